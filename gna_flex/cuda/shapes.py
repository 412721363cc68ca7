"""Shapes of the boxes of a kernel launch: those of least estimated time.

Key boxes start where the windows start, so their best shape depends on window, stride and query box together, and
powers of two are rarely best. All shapes are compared: counts are products over dimensions, so one small table per
dimension, ``[query side, key side]``, holds what is needed for all combinations.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from gna_flex.cuda.tables import (
    MAX_SIDE,
    ROWS,
    Dim,
    KernelTiles,
    Spans,
    Triple,
    check_slots,
    count,
    count_with_skips,
    key_boxes,
    padded_dims,
    query_spans,
    text_item_count,
)
from gna_flex.intervals import ceil_div
from gna_flex.neighborhood import GNA

Gnas = GNA | tuple[GNA, ...]
"""One GNA for all heads, or one per head with the same layout, dilation and text."""

MASK_COST = 0.1
"""What a masked key box costs more than one without a mask: 0.05 to 0.11 measured on an H100, with 128 or 144 keys."""
ITEM_COST = 1.5
"""What starting and ending a work item costs, in boxes of 128 keys, measured on an H200."""
REST_COST = 0.015
"""What a second shape of key boxes adds to the time of a launch: 0.6 to 1.2 % measured on an H100, and a margin."""
FIXED_KEYS = 16
"""What a box costs beside its keys, in keys: 12 to 20 fitted to boxes of 96, 128 and 144 keys on an H100."""
SLOTS = (128, 160, 144, 112, 96)
"""Key rows of a slot that are worth trying, by preference between equal estimates.

