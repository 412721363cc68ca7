"""Matrix products of warpgroups: 64 rows of A times 16 columns of it, N columns of B.

Each warp computes its own 16 rows, some time between its instruction and the wait for it. Results are in registers
after the wait; until then these hold poison, and no other instruction may touch them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.errors import DescriptorError, DivergenceError, InFlightError
from ptx.operands import K, Layout, field, places, widen

if TYPE_CHECKING:
    from ptx.warp import Warp

ROWS = 16
"""Rows of one warp."""
FIELDS = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62
"""Bits of a descriptor that mean something."""
ACCUMULATOR, OPERAND = "an accumulator in flight", "an operand in flight"
SPANS = {1: 128, 2: 64, 3: 32}


@functools.cache
def decoded(descriptor: int) -> Layout:
    """An operand in shared memory.

    Raises:
        DescriptorError: unknown bits.
    """
    if descriptor & ~FIELDS:
        raise DescriptorError(f"descriptor {descriptor:#x} has bits that mean nothing")
    if field(descriptor, 62, 2) not in SPANS or field(descriptor, 49, 3):
        raise DescriptorError(f"descriptor {descriptor:#x}: without swizzle, or with a base offset")
    start, leading, stride = (field(descriptor, first, 14) << 4 for first in (0, 16, 32))
    return Layout(start, leading, stride, SPANS[field(descriptor, 62, 2)])


class Registers:
    """Registers of an operand, by their places in the file; see :func:`registers`."""

    def __init__(self, places: tuple[int, ...]) -> None:
        self.rows, self.places = np.array(places), frozenset(places)
        self.accumulators = {(4, place): ACCUMULATOR for place in places}
        """What nobody else may touch while they are an accumulator in flight, and why."""
        self.operands = {(4, place): OPERAND for place in places}


@functools.cache
def registers(*places: int) -> Registers:
    """The same object for the same places."""
    return Registers(places)


def to_matrix(fragment: np.ndarray) -> np.ndarray:
    """Accumulator registers ``[N / 2, 32]`` as ``[16, N]``."""
    return fragment.reshape(-1, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2).reshape(ROWS, -1)


def to_fragment(matrix: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_matrix`."""
    return matrix.reshape(2, 8, -1, 4, 2).transpose(2, 0, 4, 1, 3).reshape(-1, 32)


def operand_matrix(registers: np.ndarray, float16: bool) -> Any:
    """Registers of A, ``[4, 32]``, as ``[16, 16]``: an accumulator of 16 columns, two of them in each."""
    halves = (
        np.ascontiguousarray(registers.T).view(np.uint16).reshape(8, 4, 2, 2, 2)
    )  # row, column, piece, 8 rows, pair
    return widen(np.ascontiguousarray(halves.transpose(3, 0, 2, 1, 4)).reshape(ROWS, K), float16)


@dataclass(frozen=True)
class Shape:
    """What the opcode and the constants of an instruction say."""

    columns: int
    float16: bool
    transposed_a: bool
    transposed_b: bool
    sign: int


class Product:
    """One instruction under way: ``to`` are the registers of its accumulator, ``inputs`` those of A, if it has some."""

    def __init__(self, warp: Warp, shape: Shape, to: Registers, a: Registers | int, b: int, accumulate: bool) -> None:
        self.shape, self.to, self.accumulate = shape, to, accumulate
        self.inputs = None if isinstance(a, int) else a
        self.shared, self.done = warp.block.shared, False
        memory = self.shared.region
        second = places(decoded(b), 0, shape.columns, shape.transposed_b).inside(memory)
        self._a: np.ndarray | None = None
        self._b = second.elements
        if isinstance(a, int):
            first = places(decoded(a), warp.index % 4 * ROWS, ROWS, shape.transposed_a).inside(memory)
            self._a = first.elements
        else:
            self._registers = operand_matrix(warp.file.take(a.rows, 0), shape.float16)
        self.reads = [self.shared.begin_async_read(warp, second.words, "matrix product")]
        if isinstance(a, int):  # rows of A that nobody wrote make the same rows of the result poison
            read = self.shared.begin_async_read(warp, first.words, "matrix product", complete=False)
            self.reads.append(read)

    def compute(self, accumulator: np.ndarray) -> Any:
        memory = self.shared.region.view(2)
        a = self._registers if self._a is None else widen(memory[self._a], self.shape.float16)
        product = a @ widen(memory[self._b], self.shape.float16).T
        if self.shape.sign < 0:
            product = -product
        return accumulator + product if self.accumulate else product


