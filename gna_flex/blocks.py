"""Block lists of a GNA mask in closed form: which blocks of tokens see which, fully or partly.

The set of keys that a box of queries sees is a box too (its union over the queries, and its intersection), so a block
row is a handful of boxes. A box is enumerated as *runs*: stretches of tokens without a gap that could hold a whole
block. Runs turn into blocks by division; nothing of size tokens x tokens or blocks x blocks is ever made.
Everything works on arrays of rows; the same code serves keys per query block and queries per key block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np

from gna_flex.intervals import ceil_div, group_length
from gna_flex.neighborhood import GNA
from gna_flex.tiling import Interval, TileOrder, tile_intervals

ROWS_AT_ONCE = 2048
"""Rows handled by one round of array operations: keeps temporaries in the processor's cache."""

Array = np.ndarray


class BlockLists(NamedTuple):
    """Blocks seen by each row of blocks, ascending: counts ``[rows]`` and indices ``[rows, width]``, int32.

    Entries past a row's count are 0. The tables are as wide as asked for, or as their longest row (at least 1).
    """

    partial_counts: Array
    partial_indices: Array
    full_counts: Array
    full_indices: Array


class Runs(NamedTuple):
    """Stretches ``[start, stop)`` of places, counted through all rows at once: ``row * row_places + place``."""

    start: Array
    stop: Array


class Boxes(NamedTuple):
    """Products of arithmetic progressions of coordinates: ``low + step * m`` for ``m < size`` per dimension.

    ``row`` has shape ``[boxes]``, ``low`` and ``size`` ``[boxes, dims]``, ``step`` ``[dims]``.
    """

    row: Array
    low: Array
    size: Array
    step: Array


class Relation(Protocol):
    """Who sees whom, as runs of places; ``block`` places make one column of blocks."""

    rows: int
    columns: int
    block: int

    def runs(self, rows: Array) -> tuple[Runs, Runs]:
        """Places that some token of each row sees, and places that all its tokens see.

        Rows are counted from ``rows[0]``. The first may cover gaps shorter than a block; the second leaves out rows
        with padding.
        """


def block_lists(relation: Relation, width: int | None = None) -> BlockLists:
    """The lists of all rows of a relation, in tables of ``width`` columns (``None``: as narrow as possible).

    Both are equally wide: torch's Triton kernels find rows of the full blocks with the strides of the partial ones.
    """
    columns = relation.columns
    dtype = np.int32 if ROWS_AT_ONCE * columns < 2**31 else np.int64
    partial, full = [], []
    for begin in range(0, relation.rows, ROWS_AT_ONCE):
        rows = np.arange(begin, min(begin + ROWS_AT_ONCE, relation.rows))
        visited, contained = relation.runs(rows)
        seen = _expand(*touched_blocks(visited, relation.block), dtype)
        kept = _expand(*contained_blocks(contained, relation.block), dtype)
        if len(kept):
            is_partial = np.ones(len(seen), dtype=bool)
            is_partial[np.searchsorted(seen, kept)] = False
            seen = seen[is_partial]
        bounds = (np.arange(len(rows) + 1) * columns).astype(dtype)
        partial.append((np.diff(np.searchsorted(seen, bounds)), seen))
        full.append((np.diff(np.searchsorted(kept, bounds)), kept))
    if width is None:
        width = max(1, *(int(counts.max()) for counts, _ in (*partial, *full)))
    return BlockLists(*_pack(partial, columns, width), *_pack(full, columns, width))


