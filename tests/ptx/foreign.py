"""Instructions that only kernels of others use: leaders of warps, clusters of one block, printing never reached."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.access import addresses, pointer
from ptx.alu import general, only
from ptx.errors import OutOfBoundsError, UnsupportedError
from ptx.parse import SINK, Instruction, Symbol, Vector
from ptx.program import Program, Run, opcode
from ptx.warp import Warp


@opcode("elect.sync")
def elect(program: Program, ins: Instruction) -> Run:
    """One lane is the leader: any, but always the same of a warp."""
    results, mask = ins.operands[0], program.slot(ins.operands[1], np.uint32)
    if not isinstance(results, Vector):
        raise UnsupportedError(ins.text)
    lane, leads = results.items
    to = None if lane == SINK else program.slot(lane, np.uint32)
    predicate = program.slot(leads, np.bool_)
    lanes = np.arange(32)

    def run(w: Warp) -> None:
        if not w.together("elect"):
            return
        if (w.slots[mask] != 0xFFFFFFFF).any():
            raise UnsupportedError("elect among a part of the warp")
        w.slots[predicate][:] = lanes == w.leader
        if to is not None:
            w.slots[to][:] = w.leader

    return run


@opcode("mapa.shared::cluster.u32")
def map_address(program: Program, ins: Instruction) -> Run:
    """The address of a variable in a block of the cluster, which has one: it stays as it is."""
    to, source, rank = (program.slot(operand, np.uint32) for operand in ins.operands)

    def run(w: Warp) -> None:
        if w.slots[rank][w.mask].any():
            raise OutOfBoundsError("mapa: there is one block in a cluster")
        w.assign(to, w.slots[source])

    return run


@opcode("prefetch.tensormap")
def prefetch(program: Program, ins: Instruction) -> Run:
    slot, offset = pointer(program, ins.operands[0])

    def run(w: Warp) -> None:
        for address in addresses(w, slot, offset).tolist():
            w.block.machine.tensor(address)

    return run


@opcode("brx.idx")
def branch_by_table(program: Program, ins: Instruction) -> Run:
    index, table = program.slot(ins.operands[0], np.uint32), ins.operands[1]
    assert isinstance(table, Symbol)
    targets = [program.kernel.labels[label] for label in program.kernel.tables[table.name]]

    def run(w: Warp) -> None:
        choice = w.slots[index]
        if (choice[w.mask] >= len(targets)).any():
            raise OutOfBoundsError(f"brx.idx beyond its {len(targets)} labels")
        mask = w.mask
        for i, target in enumerate(targets):
            w.branch(target, mask & (choice == i))

    return run


@opcode("div.approx", "div.full")
def divide_floats(program: Program, ins: Instruction) -> Run:
    """Exact here, but for rounding."""
    only(ins, "approx", "full", "ftz")
    kind = {"f32": np.float32}[ins.parts[-1]]
    return general(program, ins, np.divide, kind, (kind, kind))


@opcode("call", "st.param", "st.local", "ld.local", "brkpt")
def refuse(program: Program, ins: Instruction) -> Run:
    """What prints and stops where something is wrong."""

    def run(w: Warp) -> Any:
        raise UnsupportedError(f"{ins.opcode} is reached")

    return run
