"""Barriers in shared memory, and the numbered ones of ``bar.sync``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import ArrivalError
from ptx.memory import BARRIERS, Shared, joined

if TYPE_CHECKING:
    from ptx.warp import Warp


class MBarrier:
    """A phase ends when all arrivals and all bytes that were announced have come.

    Attributes:
        phase: phases that have ended.
        pending: arrivals that the current phase lacks.
        bytes: announced bytes that have not come; below zero while they come before their announcement.
    """

    def __init__(self, shared: Shared, warp: Warp, address: int, count: int) -> None:
        if not 1 <= count < 1 << 20 or shared.barriers_made == BARRIERS:
            raise ArrivalError(f"barrier {address:#x} with {count} arrivals, after {shared.barriers_made} others")
        self.address, self.count, self.agent = address, count, shared.readers + shared.barriers_made
        shared.barriers_made += 1
        self.phase, self.pending, self.bytes = 0, count, 0
        self.made = warp.index, int(warp.clock[warp.index])
        self.fenced = False
        self._arrived, self._seen = np.zeros((2, len(warp.message())), np.int64)

    def expect(self, count: int) -> None:
        self.bytes += count

    def arrive(self, message: np.ndarray, times: int = 1, threads: int = 1) -> None:
        """Arrivals, of threads or of what they have begun: those who wait get to know the message."""
        self._arrived = joined(self._arrived, message)
        for _ in range(threads):
            if self.pending < times:
                raise ArrivalError(f"barrier {self.address:#x}: an arrival beyond the {self.count} of its phase")
            self.pending -= times
            self._finish()

    def complete(self, count: int) -> None:
        """Bytes of a copy have come."""
        self.bytes -= count
        self._finish()

    def _finish(self) -> None:
        if self.pending or self.bytes:
            return
        self.phase, self.pending = self.phase + 1, self.count
        self._arrived[self.agent] = self.phase
        self._seen = joined(self._seen, self._arrived)

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity has ended."""
        return self.phase & 1 != parity & 1

    def observe(self, warp: Warp) -> None:
        """The warp learns what those did who arrived."""
        warp.hear(self._seen)

    def __str__(self) -> str:
        return f"barrier {self.address:#x} (phase {self.phase}, lacks {self.pending} arrivals, {self.bytes} bytes)"


class NamedBarrier:
    """A barrier of ``bar.sync``: warps wait until those of ``threads`` threads are there."""

    def __init__(self, number: int) -> None:
        self.number, self.generation, self.threads = number, 0, 0
        self.waiting: list[tuple[Warp, np.ndarray]] = []

    def arrive(self, warp: Warp, threads: int) -> int:
        """A warp comes; the generation that it waits for the end of."""
        if self.waiting and threads != self.threads:
            raise ArrivalError(f"bar.sync {self.number}: for {threads} threads, and for {self.threads}")
        if threads % 32 or threads < 32:
            raise ArrivalError(f"bar.sync {self.number}: {threads} threads are no whole warps")
        self.threads, generation = threads, self.generation
        self.waiting.append((warp, warp.release()))
        if 32 * len(self.waiting) == threads:
            everything = np.max([message for _, message in self.waiting], axis=0)
            for each, _ in self.waiting:
                each.hear(everything)
            self.waiting, self.generation = [], generation + 1
        return generation
