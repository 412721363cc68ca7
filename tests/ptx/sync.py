"""Instructions by which threads meet: barriers, fences, copies, matrix products, shuffles and votes."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

from ptx.access import addresses, pointer
from ptx.alu import only
from ptx.barriers import MBarrier, NamedBarrier
from ptx.errors import DivergenceError, ProxyFenceError, PtxError, UnsupportedError
from ptx.parse import Address, Imm, Instruction, Operand, Vector
from ptx.program import Program, Run, opcode
from ptx.tma import Line, Load, Reduction, Store, StoreGroups
from ptx.warp import Warp
from ptx.wgmma import Registers, Shape, registers


def uniform(values: np.ndarray, what: str) -> int:
    """The value that all active threads have."""
    bits = values.tobytes()
    if bits != bits[: values.itemsize] * len(values):
        raise DivergenceError(f"{what} differs between threads")
    return int(values[0])


def _active(w: Warp, slot: int) -> Any:
    return w.slots[slot][w.mask]


def _constant(operand: Operand) -> int:
    if not isinstance(operand, Imm):
        raise UnsupportedError(f"{operand} where a constant belongs")
    return operand.bits


# ---- mbarriers


@opcode("mbarrier.init.shared::cta.b64", "mbarrier.init.shared.b64")
def barrier_init(program: Program, ins: Instruction) -> Run:
    slot, offset = pointer(program, ins.operands[0])
    count = program.slot(ins.operands[1], np.uint32)

    def run(w: Warp) -> None:
        shared = w.block.shared
        for address, arrivals in zip(addresses(w, slot, offset).tolist(), _active(w, count).tolist(), strict=True):
            shared.reserve(w, address)
            shared.barriers[address] = MBarrier(shared, w, address, arrivals)

    return run


@opcode("mbarrier.arrive.shared::cta.b64", "mbarrier.arrive.shared::cluster.b64", "mbarrier.arrive.shared.b64")
def barrier_arrive(program: Program, ins: Instruction) -> Run:
    slot, offset = pointer(program, ins.operands[1])
    times = program.slot(ins.operands[2] if len(ins.operands) > 2 else Imm(1), np.uint32)

    def run(w: Warp) -> None:
        at, counts = addresses(w, slot, offset).tolist(), _active(w, times).tolist()
        message = w.release()
        for (address, count), threads in Counter(zip(at, counts, strict=True)).items():
            w.block.shared.barrier(w, address).arrive(message, count, threads)
        w.note("arrive", at)

    return run


@opcode("mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.arrive.expect_tx.shared.b64")
def barrier_expect(program: Program, ins: Instruction) -> Run:
    slot, offset = pointer(program, ins.operands[1])
    count = program.slot(ins.operands[2], np.uint32)

    def run(w: Warp) -> None:
        at = addresses(w, slot, offset).tolist()
        for address, bytes_ in zip(at, _active(w, count).tolist(), strict=True):
            barrier = w.block.shared.barrier(w, address)
            barrier.expect(bytes_)
            barrier.arrive(w.release())
        w.note("expect", at)

    return run


@opcode("mbarrier.try_wait.parity.shared::cta.b64", "mbarrier.try_wait.parity.shared.b64")
def barrier_wait(program: Program, ins: Instruction) -> Run:
    """Suspends until the phase has ended: the time limit never runs out."""
    to = program.slot(ins.operands[0], np.bool_)
    slot, offset = pointer(program, ins.operands[1])
    phase = program.slot(ins.operands[2], np.uint32)

    def run(w: Warp) -> None:
        at = addresses(w, slot, offset)
        barrier = w.block.shared.barrier(w, uniform(at, "the barrier of a wait"))
        parity = uniform(_active(w, phase), "the parity of a wait")
        if barrier.passed(parity):
            barrier.observe(w)
            w.note("wait", at.tolist(), parity)
            w.assign(to, True)
        else:
            w.wait(lambda: barrier.passed(parity), f"parity {parity} of ", barrier)

    return run


# ---- fences and bar.sync


@opcode("fence.mbarrier_init.release.cluster")
def fence_barriers(program: Program, ins: Instruction) -> Run:
    def run(w: Warp) -> None:
        for barrier in w.block.shared.barriers.values():
            barrier.fenced |= barrier.made[0] == w.index

    return run


@opcode("fence.proxy.async")
def fence_proxy(program: Program, ins: Instruction) -> Run:
    everywhere = ins.opcode == "fence.proxy.async"

    def run(w: Warp) -> None:
        w.block.shared.proxy_fence(w)
        w.unfenced &= not everywhere

    return run


@opcode("bar.sync", "barrier.sync", "barrier.sync.aligned")
def named_barrier(program: Program, ins: Instruction) -> Run:
    number = program.slot(ins.operands[0], np.uint32)
    threads = program.slot(ins.operands[1], np.uint32) if len(ins.operands) > 1 else None

    def run(w: Warp) -> None:
        if not w.together("bar.sync"):
            return
        index = uniform(w.slots[number], "the number of bar.sync")
        count = w.block.threads if threads is None else uniform(w.slots[threads], "the threads of bar.sync")
        barrier = w.block.named.setdefault(index, NamedBarrier(index))
        if w.arrived is None:
            w.arrived = barrier.arrive(w, count)
        generation = w.arrived
        if barrier.generation > generation:
            w.arrived = None
        else:
            w.wait(lambda: barrier.generation > generation, f"bar.sync {index} of {count} threads")

    return run


@opcode("bar.warp.sync")
def warp_barrier(program: Program, ins: Instruction) -> Run:
    mask = program.slot(ins.operands[0], np.uint32)

    def run(w: Warp) -> None:
        if (w.slots[mask] != 0xFFFFFFFF).any():
            raise UnsupportedError("bar.warp.sync among a part of the warp")
        w.together("bar.warp.sync")

    return run


@opcode("mbarrier.inval.shared::cta.b64", "mbarrier.inval.shared.b64")
def barrier_end(program: Program, ins: Instruction) -> Run:
    slot, offset = pointer(program, ins.operands[0])

    def run(w: Warp) -> None:
        for address in addresses(w, slot, offset).tolist():
            w.block.shared.release(w, address)

    return run


@opcode("setmaxnreg.inc.sync.aligned.u32", "setmaxnreg.dec.sync.aligned.u32")
def set_registers(program: Program, ins: Instruction) -> Run:
    count, more = _constant(ins.operands[0]), ins.parts[1] == "inc"

    def run(w: Warp) -> None:
        if not w.together("setmaxnreg"):
            return
        if count % 8 or (count < w.registers if more else count > w.registers):
            raise UnsupportedError(f"{ins.opcode} {count}, from {w.registers} registers")
        needed = 32 * (count - w.registers)
        if needed > w.block.free_registers:
            w.wait(lambda: needed <= w.block.free_registers, f"{needed} registers for its threads")
            return
        w.block.free_registers -= needed
        w.registers = count

    return run


@opcode("nanosleep.u32")
def sleep(program: Program, ins: Instruction) -> Run:
    """Until some atomic may have changed what was polled, so that threads that poll for ever are a deadlock."""

    def run(w: Warp) -> None:
        seen, machine = w.polled, w.block.machine
        if machine.atomics == seen:
            w.wait(lambda: machine.atomics > seen, "what it polls")

    return run


@opcode("trap")
def trap(program: Program, ins: Instruction) -> Run:
    def run(w: Warp) -> None:
        raise PtxError("trap")

    return run


# ---- copies

LOAD = re.compile(r"\dd\.shared::\w+\.global(\.tile)?\.mbarrier::complete_tx::bytes(\.L2::cache_hint)?")
STORE = re.compile(r"\dd\.global\.shared::cta(\.tile)?\.bulk_group")
REDUCTION = re.compile(r"\dd\.global\.shared::cta\.add(\.tile)?\.bulk_group")


@opcode("createpolicy.fractional.L2::evict_first.b64")
def policy(program: Program, ins: Instruction) -> Run:
    """Caches are not modelled: a number that nobody looks at."""
    to = program.slot(ins.operands[0], np.uint64)

    def run(w: Warp) -> None:
        w.assign(to, np.uint64(0))

    return run


def _copier(w: Warp) -> int:
    """The lane that issues a copy, which must be ordered after what its warp has learned from global memory."""
    if w.unfenced:
        raise ProxyFenceError("a copy after an acquire without a proxy fence of all memory")
    return w.lane("a copy")


def _coordinates(program: Program, operand: Operand, rank: str) -> list[int]:
    if not isinstance(operand, Address) or operand.coordinates is None or f"{len(operand.coordinates.items)}d" != rank:
        raise UnsupportedError(f"{operand} where a tensor belongs")
    return [program.slot(item, np.int32) for item in operand.coordinates.items]


@opcode("cp.async.bulk.tensor")
def tensor_copy(program: Program, ins: Instruction) -> Run:
    form = ".".join(ins.parts[4:])
    if LOAD.fullmatch(form):
        return tensor_load(program, ins)
    if STORE.fullmatch(form):
        return tensor_store(program, ins, Store, ins.parts[4])
    raise UnsupportedError(ins.opcode)


@opcode("cp.reduce.async.bulk.tensor")
def tensor_reduction(program: Program, ins: Instruction) -> Run:
    if not REDUCTION.fullmatch(".".join(ins.parts[5:])):
        raise UnsupportedError(ins.opcode)
    return tensor_store(program, ins, Reduction, ins.parts[5])


def tensor_load(program: Program, ins: Instruction) -> Run:
    to, tensor, barrier = (pointer(program, operand) for operand in ins.operands[:3])
    coordinates = _coordinates(program, ins.operands[1], ins.parts[4])

    def run(w: Warp) -> None:
        lane = _copier(w)
        address, map_, bar = (int(addresses(w, *each)[0]) for each in (to, tensor, barrier))
        at = [int(w.slots[slot][lane]) for slot in coordinates]
        machine = w.block.machine
        where = w.block.shared.barrier(w, bar, asynchronous=machine.rules.barrier_fences)
        machine.under_way.append(Load(w, machine.tensor(map_), at, address, where))
        w.note("load", [bar])

    return run


def tensor_store(program: Program, ins: Instruction, kind: type[Store], rank: str) -> Run:
    tensor, source = (pointer(program, operand) for operand in ins.operands)
    coordinates = _coordinates(program, ins.operands[0], rank)

    def run(w: Warp) -> None:
        lane = _copier(w)
        map_, address = (int(addresses(w, *each)[0]) for each in (tensor, source))
        at = [int(w.slots[slot][lane]) for slot in coordinates]
        machine = w.block.machine
        store = kind(w, machine.tensor(map_), at, address)
        machine.under_way.append(store)
        w.stores.setdefault(lane, StoreGroups()).add(store)

    return run


@opcode("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes")
def line_load(program: Program, ins: Instruction) -> Run:
    to, source, barrier = (pointer(program, ins.operands[i]) for i in (0, 1, 3))
    count = program.slot(ins.operands[2], np.uint32)

    def run(w: Warp) -> None:
        lane = _copier(w)
        address, start, bar = (int(addresses(w, *each)[0]) for each in (to, source, barrier))
        machine = w.block.machine
        where = w.block.shared.barrier(w, bar, asynchronous=machine.rules.barrier_fences)
        machine.under_way.append(Load(w, Line(start, int(w.slots[count][lane])), (), address, where))
        w.note("load", [bar])

    return run


@opcode("cp.async.bulk.global.shared::cta.bulk_group")
def line_store(program: Program, ins: Instruction) -> Run:
    to, source = (pointer(program, operand) for operand in ins.operands[:2])
    count = program.slot(ins.operands[2], np.uint32)

    def run(w: Warp) -> None:
        lane = _copier(w)
        start, address = (int(addresses(w, *each)[0]) for each in (to, source))
        store = Store(w, Line(start, int(w.slots[count][lane])), (), address)
        w.block.machine.under_way.append(store)
        w.stores.setdefault(lane, StoreGroups()).add(store)

    return run


@opcode("cp.async.bulk.commit_group")
def commit_stores(program: Program, ins: Instruction) -> Run:
    def run(w: Warp) -> None:
        for lane in np.flatnonzero(w.mask).tolist():
            w.stores.setdefault(lane, StoreGroups()).commit()

    return run


@opcode("cp.async.bulk.wait_group")
def wait_stores(program: Program, ins: Instruction) -> Run:
    allowed, only_read = _constant(ins.operands[0]), ins.parts[-1] == "read"

    def run(w: Warp) -> None:
        groups = [w.stores[lane] for lane in np.flatnonzero(w.mask).tolist() if lane in w.stores]
        if all(group.complete(allowed, only_read) for group in groups):
            for group in groups:
                group.observe(w, allowed, only_read)
        else:
            w.wait(lambda: all(group.complete(allowed, only_read) for group in groups), "its tensor stores")

    return run


# ---- matrix products


@opcode("wgmma.fence.sync.aligned")
def mma_fence(program: Program, ins: Instruction) -> Run:
    def run(w: Warp) -> None:
        if not w.together("wgmma.fence"):
            return
        w.mma.fence()

    return run


@opcode("wgmma.mma_async.sync.aligned")
def mma(program: Program, ins: Instruction) -> Run:
    shape = re.fullmatch(r"m64n(\d+)k16\.f32\.(b?f16)\.\2", ".".join(ins.parts[4:]))
    accumulator, a, b, accumulate, *signs = ins.operands
    if shape is None or not isinstance(accumulator, Vector) or len(accumulator.items) != int(shape[1]) // 2:
        raise UnsupportedError(ins.opcode)
    sign_a, sign_b, *transposed = (_constant(operand) for operand in signs)
    if isinstance(a, Vector):
        transposed = [0, *transposed]
    facts = Shape(int(shape[1]), shape[2] == "f16", bool(transposed[0]), bool(transposed[1]), sign_a * sign_b)
    to = register_places(program, accumulator)
    fragment = register_places(program, a) if isinstance(a, Vector) else None
    a_slot = -1 if isinstance(a, Vector) else program.slot(a, np.uint64)
    b_slot, predicate = program.slot(b, np.uint64), program.slot(accumulate, np.bool_)

    def run(w: Warp) -> None:
        if not w.together("wgmma"):
            return
        first = uniform(w.slots[a_slot], "a descriptor") if fragment is None else fragment
        second = uniform(w.slots[b_slot], "a descriptor")
        w.mma.issue(ins.line, facts, to, first, second, bool(uniform(w.slots[predicate], "scale-d")))

    return run


def register_places(program: Program, vector: Vector) -> Registers:
    return registers(*(program.places[item.name][1] for item in vector.items))  # type: ignore[union-attr]


@opcode("wgmma.commit_group.sync.aligned")
def mma_commit(program: Program, ins: Instruction) -> Run:
    def run(w: Warp) -> None:
        if not w.together("wgmma.commit_group"):
            return
        w.mma.commit()

    return run


@opcode("wgmma.wait_group.sync.aligned")
def mma_wait(program: Program, ins: Instruction) -> Run:
    allowed = _constant(ins.operands[0])

    def run(w: Warp) -> None:
        if not w.together("wgmma.wait_group"):
            return
        if w.mma.complete(allowed):
            w.mma.retire(allowed)
        else:
            w.wait(lambda: w.mma.complete(allowed), "its matrix products")

    return run


# ---- between lanes


@opcode("shfl.sync.bfly.b32", "shfl.sync.idx.b32")
def shuffle(program: Program, ins: Instruction) -> Run:
    to, source, by, clamp, members = ins.operands
    targets = (
        [program.slot(to.items[0], np.uint32), program.slot(to.items[1], np.bool_)]
        if isinstance(to, Vector)
        else [program.slot(to, np.uint32)]
    )
    value, distance, limit, mask = (program.slot(x, np.uint32) for x in (source, by, clamp, members))
    lanes = np.arange(32)
    butterfly = ins.parts[2] == "bfly"

    def run(w: Warp) -> None:
        if not w.together("shfl"):
            return
        s = w.slots
        if (s[mask] != 0xFFFFFFFF).any() or (s[limit] != 31).any():
            raise UnsupportedError("shfl among a part of the warp")
        other = lanes ^ (s[distance] & 31) if butterfly else s[distance] & 31
        s[targets[0]][:] = s[value][other]
        if len(targets) > 1:
            s[targets[1]][:] = True

    return run


@opcode("vote.sync.any.pred", "vote.sync.all.pred")
def vote(program: Program, ins: Instruction) -> Run:
    only(ins, "sync", "any", "all")
    to, source, mask = (
        program.slot(x, kind) for x, kind in zip(ins.operands, (np.bool_, np.bool_, np.uint32), strict=True)
    )

    def run(w: Warp) -> None:
        if not w.together("vote"):
            return
        if (w.slots[mask] != 0xFFFFFFFF).any():
            raise UnsupportedError("vote among a part of the warp")
        w.slots[to][:] = w.slots[source].any() if ins.parts[2] == "any" else w.slots[source].all()

    return run
