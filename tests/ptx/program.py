"""A kernel made ready to run: registers have places in files of arrays, instructions are Python functions.

Operands become slots, which are NumPy arrays of 32 lanes in a list of the warp: views of registers in the type that an
instruction asks for, constants, special registers. A function of an instruction takes the warp and works on its slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.errors import UnsupportedError
from ptx.parse import SCOPE, Address, Imm, Instruction, Kernel, Operand, Reg, Symbol, Vector

if TYPE_CHECKING:
    from ptx.warp import Warp

LANES = 32
WHOLE = slice(None)
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
ONES = {size: np.array(-1).astype(kind) for size, kind in FILES.items()}
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


@functools.cache
def builder(opcode: str) -> Build | None:
    """What makes instructions of an opcode ready."""
    parts = opcode.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((BUILDERS[name] for name in names if name in BUILDERS), None)


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


@dataclass
class Shared:
    """Steps that programs with the same registers and symbols share, by all that they depend on, and their slots.

    Mutants of a kernel differ in one step. Registers of inner scopes stay out of it, as their names and places vary.
    """

    steps: dict[tuple[Any, ...], Step] = field(default_factory=dict)
    slots: dict[tuple[Any, ...], int] = field(default_factory=dict)
    views: list[tuple[int, np.dtype[Any], int, int, slice]] = field(default_factory=list)
    constants: dict[int, np.ndarray] = field(default_factory=dict)
    special: dict[int, str] = field(default_factory=dict)
    slot_count: int = 0


@functools.lru_cache(maxsize=8)
def shared(places: tuple[Any, ...], symbols: tuple[Any, ...]) -> Shared:
    """What is known of programs with such places of registers and such symbols: nothing until the first one is made."""
    return Shared()


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
        outer = tuple((name, place) for name, place in self.places.items() if SCOPE not in name)
        known = shared(outer, tuple(symbols.items()))
        self._slots, self.slot_count = dict(known.slots), known.slot_count
        self.views = list(known.views)
        """Slots that are registers: number, type, bytes, place in the file, and which of the elements in it."""
        self.constants, self.special = dict(known.constants), dict(known.special)
        keys = [self._key(instruction) for instruction in kernel.instructions]
        self.steps = [
            known.steps.get(key) or self._step(instruction)
            for key, instruction in zip(keys, kernel.instructions, strict=True)
        ]
        self._rows: dict[tuple[int, np.dtype[Any]], list[tuple[int, int, slice]]] = {}
        for slot, kind, size, place, elements in self.views:
            self._rows.setdefault((size, kind), []).append((slot, place, elements))
        if not known.steps:
            known.steps = {key: step for key, step in zip(keys, self.steps, strict=True) if key}
            known.slots = {key: slot for key, slot in self._slots.items() if SCOPE not in key[0]}
            kept = set(known.slots.values())
            known.views = [view for view in self.views if view[0] in kept]
            known.constants, known.special, known.slot_count = self.constants, self.special, self.slot_count

    def _key(self, source: Instruction) -> tuple[Any, ...]:
        """All that a step depends on beside registers and symbols; nothing if it is in an inner scope."""
        if source.scope:
            return ()
        labels, tables = self.kernel.labels, self.kernel.tables
        names = [operand.name for operand in source.operands if isinstance(operand, Symbol)]
        targets = [labels.get(label) for name in names for label in tables.get(name, (name,))]
        return source.text, source.line, source.used, *targets

    def _step(self, source: Instruction) -> Step:
        build = builder(source.opcode)
        if build is None:
            raise UnsupportedError(f"line {source.line}: {source.text[:100]}")
        try:
            run = build(self, source)
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise UnsupportedError(f"line {source.line}: {source.text[:100]} ({error!r})") from error
        guard = self.slot(source.guard[0], np.bool_) if source.guard and source.parts[0] != "bra" else None
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
        return self._view(operand.name, kind, WHOLE)

    def part(self, operand: Operand, kind: Any, index: int, count: int) -> int:
        """The slot of one of the ``count`` parts of a register: its bits from ``index`` times the type's size on."""
        if not isinstance(operand, Reg) or self.places[operand.name][0] != count * np.dtype(kind).itemsize:
            raise UnsupportedError(f"{operand} as {count} of {kind}")
        return self._view(operand.name, np.dtype(kind), slice(index, None, count))

    def packed(self, operand: Operand, kind: Any) -> int:
        """The slot of a register as small numbers side by side, those of lane 0 first."""
        if not isinstance(operand, Reg) or self.places[operand.name][0] % np.dtype(kind).itemsize:
            raise UnsupportedError(f"{operand} as a vector of {kind}")
        return self._view(operand.name, np.dtype(kind), WHOLE)

    def _view(self, name: str, kind: np.dtype[Any], elements: slice) -> int:
        key = (name, kind, elements.start, elements.step)
        if key not in self._slots:
            self.views.append((self._number(key), kind, *self.places[name], elements))
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
            table[self._number(key)] = value
        return self._slots[key]

    def _number(self, key: tuple[Any, ...]) -> int:
        """A new slot."""
        self._slots[key] = self.slot_count
        self.slot_count += 1
        return self._slots[key]

    def target(self, label: Operand) -> int:
        """Index of the step behind a label."""
        assert isinstance(label, Symbol)
        return self.kernel.labels[label.name]

    def registers(self, rng: np.random.Generator, special: Mapping[str, np.ndarray]) -> tuple[list[Any], Any]:
        """The slots of a new warp, and its file of 32-bit registers. All are poison: bits of NaN, random predicates."""
        files = {size: np.full((max(count, 1), LANES), ONES[size], FILES[size]) for size, count in self.sizes.items()}
        files[1][:] = rng.random(files[1].shape) < 0.5
        slots: list[Any] = [None] * self.slot_count
        for (size, kind), rows in self._rows.items():
            file = files[size].view(kind)
            for slot, place, elements in rows:
                slots[slot] = file[place] if elements is WHOLE else file[place, elements]
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
