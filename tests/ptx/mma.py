"""Matrix products of a single warp, whose operands are all in registers, complete when the instruction is."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.errors import UnsupportedError
from ptx.operands import K, widen
from ptx.parse import Instruction, Vector
from ptx.program import Program, Run, opcode
from ptx.warp import Warp
from ptx.wgmma import operand_matrix, to_fragment, to_matrix

FORMS = tuple(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" for kind in ("f16", "bf16"))
COLUMNS = 8


def columns_matrix(registers: np.ndarray, float16: bool) -> Any:
    """Registers of B, ``[2, 32]``, as ``[8, 16]``: a lane has two and two of the 16 places of column ``lane / 4``."""
    # Column, piece, 8 places, pair.
    halves = np.ascontiguousarray(registers.T).view(np.uint16).reshape(COLUMNS, 4, 2, 2)
    return widen(np.ascontiguousarray(halves.transpose(0, 2, 1, 3)).reshape(COLUMNS, K), float16)


@opcode(*FORMS)
def multiply(program: Program, ins: Instruction) -> Run:
    vectors = [x.items for x in ins.operands if isinstance(x, Vector)]
    if ins.opcode not in FORMS or len(ins.operands) != 4 or [len(items) for items in vectors] != [4, 4, 2, 4]:
        raise UnsupportedError(ins.text)
    kinds = (np.float32, np.uint32, np.uint32, np.float32)
    to, a, b, c = ([program.slot(item, kind) for item in items] for items, kind in zip(vectors, kinds, strict=True))
    float16 = "bf16" not in ins.parts

    def run(w: Warp) -> None:
        if not w.together("mma"):
            return
        w.block.machine.warp_products += 1
        x, y = (np.stack([w.slots[slot] for slot in slots]) for slots in (a, b))
        sums = to_matrix(np.stack([w.slots[slot] for slot in c]))
        product = operand_matrix(x, float16) @ columns_matrix(y, float16).T
        for slot, values in zip(to, to_fragment(sums + product), strict=True):
            w.slots[slot][:] = values

    return run
