"""Tensor memory of one block: 128 lanes of 512 columns of 32 bits, and who read and wrote them when.

Agents are the warps and the pipes of matrix products; both are the readers of shared memory, and numbered like them.
An access of a warp is complete once the warp has waited for it, an access of a pipe once a commit after it has arrived.
Each warp has an order of its own for tensor memory: what a barrier has told it counts from its next
``fence::after_thread_sync`` on, and its arrivals tell what it knew at its last ``fence::before_thread_sync``. An access
must come after earlier ones in that order. So nothing needs to be poisoned while it is under way: whoever comes too
early is an error, with every seed. Columns begin as NaN, which nobody may read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import AllocationError, OutOfBoundsError, RaceError, UninitialisedError
from ptx.memory import joined

if TYPE_CHECKING:
    from ptx.warp import Warp

Excuse = Callable[[np.ndarray, np.ndarray], bool]
"""Whether accesses, by agents and at times, may be overtaken though nothing orders them."""
LANES, COLUMNS = 128, 512
QUARTER = 32
"""Lanes that a warp can load and store, by its place in its warpgroup."""
LOADING = "loaded from tensor memory"
GRANULE = 16
"""Lanes whose accesses are watched together: no instruction touches fewer."""


class Order:
    """What a warp knows of the accesses to tensor memory: times by agent.

    Attributes:
        known: accesses that its next ones come after. Its own entry is its time.
        heard: what barriers have told it.
        told: what its arrivals tell.
    """

    def __init__(self, agents: int, own: int, fences: bool) -> None:
        self.own, self.fences = own, fences
        self.known, self.heard, self.told = (np.zeros(agents, np.int64) for _ in range(3))
        self.known[own] = 1

    def before(self) -> np.ndarray:
        """``fence::before_thread_sync``, also that of a commit: everything known so far."""
        told = self.known.copy()
        self.known[self.own] += 1
        return told

    def after(self) -> None:
        """``fence::after_thread_sync``."""
        self.known = joined(self.known, self.heard)

    def message(self) -> np.ndarray:
        """What an arrival tells."""
        if not self.fences:
            self.told = self.before()
        return self.told

    def hear(self, message: np.ndarray) -> None:
        self.heard = joined(self.heard, message)
        if not self.fences:
            self.after()


class Area:
    """A rectangle: ``lanes`` from ``lane`` on, ``columns`` from ``column`` on.

    Raises:
        OutOfBoundsError: it is not inside of tensor memory.
    """

    def __init__(self, address: int, lanes: int, columns: int) -> None:
        lane, column = address >> 16, address & 0xFFFF
        if lane % GRANULE or lane + lanes > LANES or column + columns > COLUMNS:
            raise OutOfBoundsError(f"{lanes} lanes and {columns} columns of tensor memory at {address:#x}")
        self.lanes, self.columns = slice(lane, lane + lanes), slice(column, column + columns)
        self.watched = slice(lane // GRANULE, -(-(lane + lanes) // GRANULE)), self.columns
        self.where = self.lanes, self.columns

    def __str__(self) -> str:
        return f"tensor memory, lanes from {self.lanes.start} and columns from {self.columns.start} on"


class TensorMemory:
    """See the module's text. ``values`` are ``[lanes, columns]``."""

    def __init__(self, agents: int) -> None:
        self.values = np.full((LANES, COLUMNS), 0xFFFFFFFF, np.uint32)
        shape = LANES // GRANULE, COLUMNS
        self.writer = np.full(shape, -1, np.int32)
        self.written = np.zeros(shape, np.int64)
        self.read = np.zeros((*shape, agents), np.int64)
        self.allocations: dict[int, int] = {}
        """Columns of each allocation, by the first of them."""
        self.relinquished = False
        self.stores: Counter[int] = Counter()
        """Instructions that stored, by warp: which way a kernel went."""
        self._free = np.ones(COLUMNS, np.bool_)
        self._maker, self._made = np.zeros((2, COLUMNS), np.int64)
        """Which warp has allocated each column, and when."""

    # ---- allocation

    def places(self, columns: int) -> list[int]:
        """Where so many columns are free."""
        starts = range(0, COLUMNS - columns + 1, 32)
        return [start for start in starts if self._free[start : start + columns].all()]

    def allocate(self, warp: Warp, start: int, columns: int) -> None:
        area = slice(start, start + columns)
        self._maker[area], self._made[area] = warp.index, warp.tensor.known[warp.index]
        self.values[:, area], self.writer[:, area] = 0xFFFFFFFF, -1
        self.written[:, area], self.read[:, area] = 0, 0
        self.allocations[start], self._free[area] = columns, False

    def free(self, warp: Warp, address: int, columns: int) -> None:
        if self.allocations.get(address) != columns:
            raise AllocationError(f"{columns} columns at {address:#x} are freed, which were not allocated together")
        self.check(warp.tensor.known, Area(address, LANES, columns), "dealloc", write=True)
        del self.allocations[address]
        self._free[address : address + columns] = True

    # ---- accesses

    def check(self, known: np.ndarray, area: Area, what: str, *, write: bool, excuse: Excuse | None = None) -> None:
        """Whether an access is allowed to what comes next after the ``known`` accesses.

        Raises:
            OutOfBoundsError: it is not allocated.
            UninitialisedError: it is read, but was not written.
            RaceError: an earlier access is under way, or nothing orders it, or the allocation, before this one.
        """
        if self._free[area.columns].any():
            raise OutOfBoundsError(f"{what} of {area}: not allocated")
        if (self._made[area.columns] > known[self._maker[area.columns]]).any():
            raise RaceError(f"{what} of {area}: nothing orders its allocation before")
        writer, written = self.writer[area.watched], self.written[area.watched]
        if not write and (writer < 0).any():
            raise UninitialisedError(f"{what} of {area}: nothing was written there")
        late = written > known[writer]  # nobody's writes were at time 0
        if late.any() and not (excuse and excuse(writer[late], written[late])):
            raise RaceError(f"{what} of {area}: a write is under way, or nothing orders it before")
        if write:
            late = self.read[area.watched] > known
            if late.any() and not (excuse and excuse(np.nonzero(late)[2], self.read[area.watched][late])):
                raise RaceError(f"{what} of {area}: a read is under way, or nothing orders it before")

    def note(self, area: Area, agent: int, time: int, *, write: bool) -> None:
        """An access of an agent, at a time of its own."""
        if write:
            self.writer[area.watched], self.written[area.watched] = agent, time
        else:
            self.read[(*area.watched, agent)] = time
