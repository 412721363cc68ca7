"""Products of single warps beside other things: any operands, threads elsewhere, wgmma in flight, keys from copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ptx.errors import DivergenceError, InFlightError, RaceError, UninitialisedError, UnsupportedError
from test_ptx_engines import COPY_OUT, SS, descriptor, load_box, multiply, operands
from test_ptx_interpreter import LANES, WAIT, run

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
GIVEN = "mul.wide.u32 %rd6, %r1, 40; add.s64 %rd6, %rd6, %rd1;\n" + "".join(
    [f"ld.global.u32 %r{10 + i}, [%rd6+{4 * i}];\n" for i in range(6)]
    + [f"ld.global.f32 %f{i}, [%rd6+{24 + 4 * i}];\n" for i in range(4)]
)
PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32 "
    "{%f4, %f5, %f6, %f7}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f0, %f1, %f2, %f3};\n"
)
TAKEN = "mul.wide.u32 %rd7, %r1, 32; add.s64 %rd7, %rd7, %rd2;\n" + "".join(
    f"st.global.f32 [%rd7+{4 * i}], %f{i};\n" for i in range(8)
)


def place(lane: int, i: int) -> tuple[int, int]:
    """Row and column of element ``i`` of a lane's sums."""
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


def product(kind: str, seed: int = 0, edit: Any = str, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What the interpreter makes of random ``c + a @ b``, maybe of whole numbers, and what numpy does in float64."""
    torch.manual_seed(seed)
    a, b, c = (3 * torch.randn(sizes) for sizes in ((16, 16), (16, 8), (16, 8)))
    a, b, c = (x.round() if whole else x for x in (a, b, c))
    a, b, c = a.to(TYPES[kind]), b.to(TYPES[kind]), c.numpy()
    a_bits, b_bits = (x.view(torch.int16).numpy().view(np.uint16) for x in (a, b))
    given = np.zeros((LANES, 10), np.uint32)
    for lane in range(LANES):
        halves = given[lane].view(np.uint16)
        for i in range(8):  # two in each register: rows, then the other 8 columns
            halves[i] = a_bits[lane // 4 + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)]
        for i in range(4):
            halves[8 + i] = b_bits[2 * (lane % 4) + i % 2 + 8 * (i // 2), lane // 4]
            given[lane, 6 + i] = c[place(lane, i)].view(np.uint32)
    out = np.zeros((LANES, 8), np.float32)
    run(edit(GIVEN + PRODUCT + TAKEN).replace("KIND", kind), given, out)
    found = np.zeros((16, 8), np.float32)
    for lane in range(LANES):
        for i in range(4):
            assert out[lane, i] == c[place(lane, i)]
            found[place(lane, i)] = out[lane, 4 + i]
    return found, c + a.double().numpy() @ b.double().numpy()


@pytest.mark.parametrize("kind", TYPES)
def test_whole_numbers_are_exact(kind: str) -> None:
    found, wanted = product(kind, whole=True)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", TYPES)
def test_any_operands_and_sums_of_their_own(kind: str, seed: int) -> None:
    found, wanted = product(kind, seed)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "before",
    [
        "setp.ne.s32 %p1, %r1, 7; @%p1 ",  # one thread is left out
        "setp.eq.s32 %p1, %r1, 7; @%p1 ret;\n",  # or has ended
        "setp.eq.s32 %p1, %r1, 7; @%p1 bra PAST;\n",  # or is past it
    ],
)
def test_a_missing_thread(before: str) -> None:
    with pytest.raises(DivergenceError, match="mma: by 31 threads"):
        product("bf16", edit=lambda body: body.replace(PRODUCT, before + PRODUCT + "PAST:\n"))


def test_threads_that_come_later_are_waited_for() -> None:
    """From behind the product, so that the others are there first; only then is its operand what it should be."""
    first = "setp.eq.s32 %p1, %r1, 7; mov.b32 %r30, %r15; @%p1 mov.b32 %r15, 0; @%p1 bra LATER; MEET:\n"
    last = "ret;\nLATER: mov.b32 %r15, %r30; bra MEET;\n"
    found, wanted = product("f16", edit=lambda body: body.replace(PRODUCT, first + PRODUCT) + last)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%r13}", "%r13, %r14}"),
        ("{%r14, %r15}", "%r14"),
        ("%f3};", "%f3}, 1;"),
        ("{%f4, %f5, %f6, %f7}", "{%r4, %r5, %r6}"),
        ("m16n8k16", "m16n8k8"),
        ("row.col", "row.row"),
        ("f32.KIND.KIND.f32", "f32.bf16.f16.f32"),
        ("f32.KIND.KIND.f32", "f32.KIND.KIND.f32.satfinite"),
        ("f32.KIND.KIND.f32", "f16.f16.f16.f16"),
    ],
)
def test_other_forms_are_refused(old: str, new: str) -> None:
    with pytest.raises(UnsupportedError):
        product("bf16", edit=lambda body: body.replace(PRODUCT, PRODUCT.replace(old, new)))


# ---- beside wgmma

WARP_PRODUCT = PRODUCT.replace("KIND", "bf16")


@pytest.mark.parametrize(
    ("issue", "error"),
    [
        (WARP_PRODUCT.replace("%f", "%f3") + SS, None),  # registers of its own
        (SS + WARP_PRODUCT.replace("%f", "%f3"), None),
        (WARP_PRODUCT + SS, InFlightError),  # changes them after the fence
        (SS + WARP_PRODUCT, InFlightError),  # writes what is in flight
        (SS + WARP_PRODUCT.replace("{%f4, %f5, %f6, %f7}", "{%f30, %f31, %f32, %f33}"), InFlightError),  # or reads it
    ],
)
def test_registers_of_products_in_flight(issue: str, error: type[Exception] | None) -> None:
    a, b = operands()
    setup = "".join(f"mov.b32 %r{i}, 0x3F803F80;" for i in range(10, 16))
    setup += "".join(f"mov.f32 %f{i}, 0f3F800000;" for i in range(30, 34))
    parts: dict[str, Any] = {"DESC_A": str(descriptor(0, 16, 1024)), "DESC_B": str(descriptor(8192, 16, 1024))}
    if error is None:
        got = multiply(a, b, SETUP=setup, ISSUE=issue, **parts)
        wanted = 1 + a[:, :16].double() @ b[:16, :16].double().T
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(error):
            multiply(a, b, SETUP=setup, ISSUE=issue, **parts)


# ---- operands from tensor copies


KEYS = (
    "and.b32 %r2, %r1, 31; shl.b32 %r3, %r2, 4; add.s32 %r3, %r3, %r20; shr.u32 %r6, %r1, 5;\n"
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r3];\n"
    + "".join(f"setp.eq.s32 %p1, %r6, {i}; @%p1 mov.b32 %r4, %r{10 + i};\n" for i in range(4))
    + "st.global.u32 [%rd5], %r4;\n"
)
"""Warp ``i`` has the words of matrix ``i``."""


def test_matrices_that_a_tensor_copy_filled() -> None:
    x = np.arange(1, 1 + 4 * 7 * 72, dtype=np.uint16).reshape(1, 1, 4, 7, 72)
    box, at = (16, 8, 2, 1, 1), (8, -2, 1)
    keys = load_box(x, box, at, 0, edit=lambda body: body.replace(COPY_OUT, KEYS))
    assert keys.tolist() == load_box(x, box, at, 0).tolist()
    with pytest.raises((RaceError, UninitialisedError)):
        load_box(x, box, at, 0, edit=lambda body: body.replace(COPY_OUT, KEYS).replace(WAIT.replace("PARITY", "0"), ""))


@pytest.mark.parametrize(("limit", "wanted"), [(0, 11), (5, 10), (32, 0)])
def test_votes_of_all_and_of_any(limit: int, wanted: int) -> None:
    b = np.zeros(LANES, np.uint32)
    run(
        f"setp.ge.u32 %p1, %r1, {limit}; vote.sync.all.pred %p2, %p1, -1; vote.sync.any.pred %p3, %p1, -1;\n"
        "selp.u32 %r4, 1, 0, %p2; selp.u32 %r5, 10, 0, %p3; add.s32 %r4, %r4, %r5; st.global.u32 [%rd5], %r4;",
        np.zeros(1, np.uint32),
        b,
    )
    assert b.tolist() == [wanted] * LANES
