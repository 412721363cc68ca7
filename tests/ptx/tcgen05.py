"""Matrix products of tensor memory, 128 rows of A times N columns of B that one thread issues; loads and stores.

The products of one thread are done one after the other, any time after they were issued; a commit is one more thing in
this line, an arrival. Loads and stores of a warp are done when it waits for them.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ptx.access import addresses, pointer
from ptx.barriers import MBarrier
from ptx.errors import (
    AllocationError,
    ArrivalError,
    DescriptorError,
    OutOfBoundsError,
    UnsupportedError,
    UnsupportedValueError,
)
from ptx.memory import FUTURE
from ptx.operands import E4M3, K, Layout, field, places, widen
from ptx.parse import Address, Instruction, Vector
from ptx.program import Program, Run, opcode
from ptx.sync import register_places, uniform
from ptx.tmem import COLUMNS, LANES, LOADING, QUARTER, Area
from ptx.warp import Warp

if TYPE_CHECKING:
    from ptx.machine import Block

SPANS = {2: 128, 4: 64, 6: 32}
ONES = 1 << 46
"""The bits of an operand's descriptor that are always there."""
FIELDS = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 46 | 7 << 49 | 1 << 52 | 7 << 61


@functools.cache
def decoded(descriptor: int) -> Layout:
    """An operand in shared memory.

    Raises:
        DescriptorError: bits that mean nothing, or that the hardware would not take.
        UnsupportedValueError: no swizzle, one of 32-byte pieces, a base offset, an absolute leading dimension.
    """
    if descriptor & ~FIELDS or field(descriptor, 46, 3) != 1:
        raise DescriptorError(f"descriptor {descriptor:#x} has bits that mean nothing, or lacks some")
    kind = field(descriptor, 61, 3)
    if kind not in (0, 1, *SPANS):
        raise DescriptorError(f"descriptor {descriptor:#x}: no swizzle has the number {kind}")
    if kind not in SPANS or field(descriptor, 49, 4):
        raise UnsupportedValueError(
            f"descriptor {descriptor:#x}: swizzle {kind}, base offset or mode of the leading dimension"
        )
    start, leading, stride = (field(descriptor, first, 14) << 4 for first in (0, 16, 32))
    return Layout(start, leading, stride, SPANS[kind])


class Shape(NamedTuple):
    """What an instruction descriptor says. ``float8``: e4m3, which is of ``kind::f8f6f4``."""

    rows: int
    columns: int
    float16: bool
    transposed_a: bool
    transposed_b: bool
    sign: int
    float8: bool = False

    @property
    def size(self) -> int:
        """Bytes of an element of A and of B."""
        return 1 if self.float8 else 2

    def floats(self, elements: np.ndarray) -> Any:
        """Elements of A or of B as float32."""
        return E4M3[elements] if self.float8 else widen(elements, self.float16)


TYPES = {"kind::f16": (0, 1), "kind::f8f6f4": (0, 1, 3, 4, 5)}
"""Types of operands by kind: float16, bfloat16; e4m3, e5m2 and those of fewer bits."""


@functools.cache
def shape(bits: int, kind: str = "kind::f16") -> Shape:
    """The shape of an instruction descriptor.

    Raises:
        DescriptorError: bits that mean nothing, or a size or a type that the hardware would not take.
        UnsupportedValueError: sparse operands, 64 rows, an accumulator of 16-bit floats, operands of two types,
            8 bits but e4m3.
    """
    accumulator, a, b = field(bits, 4, 2), field(bits, 7, 3), field(bits, 10, 3)
    columns, rows = field(bits, 17, 6) << 3, field(bits, 24, 5) << 4
    if bits >> 32 or bits & (1 << 6 | 1 << 23 | 1 << 29) or field(bits, 30, 2) or field(bits, 3, 1):
        raise DescriptorError(f"instruction descriptor {bits:#x}: bits that mean nothing")
    float8 = kind == "kind::f8f6f4"
    if accumulator > 1 or accumulator < float8 or a not in TYPES[kind] or b not in TYPES[kind]:
        raise DescriptorError(f"instruction descriptor {bits:#x}: types {accumulator}, {a}, {b}")
    if rows not in (64, 128) or not 8 <= columns <= 256 or columns % (16 if rows == 128 else 8):
        raise DescriptorError(f"instruction descriptor {bits:#x}: {rows} rows, {columns} columns")
    if field(bits, 0, 3) or accumulator == 0 or rows == 64 or a != b or (float8 and a):
        raise UnsupportedValueError(
            f"instruction descriptor {bits:#x}: sparse, or 64 rows, or types {accumulator}, {a}, {b}"
        )
    sign = (-1) ** (field(bits, 13, 1) + field(bits, 14, 1))
    float16 = a == 0 and not float8
    return Shape(rows, columns, float16, bool(field(bits, 15, 1)), bool(field(bits, 16, 1)), sign, float8)