With fewer the fixed cost of a box shows, and more need too many registers.
"""


@functools.lru_cache(maxsize=1024)
def choose(
    gnas: Gnas,
    kv_slots: int = 128,
    groups: int = 2,
    rows: int = ROWS,
    mask_cost: float = MASK_COST,
    item_cost: float = ITEM_COST,
) -> KernelTiles:
    """The shapes of least estimated time, out of all that fit ``kv_slots`` keys and ``groups`` boxes of queries.

    Args:
        gnas: the neighborhood, or one per head (same layout, dilation and text).
        kv_slots: key rows of one shared-memory slot.
        groups: boxes of queries that share their key boxes.
        rows: most queries of one box.
        mask_cost: extra cost of a masked key box, as a fraction of a box.
        item_cost: cost of one work item, in boxes of 128 keys.

    Raises:
        ValueError: if the heads differ in layout, dilation or text, or a size is not possible.

    >>> choose(GNA((30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))).kv_tile
    (2, 8, 8)
    """
    search = search_shapes(gnas, kv_slots, groups, rows, mask_cost, item_cost)
    return search.tiles(int(np.argmin(search.costs)))


def cost(gnas: Gnas, tiles: KernelTiles, mask_cost: float = MASK_COST, item_cost: float = ITEM_COST) -> float:
    """Estimated time of all given heads, in units of one mask-free box of 128 keys.

    >>> cost(GNA(512, 256), KernelTiles((1, 1, 64), 2, 2, (1, 1, 128), 128))
    16.4
    """
    total = 0.0
    for gna, heads in heads_of(gnas).items():
        work = count(gna, tiles)
        boxes, masked = count_with_skips(gna, tiles) if tiles.skips else (work.boxes, work.masked)
        boxes, masked = boxes + work.text_boxes, masked + work.text_masked
        total += heads * time_of(boxes, masked, work.items, tiles.kv_slots, mask_cost, item_cost)
    return total * (1 + REST_COST * (tiles.kv_rest is not None))


def skipping(gnas: Gnas, tiles: KernelTiles) -> KernelTiles:
    """The same shapes where warpgroups skip key boxes, if there is one dimension and something to skip.

    >>> skipping(GNA(4096, 1024, 256), KernelTiles((1, 1, 64), 3, 2, (1, 1, 64), 64)).skips
    True
    """
    if next(iter(heads_of(gnas))).ndim > 1:
        return tiles
    found = replace(tiles, skips=True)
    return found if cost(gnas, found) < cost(gnas, tiles) else tiles


def box_cost(kv_slots: int) -> float:
    """Time of a key box with that many keys, in those of a box of 128.

    >>> box_cost(128), round(box_cost(64), 3), round(box_cost(144), 3)
    (1.0, 0.556, 1.111)
    """
    return (kv_slots + FIXED_KEYS) / (128 + FIXED_KEYS)


def time_of(
    boxes: Any, masked: Any, items: Any, kv_slots: int, mask_cost: float = MASK_COST, item_cost: float = ITEM_COST
) -> Any:
    """Time of key boxes and work items, in units of one mask-free box of 128 keys; numbers, or arrays.

    >>> round(time_of(10, 4, 4, 128), 3)
    16.4
    """
    return (boxes + mask_cost * masked) * box_cost(kv_slots) + item_cost * items


class Candidate(NamedTuple):
    """Shapes and their estimated time, as :func:`cost` has it."""

    tiles: KernelTiles
    cost: float


def candidates(
    gnas: Gnas,
    groups: int = 2,
    slots: tuple[int, ...] = SLOTS,
    per_slots: int = 2,
    limit: int = 6,
    rows: int = ROWS,
) -> list[Candidate]:
    """The most promising shapes over several slot sizes, best first, for a caller that can measure them.

    At most ``per_slots`` of each size of slot, with different key boxes, because those of one size that follow the
    best are often almost the same; at most ``limit`` in all.

    >>> [best.tiles.kv_slots for best in candidates(GNA((256, 256), window=80, stride=16), per_slots=1, limit=2)]
    [160, 128]
    """
    found = [best for size in slots for best in _best(gnas, size, groups, rows, per_slots)]
    return sorted(found, key=lambda candidate: candidate.cost)[:limit]


def _best(gnas: Gnas, kv_slots: int, groups: int, rows: int, number: int) -> list[Candidate]:
    """The best shapes with different key boxes, best first."""
    search = search_shapes(gnas, kv_slots, groups, rows)
    queries = np.argmin(search.costs, axis=0)
    keys = np.arange(len(queries))
    best = search.costs[queries, keys]
    order = np.argsort(best, kind="stable")[:number]
    return [Candidate(search.tiles(int(queries[i] * len(keys) + i)), float(best[i])) for i in order]


class Search(NamedTuple):
    """All shapes of queries and of keys, and the cost of every combination, ``[query shapes, key shapes]``."""

    queries: tuple[tuple[Triple, int], ...]
    keys: tuple[Triple, ...]
    costs: np.ndarray
    groups: int
    kv_slots: int
    rows: int

    def tiles(self, index: int) -> KernelTiles:
        """The combination with this index in the flattened costs."""
        (box, split), kv_tile = self.queries[index // len(self.keys)], self.keys[index % len(self.keys)]
        return KernelTiles(box, self.groups, split, kv_tile, self.kv_slots, self.rows)


def search_shapes(
    gnas: Gnas,
    kv_slots: int,
    groups: int,
    rows: int,
    mask_cost: float = MASK_COST,
    item_cost: float = ITEM_COST,
) -> Search:
    """The cost of every combination of shapes."""
    check_slots(kv_slots)
    heads = heads_of(gnas)
    first = next(iter(heads))
    queries, keys = query_shapes(first, groups, rows), key_shapes(first, kv_slots)
    sides = query_sides(queries, groups)
    tiles = np.array(keys)
    costs = np.zeros((len(queries), len(keys)))
    for gna, number in heads.items():
        text_items = text_item_count(gna, groups, rows)
        costs += number * _costs(gna, sides, tiles, kv_slots, text_items, mask_cost, item_cost)
    return Search(queries, keys, costs, groups, kv_slots, rows)


def query_sides(queries: Sequence[tuple[Triple, int]], groups: int) -> np.ndarray:
    """Sides of the tiles of all warpgroups, ``[Q, 3]``, of boxes of queries and what they lie along."""
    return np.array([[side * (groups if a == split else 1) for a, side in enumerate(box)] for box, split in queries])


def heads_of(gnas: Gnas) -> Counter[GNA]:
    """Different GNAs, and how many heads have each."""
    heads = Counter([gnas] if isinstance(gnas, GNA) else gnas)
    shared = {(gna.layout, gna.dilation, gna.text_first, gna.text_last) for gna in heads}
    if len(shared) != 1:
        raise ValueError(f"gnas has {len(shared)} different layouts, dilations or texts; all heads must share one")
    return heads


def _costs(
    gna: GNA, sides: np.ndarray, tiles: np.ndarray, kv_slots: int, text_items: int, mask_cost: float, item_cost: float
) -> np.ndarray:
    """Cost of one head for all query tiles ``sides[Q, 3]`` and key boxes ``tiles[K, 3]``, ``[Q, K]``."""
    dims = padded_dims(gna)
    keys = np.prod(tiles, axis=1)
    exact = keys == kv_slots
    boxes, free, items = np.ones((1, 1)), np.ones((1, 1)), np.ones(1)
    for dim, side, tile in zip(dims, sides.T, tiles.T, strict=True):
        axis_boxes, axis_free, axis_items = axis_totals(dim, side, tile, exact)
        boxes, free, items = boxes * axis_boxes, free * axis_free, items * axis_items
    # Text queries do not depend on the query tile, and visit the undivided grid.
    lengths = np.array([dim[0] for dim in dims])
    items = items[:, None] + text_items
    text, text_masked = text_boxes(gna, keys, exact)
    boxes = boxes + (text_items * np.prod(ceil_div(lengths, tiles), axis=1) + items * text)
    masked = boxes - items * (text - text_masked)
    masked[:, exact] -= free + text_items * np.prod(lengths // tiles[exact], axis=1)
    # Counts are whole numbers, so that shapes with equal counts have equal costs.
    costs: np.ndarray = time_of(boxes, masked, items, kv_slots, mask_cost, item_cost)
    return costs


def text_boxes(gna: GNA, keys: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of text keys that one item visits, and masked ones of them, for every number of keys in a box."""
    texts = np.array([[gna.text_first], [gna.text_last]])
    boxes = ceil_div(texts, keys)
    return boxes.sum(0), (boxes - texts // keys * exact).sum(0)


def axis_totals(
    dim: Dim, sides: np.ndarray, tiles: np.ndarray, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over the query tiles along one dimension, all dilation groups together.

    Key boxes ``[Q, K]`` for query sides ``sides[Q]`` and key sides ``tiles[K]``; free ones ``[Q, exact.sum()]``, only
    for the key boxes that fill their slots; query tiles ``[Q]``.
    """
    some_sides, side_of = np.unique(sides, return_inverse=True)
    some_tiles, tile_of = np.unique(tiles, return_inverse=True)
    spans, weight = distinct_spans(dim, some_sides)
    lo, hi, free_lo, free_hi = (bound[:, None] for bound in spans[2:])
    boxes = key_boxes(lo, hi, free_lo, free_hi, some_tiles)

    def totals(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return side_totals(spans, weight, values)[:, columns][side_of]

    items = side_totals(spans, weight, np.ones((len(weight), 1)))[side_of, 0]
    return totals(boxes.total, tile_of), totals(boxes.free_total, tile_of[exact]), items


def side_totals(spans: Spans, weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of ``values[spans, columns]`` over all spans of a side, ``[sides, columns]``; see :func:`distinct_spans`."""
    begin = np.searchsorted(spans.sequence, np.arange(spans.sequence[-1] + 1))
    sums: np.ndarray = np.add.reduceat(values * weight[:, None], begin, axis=0)
    return sums.astype(float)


def distinct_spans(dim: Dim, sides: np.ndarray) -> tuple[Spans, np.ndarray]:
    """Spans of query tiles of every side in ``sides`` up to shifts, by side (``sequence``), and how often each occurs.

    Most tiles inside a grid are shifted copies of a few, and dilation groups have at most two different lengths.
    """
    length, dilation = dim.length, dim.dilation
    sizes = np.array([ceil_div(length, dilation), length // dilation])
    groups = np.array([length % dilation, dilation - length % dilation])
    number = len(sides)
    spans = query_spans(dim, np.tile(sizes, number), np.repeat(sides, 2))
    side, half = spans.sequence // 2, spans.sequence % 2
    # The largest value of an intersection that is empty says nothing more than that it is.
    widths = (side, spans.hi - spans.lo, spans.free_lo - spans.lo, np.maximum(spans.free_hi - spans.free_lo, 0))
    kinds = np.zeros(len(side), np.int64)
    for width in widths:
        both = kinds * (int(width.max()) + 1) + width
        _, chosen, kinds = np.unique(both, return_index=True, return_inverse=True)
    weight = np.bincount(kinds, weights=groups[half]).astype(np.int64)
    side, width, skip, free = (values[chosen] for values in widths)
    zero = np.zeros_like(width)
    return Spans(side, zero, zero, width, skip, skip + free), weight


@functools.lru_cache(maxsize=1024)
def query_shapes(gna: GNA, groups: int, rows: int = ROWS) -> tuple[tuple[Triple, int], ...]:
    """Boxes of queries worth comparing, each with the dimension along which the boxes of the warpgroups lie.

    No side is longer than a dilation group. A box is at least half full, unless the grid is too small for that: small
    boxes can fit a stride, tiny ones never pay.

    >>> query_shapes(GNA((1, 2), 1), 2)
    (((1, 1, 1), 2), ((1, 1, 2), 2))
    """
    lengths = [ceil_div(dim[0], dim[3]) for dim in padded_dims(gna)]
    fewest = rows // 2 if math.prod(lengths) >= rows else 1
    # Along a dimension of length 1 all but one warpgroup would have nothing to do.
    splits = [axis for axis in range(3) if lengths[axis] > 1] if groups > 1 else [2]
    boxes = [
        (a, b, c)
        for a in range(1, min(lengths[0], rows) + 1)
        for b in range(1, min(lengths[1], rows // a) + 1)
        for c in range(1, min(lengths[2], rows // (a * b)) + 1)
        if a * b * c >= fewest
    ]
    return tuple(itertools.product(boxes, splits or [2]))


@functools.lru_cache(maxsize=1024)
def key_shapes(gna: GNA, kv_slots: int) -> tuple[Triple, ...]:
    """Boxes of keys worth comparing: those of which no side can grow without leaving the slot or the grid.

    A longer side never needs more boxes, so no other shape can be better.

    >>> key_shapes(GNA((2, 9), (1, 3)), 16)
    ((1, 1, 9), (1, 2, 8))
    """
    dims = padded_dims(gna)
    limits = [min(ceil_div(dim[0], dim[3]), MAX_SIDE) for dim in dims]
    if gna.text_first or gna.text_last:
        # Boxes of text hold as many keys as those of the grid, so that places outside a small grid are useful.
        limits = [MAX_SIDE if dim[0] > 1 or axis == 2 else 1 for axis, dim in enumerate(dims)]

    def grows(shape: Triple) -> bool:
        keys = math.prod(shape)
        return any(
            side < limit and keys // side * (side + 1) <= kv_slots for side, limit in zip(shape, limits, strict=True)
        )

    shapes = []
    for a in range(1, min(limits[0], kv_slots) + 1):
        for b in range(1, min(limits[1], kv_slots // a) + 1):
            shape = (a, b, min(limits[2], kv_slots // (a * b)))
            if not grows(shape):
                shapes.append(shape)
    return tuple(shapes)
