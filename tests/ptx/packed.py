"""Arithmetic of two 32-bit floats in one register of 64 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.alu import only
from ptx.parse import Instruction
from ptx.program import Program, Run, opcode
from ptx.warp import Warp

Function = Callable[..., Any]


def rounded_down(exact: np.ndarray, rest: np.ndarray) -> Any:
    """The largest float32 that is not above ``exact`` + ``rest``, where ``rest`` is much the smaller."""
    near = exact.astype(np.float32)
    above = (near > exact) | ((near == exact) & (rest < 0))
    return np.where(above, np.nextafter(near, np.float32(-np.inf)), near)


def add_down(a: np.ndarray, b: np.ndarray) -> Any:
    x, y = a.astype(np.float64), b.astype(np.float64)
    total = x + y
    of_y = total - x
    return rounded_down(total, (x - (total - of_y)) + (y - of_y))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Any:
    """The product is exact; the sum rounds twice, all but never in vain."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


FUNCTIONS: dict[tuple[str, str], Function] = {
    ("add", "rn"): np.add,
    ("mul", "rn"): np.multiply,
    ("fma", "rn"): fused,
    ("add", "rm"): add_down,
}


@opcode(*[f"{name}.{rounding}{flush}.f32x2" for name, rounding in FUNCTIONS for flush in ("", ".ftz")],
        "add.f32x2", "mul.f32x2")  # fmt: skip
def pairs(program: Program, ins: Instruction) -> Run:
    """Denormals are kept."""
    only(ins, "rn", "rm", "ftz")
    function = FUNCTIONS[ins.parts[0], "rm" if "rm" in ins.parts else "rn"]
    to, *args = (program.packed(operand, np.float32) for operand in ins.operands)

    def run(w: Warp) -> None:
        s = w.slots
        result = function(*[s[arg] for arg in args])
        if w.full:
            s[to][:] = result
        else:
            np.copyto(s[to], result, where=np.repeat(w.mask, 2))

    return run
