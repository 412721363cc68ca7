"""PTX text to instructions. Names of inner scopes get the number of their scope, as ``p#3``."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ptx.errors import UnsupportedError


@dataclass(frozen=True)
class Reg:
    """A register, special ones (``%tid.x``) included."""

    name: str


@dataclass(frozen=True)
class Imm:
    """A constant: its bits, and whether they were written as those of a float."""

    bits: int
    is_float: bool = False


@dataclass(frozen=True)
class Symbol:
    """A parameter, a variable or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, or ``[base, {coordinates}]`` of a tensor."""

    base: Reg | Symbol | Imm
    offset: int = 0
    coordinates: Vector | None = None


Operand = Reg | Imm | Symbol | Vector | Address
SINK = Symbol("_")
SCOPE = "#"
"""Comes between a name of an inner scope and the scope's number."""


@dataclass(frozen=True)
class Instruction:
    """One instruction. ``guard`` is its predicate and whether that is negated; ``used`` which bytes of a load count.

    ``scope`` is the number of the innermost scope around it, 0 for that of the function.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Reg, bool] | None
    line: int
    text: str
    used: int | None = None
    scope: int = 0

    @property
    def parts(self) -> list[str]:
        """The opcode's name and its modifiers."""
        return self.opcode.split(".")


@dataclass
class Kernel:
    """An entry function. ``registers`` has the type of each register; ``params`` name, bytes and alignment.

    ``tables`` are lists of labels. ``variables`` are names in global and local memory and of calls, without contents.
    """

    name: str
    params: list[tuple[str, int, int]]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)


