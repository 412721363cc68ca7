"""Sums of the queries' gradients, which a fused backward adds up in float32: how many are kept, and who rounds them.

A group is the heads of queries that share a head of keys. Work items come group by group; where neighbors along the
sequence come one after the other, sums of a slice of it are complete long before those of the group are. CTAs that do
nothing else round them while others multiply, and leave zeros for a later group: a ring of a few groups is enough, and
most of what is in use stays in the L2 cache. ``csrc/hopper/sums.cuh`` has the other half of this.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gna_flex.cuda.tables import BOXES, GROUP, KEY_START, KernelTiles, padded_dims, work_records
from gna_flex.intervals import ceil_div, group_length
from gna_flex.neighborhood import GNA

ROWS_PER_BOX = 128
"""Rows that one CTA rounds while another one meets a box of queries (measured on an H100)."""
WAVES, SHARE = 16, 8
"""Some CTAs only round where each has so many items at least, and where they are not more than that part of all."""
ROUND_STAGES = 6
"""Copies of sums that a consumer has under way; ``kRoundStages`` of the kernel."""
COPY_ROWS, MOST_ROWS = 32, 512
"""Rows of a slice are a multiple of the first (those of a copy), and at most the second."""
ITEMS_PER_COUNTER, SLICE_COUNTERS = 8, 16
"""Items that share a counter, which a warp waits for; and counters of a group's slices, of which there are few as one
thread waits for them."""
FEW_BOXES = 8
"""Boxes that an item has left when its CTA fetches the next one; ``kFewBoxes`` of the kernel."""


class SumsParams(ctypes.Structure):
    """``Sums`` of ``csrc/common/records.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ring", "to")),
        ("strides", ctypes.c_longlong * 3),
        ("counters", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("of_slice", "of_counter")),
        *((name, ctypes.c_int) for name in ("places", "groups", "slices", "slice_rows")),
        *((name, ctypes.c_int) for name in ("item_counters", "slice_counters")),
        *((name, ctypes.c_int) for name in ("items_per_counter", "slices_per_counter")),
        ("rounders", ctypes.c_int),
    )


def rows_of_slices(rows: int, processors: int) -> int:
    """Rows of a slice, where all heads of queries have so many: a few slices for each consumer.

    >>> rows_of_slices(32 * 32768, 132), rows_of_slices(8 * 1000, 132)
    (512, 32)
    """
    share = ceil_div(rows, 4 * processors)
    return int(min(ceil_div(share, COPY_ROWS) * COPY_ROWS, MOST_ROWS))


def slices_per_counter(slices: int) -> int:
    """How many slices share a counter.

    >>> slices_per_counter(16), slices_per_counter(17)
    (1, 2)
    """
    return int(ceil_div(slices, SLICE_COUNTERS))


