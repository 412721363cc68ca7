"""Arithmetic, comparison, conversion and branches: one lane knows nothing of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx.errors import UnsupportedError
from ptx.operands import e4m3_bits
from ptx.parse import SINK, Imm, Instruction, Symbol, Vector
from ptx.program import FILES, TYPES, Program, Run, opcode
from ptx.warp import Warp


def ufunc(program: Program, ins: Instruction, function: Any, kind: Any, *kinds: Any) -> Run:
    """An instruction that is one NumPy function: types of its result and of its operands."""
    to, *args = (program.slot(x, k) for x, k in zip(ins.operands, (kind, *kinds), strict=True))
    if len(args) == 1:
        (a,) = args

        def unary(w: Warp) -> None:
            s = w.slots
            if w.full:
                function(s[a], s[to])
            else:
                function(s[a], s[to], where=w.mask)

        return unary
    a, b = args

    def binary(w: Warp) -> None:
        s = w.slots
        if w.full:
            function(s[a], s[b], out=s[to])
        else:
            function(s[a], s[b], out=s[to], where=w.mask)

    return binary


def general(program: Program, ins: Instruction, function: Callable[..., Any], kind: Any, kinds: Sequence[Any]) -> Run:
    """An instruction that is any function of arrays."""
    to, *args = (program.slot(x, k) for x, k in zip(ins.operands, (kind, *kinds), strict=True))

    def run(w: Warp) -> None:
        s = w.slots
        w.assign(to, function(*[s[arg] for arg in args]))

    return run


def last_type(ins: Instruction) -> Any:
    return TYPES[ins.parts[-1]]


def only(ins: Instruction, *allowed: str) -> None:
    """Raise for modifiers that would change the result in a way not done here."""
    if rest := set(ins.parts[1:-1]) - set(allowed):
        raise UnsupportedError(f"{ins.opcode}: {', '.join(sorted(rest))}")


SIMPLE: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "neg": np.negative,
    "not": np.invert,
    "abs": np.absolute,
}


@opcode(*SIMPLE)
def simple(program: Program, ins: Instruction) -> Run:
    only(ins, "rn", "ftz")
    kind = last_type(ins)
    return ufunc(program, ins, SIMPLE[ins.parts[0]], kind, *[kind] * (len(ins.operands) - 1))


@opcode("min", "max")
def extreme(program: Program, ins: Instruction) -> Run:
    only(ins, "ftz")
    kind = last_type(ins)
    functions: dict[str, Any] = {"min": np.minimum, "max": np.maximum}
    if np.dtype(kind).kind == "f":
        functions = {"min": np.fmin, "max": np.fmax}  # the other operand if one is NaN
    function = functions[ins.parts[0]]
    if len(ins.operands) == 4:
        return general(program, ins, lambda a, b, c: function(function(a, b), c), kind, (kind, kind, kind))
    return ufunc(program, ins, function, kind, kind, kind)


@opcode("mul")
def multiply(program: Program, ins: Instruction) -> Run:
    kind, how = last_type(ins), ins.parts[1]
    if how == "wide":
        wide = np.dtype(f"{np.dtype(kind).kind}{2 * np.dtype(kind).itemsize}")
        return general(program, ins, lambda a, b: a.astype(wide) * b.astype(wide), wide, (kind, kind))
    if how == "hi":
        return general(program, ins, _high(kind), kind, (kind, kind))
    only(ins, "lo", "rn", "ftz")
    return ufunc(program, ins, np.multiply, kind, kind, kind)


def _high(kind: Any) -> Callable[..., Any]:
    wide = {np.int32: np.int64, np.uint32: np.uint64}[kind]
    return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(kind)


@opcode("mad")
def multiply_add(program: Program, ins: Instruction) -> Run:
    kind, how = last_type(ins), ins.parts[1]
    if how == "wide":
        wide = np.dtype(f"{np.dtype(kind).kind}{2 * np.dtype(kind).itemsize}")
        return general(program, ins, lambda a, b, c: a.astype(wide) * b.astype(wide) + c, wide, (kind, kind, wide))
    only(ins, "lo")
    return general(program, ins, lambda a, b, c: a * b + c, kind, (kind, kind, kind))


@opcode("fma.rn")
def fused(program: Program, ins: Instruction) -> Run:
    only(ins, "rn", "ftz")
    kind = {"f32": np.float32}[ins.parts[-1]]
    to, a, b, c = (program.slot(x, kind) for x in ins.operands)

    def run(w: Warp) -> None:
        s = w.slots
        # The product is exact; the sum then rounds twice, all but never in vain.
        w.assign(to, s[a].astype(np.float64) * s[b] + s[c])

    return run


def quotient(a: np.ndarray, b: np.ndarray) -> Any:
    """Rounded towards zero; exact for 32 bits, whose quotients float64 can hold. Idle lanes may divide by zero."""
    return np.where(b == 0, 0, np.trunc(a.astype(np.float64) / b)).astype(np.int64)


@opcode("div", "rem")
def divide(program: Program, ins: Instruction) -> Run:
    only(ins)
    kind = {"s32": np.int32, "u32": np.uint32, "u16": np.uint16}[ins.parts[-1]]
    if ins.parts[0] == "div":
        return general(program, ins, lambda a, b: quotient(a, b).astype(kind), kind, (kind, kind))
    return general(program, ins, lambda a, b: (a - quotient(a, b) * b).astype(kind), kind, (kind, kind))


@opcode("shl", "shr")
def shift(program: Program, ins: Instruction) -> Run:
    only(ins)
    kind = last_type(ins)
    bits = 8 * np.dtype(kind).itemsize
    wide = np.int64 if np.dtype(kind).kind == "i" else np.uint64
    function = np.left_shift if ins.parts[0] == "shl" else np.right_shift
    by = ins.operands[2]
    if isinstance(by, Imm) and by.bits < bits:
        return ufunc(program, ins, function, kind, kind, kind)

    def run(a: np.ndarray, by: np.ndarray) -> Any:
        if bits == 64:
            return function(a, by.astype(a.dtype))
        return function(a.astype(wide), np.minimum(by, bits).astype(wide)).astype(kind)

    return general(program, ins, run, kind, (kind, np.uint32))


@opcode("bfi.b32")
def insert_bits(program: Program, ins: Instruction) -> Run:
    def run(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> Any:
        start, length = start.astype(np.uint64) & 255, np.minimum(length & 255, 32).astype(np.uint64)
        mask = ((np.uint64(1) << length) - np.uint64(1)) << start
        return ((b & ~mask) | (a.astype(np.uint64) << start & mask)).astype(np.uint32)

    return general(program, ins, run, np.uint32, [np.uint32] * 4)


@opcode("bfe.u32")
def extract_bits(program: Program, ins: Instruction) -> Run:
    def run(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> Any:
        mask = (np.uint64(1) << np.minimum(length & 255, 32).astype(np.uint64)) - np.uint64(1)
        return (a.astype(np.uint64) >> (start.astype(np.uint64) & 255) & mask).astype(np.uint32)

    return general(program, ins, run, np.uint32, [np.uint32] * 3)


@opcode("bmsk.clamp.b32")
def mask_of_bits(program: Program, ins: Instruction) -> Run:
    def run(start: np.ndarray, length: np.ndarray) -> Any:
        start, length = (np.minimum(x, 32).astype(np.uint64) for x in (start, length))
        return ((((np.uint64(1) << length) - np.uint64(1)) << start) & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return general(program, ins, run, np.uint32, [np.uint32] * 2)


@opcode("prmt.b32")
def choose_bytes(program: Program, ins: Instruction) -> Run:
    def run(a: np.ndarray, b: np.ndarray, choice: np.ndarray) -> Any:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.zeros_like(both)
        for i in range(4):
            which = choice.astype(np.uint64) >> np.uint64(4 * i)
            byte = both >> ((which & 7) * 8) & 255
            byte = np.where(which & 8, (byte >> 7) * 255, byte)  # eight copies of its sign
            result |= byte << np.uint64(8 * i)
        return result.astype(np.uint32)

    return general(program, ins, run, np.uint32, [np.uint32] * 3)


@opcode("selp")
def select(program: Program, ins: Instruction) -> Run:
    kind = last_type(ins)
    return general(program, ins, lambda a, b, p: np.where(p, a, b), kind, (kind, kind, np.bool_))


COMPARE: dict[str, Any] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
OPPOSITE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
COMBINE: dict[str, Any] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@opcode("setp")
def compare(program: Program, ins: Instruction) -> Run:
    kind, name = last_type(ins), ins.parts[1]
    combine = next((COMBINE[part] for part in ins.parts[2:-1] if part in COMBINE), None)
    is_float = np.dtype(kind).kind == "f"
    if is_float and name == "ne":
        function: Any = lambda a, b: (a < b) | (a > b)  # noqa: E731  false for NaN, unlike Python's
    elif is_float and name in OPPOSITE:  # true for NaN
        other = COMPARE[OPPOSITE[name]]
        function = (lambda a, b: ~((a < b) | (a > b))) if name == "equ" else (lambda a, b: ~other(a, b))
    elif combine is None:
        return ufunc(program, ins, COMPARE[name], np.bool_, kind, kind)
    else:
        function = COMPARE[name]
    if combine is None:
        return general(program, ins, function, np.bool_, (kind, kind))
    return general(program, ins, lambda a, b, p: combine(function(a, b), p), np.bool_, (kind, kind, np.bool_))


@opcode("mov", "cvta")
def move(program: Program, ins: Instruction) -> Run:
    only(ins, "to", "global", "param", "local")
    kind = last_type(ins)
    if any(isinstance(operand, Vector) for operand in ins.operands):
        return _pack(program, ins, kind)
    kind = FILES[np.dtype(kind).itemsize]  # bits, so that no NaN is touched
    if kind is np.bool_:
        return general(program, ins, lambda a: a, kind, (kind,))
    return ufunc(program, ins, np.positive, kind, kind)


def _pack(program: Program, ins: Instruction, kind: Any) -> Run:
    """``mov`` between one register and a vector of smaller ones."""
    to, source = ins.operands
    vector = to if isinstance(to, Vector) else source
    assert isinstance(vector, Vector)
    count = len(vector.items)
    part = FILES[np.dtype(kind).itemsize // count]
    whole = source if vector is to else to
    wanted = [(i, item) for i, item in enumerate(vector.items) if item != SINK]
    if vector is source and len(wanted) < count:
        raise UnsupportedError(ins.text)
    moves = [(program.slot(item, part), program.part(whole, part, i, count)) for i, item in wanted]
    if vector is source:
        moves = [(piece, small) for small, piece in moves]

    def run(w: Warp) -> None:
        s = w.slots
        for target, origin in moves:
            if w.full:
                s[target][:] = s[origin]
            else:
                np.copyto(s[target], s[origin], where=w.mask)

    return run


@opcode("cvt")
def convert(program: Program, ins: Instruction) -> Run:
    to, source = ins.parts[-2:]
    if to == "e4m3x2":
        only(ins, "rn", "satfinite", to)
        if source != "f32" or "satfinite" not in ins.parts:
            raise UnsupportedError(ins.opcode)
        pair = lambda high, low: e4m3_bits(high).astype(np.uint16) << np.uint16(8) | e4m3_bits(low)  # noqa: E731
        return general(program, ins, pair, np.uint16, [np.float32] * 2)
    if to in ("bf16x2", "f16x2"):
        only(ins, "rn", to)
        narrow = bfloat16_bits if to == "bf16x2" else float16_bits

        def pair(high: np.ndarray, low: np.ndarray) -> Any:
            halves = np.empty((len(high), 2), np.float32)
            halves[:, 0], halves[:, 1] = low, high
            return narrow(halves).view(np.uint32)[:, 0]

        return general(program, ins, pair, np.uint32, [np.float32] * 2)
    if "f" in to + source:
        only(ins, "rn", to)
        if TYPES[source] not in (np.int32, np.uint32) or to != "f32":
            raise UnsupportedError(ins.opcode)
    else:
        only(ins, to)
    kind = TYPES[to]
    return general(program, ins, lambda a: a.astype(kind), kind, (TYPES[source],))


ONE, HALF, SIXTEEN = np.uint32(1), np.uint32(0x7FFF), np.uint32(16)


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Floats rounded to bfloat16, to the nearest even, as integers of 16 bits."""
    bits = x.view(np.uint32)
    rounded = bits >> SIXTEEN
    rounded &= ONE
    rounded += HALF
    rounded += bits
    rounded >>= SIXTEEN
    rounded[np.isnan(x)] = HALF
    return rounded.astype(np.uint16)


def float16_bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


APPROXIMATE: dict[str, Any] = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal}


@opcode(*APPROXIMATE)
def approximate(program: Program, ins: Instruction) -> Run:
    """Exact here, but for rounding; denormals are kept."""
    only(ins, "approx", "ftz", "rn")
    kind = {"f32": np.float32}[ins.parts[-1]]
    return ufunc(program, ins, APPROXIMATE[ins.parts[0]], kind, kind)


@opcode("bra")
def branch(program: Program, ins: Instruction) -> Run:
    (label,) = ins.operands
    assert isinstance(label, Symbol)
    target = program.target(label)
    if ins.guard is None:

        def always(w: Warp) -> None:
            w.pc = target

        return always
    guard, negated = program.slot(ins.guard[0], np.bool_), ins.guard[1]

    def run(w: Warp) -> None:
        p = w.slots[guard]
        if w.full and not negated:
            w.branch(target, p.copy())
        else:
            w.branch(target, (~p if negated else p) & w.mask)

    return run


@opcode("ret", "exit")
def leave(program: Program, ins: Instruction) -> Run:
    return Warp.leave