_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)\s*((?:\.\w+[^{\n]*\n\s*)*)\{", re.S)
_POINTER = r"(?:\.ptr\s+(?:\.\w+\s+)?\.align\s+\d+\s+)?"
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w)(\d+)\s+" + _POINTER + r"(\w+)(?:\[(\d+)\])?")
_SHARED = re.compile(r"\.extern\s+\.shared\s+[^;]*?\s(\w+)\[\];")
_VARIABLE = re.compile(r"^\s*\.(?:global|local|param)\s[^;=\[\n]*?([$\w]+)(?:\[\d+\])?\s*[;=]", re.M)
_TABLE = re.compile(r"([$\w]+)\s*:\s*\.branchtargets\s([^;]*);")
_DEBUG = re.compile(r"^\s*\.(?:loc|file)\s[^\n]*", re.M)
_STATEMENT = re.compile(r"\s*(?:([$\w]+)\s*:(?!:)|([{}])|([^;{}]*(?:\{[^{};]*\}[^;{}]*)*);)", re.S)
_GUARD = re.compile(r"@(!?)([%\w.]+)\s+(.*)", re.S)
_USED = re.compile(r'\.pragma\s+"used_bytes_mask (0x[0-9a-f]+)"')
_RANGE = re.compile(r"(.+)<(\d+)>")


def parse(text: str) -> Kernel:
    """The one entry function of a PTX module.

    Raises:
        UnsupportedError: there is not exactly one, or a statement is not understood.
    """
    text = re.sub(r"/\*.*?\*/|//[^\n]*", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    text = _DEBUG.sub("", text)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise UnsupportedError(f"{len(entries)} entry functions instead of one")
    params = [
        (name, int(bits) // 8 * int(count or 1), int(align or int(bits) // 8))
        for align, _, bits, name, count in _PARAM.findall(entries[0][2])
    ]
    kernel = Kernel(entries[0][1], params, shared=_SHARED.findall(text), variables=_VARIABLE.findall(text))
    if ".branchtargets" in text:
        kernel.tables = {name: _split(labels) for name, labels in _TABLE.findall(text)}
    _Body(kernel).read(text, entries[0].end())
    return kernel


class _Body:
    """Reads the statements of a function, scope by scope."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[tuple[int, set[str]]] = [(0, set())]
        self.count = 0
        self.used: int | None = None
        self.usual = True
        """Whether names of registers begin with ``%``, but for those of inner scopes."""

    def read(self, text: str, at: int) -> None:
        for label, brace, statement, line in self._statements(text, at):
            if brace == "{":
                self.count += 1
                self.scopes.append((self.count, set(self._labels_inside(text, self._at))))
            elif brace == "}":
                self.scopes.pop()
                if not self.scopes:
                    return
            elif label:
                self.kernel.labels[self._scoped().get(label, label)] = len(self.kernel.instructions)
            elif statement.startswith(".reg"):
                self._declare(statement)
            elif match := _USED.fullmatch(statement):
                self.used = int(match[1], 16)
            elif statement and not statement.startswith("."):
                self.kernel.instructions.append(self._instruction(statement, line))
        raise UnsupportedError("a function without an end")

    def _statements(self, text: str, at: int) -> Iterator[tuple[str, str, str, int]]:
        line, seen = text.count("\n", 0, at) + 1, at
        while match := _STATEMENT.match(text, at):
            start = match.start(match.lastindex or 0)
            line, seen = line + text.count("\n", seen, start), start
            self._at = at = match.end()
            yield match[1] or "", match[2] or "", (match[3] or "").strip(), line

    @staticmethod
    def _labels_inside(text: str, at: int) -> list[str]:
        """Labels of a scope that begins here, known before the branches to them."""
        return re.findall(r"([$\w]+)\s*:(?!:)", text[at : re.compile(r"\n\s*\}|;\s*\}").search(text, at).end()])  # type: ignore[union-attr]

    def _declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        for name in names.split(","):
            name = name.strip()
            if match := _RANGE.fullmatch(name):
                self.kernel.registers |= {f"{match[1]}{i}": kind[1:] for i in range(int(match[2]))}
            else:
                self.scopes[-1][1].add(name)
                self.kernel.registers[self._scoped().get(name, name)] = kind[1:]
            self.usual &= name.startswith("%") or len(self.scopes) > 1

    def _scoped(self) -> dict[str, str]:
        """What names of inner scopes stand for here."""
        return {name: f"{name}{SCOPE}{number}" for number, names in self.scopes if number for name in names}

    def _instruction(self, statement: str, line: int) -> Instruction:
        if len(self.scopes) == 1 and self.usual:
            decoded = _outer(statement)
        else:
            decoded = _Names(self._scoped(), self.kernel.registers).instruction(statement)
        used, self.used = self.used, None
        return Instruction(*decoded, line, " ".join(statement.split()), used, self.scopes[-1][0])


Decoded = tuple[str, tuple[Operand, ...], tuple[Reg, bool] | None]


class _Names(NamedTuple):
    """What names mean at one place: those of inner scopes, and which are registers though they do not begin with %."""

    scoped: Mapping[str, str]
    registers: Collection[str]

    def instruction(self, statement: str) -> Decoded:
        """Opcode, operands and guard."""
        guard, rest = None, statement
        if match := _GUARD.fullmatch(statement):
            guard, rest = (Reg(self.scoped.get(match[2], match[2])), bool(match[1])), match[3]
        opcode, operands = re.fullmatch(r"([\w.:]+)\s*(.*)", rest, re.S).groups()  # type: ignore[union-attr]
        return opcode, tuple(self.operand(item) for item in _split(operands)), guard

    def operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self.operand(item) for item in _split(text[1:-1])))
        if text.startswith("["):
            base, *rest = _split(text[1:-1])
            name, sign, offset = re.fullmatch(r"([^+-]+)(?:([+-])(.+))?", base).groups()  # type: ignore[union-attr]
            vector = self.operand(rest[0]) if rest else None
            if not isinstance(vector, Vector | None):
                raise UnsupportedError(text)
            shift = int(f"{sign}1") * int(offset.strip(), 0) if offset else 0
            base_operand = self.operand(name.strip())
            if not isinstance(base_operand, Reg | Symbol | Imm):
                raise UnsupportedError(text)
            return Address(base_operand, shift, vector)
        if re.match(r"-?\d", text):
            return _number(text)
        if "|" in text:
            return Vector(tuple(self.operand(item.strip()) for item in text.split("|")))
        name = self.scoped.get(text, text)
        return Reg(name) if name in self.registers or text.startswith("%") else Symbol(name)


@functools.lru_cache(maxsize=1 << 16)
def _outer(statement: str) -> Decoded:
    """A statement of no inner scope, in the usual names: mutants of a kernel share all but one of them."""
    return _Names({}, ()).instruction(statement)


def _split(text: str) -> list[str]:
    """Operands, which commas separate outside of brackets."""
    return [item.strip() for item in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", text)]


def _number(text: str) -> Imm:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Imm(int(match[1], 16), True)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Imm(int(match[1], 16), True)
    if "." in text:
        return Imm(struct.unpack("<I", struct.pack("<f", float(text)))[0], True)
    return Imm(int(text.rstrip("U"), 0))