class Meetings(NamedTuple):
    """Which work items of a group add to which slices of its queries' sums, in ranges ``[first, last]``, int32.

    ``of_slice``: for each slice, the counters of items, of which :data:`ITEMS_PER_COUNTER` share one. ``of_counter``:
    for each of these counters, those of slices, of which :func:`slices_per_counter` share one.
    """

    of_slice: np.ndarray
    of_counter: np.ndarray

    @classmethod
    def all(cls, tokens: int, slice_rows: int, items: int) -> Meetings:
        """Every item adds to every slice.

        >>> meetings = Meetings.all(100, 64, 17)
        >>> meetings.of_slice.tolist(), meetings.of_counter.tolist()
        ([[0, 2], [0, 2]], [[0, 1], [0, 1], [0, 1]])
        """
        slices, counters = ceil_div(tokens, slice_rows), ceil_div(items, ITEMS_PER_COUNTER)
        return cls._of(np.array([[0, slices - 1]] * counters), slices)

    @classmethod
    def of(cls, gna: GNA, tiles: KernelTiles, slice_rows: int) -> Meetings:
        """Of the items of a pass whose rows are keys, all of which are of the grid.

        >>> from gna_flex.cuda.tables import Transposed
        >>> gna, tiles = Transposed.of(GNA(4096, 512, 256)), KernelTiles((1, 1, 64), 2, 2, (1, 1, 64), 64)
        >>> Meetings.of(gna, tiles, 1024).of_counter.tolist()
        [[0, 1], [0, 2], [1, 3], [2, 3]]
        """
        records = work_records(gna, tiles)
        first, last = np.zeros(len(records), np.int64), np.zeros(len(records), np.int64)
        for axis, dim in enumerate(padded_dims(gna)):
            start, boxes, group = (records[:, place.start + axis] for place in (KEY_START, BOXES, GROUP))
            end = np.minimum(start + boxes * tiles.kv_tile[axis], group_length(dim.length, dim.dilation, group))
            for token, place in ((first, np.maximum(start, 0)), (last, end - 1)):
                token *= dim.length
                token += place * dim.dilation + group
        starts = np.arange(0, len(records), ITEMS_PER_COUNTER)
        rows = np.stack([np.minimum.reduceat(first, starts), np.maximum.reduceat(last, starts)], 1)
        return cls._of(rows // slice_rows, ceil_div(gna.tokens, slice_rows))

    @classmethod
    def _of(cls, of_counter: np.ndarray, slices: int) -> Meetings:
        """Given the slices that the items of each counter add to."""
        of_slice = np.zeros((slices, 2), np.int32)
        for counter, (first, last) in enumerate(of_counter):
            of_slice[first : last + 1, 1] = counter
        for counter, (first, last) in reversed(list(enumerate(of_counter))):
            of_slice[first : last + 1, 0] = counter
        return cls(of_slice, (of_counter // slices_per_counter(slices)).astype(np.int32))

    def behind(self, items: int, boxes: int, processors: int) -> int:
        """How many items come between one and the one that may take its place, if that is to wait for nobody.

        ``items`` of a group visit so many ``boxes`` of a head. Each of ``processors`` computes an item; who has few
        boxes left has fetched another one, for which it needs the place. Slices are rounded one after the other, as
        quickly as items need it.

        >>> Meetings.all(32768, 512, 256).behind(256, 8192, 132), Meetings.all(32768, 512, 8).behind(8, 256, 132)
        (677, 181)
        """
        slices = np.arange(len(self.of_slice))
        pace = items / len(slices)
        at_work = processors * (1 + min(1, FEW_BOXES * items / boxes))
        complete = (self.of_slice[:, 1] + 1) * ITEMS_PER_COUNTER + at_work
        rounded = np.maximum.accumulate(complete - pace * slices) + pace * (slices + 1)
        last = np.minimum((self.of_counter[:, 1] + 1) * slices_per_counter(len(slices)), len(slices)) - 1
        return math.ceil(float((rounded[last] - np.arange(len(last)) * ITEMS_PER_COUNTER).max()))


@dataclass(frozen=True)
class Ring:
    """How sums are kept and rounded.

    Attributes:
        groups: all of them.
        places: groups whose sums there is room for.
        rounders: CTAs that only round. Without any there is room for all groups.
        slice_rows: rows of a head that are rounded at a time.

    Raises:
        ValueError: a group would wait for ever.
    """

    groups: int
    places: int
    rounders: int
    slice_rows: int

    def __post_init__(self) -> None:
        if not 1 <= self.places <= self.groups or (self.places < self.groups and not self.rounders):
            raise ValueError(f"{self}: sums of all groups need places, or CTAs that round")

    @classmethod
    def of(
        cls, groups: int, tokens: int, items: int, boxes: int, processors: int, slice_rows: int, behind: int
    ) -> Ring:
        """For ``groups`` of heads of ``tokens`` queries, whose ``items`` visit ``boxes`` of each head in total.

        ``behind``: how many items must come between one and the one that takes its place.

        >>> Ring.of(32, tokens=32768, items=256, boxes=8192, processors=132, slice_rows=512, behind=205)
        Ring(groups=32, places=1, rounders=5, slice_rows=512)
        >>> Ring.of(4, tokens=1000, items=16, boxes=200, processors=132, slice_rows=32, behind=205)
        Ring(groups=4, places=4, rounders=0, slice_rows=32)
        """
        rounders = ceil_div(processors * tokens, ROWS_PER_BOX * boxes)
        if groups * items < WAVES * processors or rounders * SHARE > processors:
            return cls(groups, groups, 0, slice_rows)
        return cls(groups, min(groups, ceil_div(behind, items)), rounders, slice_rows)


@dataclass(frozen=True)
class Sums:
    """Sums of one call, and zeros to count with.

    Attributes:
        ring: how they are kept.
        sums: float32 ``[1, places * heads of a group, S, D']``, with columns as the kernel has them.
        counters: int32, of slices that are taken; and of each group, of items that are done, then of
            slices that are rounded.
        to: the queries' gradients ``[B, H, S, D]``, ``D <= D'``.
    """

    ring: Ring
    sums: Tensor
    counters: Tensor
    to: Tensor

    @classmethod
    def zeros(cls, ring: Ring, to: Tensor, columns: int, items: int) -> Sums:
        """Sums of ``columns`` columns that become the gradients ``to``, of groups of ``items``."""
        batch, heads, tokens, _ = to.shape
        counters = 1 + ring.groups * (ceil_div(items, ITEMS_PER_COUNTER) + SLICE_COUNTERS)
        shape = (1, ring.places * (batch * heads // ring.groups), tokens, columns)
        size = shape[1] * tokens * columns
        memory = torch.zeros(size + counters, dtype=torch.float32, device=to.device)
        return cls(ring, memory[:size].view(shape), memory[size:].view(torch.int32), to)

    def params(self, of_slice: Tensor, of_counter: Tensor) -> SumsParams:
        """What the kernel is told; the tables of :class:`Meetings` are on its device."""
        ring = self.ring
        pointers, strides = (self.sums.data_ptr(), self.to.data_ptr()), (ctypes.c_longlong * 3)(*self.to.stride()[:3])
        slices = len(of_slice)
        shared = (len(of_counter), SLICE_COUNTERS, ITEMS_PER_COUNTER, slices_per_counter(slices))
        numbers = (ring.places, ring.groups, slices, ring.slice_rows, *shared, ring.rounders)
        counters = (x.data_ptr() for x in (self.counters, of_slice, of_counter))
        return SumsParams(*pointers, strides, *counters, *numbers)
