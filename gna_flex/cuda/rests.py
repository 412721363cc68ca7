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
    ITEM_COST,
    MASK_COST,
    REST_COST,
    Gnas,
    axis_totals,
    box_cost,
    cost,
    distinct_spans,
    heads_of,
    key_shapes,
    query_sides,
    search_shapes,
    text_boxes,
)
from gna_flex.cuda.tables import KernelTiles, Spans, boxes_and_rest, padded_dims, text_item_count
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
    heads = heads_of(gnas)
    first = next(iter(heads))
    pairs = shape_pairs([shape for shape in key_shapes(first, kv_slots) if math.prod(shape) == kv_slots], kv_slots)
    if not len(pairs):
        return None
    search = search_shapes(gnas, kv_slots, groups, rows)
    chosen = np.argsort(search.costs.min(axis=1), kind="stable")[:QUERY_SHAPES]
    queries = [search.queries[i] for i in chosen]
    sides = query_sides(queries, groups)
    costs = np.stack([axis_costs(gnas, sides, pairs, kv_slots, groups, rows, axis) for axis in range(3)])
    axis, query, pair = (int(i) for i in np.unravel_index(np.argmin(costs), costs.shape))
    (box, split), ((a, b, c), (x, y, z)) = queries[query], pairs[pair].tolist()
    return KernelTiles(box, groups, split, (a, b, c), kv_slots, rows, (x, y, z), axis)


def shape_pairs(shapes: list[tuple[int, int, int]], kv_slots: int) -> np.ndarray:
    """All pairs of different shapes that can share a table of masks, ``[P, 2, 3]``."""
    pairs = [(a, b) for a in shapes for b in shapes if a != b and sum(a) + sum(b) < kv_slots]
    return np.array(pairs).reshape(-1, 2, 3)


def axis_costs(
    gnas: Gnas, sides: np.ndarray, pairs: np.ndarray, kv_slots: int, groups: int, rows: int, axis: int
) -> np.ndarray:
    """Estimated times with the second shape along ``axis``, ``[Q, P]``, as :func:`gna_flex.cuda.shapes.cost` has them.

    ``sides[Q, 3]`` of query tiles, ``pairs[P, 2, 3]`` of key boxes.
    """
    total = np.zeros((len(sides), len(pairs)))
    for gna, number in heads_of(gnas).items():
        first, first_free, rest, rest_free = (np.ones((1, 1)) for _ in range(4))
        items = np.ones(len(sides))
        for d, dim in enumerate(padded_dims(gna)):
            (side_spans, weight), (tiles, rests) = distinct_spans(dim, np.unique(sides[:, d])), pairs[:, :, d].T
            every = np.ones(len(pairs), bool)
            if d == axis:
                counts = _along_rest(side_spans, weight, sides[:, d], tiles, rests)
            else:
                counts = [
                    totals for side in (tiles, rests) for totals in axis_totals(dim, sides[:, d], side, every)[:2]
                ]
            first, first_free, rest, rest_free = (
                a * b for a, b in zip((first, first_free, rest, rest_free), counts, strict=True)
            )
            items = items * axis_totals(dim, sides[:, d], tiles[:1], every[:1])[2]
        text_items = text_item_count(gna, groups, rows)
        every_item = items[:, None] + text_items
        lengths = np.array([dim.length for dim in padded_dims(gna)])
        plain = text_items * np.prod(ceil_div(lengths, pairs[:, 0]), axis=1)
        plain_free = text_items * np.prod(lengths // pairs[:, 0], axis=1)
        text, text_masked = text_boxes(gna, np.array([kv_slots]), np.array([True]))
        boxes = first + rest + plain + every_item * text
        masked = boxes - every_item * (text - text_masked) - first_free - rest_free - plain_free
        total += (1 + REST_COST) * number * ((boxes + MASK_COST * masked) * box_cost(kv_slots) + ITEM_COST * every_item)
    return total


def _along_rest(
    spans: Spans, weight: np.ndarray, sides: np.ndarray, tiles: np.ndarray, rests: np.ndarray
) -> list[np.ndarray]:
    """Boxes and free ones of the first shape, then of the second, along the dimension of the rest, ``[Q, P]``."""
    begin = np.searchsorted(spans.sequence, np.arange(spans.sequence[-1] + 1))
    side_of = np.unique(sides, return_inverse=True)[1]
    both = np.unique(np.stack([tiles, rests]), axis=1, return_inverse=True)
    (some_tiles, some_rests), pair_of = both[0], both[1].reshape(-1)
    column = Spans(*(values[:, None] for values in spans))
    found = boxes_and_rest(column, some_tiles, some_rests)
    totals = []
    for boxes in found:
        for values in (boxes.total, boxes.free_total):
            sums = np.add.reduceat(values * weight[:, None], begin, axis=0).astype(float)
            totals.append(sums[:, pair_of][side_of])
    return totals
