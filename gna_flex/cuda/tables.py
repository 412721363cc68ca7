"""Work records: which boxes of keys each box of queries visits, as the tables that a CUDA kernel reads.

A kernel knows no window rule. It takes one record (a box of queries per warpgroup), walks a regular grid of key boxes,
and applies windows from a table to the boxes that are not marked as free of masked pairs. Everything here is a product
over dimensions: along one dimension the windows of neighbouring queries have monotone ends, so the first and the last
query of a box decide which keys all of them, or any of them, see.

Grids are padded to three dimensions with leading ones. Positions count inside one dilation group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gna_flex.cuda.skips import skips
from gna_flex.intervals import ceil_div, group_length, key_interval, query_interval
from gna_flex.neighborhood import GNA
from gna_flex.words import by_x

Triple = tuple[int, int, int]


class Transposed(GNA):
    """A neighborhood with queries and keys exchanged: rows of a kernel are keys, with windows of queries that see them.

    >>> work_records(Transposed.of(GNA(512, 256)), KernelTiles((1, 1, 64), 2, 2, (1, 1, 64), 64))[:, [2, 5, 8]].tolist()
    [[0, 0, 4], [128, 0, 6], [256, 128, 6], [384, 256, 4]]
    """

    @classmethod
    def of(cls, gna: GNA) -> Transposed:
        """The exchanged neighborhood."""
        return cls(gna.layout, gna.window, gna.stride, gna.dilation, gna.causal, gna.text_first, gna.text_last)


class Dim(NamedTuple):
    """One dimension of a grid."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool
    transposed: bool = False

    def interval(self, i: Any, size: Any) -> tuple[Any, Any]:
        """What row ``i`` of a dilation group of ``size`` positions meets: keys ``[lo, hi)``, or queries."""
        interval = query_interval if self.transposed else key_interval
        return interval(i, size, self.window, self.stride, self.causal)


ROWS = 64
"""Query rows of one warpgroup of the Hopper kernel, and tokens in its box of text."""
MAX_SIDE = 256
"""Longest side of a box that a tensor map can describe."""
COLUMNS, REST_COLUMNS = 24, 12
"""Integers in one record, and more of them where there are key boxes of a second shape."""
START, KEY_START, BOXES, FREE_START, FREE_BOXES, GROUP = (slice(3 * i, 3 * i + 3) for i in range(6))
LENGTHS, KIND, MASKED, SKIPS = 18, 19, 20, slice(21, 24)
REST_START, REST_BOXES, REST_FREE_START, REST_FREE_BOXES = (slice(3 * i, 3 * i + 3) for i in range(7, 11))
FIRST_SHAPE = KEY_START, BOXES, FREE_START, FREE_BOXES
SECOND_SHAPE = REST_START, REST_BOXES, REST_FREE_START, REST_FREE_BOXES
"""Where records have the fields of :class:`KeyBoxes`, of either shape."""
GRID, TEXT_FIRST, TEXT_LAST = 0, 1, 2
"""Values of column ``KIND``: what the queries of the record are."""
PLAIN = 8
"""Length class of the undivided layout, where text queries see everything."""