class Form(NamedTuple):
    """What descriptors of a product say, but for addresses: span and stride of operands, 0 of one in tensor memory."""

    shape: Shape
    a: tuple[int, int]
    b: tuple[int, int]
    leading: int
    """Of B, 0 where its rows have one piece."""

    @classmethod
    def of(cls, facts: Shape, a: Layout | int, b: Layout) -> Form:
        pieces = facts.transposed_b and facts.size * facts.columns > b.span
        first = (a.span, a.stride) if isinstance(a, Layout) else (0, 0)
        return cls(facts, first, (b.span, b.stride), b.leading if pieces else 0)


class Product:
    """One instruction under way. ``a`` and ``b`` are places of elements, ``[rows, K]``; ``a`` may be an area."""

    def __init__(
        self, pipe: Pipe, shape: Shape, to: Area, a: np.ndarray | Area, b: np.ndarray, accumulate: bool, off: np.ndarray
    ) -> None:
        self.pipe, self.shape, self.to, self.a, self.b = pipe, shape, to, a, b
        self.accumulate, self.off = accumulate, off

    def advance(self) -> None:
        block = self.pipe.block
        memory, values, floats = (
            block.shared.region.view(self.shape.size),
            block.tensor_memory.values,
            self.shape.floats,
        )
        if isinstance(self.a, Area):
            a = floats(np.ascontiguousarray(values[self.a.where]).view(memory.dtype))
        else:
            a = floats(memory[self.a])
        with np.errstate(all="ignore"):
            product = self.shape.sign * (a @ floats(memory[self.b]).T)
            target = values[self.to.where].view(np.float32)
            result = target + product if self.accumulate else product
        if self.off.any():
            result = np.where(self.off[:, None], target, result)
        values[self.to.where] = result.view(np.uint32)


class Commit(NamedTuple):
    """An arrival at a barrier once everything before it in its pipe is done."""

    barrier: MBarrier
    message: np.ndarray
    where: str

    def advance(self) -> None:
        try:
            self.barrier.arrive(self.message)
        except ArrivalError as error:
            error.args = (f"{error}\n  {self.where}",)
            raise