class Queue:
    """The products of one warp, in order, in groups."""

    def __init__(self, warp: Warp) -> None:
        self.warp = warp
        self.open: list[Product] = []
        self.groups: list[list[Product]] = []
        self._todo: list[Product] = []
        self._values: dict[Registers, np.ndarray] = {}
        self._operands: set[int] = set()
        """Places of registers that are operands in flight."""
        self._fenced: np.ndarray | None = None
        self._count = 0

    @property
    def idle(self) -> bool:
        return not self._todo

    def fence(self) -> None:
        """Registers as they are now may be used by products."""
        self._fenced = self.warp.file[: self.warp.mma_registers].copy()

    def issue(self, site: int, shape: Shape, to: Registers, a: Registers | int, b: int, accumulate: bool) -> None:
        """Begins a product. ``a`` is a descriptor, or 4 registers."""
        self._agree((site, a if isinstance(a, int) else -1, b, accumulate))
        self._check_registers(to, a)
        file = self.warp.file
        product = Product(self.warp, shape, to, a, b, accumulate)
        if to not in self._values:
            self._values[to] = to_matrix(file.take(to.rows, 0).view(np.float32))
            file[to.rows] = 0xFFFFFFFF
        self.open.append(product)
        self._todo.append(product)
        self._hold(product)

    def _hold(self, product: Product) -> None:
        """Nobody else may touch the registers of a product."""
        self.warp.in_flight |= product.to.accumulators
        if product.inputs:
            self.warp.in_flight |= product.inputs.operands
            self._operands |= product.inputs.places

    def _agree(self, call: tuple[object, ...]) -> None:
        """The four warps of a warpgroup must issue the same products."""
        log = self.warp.block.mma_log
        key = self.warp.index // 4, self._count
        self._count += 1
        first, seen = log.setdefault(key, (call, 0))
        if first != call:
            raise DivergenceError(f"warps of a warpgroup issue different products: {call} and {first}")
        log[key] = first, seen + 1
        if seen == 3:
            del log[key]

    def _check_registers(self, to: Registers, a: Registers | int) -> None:
        for other in self._values:
            if other is not to and not to.places.isdisjoint(other.places):
                raise InFlightError("two accumulators in flight share registers")
            if not isinstance(a, int) and not a.places.isdisjoint(other.places):
                raise InFlightError("an operand is an accumulator in flight")
        if not to.places.isdisjoint(self._operands):
            raise InFlightError("an accumulator is an operand in flight")
        used = [] if isinstance(a, int) else [a.rows]
        if to not in self._values:
            used.append(to.rows)
        old, new = self._fenced, self.warp.file
        if old is None or any(old.take(rows, 0).tobytes() != new.take(rows, 0).tobytes() for rows in used):
            raise InFlightError("registers of a product have changed since the last wgmma.fence")

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def advance(self) -> None:
        """Computes the next product."""
        product = self._todo.pop(0)
        self._values[product.to] = product.compute(self._values[product.to])
        product.done = True

    def complete(self, allowed: int) -> bool:
        """Whether all groups but the last ``allowed`` ones are computed, which are computed in order."""
        old = self.groups[: max(len(self.groups) - allowed, 0)]
        return next((group[-1].done for group in reversed(old) if group), True)

    def retire(self, allowed: int) -> None:
        """The warp has waited: results of these groups come into registers."""
        count = max(len(self.groups) - allowed, 0)
        old, self.groups = self.groups[:count], self.groups[count:]
        left = [product for group in (*self.groups, self.open) for product in group]
        retired = [product for group in old for product in group]
        self.warp.block.shared.end_async_reads(self.warp, [read for product in retired for read in product.reads])
        for to in {product.to for product in retired} - {product.to for product in left}:
            bits = to_fragment(self._values.pop(to)).astype(np.float32).view(np.uint32)
            self.warp.file[to.rows] = bits
            if self._fenced is not None:
                self._fenced[to.rows] = bits
        self.warp.in_flight, self._operands = {}, set()
        for product in left:
            self._hold(product)
