"""Loads, stores and atomics of plain threads, and ``stmatrix``."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ptx.alu import only
from ptx.errors import InFlightError, OutOfBoundsError, UnsupportedError
from ptx.memory import WINDOW
from ptx.parse import SINK, Address, Instruction, Operand, Reg, Vector
from ptx.program import FILES, TYPES, Program, Run, opcode
from ptx.warp import Warp

SPACES = ("param", "global", "shared", "shared::cta")
NO_WORDS = np.zeros(0, np.int64)
HINTS = ("v2", "v4", "nc", "cs", "volatile", "relaxed", "acquire", "gpu", "cta", "aligned")


def pointer(program: Program, operand: Operand) -> tuple[int, int]:
    """Slot and offset of an address, in the type of its register."""
    assert isinstance(operand, Address)
    return program.address(operand, program.register_kind(operand.base) if isinstance(operand.base, Reg) else np.uint64)


def addresses(w: Warp, slot: int, offset: int) -> Any:
    """Addresses of the active threads."""
    base = (w.slots[slot] if w.full else w.slots[slot][w.mask]).astype(np.int64)
    base += offset
    return base


def _space(ins: Instruction) -> str:
    only(ins, *SPACES, *HINTS)
    return next((part.split("::")[0] for part in ins.parts[1:] if part in SPACES), "generic")


def _resolve(space: str, at: np.ndarray) -> tuple[str, np.ndarray]:
    """The space of generic addresses, and their addresses in it: shared memory has a window, global memory the rest."""
    if space != "generic":
        return space, at
    inside = (at >= WINDOW) & (at < WINDOW + (1 << 24))
    if inside.all():
        return "shared", at - WINDOW
    if inside.any():
        raise UnsupportedError("generic addresses of two spaces at once")
    return "global", at


@opcode("cvta.shared.u64", "cvta.to.shared.u64")
def convert_address(program: Program, ins: Instruction) -> Run:
    to, source = (program.slot(operand, np.uint64) for operand in ins.operands)
    back = ins.parts[1] == "to"

    def run(w: Warp) -> None:
        at = w.slots[source].astype(np.int64)
        if back and _resolve("generic", at[w.mask])[0] != "shared":
            raise OutOfBoundsError("a generic address that is not one of shared memory")
        w.assign(to, (at - WINDOW if back else at + WINDOW).astype(np.uint64))

    return run


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _locate(w: Warp, space: str, at: np.ndarray, size: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of ``count`` elements of ``size`` bytes, each thread's index among them, its words if shared."""
    whole = size * count
    if space == "shared":
        region = w.block.shared.region
        index = region.elements(at, whole)
        words = w.block.shared.words_of(index, whole)
    else:
        memory = w.block.machine.params if space == "param" else w.block.machine.memory
        region = memory.region(int(at[0]))
        index, words = region.elements(at, whole), NO_WORDS
    return region.vectors(size, count), index, words


@opcode("ld")
def load(program: Program, ins: Instruction) -> Run:
    space, kind = _space(ins), TYPES[ins.parts[-1]]
    polls = "acquire" in ins.parts
    items = _items(ins.operands[0])
    size, count = np.dtype(kind).itemsize, len(items)
    wide = program.register_kind(items[0])
    if np.dtype(wide).itemsize == size:
        kind = wide  # bits
    else:  # extended by zeros, or by the sign
        wide = np.dtype(f"{np.dtype(kind).kind}{np.dtype(wide).itemsize}")
    to = [program.slot(item, wide) for item in items]
    slot, offset = pointer(program, ins.operands[1])
    bytes_ = -1 if ins.used is None else ins.used
    unused = [i for i in range(count) if not bytes_ >> i * size & (1 << size) - 1]
    poison = np.array(-1).astype(kind)
    if unused and size != 4:
        raise UnsupportedError("a load of which some bytes are not used, of elements that are no words")

    def run(w: Warp) -> None:
        where, at = _resolve(space, addresses(w, slot, offset))
        data, index, words = _locate(w, where, at, size, count)
        if polls:
            w.polled, w.unfenced = w.block.machine.atomics, True
        if where == "shared":
            if unused:
                words = np.delete(words.reshape(-1, count), unused, 1).reshape(-1)
            w.block.shared.plain_read(w, words)
        values = data.take(index, 0).view(kind)
        if unused:
            values[:, unused] = poison
        for i, register in enumerate(to):
            if w.full:
                w.slots[register][:] = values[:, i]
            else:
                w.slots[register][w.mask] = values[:, i]

    return run