@dataclass(frozen=True)
class KernelTiles:
    """Shapes of one kernel launch: boxes of queries and of keys, in tokens of one dilation group.

    Args:
        box: queries of one warpgroup per dimension, at most ``rows`` together.
        groups: warpgroups that share their key boxes, 1 to 4.
        split: dimension along which the boxes of the warpgroups lie side by side.
        kv_tile: keys of one key box per dimension, at most ``kv_slots`` together and 256 per side.
        kv_slots: key rows of one shared-memory slot, a multiple of 16 up to 256.
        rows: query rows of one warpgroup, and tokens in its box of text: 64, or the 128 of the Blackwell kernel.
        kv_rest: a second shape of key boxes with as many keys, for what boxes of the first shape leave over along
            ``rest_axis``, if its side there is long enough for that; ``None``: all have the first.
        rest_axis: that dimension.
        skips: a warpgroup skips key boxes at both ends of an item's walk which none of its queries sees; with one
            dimension only.

    Raises:
        ValueError: if a value is outside its range.

    >>> KernelTiles((1, 8, 8), groups=2, split=1, kv_tile=(1, 8, 16), kv_slots=128).q_tile
    (1, 16, 8)
    """

    box: Triple
    groups: int
    split: int
    kv_tile: Triple
    kv_slots: int
    rows: int = ROWS
    kv_rest: Triple | None = None
    rest_axis: int = 2
    skips: bool = False

    def __post_init__(self) -> None:
        for name, value in (("box", self.box), ("kv_tile", self.kv_tile)):
            if len(value) != 3 or min(value) < 1:
                raise ValueError(f"{name}={value}: three sides of at least 1 are needed")
        if self.rows not in (64, 128):
            raise ValueError(f"rows={self.rows} must be 64 or 128")
        if math.prod(self.box) > self.rows:
            raise ValueError(f"box={self.box} has {math.prod(self.box)} queries; a warpgroup holds {self.rows}")
        if not 1 <= self.groups <= 4:
            raise ValueError(f"groups={self.groups} must be 1 to 4")
        if self.split not in range(3):
            raise ValueError(f"split={self.split} must be 0, 1 or 2")
        check_slots(self.kv_slots)
        if math.prod(self.kv_tile) > self.kv_slots or max(self.kv_tile) > MAX_SIDE:
            raise ValueError(f"kv_tile={self.kv_tile} must fit kv_slots={self.kv_slots} and {MAX_SIDE} per side")
        if self.rest_axis not in range(3):
            raise ValueError(f"rest_axis={self.rest_axis} must be 0, 1 or 2")
        if self.kv_rest is not None:
            self._check_rest(self.kv_rest)
        along_one = self.split == 2 and self.box[:2] == self.kv_tile[:2] == (1, 1)
        if self.skips and (self.kv_rest or self.groups > 3 or not along_one):
            raise ValueError(f"skips=True is for boxes along one dimension, and at most 3 warpgroups: {self}")

    def _check_rest(self, rest: Triple) -> None:
        """Boxes of both shapes are loaded alike, and share a table of masks."""
        if len(rest) != 3 or min(rest) < 1 or math.prod(rest) != math.prod(self.kv_tile):
            raise ValueError(f"kv_rest={rest}: three sides, and as many keys as kv_tile={self.kv_tile}, are needed")
        if sum(rest) + sum(self.kv_tile) >= self.kv_slots:
            raise ValueError(f"kv_rest={rest}, kv_tile={self.kv_tile}: sides add up to kv_slots={self.kv_slots}")

    @property
    def q_tile(self) -> Triple:
        """Queries of one work item per dimension: the boxes of all warpgroups."""
        a, b, c = (side * (self.groups if axis == self.split else 1) for axis, side in enumerate(self.box))
        return a, b, c

    def sides(self, ndim: int) -> tuple[str, str]:
        """Tiles of queries and of keys as people write them, in the dimensions that a grid has.

        >>> KernelTiles((1, 8, 8), 2, 1, (1, 9, 16), 144, kv_rest=(1, 48, 3)).sides(2)
        ('16x8', '9x16 + 48x3')
        """
        keys = [by_x(side[3 - ndim :]) for side in (self.kv_tile, self.kv_rest) if side]
        return by_x(self.q_tile[3 - ndim :]), " + ".join(keys)

    @property
    def fills_slots(self) -> bool:
        """Whether a key box leaves no slot row empty; otherwise every box needs the mask."""
        return math.prod(self.kv_tile) == self.kv_slots


def check_slots(kv_slots: int) -> None:
    """Raise ``ValueError`` unless a kernel can have slots of ``kv_slots`` keys."""
    if kv_slots % 16 or not 16 <= kv_slots <= 256:
        raise ValueError(f"kv_slots={kv_slots} must be a multiple of 16 from 16 to 256")


def padded_dims(gna: GNA) -> list[Dim]:
    """The dimensions of a grid, padded to three with leading ones.

    >>> [dim.length for dim in padded_dims(GNA((8, 9), 3))]
    [1, 8, 9]
    """
    transposed = isinstance(gna, Transposed)
    return [Dim(1, 1, 1, 1, False)] * (3 - gna.ndim) + [Dim(*dim, transposed=transposed) for dim in gna.dims()]


