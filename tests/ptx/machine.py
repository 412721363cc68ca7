"""Launches kernels: blocks, a scheduler that is as unkind as its seed, and the engines' work under way."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ptx import access, alu, foreign, mma, packed, sync, tcgen05  # noqa: F401  they register the instructions
from ptx.barriers import NamedBarrier
from ptx.errors import (
    AllocationError,
    DeadlockError,
    DescriptorError,
    DivergenceError,
    InFlightError,
    UnsupportedError,
)
from ptx.memory import NOWHERE, PIPES, SHARED_BASE, Shared, Space
from ptx.parse import Kernel, parse
from ptx.program import Program
from ptx.rules import Rules
from ptx.tma import Copy, TensorMap
from ptx.tmem import TensorMemory
from ptx.warp import Warp
from ptx.wgmma import Queue

REGISTERS = 1 << 16
"""Registers of a multiprocessor, all of which one block gets."""
TURNS = 300
"""Turns of warps after which their speeds change."""


class Block:
    """One thread block."""

    def __init__(self, machine: Machine, index: int, blocks: int, threads: int, shared: int) -> None:
        self.machine, self.index, self.blocks, self.threads = machine, index, blocks, threads
        self.shared = Shared(shared, threads // 32)
        self.tensor_memory = TensorMemory(self.shared.readers)
        self.pipes: dict[tuple[int, int], tcgen05.Pipe] = {}
        self.named: dict[int, NamedBarrier] = {}
        self.mma_log: dict[tuple[int, int], tuple[tuple[object, ...], int]] = {}
        self.registers = min(REGISTERS // threads, 255) // 8 * 8
        self.free_registers = 0  # only what its own warps give back: not what the multiprocessor has beside
        self.warps = [Warp(self, i, machine.program, machine.rng) for i in range(threads // 32)]

    def new_mma_queue(self, warp: Warp) -> Queue:
        queue = Queue(warp)
        self.machine.queues.append(queue)
        return queue

    def pipe(self, warp: Warp, lane: int) -> tcgen05.Pipe:
        """The pipe of matrix products of tensor memory that a thread issues.

        Raises:
            UnsupportedError: too many threads have one.
        """
        if (warp.index, lane) not in self.pipes:
            if len(self.pipes) == PIPES:
                raise UnsupportedError(f"more than {PIPES} threads that multiply")
            pipe = tcgen05.Pipe(self, self.shared.warps + len(self.pipes))
            self.pipes[warp.index, lane] = pipe
            self.machine.queues.append(pipe)
        return self.pipes[warp.index, lane]

    def check_end(self) -> None:
        """All threads have ended."""
        if self.tensor_memory.allocations:
            raise AllocationError(f"block {self.index} ends with tensor memory that is not freed")
        if not all(pipe.idle for pipe in self.pipes.values()):
            raise InFlightError(f"block {self.index} ends before all of its products of tensor memory are committed")


class Machine:
    """A GPU with one kernel. ``memory`` holds the arrays that it may reach.

    ``rules`` are those of :class:`ptx.rules.Rules` that are not as they are by default. ``most``: instructions of all
    warps after which a kernel counts as endless.

    >>> import numpy as np
    >>> machine = Machine('''.entry f(.param .u64 p) {
    ...     .reg .b64 %rd<2>;
    ...     .reg .b32 %r<2>;
    ...     ld.param.u64 %rd1, [p];
    ...     mov.u32 %r1, %tid.x;
    ...     st.global.u32 [%rd1], %r1;
    ...     ret; }''')
    >>> numbers = np.zeros(1, np.uint32)
    >>> machine.launch(1, 32, 0, [np.uint64(machine.memory.add("numbers", numbers)).tobytes()])
    """

    def __init__(self, kernel: str | Kernel, seed: int = 0, *, most: int = 10**8, **rules: bool) -> None:
        self.kernel = parse(kernel) if isinstance(kernel, str) else kernel
        self.rng, self.random = np.random.default_rng(seed), random.Random(seed)
        self.memory, self.params = Space(0x7F3A_0000_0000), Space(0x4000_0000)
        self.rules = Rules(**rules)
        self.maps: dict[int, TensorMap] = {}
        self.queues: list[Queue | tcgen05.Pipe] = []
        self.under_way: list[Copy] = []
        self.forms: set[tcgen05.Form] = set()
        """Kinds of products of tensor memory that there were."""
        self.executed, self.most = 0, most
        self.atomics = 0
        self.warp_products = 0
        """Atomics in global memory that there were."""
        self.grid: list[Block] = []
        self.program: Program

    def tensor(self, address: int) -> TensorMap:
        """The tensor map at an address."""
        if address not in self.maps:
            raise DescriptorError(f"no tensor map at {address:#x}")
        return self.maps[address]

    def launch(
        self,
        blocks: int,
        threads: int,
        shared: int,
        arguments: Sequence[bytes],
        maps: Mapping[tuple[int, int], TensorMap] | None = None,
    ) -> None:
        """Runs the kernel to its end. ``maps`` are tensor maps by argument and byte in it.

        Raises:
            PtxError: one of its kinds, for each kind of fault of the kernel.
        """
        if (threads % 128 and threads != 32) or len(arguments) != len(self.kernel.params):
            raise ValueError(f"{threads} threads, {len(arguments)} arguments")
        symbols = dict.fromkeys(self.kernel.shared, SHARED_BASE) | dict.fromkeys(self.kernel.variables, NOWHERE)
        for index, ((name, size, _), argument) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            if size != len(argument):
                raise ValueError(f"{name}: {len(argument)} bytes instead of {size}")
            symbols[name] = self.params.add(name, np.frombuffer(argument, np.uint8).copy())
            offsets = {at: each for (of, at), each in (maps or {}).items() if of == index}
            self.maps |= {symbols[name] + at: each for at, each in offsets.items()}
        with np.errstate(all="ignore"):
            self.program = Program(self.kernel, symbols)
            self.grid = [Block(self, index, blocks, threads, shared) for index in range(blocks)]
            self._run([warp for block in self.grid for warp in block.warps])
        if any(block.mma_log for block in self.grid):
            raise DivergenceError("some warps of a warpgroup have issued fewer matrix products than others")

    def _run(self, warps: list[Warp]) -> None:
        patience = self.random.choice([0.05, 0.4, 0.8])  # of a turn to see some work of the engines done
        left, turn = list(warps), 0
        while left:
            if turn % TURNS == 0:
                speed = {id(warp): self.random.choice([1, 1, 3, 20]) for warp in warps}
            turn += 1
            ready = [warp for warp in left if warp.waiting is None or warp.waiting.ready()]
            if ready:
                warp = self.random.choices(ready, [speed[id(warp)] for warp in ready])[0]
                self.executed += warp.run(self.random.choice([1, 10, 100, 1000]))
                if self.executed > self.most:
                    raise DeadlockError(f"{warp} is still running after {self.executed} instructions")
                if warp.done:
                    left.remove(warp)
                    self._check_end(warp)
                    if warp.block not in [other.block for other in left]:
                        warp.block.check_end()
            elif not self._advance():
                lines = [f"  {warp} at line {warp.step.source.line}: {warp.waiting}" for warp in left if warp.waiting]
                raise DeadlockError("\n".join(["nothing can go on:", *lines]))
            while self.random.random() < patience and self._advance():
                pass
        while self._advance():
            pass

    def _advance(self) -> bool:
        """Lets one copy or one product under way make progress; whether there was any."""
        work: list[Callable[[], None]] = [copy.advance for copy in self.under_way]
        work += [queue.advance for queue in self.queues if not queue.idle]
        if not work:
            return False
        self.random.choice(work)()
        self.under_way = [copy for copy in self.under_way if not copy.finished]
        return True

    @staticmethod
    def _check_end(warp: Warp) -> None:
        if any(groups.unread for groups in warp.stores.values()):
            raise InFlightError(f"{warp} ends before its tensor stores have read shared memory")
        if warp.in_flight:
            raise InFlightError(f"{warp} ends with matrix products, or loads of tensor memory, in flight")
        if warp.tensor_stores:
            raise InFlightError(f"{warp} ends with stores to tensor memory in flight")
