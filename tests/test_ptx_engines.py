"""Tensor copies and matrix products of the PTX interpreter: hand-written PTX against plain loops and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ptx.errors import (
    DeadlockError,
    DescriptorError,
    DivergenceError,
    InFlightError,
    OutOfBoundsError,
    ProxyFenceError,
    RaceError,
    UninitialisedError,
)
from ptx.machine import Machine
from ptx.tma import TensorMap
from test_ptx_interpreter import BARRIER, HEADER, WAIT, run

# ---- tensor copies

LOAD = """
@%p7 bra LOADED;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], BYTES;
cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
[%r20], [%rd9, {C0, C1, C2, 0, 0}], [%r21];
LOADED:
"""
COPY_OUT = "shl.b32 %r3, %r1, 2; add.s32 %r3, %r3, %r20; ld.shared.u32 %r4, [%r3]; st.global.u32 [%rd5], %r4;\n"


def tensor_of(
    machine: Machine, x: np.ndarray, box: tuple[int, ...], span: int, steps: tuple[int, ...] = ()
) -> TensorMap:
    """A map of a 5-D array, whose last dimension has stride 1."""
    strides = tuple(reversed(x.strides[:-1]))
    return TensorMap(machine.memory.add("tensor", x), x.shape[::-1], strides, box, span, steps, x.itemsize)


def load_box(
    x: np.ndarray,
    box: tuple[int, ...],
    at: tuple[int, int, int],
    span: int,
    steps: tuple[int, ...] = (),
    edit: Any = str,
    **rules: bool,
) -> np.ndarray:
    """What a load of a box of 512 bytes leaves in shared memory, as 16-bit words."""
    b = np.zeros(128, np.uint32)
    tensor: list[TensorMap] = []

    def machine(text: str, seed: int) -> Machine:
        made = Machine(text, seed, **rules)
        tensor.append(tensor_of(made, x, box, span, steps))
        return made

    body = BARRIER.replace("COUNT", "1") + LOAD.replace("BYTES", "512")
    for i, c in enumerate(at):
        body = body.replace(f"C{i}", str(c))
    body += WAIT.replace("PARITY", "0") + COPY_OUT
    m = machine(HEADER + edit(body) + "\nret;\n}\n", 0)
    arguments = [np.uint64(m.memory.add(name, y)).tobytes() for name, y in (("a", np.zeros(1, np.uint32)), ("b", b))]
    m.launch(1, 128, 16384, [*arguments, bytes(128)], {(2, 0): tensor[0]})
    return b.view(np.uint16)


def boxed(x: np.ndarray, box: tuple[int, ...], at: tuple[int, ...], steps: tuple[int, ...]) -> list[int]:
    """Elements of a box by plain loops, zero outside."""
    found = []
    for k in range(0, box[2], steps[2]):
        for j in range(0, box[1], steps[1]):
            for i in range(0, box[0], steps[0]):
                c, b, a = at[2] + k, at[1] + j, at[0] + i
                inside = 0 <= c < x.shape[2] and 0 <= b < x.shape[3] and 0 <= a < x.shape[4]
                found.append(int(x[0, 0, c, b, a]) if inside else 0)
    return found


@pytest.mark.parametrize("span", [0, 64, 128])
@pytest.mark.parametrize("at", [(0, 0, 0), (8, -2, 1), (-8, 5, -1), (40, 6, 3)])
def test_tensor_loads(span: int, at: tuple[int, int, int]) -> None:
    x = np.arange(1, 1 + 4 * 7 * 72, dtype=np.uint16).reshape(1, 1, 4, 7, 72)
    wide = span // 2 or 16
    box = (wide, 256 // wide // 2, 2, 1, 1)
    got = load_box(x, box, at, span).tolist()
    wanted = boxed(x, box, at, (1, 1, 1))
    for element, value in enumerate(wanted):
        byte = 2 * element
        if span == 128:  # the piece of 16 bytes within a row of 128, by the row
            byte = byte // 128 * 128 + ((byte // 16 % 8) ^ (byte // 128 % 8)) * 16 + byte % 16
        elif span == 64:
            byte = byte // 64 * 64 + ((byte // 16 % 4) ^ (byte // 128 % 4)) * 16 + byte % 16
        assert got[byte // 2] == value


def test_tensor_loads_with_steps() -> None:
    x = np.arange(1, 1 + 6 * 16 * 32, dtype=np.uint16).reshape(1, 1, 6, 16, 32)
    box, steps = (16, 15, 3, 1, 1), (1, 2, 2, 1, 1)
    assert load_box(x, box, (8, 3, -1), 0, steps).tolist() == boxed(x, box, (8, 3, -1), steps)
    with pytest.raises(DescriptorError):  # which the hardware would ignore
        load_box(x, box, (8, 3, -1), 0, (2, 2, 2, 1, 1))


def test_tensor_loads_of_32_bits() -> None:
    x = np.arange(1 << 20, (1 << 20) + 4 * 7 * 72, dtype=np.uint32).reshape(1, 1, 4, 7, 72)
    box, at = (16, 4, 2, 1, 1), (64, -1, 1)
    assert load_box(x, box, at, 0).view(np.uint32).tolist() == boxed(x, box, at, (1, 1, 1))


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("fence.mbarrier_init.release.cluster;", "", ProxyFenceError),
        ("], 512;", "], 528;", DeadlockError),
        ("[%r20], [%rd9", "[%r20+64], [%rd9", DescriptorError),
        ("[%r20], [%rd9", "[%r20+16384], [%rd9", OutOfBoundsError),
        ("[%rd9,", "[%rd9+64,", DescriptorError),
        (WAIT.replace("PARITY", "0"), "", (RaceError, UninitialisedError)),
        ("@%p7 bra LOADED;", "@%p7 bra LOADED; st.shared.u32 [%r20], 5;", ProxyFenceError),
        ("LOADED:", "ld.shared.u32 %r4, [%r20]; LOADED:", RaceError),
    ],
)
def test_faults_of_tensor_loads(old: str, new: str, error: Any) -> None:
    x = np.ones((1, 1, 4, 7, 72), np.uint16)
    with pytest.raises(error):
        load_box(x, (16, 8, 2, 1, 1), (0, 0, 0), 0, edit=lambda body: body.replace(old, new))


STORE = """
{write}
{fence}
bar.sync 0;
@%p7 bra STORED;
cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%rd9, {8, -2, 1, 0, 0}], [%r20];
cp.async.bulk.commit_group;
{wait}
STORED:
"""
WRITE = "mov.u32 %r20, shared; setp.ne.s32 %p7, %r1, 0; shl.b32 %r3, %r1, 2; add.s32 %r3, %r3, %r20;\n"
WRITE += "st.shared.u32 [%r3], %r1;"
FENCE, STORE_WAIT = "fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group 0;"


def store_box(seed: int = 0, **parts: str) -> np.ndarray:
    """A tensor ``[1, 1, 3, 7, 24]`` of ones after 128 words were stored as a box ``[2, 8, 16]`` of it."""
    x = np.full((1, 1, 3, 7, 24), 9999, np.uint16)
    body = STORE
    for name, part in ({"write": WRITE, "fence": FENCE, "wait": STORE_WAIT} | parts).items():
        body = body.replace(f"{{{name}}}", part)
    m = Machine(HEADER + body + "\nret;\n}\n", seed)
    tensor = tensor_of(m, x, (16, 8, 2, 1, 1), 0)
    one = np.uint64(m.memory.add("nothing", np.zeros(1, np.uint32))).tobytes()
    m.launch(1, 128, 16384, [one, one, bytes(128)], {(2, 0): tensor})
    return x


@pytest.mark.parametrize("seed", range(3))
def test_tensor_stores_write_inside_only(seed: int) -> None:
    x = store_box(seed)
    wanted = np.full_like(x, 9999)
    values = np.arange(128, dtype=np.uint32).view(np.uint16).reshape(2, 8, 16)
    for k in range(2):
        for j in range(8):
            for i in range(16):
                if 0 <= j - 2 < 7:
                    wanted[0, 0, 1 + k, j - 2, 8 + i] = values[k, j, i]
    assert x.tolist() == wanted.tolist()


def test_faults_of_tensor_stores() -> None:
    with pytest.raises(ProxyFenceError):
        store_box(fence="")
    with pytest.raises(ProxyFenceError):  # by some of the threads that wrote
        store_box(fence="setp.lt.u32 %p1, %r1, 96; @%p1 fence.proxy.async.shared::cta;")
    with pytest.raises(InFlightError):
        store_box(wait="")
    with pytest.raises(RaceError):
        store_box(wait="st.shared.u32 [%r20], 1; cp.async.bulk.wait_group 0;")
    store_box(wait="cp.async.bulk.wait_group.read 0; st.shared.u32 [%r20], 1;")
    with pytest.raises(UninitialisedError):
        store_box(write=WRITE.split("st.shared")[0])


# ---- matrix products

PRODUCT = """
mov.u32 %r20, shared;
shl.b32 %r3, %r1, 4;
add.s32 %r4, %r3, %r20;
COPY
fence.proxy.async.shared::cta;
bar.sync 0;
ONES
SETUP
mov.b64 %rd7, DESC_A;
mov.b64 %rd8, DESC_B;
wgmma.fence.sync.aligned;
ISSUE
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
mul.wide.u32 %rd6, %r1, STEP; add.s64 %rd6, %rd6, %rd2;
RESULTS
"""
COPY = "".join(
    f"shl.b64 %rd6, %rd3, 2; add.s64 %rd6, %rd6, %rd1;\nld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd6+{at}];\n"
    f"st.shared.v4.u32 [%r4+{at}], {{%r5, %r6, %r7, %r8}};\n"
    for at in range(0, 16384, 2048)
)


def multiplication(columns: int, operands: str) -> str:
    """The instruction for ``[64, columns]``."""
    accumulator = ", ".join(f"%f{i}" for i in range(columns // 2))
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{accumulator}}}, {operands};"


SS = multiplication(16, "%rd7, %rd8, 1, 1, 1, 0, 0")
RS = multiplication(16, "{%r10, %r11, %r12, %r13}, %rd8, 1, 1, 1, 1")
TT = multiplication(16, "%rd7, %rd8, 1, 1, 1, 1, 1")
REGISTERS_OF_A = """
shl.b64 %rd6, %rd3, 2; add.s64 %rd6, %rd6, %rd1;
ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd6+16384];
"""


def descriptor(at: int, leading: int, stride: int, span: int = 128) -> int:
    """Swizzle of 128 or 64 bytes; shared memory begins at 1024."""
    return (1024 + at) // 16 | leading // 16 << 16 | stride // 16 << 32 | 128 // span << 62


def swizzled(rows: torch.Tensor) -> np.ndarray:
    """Rows of 64 values as shared memory holds them: piece ``p`` of row ``r`` at ``p ^ (r % 8)``."""
    out = torch.zeros_like(rows)
    for r in range(len(rows)):
        for p in range(8):
            to = 8 * (p ^ (r % 8))
            out[r, to : to + 8] = rows[r, 8 * p : 8 * p + 8]
    return out.view(torch.int16).numpy().reshape(-1).view(np.uint16)


def multiply(
    a: torch.Tensor, b: torch.Tensor, registers: np.ndarray | None = None, seed: int = 0, **parts: str
) -> np.ndarray:
    """``[64, 16]`` from operands whose rows of 64 values are at 0 and at 8192 of shared memory."""
    data = np.zeros(16384 + 2048, np.uint8)
    data[: 128 * len(a)] = swizzled(a).view(np.uint8)
    data[8192 : 8192 + 128 * len(b)] = swizzled(b).view(np.uint8)
    if registers is not None:
        data[16384:] = registers.reshape(-1).view(np.uint8)
    return multiply_bytes(data, 16, seed, **parts)


def multiply_bytes(data: np.ndarray, columns: int, seed: int, **parts: str) -> np.ndarray:
    """``[64, columns]`` from what is in shared memory, added to ones."""
    count = columns // 2
    body = PRODUCT.replace("COPY", COPY).replace("STEP", str(4 * count))
    body = body.replace("ONES", "".join(f"mov.f32 %f{i}, 0f3F800000;" for i in range(count)))
    body = body.replace("RESULTS", "".join(f"st.global.f32 [%rd6+{4 * i}], %f{i};" for i in range(count)))
    for name, part in parts.items():
        body = body.replace(name, part)
    out = np.zeros((128, count), np.float32)
    run(body, data.view(np.uint32), out, threads=128, seed=seed)
    matrix = np.zeros((64, columns), np.float32)
    for thread in range(128):
        for j in range(count):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (j // 2 % 2)
            matrix[row, 8 * (j // 4) + 2 * (thread % 4) + j % 2] = out[thread, j]
    return matrix


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step", [0, 16, 48])
def test_products_of_shared_memory(step: int, seed: int) -> None:
    a, b = operands()
    parts = {"DESC_A": str(descriptor(2 * step, 16, 1024)), "DESC_B": str(descriptor(8192 + 2 * step, 16, 1024))}
    got = multiply(a, b, seed=seed, SETUP="", ISSUE=SS, **parts)
    wanted = 1 + a[:, step : step + 16].double() @ b[:16, step : step + 16].double().T
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_products_of_registers_and_transposed_memory() -> None:
    """B is ``[16 of k, 16 columns]``, the columns side by side."""
    a, b = operands()
    a = a[:, :16]
    registers = np.zeros((128, 4, 2), np.uint16)
    bits = a.view(torch.int16).numpy().view(np.uint16)
    for thread in range(128):
        for register in range(4):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register % 2)
            column = 2 * (thread % 4) + 8 * (register // 2)
            registers[thread, register] = bits[row, column : column + 2]
    parts = {"DESC_A": "0", "DESC_B": str(descriptor(8192 + 2048, 8192, 1024)), "SETUP": REGISTERS_OF_A, "ISSUE": RS}
    got = multiply(torch.zeros(64, 64).bfloat16(), b, registers, **parts)
    wanted = 1 + a.double() @ b[16:32, :16].double()
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)


def columns_first(data: np.ndarray, at: int, x: torch.Tensor, leading: int, stride: int, span: int) -> None:
    """Writes ``[rows, 16]`` as a transposed operand: columns are rows of ``span`` bytes, in patterns of 8."""
    bits = x.view(torch.int16).numpy().view(np.uint16)
    for row in range(len(x)):
        for column in range(16):
            line, byte = column % 8, (at + 2 * row) % span
            piece = byte // 16 ^ (line if span == 128 else line // 2)
            place = at - at % span + 2 * row // span * leading + column // 8 * stride
            place += line * span + 16 * piece + byte % 16
            data[place : place + 2] = bits[row, column : column + 1].view(np.uint8)


@pytest.mark.parametrize(
    ("span", "a_strides", "b_strides", "start"),
    [
        (128, (16, 1024), (16, 1024), 0),
        (128, (16, 4096), (2048, 1024), 64),
        (128, (1024, 2048), (16, 3072), 32),
        (64, (512, 1024), (16, 512), 0),
        (64, (1024, 512), (512, 1536), 0),
        (64, (4096, 2048), (1024, 512), 0),
    ],
)
@pytest.mark.parametrize("columns", [16, 32])
def test_products_of_transposed_operands(
    span: int, a_strides: tuple[int, int], b_strides: tuple[int, int], start: int, columns: int
) -> None:
    """The columns of B are a part of the rows of ``span`` bytes, from byte ``start`` on."""
    torch.manual_seed(3)
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(columns, 16).bfloat16()
    data = np.zeros(16384 + 2048, np.uint8)
    columns_first(data, 0, a, *a_strides, span)
    columns_first(data, 8192 + start, b, *b_strides, span)
    parts = {
        "DESC_A": str(descriptor(0, *a_strides, span)),
        "DESC_B": str(descriptor(8192 + start, *b_strides, span)),
        "ISSUE": multiplication(columns, "%rd7, %rd8, 1, 1, 1, 1, 1"),
        "SETUP": "",
    }
    wanted = 1 + a.double() @ b.double().T
    np.testing.assert_allclose(multiply_bytes(data, columns, 0, **parts), wanted.numpy(), rtol=1e-5, atol=1e-5)


A, B = str(descriptor(0, 16, 1024)), str(descriptor(8192, 16, 1024))


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"ISSUE": SS + "mov.f32 %f20, %f3;"}, InFlightError),
        ({"ISSUE": SS + "mov.f32 %f3, %f20;"}, InFlightError),
        ({"SETUP": REGISTERS_OF_A, "ISSUE": RS + "mov.u32 %r10, 0;"}, InFlightError),
        ({"ISSUE": "mov.f32 %f3, 0f00000000;" + SS}, InFlightError),
        ({"wgmma.fence.sync.aligned;": "", "ISSUE": SS}, InFlightError),
        ({"wgmma.wait_group.sync.aligned 0;": "", "ISSUE": SS}, InFlightError),
        ({"wgmma.wait_group.sync.aligned 0;": "wgmma.wait_group.sync.aligned 1;", "ISSUE": SS}, InFlightError),
        ({"wgmma.commit_group.sync.aligned;": "", "ISSUE": SS}, InFlightError),
        ({"fence.proxy.async.shared::cta;": "", "ISSUE": SS}, ProxyFenceError),
        ({"bar.sync 0;": "", "ISSUE": SS}, (RaceError, UninitialisedError)),
        ({"DESC_B": str(descriptor(16384, 16, 1024)), "ISSUE": SS}, OutOfBoundsError),
        ({"DESC_B": str(descriptor(8192 + 128, 16, 1024)), "ISSUE": SS}, DescriptorError),
        ({"DESC_A": str(descriptor(64, 16, 1024)), "ISSUE": TT}, DescriptorError),
        ({"DESC_B": str(descriptor(8192 + 112, 16, 1024)), "ISSUE": TT}, DescriptorError),
        ({"DESC_B": str(int(B) | 1 << 46), "ISSUE": SS}, DescriptorError),
        ({"DESC_B": str(int(B) ^ 1 << 62), "ISSUE": SS}, DescriptorError),
        ({"ISSUE": SS + "st.shared.u32 [%r4], 0;"}, RaceError),
        ({"ISSUE": "setp.lt.u32 %p1, %r1, 32; @%p1 bra X;" + SS + "X: "}, DivergenceError),
        ({"ISSUE": "setp.lt.u32 %p1, %r1, 32; selp.b64 %rd8, %rd7, %rd8, %p1;" + SS}, DivergenceError),
    ],
)  # fmt: skip
def test_faults_of_products(parts: dict[str, str], error: Any) -> None:
    a, b = operands()
    with pytest.raises(error):
        multiply(a, b, np.zeros(1024, np.uint16), **({"DESC_A": A, "DESC_B": B, "SETUP": ""} | parts))


def test_matrices_are_stored_row_by_row() -> None:
    b = np.zeros(128, np.uint32)
    body = (
        "mov.u32 %r20, shared; shl.b32 %r3, %r1, 4; add.s32 %r3, %r3, %r20;\n"  # row i of all 32 rows is at 16 i
        "add.s32 %r4, %r1, 100; add.s32 %r5, %r1, 200; add.s32 %r6, %r1, 300;\n"
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {%r1, %r4, %r5, %r6}; bar.sync 0;\n"
        "ld.shared.v4.u32 {%r7, %r8, %r9, %r10}, [%r3]; shl.b64 %rd6, %rd3, 2; add.s64 %rd6, %rd6, %rd2;\n"
        "st.global.v4.u32 [%rd6], {%r7, %r8, %r9, %r10};"
    )
    run(body, np.zeros(1, np.uint32), b)
    assert b.tolist() == [lane + 100 * matrix for matrix in range(4) for lane in range(32)]
