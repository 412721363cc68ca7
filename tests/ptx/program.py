"""A kernel made ready to run: registers have places in files of arrays, instructions are Python functions.

Operands become slots, which are NumPy arrays of 32 lanes in a list of the warp: views of registers in the type that an
instruction asks for, constants, special registers. A function of an instruction takes the warp and works on its slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.errors import UnsupportedError
from ptx.parse import Address, Imm, Instruction, Kernel, Operand, Reg, Symbol, Vector

if TYPE_CHECKING:
    from ptx.warp import Warp

LANES = 32
Run = Callable[["Warp"], None]
Build = Callable[["Program", Instruction], Run]

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": getattr(np, f"uint{bits}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
    "f32": np.float32,
    "f64": np.float64,
}
FILES: dict[int, Any] = {1: np.bool_, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Type of the registers of each size in bytes; predicates are the only ones of one byte."""
FIXED = {
    **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z", "%cluster_ctarank"), 0),
    **dict.fromkeys(("%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z"), 0),
    **dict.fromkeys(("%nctaid.y", "%nctaid.z"), 1),
}
"""Special registers that are always the same: grids have one dimension, clusters one block."""
SPECIAL = ("%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x", "%laneid", *FIXED)

BUILDERS: dict[str, Build] = {}
"""How each opcode is made ready, by its name: the longest name of which the opcode's parts start with."""


def opcode(*names: str) -> Callable[[Build], Build]:
    """Registers a builder for opcodes that start with one of the names."""

    def register(build: Build) -> Build:
        BUILDERS.update(dict.fromkeys(names, build))
        return build

    return register


def is_mma(instruction: Instruction) -> bool:
    """Whether it is a matrix product, the only one that may touch its registers while they are in flight."""
    return instruction.opcode.startswith("wgmma.mma_async")


@dataclass(frozen=True)
class Step:
    """One instruction, ready to run. ``touched`` are the places of its registers; a branch handles its own guard."""

    run: Run
    guard: int | None
    negated: bool
    touched: frozenset[tuple[int, int]]
    is_mma: bool
    source: Instruction


