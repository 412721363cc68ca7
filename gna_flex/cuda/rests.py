"""Key boxes of two shapes: the second for what those of the first leave over.

The keys that a box of queries meets are rarely a multiple of a key box along every dimension: 22 x 29 x 27 of them (a
window of 18 x 24 x 24 for 5 x 6 x 4 queries) need 132 boxes of 2 x 8 x 9, which hold a tenth more. Along one dimension
the keys that are left over after the last whole box can be those of boxes that are flat there: 110 boxes of 1 x 6 x 24,
and 16 of 6 x 8 x 3 for the last 3 of 27. The kernel walks one grid of boxes, and then the other one.

Both shapes fill their slots, so that no row of a slot keeps what another box left there.
"""

from __future__ import annotations

import math

import numpy as np

from gna_flex.cuda.shapes import (
    REST_COST,
    Gnas,
    axis_totals,
    cost,
    distinct_spans,
    heads_of,
    key_shapes,
    query_sides,
    search_shapes,
    side_totals,
    text_boxes,
    time_of,
)
from gna_flex.cuda.tables import Dim, KernelTiles, Spans, boxes_and_rest, padded_dims, text_item_count
from gna_flex.intervals import ceil_div

QUERY_SHAPES = 12
"""Boxes of queries that are tried with two shapes of key boxes: those of least estimated time with one."""


def improved(gnas: Gnas, tiles: KernelTiles) -> KernelTiles:
    """The best shapes with two of key boxes for the same slots, if they are better than ``tiles``.

    >>> from gna_flex import GNA
    >>> from gna_flex.cuda.shapes import choose
    >>> gna = GNA((30, 48, 80), window=(18, 24, 24))
    >>> better = improved(gna, choose(gna, 144))
    >>> better.kv_tile, better.kv_rest, better.rest_axis
    ((6, 8, 3), (6, 3, 8), 1)
    """
    found = best(gnas, tiles.kv_slots, tiles.groups, tiles.rows)
    return found if found and cost(gnas, found) < cost(gnas, tiles) else tiles


def best(gnas: Gnas, kv_slots: int, groups: int, rows: int) -> KernelTiles | None:
    """The shapes of least estimated time with two of key boxes, which fill their slots; ``None`` if there are none."""
    first = next(iter(heads_of(gnas)))
    pairs = shape_pairs([shape for shape in key_shapes(first, kv_slots) if math.prod(shape) == kv_slots], kv_slots)
    if not len(pairs):
        return None
    search = search_shapes(gnas, kv_slots, groups, rows)
    chosen = np.argsort(search.costs.min(axis=1), kind="stable")[:QUERY_SHAPES]
    queries = [search.queries[i] for i in chosen]
    sides = query_sides(queries, groups)
    costs = pair_costs(gnas, sides, pairs, kv_slots, groups, rows)
    axis, query, pair = (int(i) for i in np.unravel_index(np.argmin(costs), costs.shape))
    (box, split), ((a, b, c), (x, y, z)) = queries[query], pairs[pair].tolist()
    return KernelTiles(box, groups, split, (a, b, c), kv_slots, rows, (x, y, z), axis)


def shape_pairs(shapes: list[tuple[int, int, int]], kv_slots: int) -> np.ndarray:
    """All pairs of different shapes that can share a table of masks, ``[P, 2, 3]``."""
    pairs = [(a, b) for a in shapes for b in shapes if a != b and sum(a) + sum(b) < kv_slots]
    return np.array(pairs).reshape(-1, 2, 3)


def pair_costs(gnas: Gnas, sides: np.ndarray, pairs: np.ndarray, kv_slots: int, groups: int, rows: int) -> np.ndarray:
    """Estimated times with the second shape along each dimension, as :func:`gna_flex.cuda.shapes.cost` has them.

    ``sides[Q, 3]`` of query tiles, ``pairs[P, 2, 3]`` of key boxes; the result is ``[3, Q, P]``.
    """
    total = np.zeros((3, len(sides), len(pairs)))
    for gna, number in heads_of(gnas).items():
        dims = padded_dims(gna)
        both, items = zip(*(_both_shapes(dim, sides[:, d], pairs[:, :, d]) for d, dim in enumerate(dims)), strict=True)
        rests = [_along_rest(dim, sides[:, d], pairs[:, :, d]) for d, dim in enumerate(dims)]
        text_items = text_item_count(gna, groups, rows)
        every_item = np.prod(items, axis=0)[:, None] + text_items
        lengths = np.array([dim.length for dim in dims])
        plain = text_items * np.prod(ceil_div(lengths, pairs[:, 0]), axis=1)
        plain_free = text_items * np.prod(lengths // pairs[:, 0], axis=1)
        text, text_masked = text_boxes(gna, np.array([kv_slots]), np.array([True]))
        for axis in range(3):
            counts = zip(*(rests[d] if d == axis else both[d] for d in range(3)), strict=True)
            first, first_free, rest, rest_free = map(math.prod, counts)
            boxes = first + rest + plain + every_item * text
            masked = boxes - every_item * (text - text_masked) - first_free - rest_free - plain_free
            total[axis] += (1 + REST_COST) * number * time_of(boxes, masked, every_item, kv_slots)
    return total


Counts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Boxes and free ones of the first shape, then of the second, along one dimension, ``[Q, P]`` each."""


def _both_shapes(dim: Dim, sides: np.ndarray, pairs: np.ndarray) -> tuple[Counts, np.ndarray]:
    """Counts along a dimension that both shapes share, and query tiles there, ``[Q]``."""
    every = np.ones(len(pairs), bool)
    first, first_free, items = axis_totals(dim, sides, pairs[:, 0], every)
    rest, rest_free, _ = axis_totals(dim, sides, pairs[:, 1], every)
    return (first, first_free, rest, rest_free), items


def _along_rest(dim: Dim, sides: np.ndarray, pairs: np.ndarray) -> Counts:
    """Counts along the dimension in which the second shape has what the first leaves over."""
    some_sides, side_of = np.unique(sides, return_inverse=True)
    some_pairs, pair_of = np.unique(pairs, axis=0, return_inverse=True)
    spans, weight = distinct_spans(dim, some_sides)
    column = Spans(*(values[:, None] for values in spans))
    first, rest = boxes_and_rest(column, *some_pairs.T)

    def totals(values: np.ndarray) -> np.ndarray:
        return side_totals(spans, weight, values)[:, pair_of.reshape(-1)][side_of]

    return totals(first.total), totals(first.free_total), totals(rest.total), totals(rest.free_total)
