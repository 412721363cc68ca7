"""32 threads that run in lockstep, or in groups of those at the same place.

Groups that a branch has split meet again because the group that is furthest behind always goes first. One that waits
for a barrier lets the others pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.errors import DivergenceError, InFlightError, PtxError
from ptx.memory import joined
from ptx.program import FIXED, LANES, Program, Step
from ptx.tmem import LOADING, Area, Order

if TYPE_CHECKING:
    from ptx.machine import Block
    from ptx.tma import StoreGroups

NOBODY = b"\0" * LANES
EVERYBODY = b"\1" * LANES
Condition = Callable[[], bool]
Event = tuple[str, int, int]
"""What a thread did at an mbarrier, or with an engine: its kind, an address, the parity of a wait."""


class Wait:
    """What a group waits for: a condition, and words for the list of a deadlock, the last ones as they are then."""

    def __init__(self, ready: Condition, text: str, about: object = "") -> None:
        self.ready, self._text, self._about = ready, text, about

    def __str__(self) -> str:
        return f"{self._text}{self._about}"


class Warp:
    """One warp. ``slots`` are its registers and constants, ``clock`` what it knows of others' progress."""

    def __init__(self, block: Block, index: int, program: Program, rng: np.random.Generator) -> None:
        self.block, self.index, self.steps = block, index, program.steps
        threads = np.arange(LANES, dtype=np.uint32) + LANES * index
        self.threads = threads.astype(np.int64)
        whole = {"%ntid.x": block.threads, "%ctaid.x": block.index, "%nctaid.x": block.blocks, **FIXED}
        special = {name: np.full(LANES, value, np.uint32) for name, value in whole.items()}
        special |= {"%tid.x": threads, "%laneid": np.arange(LANES, dtype=np.uint32)}
        self.slots, self.file = program.registers(rng, special)
        self.mma_registers = program.mma_registers
        self.leader = int(rng.integers(LANES))
        """The lane that ``elect.sync`` elects."""
        self.pc = 0
        self.live = np.ones(LANES, np.bool_)
        self.others: list[tuple[int, np.ndarray, Wait | None]] = []
        self.waiting: Wait | None = None
        self.done = False
        self.in_flight: dict[tuple[int, int], str] = {}
        self.registers = block.registers
        self._notes: list[tuple[str, np.ndarray, Sequence[int], int]] = []
        self.arrived: int | None = None
        self.stores: dict[int, StoreGroups] = {}
        self.polled, self.unfenced = 0, False
        """How many atomics of the machine there had been when it last polled global memory; no proxy fence since."""
        self.mma = block.new_mma_queue(self)
        self.clock = block.shared.new_clock(index)
        self.tensor = Order(block.shared.readers, index, block.machine.rules.tensor_fences)
        self.tensor_loads: list[tuple[Area, np.ndarray, np.ndarray]] = []
        self.tensor_stores: list[Area] = []
        self._become(np.ones(LANES, np.bool_))

    def _become(self, mask: np.ndarray) -> None:
        self.mask, self.key = mask, mask.tobytes()
        self.full = self.key == EVERYBODY

    @property
    def step(self) -> Step:
        return self.steps[self.pc]

    def together(self, what: str) -> bool:
        """Whether all 32 threads are here. If some are elsewhere, these wait for them, and come back to this step."""
        if self.others:
            self.wait(lambda: False, f"the other threads of the warp at {what}")
            return False
        if not self.full:
            raise DivergenceError(f"{what}: by {int(self.mask.sum())} threads of a warp only")
        return True

    def lane(self, what: str) -> int:
        """The only active lane."""
        lanes = np.flatnonzero(self.mask)
        if len(lanes) != 1:
            raise DivergenceError(f"{what}: by {len(lanes)} threads of a warp at once instead of one")
        return int(lanes[0])

    def run(self, budget: int) -> int:
        """Up to ``budget`` instructions, fewer if the warp must wait or ends; how many."""
        steps, start = self.steps, budget
        if self.waiting is not None:
            self.waiting = None
            if self.others:
                self._choose()
        try:
            while budget > 0 and self.waiting is None and not self.done:
                step = steps[self.pc]
                budget -= 1
                if self.in_flight and not step.is_mma and not self.in_flight.keys().isdisjoint(step.touched):
                    self._touch(step)
                self.pc += 1
                if step.guard is None:
                    step.run(self)
                else:
                    self._guarded(step)
                if self.others:
                    self._choose()
        except PtxError as error:
            with contextlib.suppress(IndexError):
                where = f"{self} at line {step.source.line}, {step.source.text[:110]}"
                error.args = (f"{error}\n  {where}",)
            raise
        return start - budget

    def _touch(self, step: Step) -> None:
        """An instruction touches registers in flight, which loads without waits allow."""
        why = {self.in_flight[place] for place in step.touched if place in self.in_flight}
        if self.block.machine.rules.load_waits or why != {LOADING}:
            raise InFlightError(f"a register is touched while it is {why.pop()}")
        touched = [row for size, row in step.touched if size == 4]
        self.finish_loads([load for load in self.tensor_loads if np.isin(load[1], touched).any()])

    def finish_loads(self, loads: list[tuple[Area, np.ndarray, np.ndarray]]) -> None:
        """The values of loads of tensor memory come into their registers."""
        for area, rows, values in loads:
            self.block.tensor_memory.note(area, self.index, int(self.tensor.known[self.index]), write=False)
            self.file[rows] = values
            for row in rows.tolist():
                del self.in_flight[4, row]
        self.tensor_loads = [load for load in self.tensor_loads if not any(load is other for other in loads)]

    def _guarded(self, step: Step) -> None:
        assert step.guard is not None
        guard = self.slots[step.guard]
        if self.full:  # as most are: whether all threads, or none, do it
            key = guard.tobytes()
            if key == (NOBODY if step.negated else EVERYBODY):
                step.run(self)
                return
            if key == (EVERYBODY if step.negated else NOBODY):
                return
        active = self.mask & (~guard if step.negated else guard)
        key = active.tobytes()
        if key == self.key:
            step.run(self)
        elif key != NOBODY:
            mask = self.mask
            self._become(active)
            try:
                step.run(self)
            finally:
                self._become(mask & self.live)

    def branch(self, target: int, taken: np.ndarray) -> None:
        """Threads of ``taken``, all of them active ones, go on at ``target``."""
        key = taken.tobytes()
        if key == self.key:
            self.pc = target
        elif key != NOBODY:
            self.others.append((target, taken, None))
            self._become(self.mask & ~taken)

    def message(self) -> np.ndarray:
        """What an arrival tells: the clock, and what there is to know of tensor memory."""
        return np.concatenate((self.clock, self.tensor.message()))

    def release(self) -> np.ndarray:
        """The message of an arrival; what comes after it is not part of it."""
        message = self.message()
        self.clock[self.index] += 1
        return message

    def hear(self, message: np.ndarray) -> None:
        """Learns what others did who arrived."""
        count = len(self.clock)
        self.clock[:] = joined(self.clock, message[:count])
        self.tensor.hear(message[count:])

    def note(self, kind: str, at: Sequence[int], parity: int = 0) -> None:
        """Adds an event to the history of each active thread."""
        self._notes.append((kind, self.mask, at, parity))

    @property
    def history(self) -> list[list[Event]]:
        """The events of each thread."""
        found: list[list[Event]] = [[] for _ in range(LANES)]
        for kind, mask, at, parity in self._notes:
            for lane, address in zip(np.flatnonzero(mask).tolist(), at, strict=True):
                found[lane].append((kind, address, parity))
        return found

    def leave(self) -> None:
        """The active threads end."""
        self.live = self.live & ~self.mask
        self._become(np.zeros(LANES, np.bool_))
        self.done = not self.live.any()

    def wait(self, ready: Condition, text: str, about: object = "") -> None:
        """The active threads run this instruction again once ``ready``."""
        self.pc -= 1
        self.waiting = Wait(ready, text, about)

    def _choose(self) -> None:
        """Lets the group at the lowest place go on, of those that can."""
        if self.waiting is None and self.key != NOBODY and all(self.pc < pc for pc, _, _ in self.others):
            return
        groups = list(self.others)
        if self.key != NOBODY:
            groups.append((self.pc, self.mask, self.waiting))
        if len({pc for pc, _, _ in groups}) == 1:  # they have met
            self.others, self.pc, self.waiting = [], groups[0][0], None
            self._become(np.logical_or.reduce([mask for _, mask, _ in groups]))
            return
        able = [pc for pc, _, wait in groups if wait is None or wait.ready()]
        if not able:
            waits = [wait for _, _, wait in groups if wait is not None]
            text = " or ".join(dict.fromkeys(map(str, waits)))
            self.others, (self.pc, mask, _) = groups[1:], groups[0]
            self._become(mask)
            self.waiting = Wait(lambda: any(wait.ready() for wait in waits), text)
            return
        self.pc = min(able)
        mask = np.zeros(LANES, np.bool_)
        self.others = []
        for group in groups:
            if group[0] == self.pc and (group[2] is None or group[2].ready()):
                mask |= group[1]
            else:
                self.others.append(group)
        self.waiting = None
        self._become(mask)

    def __str__(self) -> str:
        return f"warp {self.index} of block {self.block.index}"

    def assign(self, slot: int, value: Any) -> None:
        """Writes a register of the active threads."""
        if self.full:
            self.slots[slot][:] = value
        else:
            np.copyto(self.slots[slot], value, where=self.mask, casting="same_kind")