class Spans(NamedTuple):
    """Query tiles along one dimension, and the keys they see; arrays with one entry per tile.

    Some query of the tile sees the keys ``[lo, hi)``, and every query of it ``[free_lo, free_hi)`` (maybe none).
    """

    sequence: np.ndarray
    start: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    free_lo: np.ndarray
    free_hi: np.ndarray


def query_spans(dim: Dim, sizes: np.ndarray, sides: np.ndarray) -> Spans:
    """Spans of the query tiles of several sequences: ``sizes[i]`` positions cut into tiles of ``sides[i]``.

    >>> query_spans(Dim(10, 4, 1, 1, False), np.array([10]), np.array([5])).hi.tolist()
    [6, 10]
    """
    tiles = ceil_div(sizes, sides)
    sequence = np.repeat(np.arange(len(sizes)), tiles)
    place = np.arange(len(sequence)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    size, side = sizes[sequence], sides[sequence]
    start = place * side
    last = np.minimum(start + side, size) - 1
    lo, free_hi = dim.interval(start, size)
    free_lo, hi = dim.interval(last, size)
    return Spans(sequence, start, lo, hi, free_lo, free_hi)


class KeyBoxes(NamedTuple):
    """Key boxes along one dimension: ``total`` from ``start`` on, of which ``free_total`` from index ``free`` on.

    A free box lies inside the window of every query of the tile.
    """

    start: np.ndarray
    total: np.ndarray
    free: np.ndarray
    free_total: np.ndarray


def key_boxes(lo: Any, hi: Any, free_lo: Any, free_hi: Any, side: Any, below: bool = True) -> KeyBoxes:
    """Fewest boxes of ``side`` keys that cover ``[lo, hi)``, placed to have most of them in ``[free_lo, free_hi)``.

    They may reach past the group and, if ``below``, below 0: where a tensor copy that adds to memory is an illegal
    instruction on an H100, while one that reads is not. All other arguments are arrays that broadcast together.

    >>> [int(x) for x in key_boxes(*np.array([3, 14, 5, 13, 4]))]
    [2, 3, 1, 1]
    >>> [int(x) for x in key_boxes(*np.array([3, 14, 6, 14, 4]))]
    [2, 3, 1, 2]
    """
    total = ceil_div(hi - lo, side)
    slack = total * side - (hi - lo)
    slack = slack if below else np.minimum(slack, lo)
    # Of all starts in [lo - slack, lo] this one leaves the fewest keys between free_lo and the next box boundary.
    start = lo - np.minimum(slack, (lo - free_lo) % side)
    gap = (start - free_lo) % side
    free_total = np.maximum((free_hi - free_lo - gap) // side, 0)
    start = np.where(free_total > 0, start, lo)
    free = np.where(free_total > 0, (free_lo + gap - start) // side, 0)
    return KeyBoxes(start, total, free, free_total)


def left_over(lo: Any, hi: Any, side: Any, rest_side: Any) -> Any:
    """How many keys at the end of ``[lo, hi)`` go to a box of the second shape, ``rest_side`` long there: those that
    boxes of ``side`` keys leave over, if it holds them and one of the first shape comes before it.

    >>> left_over(*np.array([3, 32, 8, 5])), left_over(*np.array([3, 32, 8, 4])), left_over(*np.array([3, 8, 8, 5]))
    (array(5), array(0), array(0))
    """
    width = hi - lo
    return np.where((width > side) & (width % side <= rest_side), width % side, 0)


def work_records(gna: GNA, tiles: KernelTiles) -> np.ndarray:
    """All work items of one head, int32 ``[items, 24]``, or ``[items, 36]`` with key boxes of a second shape.

    Columns: 0:3 first query (position in its dilation group; warpgroup ``i`` starts ``box[split] * i`` further along
    ``split``); 3:6 first key; 6:9 key boxes per dimension; 9:12 index of the first free box; 12:15 number of free
    boxes; 15:18 dilation group; 18 length class (row of :func:`window_table`'s offsets); 19 kind of query: 0 grid,
    1 text before, 2 text after it; 20 whether any box needs the mask; 21:24 boxes that each warpgroup skips at the
    beginning and, times 2^16, at the end, if :attr:`KernelTiles.skips`; else, and after them, zero.
    A box needs no mask if its index is free in every dimension. Of boxes of the second shape, 21:33 say what 3:15 do of
    the first; where there are none, one of their numbers is 0.

    A text item holds ``rows * groups`` consecutive text tokens, from column 2 on, and visits the undivided grid. Boxes
    of text keys are not listed. Text items come first, then dilation groups, then tiles in row-major order (where rows
    are keys, with the axis of most overlap last); with a causal dimension the items of the grid are sorted by their
    number of boxes, longest first.

    >>> tiles = KernelTiles((1, 1, 64), groups=2, split=2, kv_tile=(1, 1, 128), kv_slots=128)
    >>> work_records(GNA(512, 256), tiles)[:, [2, 5, 8, 11, 14]].tolist()
    [[0, 0, 2, 0, 2], [128, -1, 3, 1, 1], [256, 127, 3, 1, 1], [384, 256, 2, 0, 2]]
    """
    return np.concatenate([_text_records(gna, tiles), _grid_records(gna, tiles)])


def _grid_records(gna: GNA, tiles: KernelTiles) -> np.ndarray:
    axes = [axis_boxes(dim, tiles, axis) for axis, dim in enumerate(padded_dims(gna))]
    records = np.zeros((*(len(each.spans.start) for each in axes), _columns(tiles)), np.int32)
    for axis, (dim, each) in enumerate(zip(padded_dims(gna), axes, strict=True)):

        def along(column: np.ndarray, axis: int = axis) -> np.ndarray:
            return column.reshape([-1 if a == axis else 1 for a in range(3)])

        triples = [(START, each.spans.start), (GROUP, each.spans.sequence), *zip(FIRST_SHAPE, each.first, strict=True)]
        if each.rest:
            triples += zip(SECOND_SHAPE, each.rest, strict=True)
        for place, column in triples:
            records[..., place.start + axis] = along(column)
        shorter = (each.spans.sequence >= dim.length % dim.dilation) & bool(dim.length % dim.dilation)
        records[..., LENGTHS] += along(shorter.astype(np.int32) << axis)
    if isinstance(gna, Transposed):
        records = records.transpose(*_by_overlap(records, tiles), 3)
    records = records.reshape(-1, records.shape[-1])
    if tiles.skips:
        records = _with_skips(records, gna, tiles)
    return _ordered(_with_masked(records), gna)


def _columns(tiles: KernelTiles) -> int:
    return COLUMNS + REST_COLUMNS * (tiles.kv_rest is not None)


def _by_overlap(records: np.ndarray, tiles: KernelTiles) -> list[int]:
    """Axes, last the one along which neighboring tiles meet mostly the same: how often boxes are as long as a tile.

    A backward pass reads 4 to 8 times what the forward does of every row that it meets, and CTAs that run side by side
    share it in the L2 cache if they begin such neighbors together. Measured on an H100: a sixth of the DRAM traffic and
    30 % less time for HunyuanVideo; the forward gains nothing.
    """
    boxes = records[..., BOXES].reshape(-1, 3).mean(axis=0)
    overlap = boxes * tiles.kv_tile / tiles.q_tile
    return sorted(range(3), key=lambda axis: (overlap[axis], -axis))


class AxisBoxes(NamedTuple):
    """Query tiles of all dilation groups along one dimension, and their key boxes of the first and the second shape."""

    spans: Spans
    first: KeyBoxes
    rest: KeyBoxes | None


def axis_boxes(dim: Dim, tiles: KernelTiles, axis: int) -> AxisBoxes:
    """The key boxes along one dimension, of which those of the other dimensions know nothing."""
    sizes = group_length(dim.length, dim.dilation, np.arange(dim.dilation))
    spans = query_spans(dim, sizes, np.full(dim.dilation, tiles.q_tile[axis]))
    below, side = not dim.transposed, tiles.kv_tile[axis]
    if tiles.kv_rest is None:
        return AxisBoxes(spans, _masked_unless_full(key_boxes(*spans[2:], side, below), tiles), None)
    rest_side = tiles.kv_rest[axis]
    if axis == tiles.rest_axis:
        first, rest = boxes_and_rest(spans, side, rest_side, below)
    else:
        first, rest = key_boxes(*spans[2:], side, below), key_boxes(*spans[2:], rest_side, below)
    return AxisBoxes(spans, _masked_unless_full(first, tiles), _masked_unless_full(rest, tiles))


def boxes_and_rest(spans: Spans, side: Any, rest_side: Any, below: bool = True) -> tuple[KeyBoxes, KeyBoxes]:
    """Key boxes of both shapes along the dimension in which one takes what the other leaves over.

    The box of the second shape starts where those of the first end, so that no key is met twice; if it is longer than
    what is left, the mask hides what no query sees.

    >>> one = Spans(*(np.array([x]) for x in (0, 0, 3, 32, 10, 32)))
    >>> [[int(x[0]) for x in boxes] for boxes in boxes_and_rest(one, 8, 5)]
    [[3, 3, 1, 2], [27, 1, 0, 1]]
    """
    _, _, lo, hi, free_lo, free_hi = spans
    left = left_over(lo, hi, side, rest_side)
    middle = hi - left
    first = key_boxes(lo, middle, free_lo, np.minimum(free_hi, middle), side, below)
    free = (left > 0) & (free_lo <= middle) & (middle + rest_side <= free_hi)
    return first, KeyBoxes(middle, (left > 0).astype(int), np.zeros_like(middle), free.astype(int))


def _masked_unless_full(boxes: KeyBoxes, tiles: KernelTiles) -> KeyBoxes:
    """No free boxes where slots stay partly empty, because the mask also hides the empty rows."""
    if tiles.fills_slots:
        return boxes
    zero = np.zeros_like(boxes.free)
    return boxes._replace(free=zero, free_total=zero)


def _with_skips(records: np.ndarray, gna: GNA, tiles: KernelTiles) -> np.ndarray:
    """What warpgroups skip, and which boxes need no mask then: all, where that suffices for the windows."""
    dim = padded_dims(gna)[2]
    group, start, keys, total = (records[:, place.start + 2, None] for place in (GROUP, START, KEY_START, BOXES))
    size = group_length(dim.length, dim.dilation, group)
    starts = start + tiles.box[2] * np.arange(tiles.groups)
    first, last, whole = skips(dim.interval, size, starts, tiles.box[2], keys, tiles.kv_tile[2], total)
    if gna.text_first or gna.text_last:  # boxes of text come last, and nobody skips them
        last, whole = np.zeros_like(last), np.zeros_like(whole)
    records[:, SKIPS.start : SKIPS.start + tiles.groups] = first | last << 16
    whole &= tiles.fills_slots
    free, free_total = FREE_START.start + 2, FREE_BOXES.start + 2
    records[whole, free], records[whole, free_total] = 0, total[whole, 0]
    # Elsewhere a walk begins with masked boxes, and the kernel asks only in these whether a row meets its first key.
    late = ~whole & (records[:, free_total] > 0)
    records[late, free] += 1
    records[late, free_total] -= 1
    return records


def _with_masked(records: np.ndarray) -> np.ndarray:
    records[:, MASKED] = np.any(records[:, BOXES] != records[:, FREE_BOXES], axis=1)
    if records.shape[1] > COLUMNS:
        records[:, MASKED] |= _product(records[:, REST_BOXES]) != _product(records[:, REST_FREE_BOXES])
    return records


def _ordered(records: np.ndarray, gna: GNA) -> np.ndarray:
    """Records in launch order: by dilation group and, if costs differ much, longest first."""
    if math.prod(gna.dilation) > 1:
        records = records[np.lexsort(records[:, GROUP].T[::-1])]
    if any(gna.causal):
        records = records[np.argsort(-boxes_of(records), kind="stable")]
    return records


def boxes_of(records: np.ndarray) -> np.ndarray:
    """Key boxes of the grid that each item visits, of all shapes."""
    first = _product(records[:, BOXES])
    return first + _product(records[:, REST_BOXES]) if records.shape[1] > COLUMNS else first


def _product(columns: np.ndarray) -> np.ndarray:
    product: np.ndarray = np.prod(columns.astype(np.int64), axis=1)
    return product


def _text_records(gna: GNA, tiles: KernelTiles) -> np.ndarray:
    """Items of the text queries: each sees the whole grid, which is never divided for them."""
    starts = [np.arange(0, count, tiles.rows * tiles.groups) for count in (gna.text_first, gna.text_last)]
    records = np.zeros((sum(map(len, starts)), _columns(tiles)), np.int32)
    records[:, 2] = np.concatenate(starts)
    records[:, BOXES], records[:, FREE_BOXES] = _plain_boxes(gna, tiles)
    records[:, LENGTHS] = PLAIN
    records[:, KIND] = np.repeat([TEXT_FIRST, TEXT_LAST], [len(start) for start in starts])
    return _with_masked(records)


def _plain_boxes(gna: GNA, tiles: KernelTiles) -> tuple[Triple, Triple]:
    """Key boxes of the undivided grid per dimension, and those without places outside it."""
    pairs = [(dim[0], side) for dim, side in zip(padded_dims(gna), tiles.kv_tile, strict=True)]
    a, b, c = (ceil_div(length, side) for length, side in pairs)
    x, y, z = (length // side if tiles.fills_slots else 0 for length, side in pairs)
    return (a, b, c), (x, y, z)


class Count(NamedTuple):
    """What one head costs: work items, and the key boxes that they visit in total.

    ``items`` includes ``text_items`` (those of text queries). ``boxes`` of the grid include ``masked``, which need the
    mask. ``text_boxes`` of text keys include ``text_masked``, which do not fill a slot.
    """

    items: int
    text_items: int
    boxes: int
    masked: int
    text_boxes: int
    text_masked: int


def count(gna: GNA, tiles: KernelTiles) -> Count:
    """Work of one head in closed form, without building its records. Costs ``sum(layout)``.

    >>> count(GNA(512, 256), KernelTiles((1, 1, 64), 2, 2, (1, 1, 128), 128))
    Count(items=4, text_items=0, boxes=10, masked=4, text_boxes=0, text_masked=0)
    """
    axes = [axis_boxes(dim, tiles, axis) for axis, dim in enumerate(padded_dims(gna))]
    plain, plain_free = map(math.prod, _plain_boxes(gna, tiles))
    text_items = text_item_count(gna, tiles.groups, tiles.rows)
    items = math.prod(len(axis.spans.start) for axis in axes) + text_items
    boxes, free = text_items * plain, text_items * plain_free
    for shape in ([axis.first for axis in axes], [axis.rest for axis in axes if axis.rest]):
        if shape:
            boxes += math.prod(int(axis.total.sum()) for axis in shape)
            free += math.prod(int(axis.free_total.sum()) for axis in shape)
    text_boxes, text_masked = text_key_boxes(gna, tiles)
    return Count(items, text_items, boxes, boxes - free, items * text_boxes, items * text_masked)


def count_with_skips(gna: GNA, tiles: KernelTiles) -> tuple[float, int]:
    """Key boxes of the grid that a warpgroup does not skip, the mean of all warpgroups, and masked boxes.

    >>> count_with_skips(GNA(768, 256, 256), KernelTiles((1, 1, 64), 3, 2, (1, 1, 64), 64, skips=True))
    (16.0, 0)
    """
    records = work_records(gna, tiles)
    boxes, skips = int(boxes_of(records).sum()), records[:, SKIPS]
    skipped = int((skips & 0xFFFF).sum() + (skips >> 16).sum())
    return boxes - skipped / tiles.groups, boxes - int(_product(records[:, FREE_BOXES]).sum())


def text_item_count(gna: GNA, groups: int, rows: int) -> int:
    """Work items that the text queries of one head need."""
    queries = rows * groups
    return int(ceil_div(gna.text_first, queries) + ceil_div(gna.text_last, queries))


def text_key_boxes(gna: GNA, tiles: KernelTiles) -> tuple[int, int]:
    """Boxes of text keys that every item visits, and those that leave a slot partly empty.

    They hold as many keys as a box of the grid, so that both are loaded alike.
    """
    texts, keys = (gna.text_first, gna.text_last), math.prod(tiles.kv_tile)
    boxes = sum(ceil_div(text, keys) for text in texts)
    return boxes, sum(text % keys > 0 for text in texts) if tiles.fills_slots else boxes
