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


@functools.cache
def row_set(key: bytes) -> frozenset[int]:
    """The places of registers in the bytes of an array of them."""
    return frozenset(np.frombuffer(key, np.int64).tolist())


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
    """One instruction under way. ``rows`` are the places of its accumulator in the file of registers."""

    def __init__(
        self, warp: Warp, shape: Shape, rows: np.ndarray, a: np.ndarray | int, b: int, accumulate: bool
    ) -> None:
        self.shape, self.rows, self.accumulate = shape, rows, accumulate
        self.inputs = [] if isinstance(a, int) else a.tolist()
        self.shared = warp.block.shared
        self.reads: list[np.ndarray] = []
        self.done = False
        self._a: np.ndarray | None = None
        self._b = self._elements(b, 0, shape.columns, shape.transposed_b)
        if isinstance(a, int):
            self._a = self._elements(a, warp.index % 4 * ROWS, ROWS, shape.transposed_a)
        else:
            self._registers = operand_matrix(warp.file[a], shape.float16)
        for i, words in enumerate(self.reads):  # rows of A that nobody wrote make the same rows of the result poison
            self.shared.begin_async_read(warp, words, "matrix product", complete=i == 0)

    @property
    def holds(self) -> dict[tuple[int, int], str]:
        """Registers that nobody else may touch, and why."""
        accumulator = {(4, row): ACCUMULATOR for row in self.rows.tolist()}
        return accumulator | {(4, row): OPERAND for row in self.inputs}

    def _elements(self, descriptor: int, first: int, rows: int, transposed: bool) -> np.ndarray:
        addresses, words = places(decoded(descriptor), first, rows, transposed)
        self.reads.append(self.shared.region.elements(words, 4))
        return (addresses - self.shared.region.base) // 2

    def compute(self, accumulator: np.ndarray) -> Any:
        memory = self.shared.region.view(2)
        a = self._registers if self._a is None else widen(memory[self._a], self.shape.float16)
        product = self.shape.sign * (a @ widen(memory[self._b], self.shape.float16).T)
        return accumulator + product if self.accumulate else product


class Queue:
    """The products of one warp, in order, in groups."""

    def __init__(self, warp: Warp) -> None:
        self.warp = warp
        self.open: list[Product] = []
        self.groups: list[list[Product]] = []
        self._todo: list[Product] = []
        self._values: dict[bytes, np.ndarray] = {}
        self._fenced: np.ndarray | None = None
        self._count = 0

    @property
    def idle(self) -> bool:
        return not self._todo

    def fence(self) -> None:
        """Registers as they are now may be used by products."""
        self._fenced = self.warp.file[: self.warp.mma_registers].copy()

    def issue(self, site: int, shape: Shape, rows: np.ndarray, a: np.ndarray | int, b: int, accumulate: bool) -> None:
        """Begins a product. ``a`` is a descriptor, or the places of 4 registers."""
        self._agree((site, a if isinstance(a, int) else -1, b, accumulate))
        key = rows.tobytes()
        self._check_registers(rows, key, a)
        file = self.warp.file
        product = Product(self.warp, shape, rows, a, b, accumulate)
        if key not in self._values:
            self._values[key] = to_matrix(file[rows].view(np.float32))
            file[rows] = 0xFFFFFFFF
        self.open.append(product)
        self._todo.append(product)
        self.warp.in_flight |= product.holds

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

    def _check_registers(self, rows: np.ndarray, key: bytes, a: np.ndarray | int) -> None:
        mine, inputs = row_set(key), frozenset(() if isinstance(a, int) else a.tolist())
        for other in self._values:
            if other != key and not mine.isdisjoint(row_set(other)):
                raise InFlightError("two accumulators in flight share registers")
            if not inputs.isdisjoint(row_set(other)):
                raise InFlightError("an operand is an accumulator in flight")
        if any(why == OPERAND and row in mine for (_, row), why in self.warp.in_flight.items()):
            raise InFlightError("an accumulator is an operand in flight")
        used = sorted(inputs if key in self._values else mine | inputs)
        if self._fenced is None or not np.array_equal(self._fenced[used], self.warp.file[used]):
            raise InFlightError("registers of a product have changed since the last wgmma.fence")

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def advance(self) -> None:
        """Computes the next product."""
        product = self._todo.pop(0)
        key = product.rows.tobytes()
        self._values[key] = product.compute(self._values[key])
        product.done = True

    def complete(self, allowed: int) -> bool:
        """Whether all groups but the last ``allowed`` ones are computed."""
        old = self.groups[: max(len(self.groups) - allowed, 0)]
        return all(product.done for group in old for product in group)

    def retire(self, allowed: int) -> None:
        """The warp has waited: results of these groups come into registers."""
        count = max(len(self.groups) - allowed, 0)
        old, self.groups = self.groups[:count], self.groups[count:]
        left = [product for group in (*self.groups, self.open) for product in group]
        busy = {product.rows.tobytes() for product in left}
        retired = [product for group in old for product in group]
        self.warp.block.shared.end_async_reads(self.warp, [words for product in retired for words in product.reads])
        for product in retired:
            key = product.rows.tobytes()
            if key not in busy and key in self._values:
                bits = to_fragment(self._values.pop(key)).astype(np.float32).view(np.uint32)
                self.warp.file[product.rows] = bits
                if self._fenced is not None:
                    self._fenced[product.rows] = bits
        self._release(left)

    def _release(self, left: list[Product]) -> None:
        flying: dict[tuple[int, int], str] = {}
        for product in left:
            flying |= product.holds
        self.warp.in_flight = flying