@opcode("st")
def store(program: Program, ins: Instruction) -> Run:
    space, kind = _space(ins), TYPES[ins.parts[-1]]
    if space == "param":
        raise UnsupportedError(ins.opcode)
    slot, offset = pointer(program, ins.operands[0])
    items = _items(ins.operands[1])
    size, count = np.dtype(kind).itemsize, len(items)
    raw: Any = FILES.get(size, np.uint8)
    sources = [program.slot(item, program.register_kind(item) if isinstance(item, Reg) else raw) for item in items]

    def run(w: Warp) -> None:
        where, at = _resolve(space, addresses(w, slot, offset))
        data, index, words = _locate(w, where, at, size, count)
        values = [w.slots[source] if w.full else w.slots[source][w.mask] for source in sources]
        if where == "shared":
            if not w.block.machine.rules.equal_writes:
                old, new = data[index], np.stack(values, 1).astype(data.dtype)
                if np.array_equal(old, new):
                    return
            threads = np.repeat(w.threads if w.full else w.threads[w.mask], len(words) // len(at))
            w.block.shared.plain_write(w, words, threads)
        for i, value in enumerate(values):
            data[:, i][index] = value

    return run


ATOMIC: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum}


@opcode("atom.global", "atom.relaxed.gpu.global", "red.global", "red.relaxed.gpu.global", "red.release.gpu.global")
def atomic(program: Program, ins: Instruction) -> Run:
    only(ins, "global", "relaxed", "release", "gpu", *ATOMIC)
    kind = TYPES[ins.parts[-1]]
    function = next(ATOMIC[part] for part in ins.parts if part in ATOMIC)
    *to, target, operand = ins.operands
    result = program.slot(to[0], kind) if to and to[0] != SINK else None
    slot, offset = pointer(program, target)
    value = program.slot(operand, kind)
    size, releases = np.dtype(kind).itemsize, "release" in ins.parts

    def run(w: Warp) -> None:
        if releases and any(w.stores[lane].unfinished for lane in np.flatnonzero(w.mask) if lane in w.stores):
            raise InFlightError("a release by a thread that has not waited for its copies to be done")
        data, index, _ = _locate(w, "global", addresses(w, slot, offset), size, 1)
        data = data.view(kind)
        lanes = np.flatnonzero(w.mask)
        w.block.machine.atomics += 1
        for i in w.block.machine.rng.permutation(len(lanes)):
            place, lane = index[i], lanes[i]
            old = data[place, 0]
            data[place, 0] = function(old, w.slots[value][lane])
            if result is not None:
                w.slots[result][lane] = old

    return run


MATRICES = re.compile(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16")


@opcode("stmatrix", "ldmatrix")
def move_matrices(program: Program, ins: Instruction) -> Run:
    """1, 2 or 4 8x8 matrices: lane ``8 i + r`` has the address of row ``r`` of matrix ``i``, and each two columns."""
    stores, form = ins.parts[0] == "stmatrix", MATRICES.fullmatch(ins.opcode)
    target, vector = ins.operands if stores else ins.operands[::-1]
    if form is None or len(_items(vector)) != int(form[1]):
        raise UnsupportedError(ins.opcode)
    slot, offset = pointer(program, target)
    registers = [program.slot(item, np.uint32) for item in _items(vector)]
    lane = np.arange(32)

    def run(w: Warp) -> None:
        if not w.together(ins.parts[0]):
            return
        rows = addresses(w, slot, offset)
        shared = w.block.shared
        shared.region.elements(rows[: 8 * len(registers)], 16)
        for i, register in enumerate(registers):
            words = shared.words(rows[8 * i + lane // 4] + 4 * (lane % 4), 4)
            if stores:
                shared.plain_write(w, words, w.threads)
                shared.region.view(4)[words] = w.slots[register]
            else:
                shared.plain_read(w, words)
                w.slots[register][:] = shared.region.view(4)[words]

    return run