class Program:
    """The steps of a kernel. ``symbols`` are the addresses of parameters and variables.

    Raises:
        UnsupportedError: an instruction or an operand is not known.
    """

    def __init__(self, kernel: Kernel, symbols: Mapping[str, int]) -> None:
        self.kernel, self.symbols = kernel, symbols
        self.sizes = dict.fromkeys(FILES, 0)
        self.places: dict[str, tuple[int, int]] = {}
        products = [operand for ins in kernel.instructions if is_mma(ins) for operand in ins.operands]
        names = [item.name for operand in products if isinstance(operand, Vector) for item in operand.items]  # type: ignore[union-attr]
        # Registers of matrix products come first in the file, so that one slice has them all.
        self.mma_registers = len(set(names))
        for name, kind in {**{name: kernel.registers[name] for name in names}, **kernel.registers}.items():
            size = np.dtype(TYPES[kind]).itemsize
            self.places[name] = size, self.sizes[size]
            self.sizes[size] += 1
        self._slots: dict[tuple[Any, ...], int] = {}
        self.views: list[tuple[int, np.dtype[Any], int, int, slice]] = []
        """Slots that are registers: number, type, bytes, place in the file, and which of the elements in it."""
        self.constants: dict[int, np.ndarray] = {}
        self.special: dict[int, str] = {}
        self.steps = [self._step(instruction) for instruction in kernel.instructions]
        self.slot_count = len(self._slots)

    def _step(self, source: Instruction) -> Step:
        parts = source.parts
        names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        build = next((BUILDERS[name] for name in names if name in BUILDERS), None)
        if build is None:
            raise UnsupportedError(f"line {source.line}: {source.text[:100]}")
        try:
            run = build(self, source)
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise UnsupportedError(f"line {source.line}: {source.text[:100]} ({error!r})") from error
        guard = self.slot(source.guard[0], np.bool_) if source.guard and parts[0] != "bra" else None
        touched = frozenset(self._touched((*source.operands, *(source.guard or ())[:1])))
        negated = bool(source.guard and source.guard[1])
        return Step(run, guard, negated, touched, is_mma(source), source)

    def _touched(self, operands: tuple[Operand, ...]) -> list[tuple[int, int]]:
        found = []
        for operand in operands:
            if isinstance(operand, Reg) and operand.name in self.places:
                found.append(self.places[operand.name])
            elif isinstance(operand, Vector):
                found += self._touched(operand.items)
            elif isinstance(operand, Address):
                found += self._touched((operand.base, *(operand.coordinates.items if operand.coordinates else ())))
        return found

    def slot(self, operand: Operand, kind: Any) -> int:
        """The slot of a register, constant, special register or symbol in a type."""
        kind = np.dtype(kind)
        if isinstance(operand, Imm):
            return self._constant(_bits(operand, kind), kind)
        if isinstance(operand, Symbol):
            return self._constant(self.symbols[operand.name], kind)
        if not isinstance(operand, Reg):
            raise UnsupportedError(f"{operand} where a register or a constant belongs")
        if operand.name not in self.places:
            if operand.name not in SPECIAL:
                raise UnsupportedError(operand.name)
            return self._new((operand.name, kind), self.special, operand.name)
        size, _ = self.places[operand.name]
        if size != kind.itemsize:
            raise UnsupportedError(f"{operand.name} of {size} bytes as {kind}")
        return self._view(operand.name, kind, slice(None))

    def part(self, operand: Operand, kind: Any, index: int, count: int) -> int:
        """The slot of one of the ``count`` parts of a register: its bits from ``index`` times the type's size on."""
        if not isinstance(operand, Reg) or self.places[operand.name][0] != count * np.dtype(kind).itemsize:
            raise UnsupportedError(f"{operand} as {count} of {kind}")
        return self._view(operand.name, np.dtype(kind), slice(index, None, count))

    def packed(self, operand: Operand, kind: Any) -> int:
        """The slot of a register as small numbers side by side, those of lane 0 first."""
        if not isinstance(operand, Reg) or self.places[operand.name][0] % np.dtype(kind).itemsize:
            raise UnsupportedError(f"{operand} as a vector of {kind}")
        return self._view(operand.name, np.dtype(kind), slice(None))

    def _view(self, name: str, kind: np.dtype[Any], elements: slice) -> int:
        key = (name, kind, elements.start, elements.step)
        if key not in self._slots:
            self._slots[key] = len(self._slots)
            self.views.append((self._slots[key], kind, *self.places[name], elements))
        return self._slots[key]

    def register_kind(self, operand: Operand) -> Any:
        """The unsigned type of a register's size."""
        assert isinstance(operand, Reg)
        return FILES[self.places[operand.name][0]]

    def address(self, operand: Operand, kind: Any) -> tuple[int, int]:
        """Slot of an address's base, and its offset."""
        if not isinstance(operand, Address):
            raise UnsupportedError(f"{operand} where an address belongs")
        if isinstance(operand.base, Reg):
            return self.slot(operand.base, kind), operand.offset
        base = self.symbols[operand.base.name] if isinstance(operand.base, Symbol) else operand.base.bits
        return self._constant(base + operand.offset, np.dtype(kind)), 0

    def _constant(self, bits: int, kind: np.dtype[Any]) -> int:
        key = ("constant", bits, kind)
        if key not in self._slots:
            unsigned = FILES[kind.itemsize]
            value = np.array([bits & ((1 << 8 * kind.itemsize) - 1)], np.uint64).astype(unsigned).view(kind)
            array = np.repeat(value, LANES)
            array.flags.writeable = False
            self._new(key, self.constants, array)
        return self._slots[key]

    def _new(self, key: tuple[Any, ...], table: dict[int, Any], value: Any) -> int:
        if key not in self._slots:
            self._slots[key] = len(self._slots)
            table[self._slots[key]] = value
        return self._slots[key]

    def target(self, label: Operand) -> int:
        """Index of the step behind a label."""
        assert isinstance(label, Symbol)
        return self.kernel.labels[label.name]

    def registers(self, rng: np.random.Generator, special: Mapping[str, np.ndarray]) -> tuple[list[Any], Any]:
        """The slots of a new warp, and its file of 32-bit registers. All are poison: bits of NaN, random predicates."""
        files = {size: np.full((max(count, 1), LANES), -1).astype(FILES[size]) for size, count in self.sizes.items()}
        files[1][:] = rng.random(files[1].shape) < 0.5
        slots: list[Any] = [None] * self.slot_count
        views: dict[tuple[int, np.dtype[Any]], np.ndarray] = {}
        for slot, kind, size, place, elements in self.views:
            if (size, kind) not in views:
                views[size, kind] = files[size].view(kind)
            slots[slot] = views[size, kind][place, elements]
        for slot, array in self.constants.items():
            slots[slot] = array
        for slot, name in self.special.items():
            slots[slot] = special[name]
        return slots, files[4]


def _bits(operand: Imm, kind: np.dtype[Any]) -> int:
    if kind == np.bool_:
        return int(operand.bits != 0)
    if kind.kind == "f" and not operand.is_float:
        raise UnsupportedError(f"integer {operand.bits} as {kind}")
    return operand.bits
