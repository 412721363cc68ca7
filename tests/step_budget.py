"""What a step of attention costs a Blackwell multiprocessor: 128 queries against 128 keys, counted from machine code.

Nothing here is measured. Rates are those of the hardware's published peak: a multiprocessor multiplies 4096 pairs of
16-bit floats, computes 16 exponentials and moves 128 bytes of shared memory in a clock; each of its four schedulers
issues one instruction, for one warp.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from machine_code import disassembler

ROWS = KEYS = 128
PRODUCTS, EXPONENTIALS, BYTES = 4096, 16, 128
"""Per clock of a multiprocessor."""


# ---- from sizes


def product_clocks(head_dim: int, float8: bool = False) -> int:
    """Both products of a step; those of 8 bits are twice as fast."""
    return 2 * ROWS * KEYS * head_dim // PRODUCTS // (2 if float8 else 1)


def exponential_clocks(share: float = 1.0) -> float:
    """Of a share of the scores."""
    return share * ROWS * KEYS / EXPONENTIALS


def shared_clocks(head_dim: int, tiles: int = 2) -> int:
    """Both operands of scores, values, and the copy of keys and values, which ``tiles`` of queries share."""
    queries, keys = 2 * ROWS * head_dim, 2 * KEYS * head_dim
    return (queries + keys + keys + 2 * keys // tiles) // BYTES


# ---- from machine code


class Instruction(NamedTuple):
    """``guarded``: whether a predicate decides; ``target``: the place of a branch, or -1."""

    name: str
    guarded: bool
    target: int

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]


_LINE = re.compile(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?);", re.M)


class Code:
    """Instructions of a cubin, and loops: pairs of the first place and the one behind the branch back."""

    def __init__(self, cubin: Path) -> None:
        command = [disassembler(), "-c", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        labels: dict[str, int] = {}
        found: list[tuple[str, bool, str]] = []
        for label, guard, name, operands in _LINE.findall(text):
            if label:
                labels[label] = len(found)
            else:
                found.append((name, bool(guard) or bool(re.match(r"!?UP\d", operands)), operands))
        self.instructions = []
        for name, guarded, operands in found:
            target = re.search(r"`\((\.L_x_\d+)\)", operands) if name.startswith("BRA") else None
            self.instructions.append(Instruction(name, guarded, labels[target[1]] if target else -1))

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        backward = [(ins.target, i + 1) for i, ins in enumerate(self.instructions) if 0 <= ins.target <= i]
        return sorted(backward, key=lambda loop: loop[1] - loop[0])

    def count(self, first: int, last: int) -> Counter[str]:
        return Counter(ins.kind for ins in self.instructions[first:last])

    def innermost(self, **least: int) -> tuple[int, int]:
        """The smallest loop with at least so many instructions of each kind."""
        return next(
            loop for loop in self.loops if all(self.count(*loop)[kind] >= number for kind, number in least.items())
        )

    def path(self, first: int, last: int, *, longest: bool = False) -> Counter[str]:
        """Instructions of the shortest way through, or of the longest one without going back: where waits are over."""
        better = max if longest else min
        costs: dict[int, tuple[int, int]] = {last: (0, last)}
        for i in range(last - 1, first - 1, -1):
            ins = self.instructions[i]
            ways = [i + 1] if ins.target < 0 or ins.guarded else []
            ways += [ins.target] if i < ins.target <= last else []
            known = [(costs[way][0] + 1, way) for way in ways if way in costs]
            if i == last - 1:
                known = [(1, last)]
            if known and ins.kind not in ("EXIT", "BRX"):
                costs[i] = better(known)
        found: Counter[str] = Counter()
        at = first
        while at != last:
            found[self.instructions[at].kind] += 1
            at = costs[at][1]
        return found


class Step(NamedTuple):
    """Instructions of one warp for one step of its rows, or of the warp that multiplies for one tile.

    Attributes:
        softmax: from scores to weights, no mask.
        masked: the same with a mask, where everything rare happens too.
        exponentials: those of ``softmax`` by the unit for them.
        correction, rescaled: of outputs, where no maximum has risen, and where one has.
        multiply: the warp that issues products.
    """

    softmax: int
    masked: int
    exponentials: int
    correction: int
    rescaled: int
    multiply: int

    def slots(self, *, masked: bool = False, rescaled: bool = False) -> int:
        """Instructions that the busiest scheduler issues for a step of one tile: it has a warp of each role."""
        return (
            (self.masked if masked else self.softmax) + (self.rescaled if rescaled else self.correction) + self.multiply
        )


def ours(code: Code, head_dim: int, float8: bool = False) -> Step:
    """Of our kernel: one loop over key boxes has steps with and without a mask; others do two tiles."""
    softmax = code.innermost(LDTM=4, MUFU=64)
    correction = code.innermost(LDTM=2, STTM=2, FMUL2=32)
    products = {"UTCQMMA": 2 * (head_dim + KEYS) // 32} if float8 else {"UTCHMMA": 2 * (head_dim + KEYS) // 16}
    multiply = code.innermost(**products)
    least, most = code.path(*softmax), code.path(*softmax, longest=True)
    return Step(
        least.total(),
        most.total(),
        least["MUFU"],
        code.path(*correction).total() // 2,
        code.path(*correction, longest=True).total() // 2,
        code.path(*multiply, longest=True).total() // 2,
    )


def cutlass(code: Code, head_dim: int) -> Step:
    """Of example 77: a loop of steps without a mask, then one of those with a mask around both."""
    softmax = code.innermost(LDTM=4, MUFU=64)
    outer = code.innermost(LDTM=8, MUFU=200)
    correction = code.innermost(LDTM=2, STTM=2, FMUL2=32)
    multiply = code.innermost(UTCHMMA=2 * (head_dim + KEYS) // 16)
    masked = code.path(softmax[1], outer[1], longest=True)
    return Step(
        code.path(*softmax).total(),
        masked.total(),
        code.path(*softmax)["MUFU"],
        code.path(*correction).total() // 2,
        code.path(*correction, longest=True).total() // 2,
        code.path(*multiply, longest=True).total() // 2,
    )
