"""Parameters, global memory and shared memory.

Shared memory knows who wrote and read each of its words of 4 bytes last, and when. Agents are the warps of the block,
its pipes, whose matrix products read, and its barriers, whose copies write; time is the agent's own count: releases of
a warp, products of a pipe, phases of a barrier. Every warp has a clock: how far it has seen each agent, through
barriers. An access must come after earlier ones in that sense, whatever the order in which they happen to run, so races
show with every seed.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.errors import OutOfBoundsError, ProxyFenceError, RaceError, UninitialisedError
from ptx.program import FILES

if TYPE_CHECKING:
    from ptx.barriers import MBarrier
    from ptx.warp import Warp

FUTURE = 1 << 40
"""Time of an access that is still under way."""
SHARED_BASE = 1024
"""Address of shared memory, which begins behind what the system keeps for itself."""
WINDOW = 0x7E00_0000_0000
"""What generic addresses of shared memory add to its own ones."""
NOWHERE = 0x8000_0000
"""Address of variables in global and in local memory, where nothing is."""
BARRIERS = 64
"""Barriers that a block can have."""
NO, YES = b"\0", b"\1"
"""Bytes of truth values: to look for them is faster than to reduce the few that instructions have."""
PIPES = 4
"""Threads of a block that can issue matrix products of tensor memory."""


class Region:
    """One array at an address."""

    def __init__(self, name: str, base: int, data: np.ndarray) -> None:
        self.name, self.base = name, base
        self.data = data.reshape(-1).view(np.uint8)
        self._vectors: dict[tuple[int, int], np.ndarray] = {}

    def elements(self, addresses: np.ndarray, size: int) -> Any:
        """Indices of elements of ``size`` bytes, a power of two; addresses have 64 bits.

        Raises:
            OutOfBoundsError: an element is not aligned, or not inside.
        """
        offsets = addresses - self.base
        bits, last = int(np.bitwise_or.reduce(offsets)), len(self.data) - size
        if not 0 <= bits <= last:  # no offset is larger, and below zero if one is
            unsigned = offsets.view(np.uint64)  # those below the array are the largest
            if int(np.maximum.reduce(unsigned)) > last:
                worst = int(offsets[unsigned.argmax()])
                raise OutOfBoundsError(f"byte {worst} of {self.name}, which has {len(self.data)} bytes")
        if bits & size - 1:
            raise OutOfBoundsError(f"an address that is not a multiple of {size} in {self.name}")
        return offsets >> size.bit_length() - 1

    def view(self, size: int) -> np.ndarray:
        """All elements of ``size`` bytes."""
        return self.vectors(size, 1).reshape(-1)

    def vectors(self, size: int, count: int) -> np.ndarray:
        """All vectors of ``count`` elements of ``size`` bytes."""
        if (size, count) not in self._vectors:
            whole = self.data[: len(self.data) // (size * count) * size * count]
            kind = np.uint8 if size == 1 else FILES.get(size, np.uint8)
            self._vectors[size, count] = whole.view(kind).reshape(-1, count)
        return self._vectors[size, count]


class Space:
    """Arrays at addresses with gaps between them."""

    GAP = 1 << 20

    def __init__(self, base: int) -> None:
        self._next = base
        self.regions: list[Region] = []
        self._bases: list[int] = []

    def add(self, name: str, array: np.ndarray, at: int | None = None) -> int:
        """The address of a contiguous array, which kernels read and write in place: a given one, or the next free."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: only contiguous arrays have an address")
        region = Region(name, self._next if at is None else at, array)
        if at is None:
            self._next += len(region.data) // self.GAP * self.GAP + 2 * self.GAP
        index = bisect.bisect(self._bases, region.base)
        self.regions.insert(index, region)
        self._bases.insert(index, region.base)
        return region.base

    def region(self, address: int) -> Region:
        """The array of an address, or the last one before it."""
        index = bisect.bisect_right(self._bases, address) - 1
        if index < 0:
            raise OutOfBoundsError(f"address {address:#x}, where nothing is")
        return self.regions[index]

    def place(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """An array and the indices of the addressed elements of ``size`` bytes in it."""
        region = self.region(int(addresses[0]))
        return region.view(size), region.elements(addresses, size)


class Shared:
    """Shared memory of one block; see the module's text."""

    def __init__(self, size: int, warps: int) -> None:
        self.region = Region("shared memory", SHARED_BASE, np.full(-(-size // 16) * 16, 0xFF, np.uint8))
        self.region.data = self.region.data[:size]
        words = -(-size // 16) * 4
        self.warps, self.readers = warps, warps + PIPES
        self.writer = np.full(words, -1, np.int32)
        self.written = np.zeros(words, np.int64)
        self.known = np.zeros((warps, words), np.bool_)
        """Words whose last write is known to come before what a warp does next: true until they are written again."""
        self.read = np.zeros((self.readers, words), np.int64)
        self.dirty = np.zeros(words, np.int32)
        """Thread (plus one) whose plain write no proxy fence has made visible."""
        self.barriers: dict[int, MBarrier] = {}
        self.barriers_made = 0
        self._numbers = np.arange(words)
        self._reading: list[dict[int, np.ndarray]] = [{} for _ in range(warps)]
        self._reads = 0

    def new_clock(self, warp: int) -> np.ndarray:
        """The clock of a warp that begins."""
        clock = np.zeros(self.readers + BARRIERS, np.int64)
        clock[warp] = 1
        return clock

    def words(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Words of elements of ``size`` bytes, flat, element after element; checks alignment and bounds."""
        return self.words_of(self.region.elements(addresses, size), size)

    def words_of(self, index: np.ndarray, size: int) -> np.ndarray:
        """Words of elements of ``size`` bytes by their indices."""
        if size < 4:
            return index * size // 4
        return index if size == 4 else self._numbers.reshape(-1, size // 4).take(index, 0).reshape(-1)

    def _where(self, words: np.ndarray, bad: np.ndarray) -> str:
        return f"byte {int(words[np.flatnonzero(bad)[0]]) * 4} of shared memory"

    def _after_writes(self, warp: Warp, words: np.ndarray, what: str, *, initialised: bool = False) -> None:
        """Fails if writes may come later; if ``initialised``, also if there were none."""
        known = self.known[warp.index]
        if NO not in known[words].tobytes():
            return
        writer = self.writer[words]
        if initialised and (bad := writer < 0).any():
            raise UninitialisedError(f"{self._where(words, bad)}: read before anything was written")
        bad = self.written[words] > warp.clock[writer]  # nobody's writes were at time 0
        if bad.any():
            first = words[np.flatnonzero(bad)[0]]
            agent = int(self.writer[first])
            who = f"warp {agent}" if agent < self.warps else "a copy"
            late = "is under way or holds a barrier" if self.written[first] == FUTURE else "nothing orders before it"
            raise RaceError(f"{what} of {self._where(words, bad)}: a write by {who} {late}")
        known[words] = writer >= 0

    def _after_reads(self, warp: Warp, words: np.ndarray, what: str) -> None:
        bad = self.read[:, words] > warp.clock[: self.readers, None]
        if YES in bad.tobytes():
            raise RaceError(f"{what} of {self._where(words, bad.any(0))}: nothing orders a read before it")

    def _fenced(self, words: np.ndarray, what: str) -> None:
        bad = self.dirty[words] > 0
        if YES in bad.tobytes():
            raise ProxyFenceError(f"{what} of {self._where(words, bad)}: a plain write without a proxy fence")

    def _write(self, words: np.ndarray, agent: int, time: int) -> None:
        self.writer[words], self.written[words] = agent, time
        self.known[:, words] = False

    def plain_read(self, warp: Warp, words: np.ndarray) -> None:
        self._after_writes(warp, words, "read", initialised=True)
        times, now = self.read[warp.index], warp.clock[warp.index]
        times[words] = np.maximum(times[words], now) if self._reading[warp.index] else now

    def plain_write(self, warp: Warp, words: np.ndarray, threads: np.ndarray) -> None:
        self._after_writes(warp, words, "write")
        self._after_reads(warp, words, "write")
        self._write(words, warp.index, warp.clock[warp.index])
        self.dirty[words] = threads + 1

    def proxy_fence(self, warp: Warp) -> None:
        """Plain writes of the active threads become visible to the asynchronous proxy."""
        fenced = np.zeros(self.warps * 32 + 1, np.bool_)
        fenced[warp.threads[warp.mask] + 1] = True
        self.dirty[fenced[self.dirty]] = 0

    def async_read(
        self, warp: Warp, words: np.ndarray, what: str, agent: int, time: int, *, complete: bool = True
    ) -> None:
        """A read that the warp begins, by an agent at a time.

        ``complete``: whether all of it must have been written, as poison would spread.
        """
        self._after_writes(warp, words, what, initialised=complete)
        self._fenced(words, what)
        self.read[agent][words] = time

    def begin_async_read(self, warp: Warp, words: np.ndarray, what: str, *, complete: bool = True) -> int:
        """An asynchronous read that the warp waits for: its number, which :meth:`end_async_reads` takes."""
        self.async_read(warp, words, what, warp.index, FUTURE, complete=complete)
        self._reads += 1
        self._reading[warp.index][self._reads] = words
        return self._reads

    def end_async_reads(self, warp: Warp, reads: list[int]) -> None:
        """The warp has waited for the end of asynchronous reads."""
        reading, times = self._reading[warp.index], self.read[warp.index]
        for number in reads:
            times[reading.pop(number)] = warp.clock[warp.index]
        for words in reading.values():
            times[words] = FUTURE

    def begin_async_write(self, warp: Warp, words: np.ndarray, barrier: MBarrier, what: str) -> None:
        self._after_writes(warp, words, what)
        self._after_reads(warp, words, what)
        if warp.block.machine.rules.overwrite_fences:
            self._fenced(words, what)
        self.dirty[words] = 0
        self._write(words, barrier.agent, FUTURE)
        self.region.view(4)[words] = 0xFFFFFFFF

    def end_async_write(self, words: np.ndarray, barrier: MBarrier) -> None:
        self.written[words] = barrier.phase + 1

    def reserve(self, warp: Warp, address: int) -> None:
        """Words that become a barrier: plain accesses are races from now on."""
        words = self.words(np.array([address]), 8)
        self._after_writes(warp, words, "barrier")
        self._write(words, warp.index, FUTURE)

    def release(self, warp: Warp, address: int) -> None:
        """A barrier ends: its words may be written again by those who come after the warp."""
        self.barrier(warp, address)
        del self.barriers[address]
        self._write(self.words(np.array([address]), 8), warp.index, warp.clock[warp.index])

    def barrier(self, warp: Warp, address: int, asynchronous: bool = False) -> MBarrier:
        """The barrier at an address, which the warp must know to be ready."""
        if address not in self.barriers:
            raise RaceError(f"no barrier was made at {address:#x}")
        barrier = self.barriers[address]
        owner, made = barrier.made
        if warp.clock[owner] < made:
            raise RaceError(f"barrier {address:#x}: nothing orders its making before this use")
        if asynchronous and not barrier.fenced:
            raise ProxyFenceError(f"barrier {address:#x}: no fence.mbarrier_init before its use by a copy")
        return barrier


def joined(clock: np.ndarray, other: np.ndarray) -> Any:
    """Everything that either clock has seen."""
    return np.maximum(clock, other)