class RowMajorRelation:
    """Blocks of ``row_block`` and ``col_block`` consecutive tokens in natural order ``[text | grid | text]``."""

    def __init__(self, gna: GNA, row_block: int, col_block: int, interval: Interval) -> None:
        self.gna, self.row_block, self.block, self.interval = gna, row_block, col_block, interval
        self.rows = ceil_div(gna.tokens, row_block)
        self.columns = ceil_div(gna.tokens, col_block)
        self.grid = (gna.text_first, gna.text_first + gna.grid_tokens)

    def runs(self, rows: Array) -> tuple[Runs, Runs]:
        """See :class:`Relation`; a place is a token."""
        begin, end = rows * self.row_block, np.minimum((rows + 1) * self.row_block, self.gna.tokens)
        row = rows - rows[0]
        first, last = np.maximum(begin, self.grid[0]), np.minimum(end, self.grid[1]) - 1
        has_text = (begin < self.grid[0]) | (end > self.grid[1])
        first_place, last_place = (
            np.clip(token - self.grid[0], 0, self.gna.grid_tokens - 1) for token in (first, last)
        )
        boxes = range_boxes(first_place, last_place, self.gna.layout)
        return (
            self._visited(row, has_text, boxes),
            self._full(row, end - begin == self.row_block, first > last, boxes),
        )

    def _visited(self, row: Array, has_text: Array, boxes: RangeBoxes) -> Runs:
        active = boxes.active & ~has_text[:, None]
        owner = np.broadcast_to(row[:, None], active.shape)[active]
        neighbors = self._neighbors(owner, boxes.low[active], boxes.high[active])
        runs = self._box_runs(neighbors, max_gap=self.block - 1)
        return _join(runs, self._row_runs(row[has_text], 0, self.gna.tokens), *self._text_runs(row[~has_text]))

    def _full(self, row: Array, whole: Array, only_text: Array, boxes: RangeBoxes) -> Runs:
        grid = whole & ~only_text
        neighbors = self._common_neighbors(row[grid], RangeBoxes(*(values[grid] for values in boxes)))
        runs = self._box_runs(neighbors, max_gap=0)
        text = self._row_runs(row[whole & only_text], 0, self.gna.tokens)
        return _join(runs, text, *self._text_runs(row[grid]))

    def _box_runs(self, boxes: Boxes, max_gap: int) -> Runs:
        first = boxes.row * (self.columns * self.block) + self.grid[0]
        return _box_runs(boxes, first, self.gna.layout, max_gap)

    def _row_runs(self, row: Array, start: int, stop: int) -> Runs:
        return _row_runs(row * (self.columns * self.block), start, stop)

    def _text_runs(self, row: Array) -> tuple[Runs, Runs]:
        return self._row_runs(row, 0, self.grid[0]), self._row_runs(row, self.grid[1], self.gna.tokens)

    def _neighbors(self, row: Array, low: Array, high: Array) -> Boxes:
        """Boxes of tokens that some token of the boxes ``low..high`` (inclusive) is related to, by dilation group."""
        box = np.arange(len(row))
        lows: list[Array] = []
        counts: list[Array] = []
        for axis, (length, window, stride, dilation, causal) in enumerate(self.gna.dims()):
            pieces = []
            for group in range(dilation):
                first = ceil_div(low[box, axis] - group, dilation)
                last = (high[box, axis] - group) // dilation
                inside = np.flatnonzero(first <= last)
                size = group_length(length, dilation, group)
                lo, _ = self.interval(first[inside], size, window, stride, causal)
                _, hi = self.interval(last[inside], size, window, stride, causal)
                pieces.append((inside, lo * dilation + group, hi - lo))
            pick, lo, count = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
            box = box[pick]
            lows = [values[pick] for values in lows] + [lo]
            counts = [values[pick] for values in counts] + [count]
        return Boxes(row[box], np.stack(lows, 1), np.stack(counts, 1), np.array(self.gna.dilation))

    def _common_neighbors(self, row: Array, boxes: RangeBoxes) -> Boxes:
        """The box of tokens that all tokens of a row's boxes are related to; rows without any are left out."""
        low, high, active = boxes
        far = max(self.gna.layout)
        lows, counts = [], []
        exists = np.ones(len(row), dtype=bool)
        for axis, (length, window, stride, dilation, causal) in enumerate(self.gna.dims()):
            lowest = np.where(active, low[..., axis], far).min(1)
            highest = np.where(active, high[..., axis], -1).max(1)
            group = lowest % dilation
            if dilation > 1:
                one_group = (low[..., axis] == high[..., axis]) & (low[..., axis] % dilation == group[:, None])
                exists &= (one_group | ~active).all(1)
            size = group_length(length, dilation, group)
            lo, _ = self.interval(highest // dilation, size, window, stride, causal)
            _, hi = self.interval(lowest // dilation, size, window, stride, causal)
            lows.append(lo * dilation + group)
            counts.append(hi - lo)
            exists &= hi > lo
        return Boxes(row[exists], np.stack(lows, 1)[exists], np.stack(counts, 1)[exists], np.array(self.gna.dilation))


class TiledRelation:
    """Blocks of two tile orders of one GNA: a place is a whole block, so runs count blocks."""

    block = 1

    def __init__(self, row_order: TileOrder, col_order: TileOrder, interval: Interval) -> None:
        self.gna, self.row_order, self.col_order = row_order.gna, row_order, col_order
        self.rows, self.columns = row_order.blocks, col_order.blocks
        dims = zip(self.gna.dims(), row_order.tile, col_order.tile, strict=True)
        self.axes = [tile_intervals(*dim, row_tile, col_tile, interval) for dim, row_tile, col_tile in dims]

    def runs(self, rows: Array) -> tuple[Runs, Runs]:
        """See :class:`Relation`; a place is a block."""
        order, other = self.row_order, self.col_order
        visited = self._runs(
            *self._split(rows, 1, order.text_blocks),
            [axis.lo for axis in self.axes],
            [axis.hi - axis.lo for axis in self.axes],
            [ceil_div(size, tile) for size, tile in self._groups(other)],
            other.text_blocks,
            rows[0],
        )
        full = self._runs(
            *self._split(rows, None, self._whole_text(order)),
            [axis.full_lo for axis in self.axes],
            [axis.full_hi - axis.full_lo for axis in self.axes],
            [size // tile for size, tile in self._groups(other)],
            self._whole_text(other),
            rows[0],
        )
        return visited, full

    def _runs(
        self,
        grid: Array,
        text: Array,
        lows: list[Array],
        counts: list[Array],
        columns: list[Array],
        text_columns: tuple[int, int],
        first_row: int,
    ) -> Runs:
        """Runs of grid rows (boxes of tiles, per axis by group and tile) and of text rows (all tiles), and of text."""
        n, dilation = self.gna.ndim, self.gna.dilation
        index = self._coordinates(grid)
        at = [(index[axis], index[n + axis]) for axis in range(n)]
        grid_low = [*index[:n], *(low[place] for low, place in zip(lows, at, strict=True))]
        grid_count = [*(np.ones_like(grid),) * n, *(count[place] for count, place in zip(counts, at, strict=True))]
        groups = [np.tile(group.ravel(), len(text)) for group in np.indices(dilation)]
        text_low = [*groups, *(np.zeros_like(group) for group in groups)]
        text_count = [
            *(np.ones_like(group) for group in groups),
            *(column[group] for column, group in zip(columns, groups, strict=True)),
        ]
        row = np.concatenate([grid, np.repeat(text, math.prod(dilation))]) - first_row
        low = np.stack([np.concatenate(pair) for pair in zip(grid_low, text_low, strict=True)], 1)
        count = np.stack([np.concatenate(pair) for pair in zip(grid_count, text_count, strict=True)], 1)
        some = (count > 0).all(1)
        boxes = Boxes(row[some], low[some], count[some], np.ones(2 * n, dtype=np.int64))
        first, last = self.col_order.text_blocks
        begin = (np.concatenate([grid, text]) - first_row) * self.columns
        begin_last = self.columns - last
        return _join(
            _box_runs(boxes, boxes.row * self.columns + first, (*dilation, *self.col_order.tiles), max_gap=0),
            _row_runs(begin, 0, text_columns[0]),
            _row_runs(begin, begin_last, begin_last + text_columns[1]),
        )

    def _split(self, rows: Array, per_tile: int | None, text: tuple[int, int]) -> tuple[Array, Array]:
        """Grid rows with enough tokens, and the rows among the first ``text`` blocks of both stretches of text."""
        first, last = self.row_order.text_blocks
        begin_last = self.rows - last
        is_text = (rows < text[0]) | ((rows >= begin_last) & (rows < begin_last + text[1]))
        return self._with_tokens(rows[(rows >= first) & (rows < begin_last)], per_tile), rows[is_text]

    def _coordinates(self, grid: Array) -> tuple[Array, ...]:
        """Dilation group per dimension, then tile per dimension, of rows of the grid."""
        order = self.row_order
        return np.unravel_index(grid - order.text_blocks[0], (*self.gna.dilation, *order.tiles))

    def _with_tokens(self, grid: Array, per_tile: int | None) -> Array:
        """Grid rows whose tile holds at least ``per_tile`` tokens per dimension (``None``: no padding at all)."""
        index = self._coordinates(grid)
        keep = np.ones(len(grid), dtype=bool)
        for axis, (size, tile) in enumerate(self._groups(self.row_order)):
            group, place = index[axis], index[self.gna.ndim + axis]
            keep &= place * tile + (per_tile or tile) <= size[group]
        return grid[keep]

    def _groups(self, order: TileOrder) -> list[tuple[Array, int]]:
        """Per dimension the tokens of every dilation group, and the side of a tile."""
        sizes = (group_length(n, d, np.arange(d)) for n, d in zip(self.gna.layout, self.gna.dilation, strict=True))
        return list(zip(sizes, order.tile, strict=True))

    def _whole_text(self, order: TileOrder) -> tuple[int, int]:
        """Text blocks without padding, before and after the grid."""
        return self.gna.text_first // order.block, self.gna.text_last // order.block


class RangeBoxes(NamedTuple):
    """Boxes that make up each range of tokens: ``low`` and ``high`` (inclusive) ``[ranges, boxes, dims]``, and which of
    them are in use, ``[ranges, boxes]``.
    """

    low: Array
    high: Array
    active: Array


def range_boxes(first: Array, last: Array, layout: tuple[int, ...]) -> RangeBoxes:
    """Each range of tokens ``first..last`` (inclusive, row-major) as disjoint boxes of coordinates.

    A range that crosses lines is a head (the rest of its first line), whole lines, and a tail, at every level.
    """
    n = len(layout)
    begin, end = (np.stack(np.unravel_index(x, layout), 1) for x in (first, last))
    top = np.asarray(layout) - 1
    differs = begin != end
    # The first dimension in which the ends differ: outer coordinates are fixed, inner ones run over whole lines.
    split = np.where(differs.any(1), differs.argmax(1), n - 1)
    shape = (len(first), 3 * n - 2, n)
    low, high = np.zeros(shape, dtype=np.int64), np.broadcast_to(top, shape).copy()
    active = np.zeros(shape[:2], dtype=bool)
    box = 0
    for level in range(n):
        inner = int(level < n - 1)
        after_begin, before_end = begin[:, level] + inner, end[:, level] - inner
        pieces: list[tuple[Array, Any, Any, Array]] = [(begin, after_begin, before_end, split == level)]
        if level:
            pieces += [(begin, after_begin, top[level], split < level), (end, 0, before_end, split < level)]
        for outer, start, stop, used in pieces:
            low[:, box, :level] = high[:, box, :level] = outer[:, :level]
            low[:, box, level], high[:, box, level] = start, stop
            active[:, box] = used & (low[:, box, level] <= high[:, box, level])
            box += 1
    return RangeBoxes(low, high, active)


def _box_runs(boxes: Boxes, origin: Array, grid: tuple[int, ...], max_gap: int) -> Runs:
    """Runs of the places of boxes in a row-major grid whose first place is ``origin``.

    Inner dimensions are merged into one run as long as its gaps are at most ``max_gap`` places; the dimensions outside
    of them (``level`` many) are enumerated.
    """
    n = len(grid)
    stride = np.array([math.prod(grid[axis + 1 :]) for axis in range(n)])
    pitch = boxes.step * stride
    first = origin + boxes.low @ stride
    level = np.full(len(first), n)
    length = span = np.ones(len(first), dtype=np.int64)
    merges = np.ones(len(first), dtype=bool)
    for axis in reversed(range(n)):
        count = boxes.size[:, axis]
        merges = merges & ((count == 1) | (pitch[axis] - span <= max_gap))
        span = span + (count - 1) * pitch[axis]
        level, length = np.where(merges, axis, level), np.where(merges, span, length)
    parts = []
    for outer in np.flatnonzero(np.bincount(level, minlength=1)) if len(level) else []:
        pick = level == outer
        start, size, counts = first[pick], length[pick], boxes.size[pick]
        for axis in range(outer):
            repeats = counts[:, axis]
            start, size = _progression(start, pitch[axis], repeats), np.repeat(size, repeats)
            counts = np.repeat(counts, repeats, axis=0) if axis + 1 < outer else counts
        parts.append(Runs(start, start + size))
    return _join(*parts)


def touched_blocks(runs: Runs, block: int) -> Runs:
    """Blocks that hold any place of the runs, as disjoint ascending runs of blocks."""
    runs = _sorted(runs)
    start, stop = runs.start // block, ceil_div(runs.stop, block)
    reached = np.maximum.accumulate(stop)
    start[1:] = np.maximum(start[1:], reached[:-1])
    return Runs(start, stop)


def contained_blocks(runs: Runs, block: int) -> Runs:
    """Blocks all of whose places are in the runs, as disjoint ascending runs of blocks."""
    runs = _sorted(runs)
    reached = np.maximum.accumulate(runs.stop)
    opens = np.ones(len(reached), dtype=bool)
    opens[1:] = runs.start[1:] > reached[:-1]
    closes = np.append(opens[1:], True)[: len(opens)]
    return Runs(ceil_div(runs.start[opens], block), reached[closes] // block)


def _expand(start: Array, stop: Array, dtype: type[np.integer[Any]]) -> Array:
    """All integers of the ranges ``[start, stop)``, in order; ranges with ``stop <= start`` are empty."""
    return _progression(start.astype(dtype), 1, np.maximum(stop - start, 0))


def _progression(start: Array, step: int, counts: Array) -> Array:
    """``start[i] + step * m`` for ``m < counts[i]``, for all ``i`` in order, in the type of ``start``."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    values = np.arange(0, total * step, step, dtype=start.dtype)
    values += np.repeat(start - ((ends - counts) * step).astype(start.dtype), counts)
    return values


def _pack(parts: list[tuple[Array, Array]], columns: int, width: int) -> tuple[Array, Array]:
    """Counts of all rows, and one table of their columns from sorted ``row * columns + column``."""
    longest = max(int(counts.max()) for counts, _ in parts)
    table = np.zeros((sum(len(counts) for counts, _ in parts), width), dtype=np.int32)
    begin = 0
    for counts, keys in parts:
        base = (np.arange(len(counts)) * columns).astype(keys.dtype)
        used = np.arange(longest, dtype=np.int32) < counts.astype(np.int32)[:, None]
        keys -= np.repeat(base, counts)
        table[begin : begin + len(counts), :longest][used] = keys
        begin += len(counts)
    return np.concatenate([counts for counts, _ in parts]).astype(np.int32), table


def _sorted(runs: Runs) -> Runs:
    """Runs by start."""
    if np.any(runs.start[1:] < runs.start[:-1]):
        order = np.argsort(runs.start, kind="stable")
        return Runs(runs.start[order], runs.stop[order])
    return runs


def _join(*parts: Runs) -> Runs:
    if not parts:
        return Runs(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    return Runs(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _row_runs(origin: Array, start: int, stop: int) -> Runs:
    """The same run in every row; none where it is empty."""
    origin = origin if stop > start else origin[:0]
    return Runs(origin + start, origin + stop)
