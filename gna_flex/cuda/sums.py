"""Sums of the queries' gradients, which a fused backward adds up in float32: how many are kept, and who rounds them.

A group is the heads of queries that share a head of keys. Work items come group by group, so sums of a group are
complete once its last items are. CTAs that do nothing else round them while others multiply, and leave zeros for a
later group: a ring of a few groups is enough, and most of it stays in the L2 cache. ``csrc/hopper/sums.cuh`` has the
other half of this.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from gna_flex.intervals import ceil_div

ROWS_PER_BOX = 128
"""Rows that one CTA rounds while another one meets a box of queries (measured on an H100)."""
WAVES, SHARE = 16, 8
"""Some CTAs only round where each has so many items at least, and where they are not more than that part of all."""
ROUND_STAGES = 6
"""Copies of sums that a consumer has under way; ``kRoundStages`` of the kernel."""
COPY_ROWS, MOST_ROWS = 32, 1024
"""Rows of a slice are a multiple of the first (those of a copy), and at most the second."""


class SumsParams(ctypes.Structure):
    """``Sums`` of ``csrc/common/records.cuh``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ring", "to")),
        ("strides", ctypes.c_longlong * 3),
        ("counters", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("places", "groups", "slices", "slice_rows", "rounders")),
    )


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
    def of(cls, groups: int, heads: int, tokens: int, items: int, boxes: int, processors: int, whole: bool) -> Ring:
        """For ``groups`` of ``heads`` of ``tokens`` queries, whose ``items`` visit ``boxes`` of each head in total.

        ``whole``: items do not come group by group, so there must be room for all.

        >>> Ring.of(groups=32, heads=1, tokens=32768, items=256, boxes=8192, processors=132, whole=False)
        Ring(groups=32, places=4, rounders=5, slice_rows=1024)
        >>> Ring.of(groups=4, heads=2, tokens=1000, items=16, boxes=200, processors=132, whole=False)
        Ring(groups=4, places=4, rounders=0, slice_rows=32)
        """
        share = ceil_div(groups * heads * tokens, 4 * processors)  # a few slices for each consumer
        slice_rows = min(ceil_div(share, COPY_ROWS) * COPY_ROWS, MOST_ROWS)
        rounders = ceil_div(processors * tokens, ROWS_PER_BOX * boxes)
        if groups * items < WAVES * processors or rounders * SHARE > processors:
            return cls(groups, groups, 0, slice_rows)
        return cls(groups, groups if whole else min(groups, 3 + ceil_div(processors, items)), rounders, slice_rows)


@dataclass(frozen=True)
class Sums:
    """Sums of one call, and zeros to count with.

    Attributes:
        ring: how they are kept.
        sums: float32 ``[1, places * heads of a group, S, D']``, with columns as the kernel has them.
        counters: int32, of slices that are taken, and two for each group.
        to: the queries' gradients ``[B, H, S, D]``, ``D <= D'``.
    """

    ring: Ring
    sums: Tensor
    counters: Tensor
    to: Tensor

    @classmethod
    def zeros(cls, ring: Ring, to: Tensor, columns: int) -> Sums:
        """Sums of ``columns`` columns that become the gradients ``to``."""
        batch, heads, tokens, _ = to.shape
        shape = (1, ring.places * (batch * heads // ring.groups), tokens, columns)
        size = shape[1] * tokens * columns
        memory = torch.zeros(size + 1 + 2 * ring.groups, dtype=torch.float32, device=to.device)
        return cls(ring, memory[:size].view(shape), memory[size:].view(torch.int32), to)

    @property
    def params(self) -> SumsParams:
        """What the kernel is told."""
        ring, tokens = self.ring, self.to.shape[2]
        pointers, strides = (self.sums.data_ptr(), self.to.data_ptr()), (ctypes.c_longlong * 3)(*self.to.stride()[:3])
        counts = (ring.places, ring.groups, ceil_div(tokens, ring.slice_rows), ring.slice_rows, ring.rounders)
        return SumsParams(*pointers, strides, self.counters.data_ptr(), *counts)