class Pipe:
    """The products and commits of one thread, in order. ``agent`` is its number, ``count`` its time."""

    def __init__(self, block: Block, agent: int) -> None:
        self.block, self.agent, self.count = block, agent, 0
        self._todo: deque[Product | Commit] = deque()
        self._keys: list[object] = [None]

    @property
    def idle(self) -> bool:
        return not self._todo

    def multiply(
        self, warp: Warp, facts: Shape, to: int, a: Layout | int, b: Layout, accumulate: bool, off: np.ndarray
    ) -> None:
        """Begins a product. ``a`` is in shared memory, or an address of tensor memory; ``off``: lanes left alone."""
        memory = self.block.tensor_memory
        target = Area(to, facts.rows, facts.columns)
        self.count += 1
        self.block.machine.forms.add(Form.of(facts, a, b))
        self._keys.append((to, facts))
        known, excuse = warp.tensor.known.copy(), None
        if self.block.machine.rules.same_shape_only:
            excuse = self._same_shape
        else:
            known[self.agent] = self.count
        first: np.ndarray | Area
        if isinstance(a, Layout):
            first = self._operand(warp, a, facts.rows, facts.transposed_a, facts.size, complete=False)
        else:
            if facts.transposed_a:
                raise DescriptorError("an operand in tensor memory cannot be transposed")
            first = Area(a, facts.rows, K // 2)  # 32 bytes: two or four elements in a column
            memory.check(known, first, "product", write=False, excuse=excuse)
        second = self._operand(warp, b, facts.columns, facts.transposed_b, facts.size, complete=True)
        if accumulate or off.any():
            memory.check(known, target, "product", write=False, excuse=excuse)
        memory.check(known, target, "product", write=True, excuse=excuse)
        if isinstance(first, Area):
            memory.note(first, self.agent, self.count, write=False)
        memory.note(target, self.agent, self.count, write=True)
        self._todo.append(Product(self, facts, target, first, second, accumulate, off))
        warp.note("multiply", [to])

    def _same_shape(self, agents: np.ndarray, times: np.ndarray) -> bool:
        """Whether accesses are only those of products with the accumulator and the shape of the last one."""
        return bool((agents == self.agent).all()) and {self._keys[time] for time in times} == {self._keys[-1]}

    def _operand(
        self, warp: Warp, layout: Layout, rows: int, transposed: bool, size: int, complete: bool
    ) -> np.ndarray:
        shared = self.block.shared
        found = places(layout, 0, rows, transposed, size).inside(shared.region)
        shared.async_read(warp, found.words, "matrix product", self.agent, self.count, complete=complete)
        return found.elements

    def commit(self, warp: Warp, barrier: MBarrier, where: str) -> None:
        """An arrival tells what the thread knows, and all of its products so far."""
        told = warp.tensor.before()
        told[self.agent] = self.count
        message = np.concatenate((warp.release()[: len(warp.clock)], told))
        message[self.agent] = self.count
        self._todo.append(Commit(barrier, message, where))
        warp.note("commit", [barrier.address])

    def advance(self) -> None:
        """Does the next thing."""
        self._todo.popleft().advance()


# ---- allocation


@opcode("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32", "tcgen05.alloc.cta_group::1.sync.aligned.b32")
def allocate(program: Program, ins: Instruction) -> Run:
    slot, offset = pointer(program, ins.operands[0])
    count = program.slot(ins.operands[1], np.uint32)

    def run(w: Warp) -> None:
        if not w.together("tcgen05.alloc"):
            return
        memory, shared = w.block.tensor_memory, w.block.shared
        columns = uniform(w.slots[count], "the number of columns")
        if columns not in (32, 64, 128, 256, COLUMNS) or memory.relinquished:
            raise AllocationError(f"{columns} columns, or permit given back: {memory.relinquished}")
        places = memory.places(columns)
        if not places:
            w.wait(lambda: bool(memory.places(columns)), f"{columns} columns of tensor memory")
            return
        to = np.array([uniform(addresses(w, slot, offset), "where the address goes")])
        words = shared.words(to, 4)
        shared.plain_write(w, words, w.threads[:1])
        start = w.block.machine.random.choice(places)
        memory.allocate(w, start, columns)
        shared.region.view(4)[words] = start

    return run


@opcode("tcgen05.dealloc.cta_group::1.sync.aligned.b32")
def free(program: Program, ins: Instruction) -> Run:
    address, count = (program.slot(operand, np.uint32) for operand in ins.operands)

    def run(w: Warp) -> None:
        if w.together("tcgen05.dealloc"):
            start, columns = uniform(w.slots[address], "an address"), uniform(w.slots[count], "the number of columns")
            w.block.tensor_memory.free(w, start, columns)

    return run


@opcode("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned")
def relinquish(program: Program, ins: Instruction) -> Run:
    def run(w: Warp) -> None:
        if w.together("tcgen05.relinquish_alloc_permit"):
            w.block.tensor_memory.relinquished = True

    return run


# ---- order between threads


@opcode("tcgen05.fence::before_thread_sync")
def fence_before(program: Program, ins: Instruction) -> Run:
    def run(w: Warp) -> None:
        w.tensor.told = w.tensor.before()

    return run


@opcode("tcgen05.fence::after_thread_sync")
def fence_after(program: Program, ins: Instruction) -> Run:
    def run(w: Warp) -> None:
        w.tensor.after()

    return run


@opcode("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64",
        "tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64")  # fmt: skip
def commit(program: Program, ins: Instruction) -> Run:
    slot, offset = pointer(program, ins.operands[0])

    def run(w: Warp) -> None:
        lane = w.lane("tcgen05.commit")
        barrier = w.block.shared.barrier(w, int(addresses(w, slot, offset)[0]))
        w.block.pipe(w, lane).commit(w, barrier, f"{w} at line {ins.line}, {ins.text[:110]}")

    return run


# ---- products

HINTS = {"collector::a::fill", "collector::a::discard", "collector::a::lastuse"}


@opcode(*[f"tcgen05.mma.cta_group::1.{kind}" for kind in TYPES])
def multiply(program: Program, ins: Instruction) -> Run:
    kind = ins.parts[3]
    if not set(ins.parts[4:]) <= HINTS:
        raise UnsupportedError(ins.opcode)
    to, a, b, instruction, *off, accumulate = ins.operands
    target, target_offset = pointer(program, to)
    in_memory = isinstance(a, Address)
    first, first_offset = pointer(program, a) if in_memory else (program.slot(a, np.uint64), 0)
    second, bits = program.slot(b, np.uint64), program.slot(instruction, np.uint32)
    predicate = program.slot(accumulate, np.bool_)
    if len(off) > 1 or any(not isinstance(item, Vector) or len(item.items) != LANES // 32 for item in off):
        raise UnsupportedError(ins.text)
    masks = [program.slot(item, np.uint32) for vector in off for item in vector.items]  # type: ignore[union-attr]

    def run(w: Warp) -> None:
        lane = w.lane("tcgen05.mma")

        def value(slot: int) -> int:
            return int(w.slots[slot][lane])

        off = np.zeros(LANES, np.bool_)
        for i, mask in enumerate(masks):
            off[32 * i : 32 * i + 32] = value(mask) >> np.arange(32) & 1
        x = value(first) + first_offset if in_memory else decoded(value(first))
        at, y = value(target) + target_offset, decoded(value(second))
        w.block.pipe(w, lane).multiply(w, shape(value(bits), kind), at, x, y, bool(value(predicate)), off)

    return run


# ---- loads and stores


def _repeats(ins: Instruction, registers: int) -> int:
    """Columns of ``32x32b.xN``, one register each."""
    found = re.fullmatch(r"tcgen05\.(?:ld|st)\.sync\.aligned\.32x32b\.x(1|2|4|8|16|32|64|128)\.b32", ins.opcode)
    if found is None or int(found[1]) != registers:
        raise UnsupportedError(ins.opcode)
    return registers


def _rows(program: Program, operand: Any) -> np.ndarray:
    return register_places(program, operand if isinstance(operand, Vector) else Vector((operand,))).rows


def _area(w: Warp, slot: int, offset: int, columns: int) -> Area:
    """The lanes of a warp, which are those of its place in its warpgroup."""
    at = uniform(w.slots[slot], "an address of tensor memory") + offset
    if at >> 16 != w.index % 4 * QUARTER:
        raise OutOfBoundsError(f"lane {at >> 16} of tensor memory, which warp {w.index} cannot reach")
    return Area(at, QUARTER, columns)


@opcode("tcgen05.ld.sync.aligned.32x32b")
def load(program: Program, ins: Instruction) -> Run:
    rows = _rows(program, ins.operands[0])
    columns = _repeats(ins, len(rows))
    slot, offset = pointer(program, ins.operands[1])
    if len(set(rows.tolist())) != columns:
        raise UnsupportedError("a register that is loaded twice")

    def run(w: Warp) -> None:
        if not w.together("tcgen05.ld"):
            return
        area, memory = _area(w, slot, offset, columns), w.block.tensor_memory
        memory.check(w.tensor.known, area, "load", write=False)
        memory.note(area, w.index, FUTURE, write=False)
        w.tensor_loads.append((area, rows, memory.values[area.where].T.copy()))
        w.file[rows] = 0xFFFFFFFF
        w.in_flight |= {(4, row): LOADING for row in rows.tolist()}

    return run


@opcode("tcgen05.st.sync.aligned.32x32b")
def store(program: Program, ins: Instruction) -> Run:
    slot, offset = pointer(program, ins.operands[0])
    rows = _rows(program, ins.operands[1])
    columns = _repeats(ins, len(rows))

    def run(w: Warp) -> None:
        if not w.together("tcgen05.st"):
            return
        area, memory = _area(w, slot, offset, columns), w.block.tensor_memory
        memory.check(w.tensor.known, area, "store", write=True)
        memory.values[area.where] = w.file[rows].T
        if w.block.machine.rules.store_waits:
            memory.note(area, w.index, FUTURE, write=True)
            w.tensor_stores.append(area)
        else:
            memory.note(area, w.index, int(w.tensor.known[w.index]), write=True)
        memory.stores[w.index] += 1

    return run


@opcode("tcgen05.wait::ld.sync.aligned")
def wait_loads(program: Program, ins: Instruction) -> Run:
    def run(w: Warp) -> None:
        if not w.together("tcgen05.wait::ld"):
            return
        w.finish_loads(w.tensor_loads)

    return run


@opcode("tcgen05.wait::st.sync.aligned")
def wait_stores(program: Program, ins: Instruction) -> Run:
    def run(w: Warp) -> None:
        if not w.together("tcgen05.wait::st"):
            return
        for area in w.tensor_stores:
            w.block.tensor_memory.note(area, w.index, int(w.tensor.known[w.index]), write=True)
        w.tensor_stores.clear()

    return run
