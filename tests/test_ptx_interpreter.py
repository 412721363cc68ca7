"""The PTX interpreter on hand-written PTX: single instructions against plain Python, and each fault that it names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from ptx.errors import (
    ArrivalError,
    DeadlockError,
    DivergenceError,
    OutOfBoundsError,
    RaceError,
    UninitialisedError,
    UnsupportedError,
)
from ptx.machine import Machine
from ptx.parse import parse
from ptx.program import shared
from ptx.tma import TensorMap

LANES = 32
HEADER = """.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 shared[];
.visible .entry f(.param .u64 a, .param .u64 b, .param .align 64 .b8 map[128])
{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<40>;
.reg .f32 %f<40>;
.reg .b64 %rd<20>;
ld.param.u64 %rd1, [a];
ld.param.u64 %rd2, [b];
mov.b64 %rd9, map;
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
"""


def run(
    body: str,
    a: np.ndarray,
    b: np.ndarray,
    *,
    threads: int = LANES,
    shared: int = 16384,
    seed: int = 0,
    tensor: TensorMap | None = None,
    machine: Callable[[str, int], Machine] = Machine,
) -> Machine:
    """Runs a kernel that has ``a`` at %rd1 and ``b`` at %rd2, and each thread's words of them at %rd4 and %rd5."""
    m = machine(HEADER + body + "\nret;\n}\n", seed)
    at = [np.uint64(m.memory.add(name, x)).tobytes() for name, x in (("a", a), ("b", b))]
    m.launch(1, threads, shared, [*at, bytes(128)], {(2, 0): tensor} if tensor else None)
    return m


def words(values: Sequence[int]) -> np.ndarray:
    return np.array([value & 0xFFFFFFFF for value in values], np.uint32)


def signed(value: int) -> int:
    return (value & 0xFFFFFFFF) - (1 << 32 if value & 0x80000000 else 0)


X = [0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFF6, 0x12345678] * 2
Y = [1, 1, 3, 5, 2, 31, 4, 32, 0xFFFFFFFE, 3, 0xFFFFFFFF, 7, 2, 0xFFFFFFFF, 3, 40] + [3, 7] * 8


def shifted(x: int, y: int) -> int:
    return x << y if y < 32 else 0


INTEGERS: dict[str, Callable[[int, int], int]] = {
    "add.s32 %r4, %r2, %r3;": lambda x, y: x + y,
    "sub.s32 %r4, %r2, %r3;": lambda x, y: x - y,
    "mul.lo.s32 %r4, %r2, %r3;": lambda x, y: x * y,
    "mul.hi.u32 %r4, %r2, %r3;": lambda x, y: x * y >> 32,
    "mul.hi.s32 %r4, %r2, %r3;": lambda x, y: signed(x) * signed(y) >> 32,
    "mad.lo.s32 %r4, %r2, %r3, 5;": lambda x, y: x * y + 5,
    "div.s32 %r4, %r2, %r3;": lambda x, y: math.trunc(signed(x) / signed(y)),
    "rem.s32 %r4, %r2, %r3;": lambda x, y: signed(x) - signed(y) * math.trunc(signed(x) / signed(y)),
    "div.u32 %r4, %r2, %r3;": lambda x, y: x // y,
    "rem.u32 %r4, %r2, %r3;": lambda x, y: x % y,
    "min.s32 %r4, %r2, %r3;": lambda x, y: min(signed(x), signed(y)),
    "max.s32 %r4, %r2, %r3;": lambda x, y: max(signed(x), signed(y)),
    "min.u32 %r4, %r2, %r3;": min,
    "and.b32 %r4, %r2, %r3;": lambda x, y: x & y,
    "or.b32 %r4, %r2, %r3;": lambda x, y: x | y,
    "xor.b32 %r4, %r2, %r3;": lambda x, y: x ^ y,
    "not.b32 %r4, %r2;": lambda x, y: ~x,
    "neg.s32 %r4, %r2;": lambda x, y: -x,
    "shl.b32 %r4, %r2, %r3;": shifted,
    "shr.u32 %r4, %r2, %r3;": lambda x, y: x >> y,
    "shr.s32 %r4, %r2, %r3;": lambda x, y: signed(x) >> y,
    "bfi.b32 %r4, %r2, %r3, 4, 9;": lambda x, y: y & ~0x1FF0 | (x & 0x1FF) << 4,
    "bfe.u32 %r4, %r2, 4, 9;": lambda x, y: x >> 4 & 0x1FF,
    "and.b32 %r5, %r3, 63; bmsk.clamp.b32 %r4, %r2, %r5;": lambda x, y: ((1 << min(y & 63, 32)) - 1) << min(x, 32),
    "bmsk.clamp.b32 %r4, 7, %r3;": lambda x, y: ((1 << min(y, 32)) - 1) << 7,
    "prmt.b32 %r4, %r2, %r3, 0x3614;": lambda x, y: (
        y & 255 | (x >> 8 & 255) << 8 | (y >> 16 & 255) << 16 | (x >> 24) << 24
    ),
    "prmt.b32 %r4, %r2, 0, 0x9484;": lambda x, y: (x >> 7 & 1) * 0xFF00 | (x >> 15 & 1) * 0xFF000000,
    "setp.lt.s32 %p1, %r2, %r3; selp.b32 %r4, %r2, %r3, %p1;": lambda x, y: x if signed(x) < signed(y) else y,
    "setp.lt.u32 %p1, %r2, %r3; selp.b32 %r4, %r2, %r3, %p1;": min,
    "setp.ge.u32 %p2, %r2, 9; setp.eq.and.s32 %p1, %r2, %r3, %p2; selp.u32 %r4, 1, 0, %p1;": lambda x, y: int(
        x == y and x >= 9
    ),
    "mov.u32 %r4, 0; setp.gt.s32 %p1, %r2, 2; @%p1 mov.u32 %r4, %r3;": lambda x, y: y if signed(x) > 2 else 0,
    "mov.u32 %r4, 0; setp.gt.s32 %p1, %r2, 2; @!%p1 mov.u32 %r4, %r3;": lambda x, y: 0 if signed(x) > 2 else y,
    "mul.wide.s32 %rd6, %r2, %r3; shr.u64 %rd6, %rd6, 16; cvt.u32.u64 %r4, %rd6;": lambda x, y: (
        signed(x) * signed(y) >> 16
    ),
    "cvt.s64.s32 %rd6, %r2; shr.s64 %rd6, %rd6, 8; cvt.u32.u64 %r4, %rd6;": lambda x, y: signed(x) >> 8,
    "cvt.u64.u32 %rd6, %r2; shr.u64 %rd6, %rd6, 8; cvt.u32.u64 %r4, %rd6;": lambda x, y: x >> 8,
    "cvt.u16.u32 %rs1, %r2; setp.gt.s16 %p1, %rs1, -1; selp.b32 %r4, 1, 0, %p1;": lambda x, y: int(not x & 0x8000),
    "mov.b64 %rd6, {%r2, %r3}; shr.u64 %rd6, %rd6, 20; cvt.u32.u64 %r4, %rd6;": lambda x, y: (x | y << 32) >> 20,
    "mov.b64 %rd6, {%r2, %r3}; mov.b64 {%r5, %r4}, %rd6;": lambda x, y: y,
}


@pytest.mark.parametrize("text", INTEGERS)
def test_integers(text: str) -> None:
    a, b = words(X), words(Y)
    x, y = a.tolist(), b.tolist()
    run(f"ld.global.u32 %r2, [%rd4]; ld.global.u32 %r3, [%rd5];\n{text}\nst.global.u32 [%rd5], %r4;", a, b)
    if text.startswith("sh"):  # counts beyond the register's bits
        assert max(y) > 64
        y = [min(value, 64) for value in y]
    assert b.tolist() == words([INTEGERS[text](i, j) for i, j in zip(x, y, strict=True)]).tolist()


INF, NAN = math.inf, math.nan
FLOATS: dict[str, Callable[[float, float], float]] = {
    "add.f32 %f3, %f1, %f2;": lambda x, y: x + y,
    "sub.f32 %f3, %f1, %f2;": lambda x, y: x - y,
    "mul.f32 %f3, %f1, %f2;": lambda x, y: x * y,
    "neg.f32 %f3, %f1;": lambda x, y: -x,
    "max.f32 %f3, %f1, %f2;": lambda x, y: y if x != x else x if y != y else max(x, y),
    "min.f32 %f3, %f1, %f2;": lambda x, y: y if x != x else x if y != y else min(x, y),
    "mov.f32 %f3, 0f3FC00000;": lambda x, y: 1.5,
    "mov.b32 %r2, %f1; mov.b32 %f3, %r2;": lambda x, y: x,
    "cvt.rn.f32.s32 %f3, -7;": lambda x, y: -7.0,
    **{
        f"setp.{name}.f32 %p1, %f1, %f2; selp.f32 %f3, 0f3F800000, 0f00000000, %p1;": function
        for name, function in {
            "lt": lambda x, y: float(x < y),
            "ge": lambda x, y: float(x >= y),
            "eq": lambda x, y: float(x == y),
            "ne": lambda x, y: float(x < y or x > y),
            "leu": lambda x, y: float(not x > y),
            "gtu": lambda x, y: float(not x <= y),
            "equ": lambda x, y: float(not (x < y or x > y)),
            "neu": lambda x, y: float(x != y),
        }.items()
    },
}


@pytest.mark.parametrize("text", FLOATS)
def test_floats(text: str) -> None:
    a = np.array([1.5, -2, 0, INF, -INF, NAN, 1, 3e38] * 4, np.float32)
    b = np.repeat(np.array([2, NAN, -INF, 1], np.float32), 8)
    with np.errstate(all="ignore"):
        wanted = np.array([FLOATS[text](x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]).astype(np.float32)
    run(f"ld.global.f32 %f1, [%rd4]; ld.global.f32 %f2, [%rd5];\n{text}\nst.global.f32 [%rd5], %f3;", a, b)
    np.testing.assert_array_equal(b, wanted)


def test_fused_multiply_add_rounds_once() -> None:
    a = np.full(LANES, 1 + 2**-12, np.float32)
    b = np.full(LANES, -1 - 2**-11, np.float32)
    run(
        "ld.global.f32 %f1, [%rd4]; ld.global.f32 %f2, [%rd5];\n"
        "fma.rn.f32 %f3, %f1, %f1, %f2; st.global.f32 [%rd5], %f3;",
        a,
        b,
    )
    assert b.tolist() == [2.0**-24] * LANES


@pytest.mark.parametrize(("kind", "dtype"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_pairs_of_16_bit_floats(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(2, LANES)
    x[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, INF])  # halves go to the even neighbour
    a, b = x.numpy().copy(), y.numpy().copy()
    body = "ld.global.f32 %f1, [%rd4]; ld.global.f32 %f2, [%rd5];\n"
    run(body + f"cvt.rn.{kind}.f32 %r2, %f1, %f2; st.global.u32 [%rd5], %r2;", a, b)
    pairs = torch.from_numpy(b).view(dtype).reshape(LANES, 2)
    assert torch.equal(pairs, torch.stack([y, x], 1).to(dtype))


@pytest.mark.parametrize(
    ("name", "function"), [("ex2", lambda x: 2.0**x), ("lg2", math.log2), ("rcp", lambda x: 1 / x)]
)
def test_approximate_functions(name: str, function: Callable[[float], float]) -> None:
    a, b = np.linspace(0.1, 30, LANES, dtype=np.float32), np.zeros(LANES, np.float32)
    run(f"ld.global.f32 %f1, [%rd4]; {name}.approx.ftz.f32 %f2, %f1; st.global.f32 [%rd5], %f2;", a, b)
    np.testing.assert_allclose(b, [function(x) for x in a.tolist()], rtol=1e-6)


def test_vectors_and_small_integers() -> None:
    a = np.arange(4 * LANES, dtype=np.uint32) * 0x01010185
    b = np.zeros(4 * LANES, np.uint32)
    run(
        "shl.b64 %rd6, %rd3, 2; add.s64 %rd7, %rd1, %rd6; add.s64 %rd8, %rd2, %rd6;\n"
        "ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd7]; ld.global.s8 %r6, [%rd7]; ld.global.u8 %r7, [%rd7+1];\n"
        "st.global.v2.u32 [%rd8], {%r5, %r2}; st.global.u32 [%rd8+8], %r6; st.global.u32 [%rd8+12], %r7;",
        a,
        b,
    )
    first, last = a[::4].tolist(), a[3::4].tolist()
    assert b[0::4].tolist() == last
    assert b[1::4].tolist() == first
    low = [x & 255 for x in first]
    assert b[2::4].tolist() == words([x - 256 if x > 127 else x for x in low]).tolist()
    assert b[3::4].tolist() == [x >> 8 & 255 for x in first]


COLLATZ = """
ld.global.u32 %r2, [%rd4];
mov.u32 %r3, 0;
LOOP: setp.le.u32 %p1, %r2, 1;
@%p1 bra DONE;
add.s32 %r3, %r3, 1;
and.b32 %r4, %r2, 1;
setp.eq.s32 %p2, %r4, 0;
@%p2 bra HALF;
mad.lo.s32 %r2, %r2, 3, 1;
bra LOOP;
HALF: shr.u32 %r2, %r2, 1;
bra LOOP;
DONE: shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
st.global.u32 [%rd5], %r5;
"""


def test_threads_that_part_meet_again() -> None:
    def steps(x: int) -> int:
        count = 0
        while x > 1:
            x, count = (3 * x + 1 if x % 2 else x // 2), count + 1
        return count

    a, b = np.arange(1, LANES + 1, dtype=np.uint32), np.zeros(LANES, np.uint32)
    run(COLLATZ, a, b)
    assert b.tolist() == [steps((lane ^ 1) + 1) for lane in range(LANES)]


def test_shuffles_and_votes() -> None:
    a, b = np.arange(LANES, dtype=np.uint32) * 3, np.zeros(LANES, np.uint32)
    run(
        "ld.global.u32 %r2, [%rd4]; shfl.sync.idx.b32 %r3|%p3, %r2, 5, 31, -1; setp.gt.u32 %p1, %r2, 90;\n"
        "vote.sync.any.pred %p2, %p1, -1; selp.u32 %r4, 100, 0, %p2; vote.sync.all.pred %p2, %p1, -1;\n"
        "selp.u32 %r5, 1000, 0, %p2; add.s32 %r3, %r3, %r4; add.s32 %r3, %r3, %r5; st.global.u32 [%rd5], %r3;",
        a,
        b,
    )
    assert b.tolist() == [115] * LANES


def test_atomics_count_every_thread_once() -> None:
    a, b = np.zeros(1, np.uint32), np.zeros(4 * LANES, np.uint32)
    run("atom.global.add.u32 %r2, [%rd1], 2; st.global.u32 [%rd5], %r2;", a, b, threads=128)
    assert a[0] == 256
    assert sorted(b.tolist()) == list(range(0, 256, 2))
    assert b.tolist() != sorted(b.tolist())  # warps and threads come in some other order


@pytest.mark.parametrize(
    "body",
    [
        "ld.global.u32 %r2, [%rd1+128];",
        "ld.global.u32 %r2, [%rd1+-4];",
        "ld.global.u32 %r2, [%rd1+2];",
        "ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd1+120];",
        "mov.u64 %rd6, 0; ld.global.u32 %r2, [%rd6];",
        "st.global.u32 [%rd4+4], %r1;",
        "atom.global.add.u32 %r2, [%rd4+4], 1;",
        "mov.u32 %r2, shared; st.shared.u32 [%r2+16384], %r1;",
        "ld.shared.u32 %r2, [0];",
    ],
)
def test_addresses_outside(body: str) -> None:
    with pytest.raises(OutOfBoundsError):
        run(body, np.zeros(LANES, np.uint32), np.zeros(LANES, np.uint32))


@pytest.mark.parametrize(
    "body",
    ["popc.b32 %r2, %r1;", "add.sat.s32 %r2, %r1, %r1;", "add.s32 %rd6, %r1, %r1;", "mov.u32 %r2, %clock;",
     "div.rn.f32 %f1, %f2, %f3;", "shfl.sync.bfly.b32 %r2, %r1, 1, 7, -1;", "add.f32 %f1, %f2, 3;"],
)  # fmt: skip
def test_what_is_not_known_is_not_guessed(body: str) -> None:
    with pytest.raises(UnsupportedError):
        run(body, np.zeros(LANES, np.uint32), np.zeros(LANES, np.uint32))


def test_a_module_of_two_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        parse(".entry f() { ret; }\n.entry g() { ret; }")


# ---- pairs of floats


def f32(x: Fraction, down: bool) -> float:
    """The nearest float32 to an exact number, or the largest one that is not above it."""
    near = np.float32(float(x))
    if down and Fraction(float(near)) > x:
        near = np.nextafter(near, np.float32(-math.inf))
    return float(near)


@pytest.mark.parametrize("operation", ["add.rn.ftz.f32x2", "add.rm.ftz.f32x2", "mul.rn.ftz.f32x2", "fma.rn.ftz.f32x2"])
def test_pairs_of_floats(operation: str) -> None:
    rng = np.random.default_rng(4)
    a = (rng.standard_normal(2 * LANES) * 2.0 ** rng.integers(-20, 24, 2 * LANES)).astype(np.float32)
    b = np.concatenate([rng.standard_normal(LANES), np.full(LANES, 12582912.0)]).astype(np.float32)
    third = ", %rd8" if operation.startswith("fma") else ""
    x, y = ([Fraction(float(v)) for v in values] for values in (a, b))
    body = "shl.b64 %rd6, %rd3, 1; add.s64 %rd7, %rd1, %rd6; add.s64 %rd9, %rd2, %rd6;\n"
    body += "ld.global.v2.f32 {%f1, %f2}, [%rd7]; ld.global.v2.f32 {%f3, %f4}, [%rd9];\n"
    body += f"mov.b64 %rd7, {{%f1, %f2}}; mov.b64 %rd8, {{%f3, %f4}};\n{operation} %rd6, %rd7, %rd8{third};\n"
    run(body + "mov.b64 {%f1, %f2}, %rd6; st.global.v2.f32 [%rd9], {%f1, %f2};", a, b)
    exact = {"add": lambda p, q: p + q, "mul": lambda p, q: p * q, "fma": lambda p, q: p * q + q}[operation[:3]]
    assert b.tolist() == [f32(exact(p, q), ".rm." in operation) for p, q in zip(x, y, strict=True)]


def test_one_thread_of_a_pair_of_floats() -> None:
    a, b = np.arange(LANES, dtype=np.float32), np.zeros(2 * LANES, np.float32)
    body = "ld.global.f32 %f1, [%rd4]; mov.b64 %rd7, {%f1, %f1}; setp.eq.s32 %p1, %r1, 5;\n"
    body += "@%p1 add.rn.f32x2 %rd7, %rd7, %rd7; mov.b64 {%f2, %f3}, %rd7;\n"
    run(body + "shl.b64 %rd6, %rd3, 1; add.s64 %rd6, %rd6, %rd2; st.global.v2.f32 [%rd6], {%f2, %f3};", a, b)
    assert b.tolist() == [float(lane * (2 if lane == 5 else 1)) for lane in range(LANES) for _ in range(2)]


def test_a_pair_of_which_one_half_is_not_asked_for() -> None:
    a, b = np.arange(LANES, dtype=np.uint32), np.zeros(LANES, np.uint32)
    run("ld.global.u32 %r2, [%rd4]; mov.b64 %rd7, {%r1, %r2}; mov.b64 {_, %r3}, %rd7; st.global.u32 [%rd5], %r3;", a, b)
    assert b.tolist() == a.tolist()
    with pytest.raises(UnsupportedError):
        run("mov.b64 %rd7, {_, %r1};", a, b)


def test_bytes_of_a_load_that_are_not_used() -> None:
    """They need not have been written; whoever uses them gets poison."""
    b = np.zeros(LANES, np.uint32)
    body = "mov.u32 %r20, shared; shl.b32 %r3, %r1, 3; add.s32 %r3, %r3, %r20; st.shared.u32 [%r3+4], %r1;\n{used}\n"
    body += "ld.shared.v2.u32 {%r5, %r6}, [%r3]; add.s32 %r6, %r6, 1; st.global.u32 [%rd5], %rX;"
    used = body.replace("{used}", '.pragma "used_bytes_mask 0xf0";')
    run(used.replace("%rX", "%r6"), np.zeros(1, np.uint32), b)
    assert b.tolist() == [lane + 1 for lane in range(LANES)]
    run(used.replace("%rX", "%r5"), np.zeros(1, np.uint32), b)
    assert b.tolist() == [0xFFFFFFFF] * LANES
    with pytest.raises(UninitialisedError):
        run(body.replace("{used}", "").replace("%rX", "%r6"), np.zeros(1, np.uint32), b)


def test_endless_kernels_end() -> None:
    with pytest.raises(DeadlockError, match="still running"):
        run(
            "L: bra L;",
            np.zeros(1, np.uint32),
            np.zeros(1, np.uint32),
            machine=lambda text, seed: Machine(text, seed, most=1000),
        )


# ---- shared memory and barriers

EXCHANGE = """
mov.u32 %r2, shared;
shl.b32 %r3, %r1, 2;
add.s32 %r4, %r2, %r3;
st.shared.u32 [%r4], %r1;
{sync}
xor.b32 %r5, %r3, 384;
add.s32 %r5, %r5, %r2;
ld.shared.u32 %r6, [%r5];
st.global.u32 [%rd5], %r6;
"""


def four_warps(body: str, **options: Any) -> list[int]:
    b = np.zeros(128, np.uint32)
    run(body, np.zeros(1, np.uint32), b, threads=128, **options)
    return b.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_bar_sync_orders_shared_memory(seed: int) -> None:
    assert four_warps(EXCHANGE.replace("{sync}", "bar.sync 0;"), seed=seed) == [t ^ 96 for t in range(128)]


@pytest.mark.parametrize("seed", range(5))
def test_races_show_with_every_seed(seed: int) -> None:
    with pytest.raises((RaceError, UninitialisedError)):
        four_warps(EXCHANGE.replace("{sync}", ""), seed=seed)
    with pytest.raises(RaceError):  # everything is written, but nothing orders the second write after the read
        four_warps(EXCHANGE.replace("{sync}", "bar.sync 0;") + "st.shared.u32 [%r4], %r1;", seed=seed)


BARRIER = """
mov.u32 %r20, shared;
add.s32 %r21, %r20, 8192;
setp.ne.s32 %p7, %r1, 0;
@%p7 bra READY;
mbarrier.init.shared::cta.b64 [%r21], COUNT;
fence.mbarrier_init.release.cluster;
READY: bar.sync 0;
"""
WAIT = "{ .reg .pred p;\nL: mbarrier.try_wait.parity.shared::cta.b64 p, [%r21], PARITY;\n@p bra E;\nbra L;\nE:\n}\n"


@pytest.mark.parametrize("seed", range(5))
def test_mbarrier_orders_shared_memory(seed: int) -> None:
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r21];\n"
    sync = BARRIER.replace("COUNT", "128") + arrive + WAIT.replace("PARITY", "0")
    assert four_warps(EXCHANGE.replace("{sync}", sync), seed=seed) == [t ^ 96 for t in range(128)]
    with pytest.raises((RaceError, UninitialisedError, DeadlockError)):  # the phase before is over at once, or never
        four_warps(EXCHANGE.replace("{sync}", sync.replace("], 0;\n@p", "], 1;\n@p")), seed=seed)


def test_arrivals_beyond_the_count() -> None:
    with pytest.raises(ArrivalError):
        four_warps(BARRIER.replace("COUNT", "129") + "mbarrier.arrive.shared::cta.b64 _, [%r21], 2;")
    with pytest.raises(ArrivalError):
        four_warps("setp.lt.u32 %p1, %r1, 64; selp.u32 %r2, 64, 128, %p1; bar.sync 1, %r2;" * 2)


def test_deadlocks_list_what_each_warp_waits_for() -> None:
    body = (
        BARRIER.replace("COUNT", "129") + "mbarrier.arrive.shared::cta.b64 _, [%r21];\n" + WAIT.replace("PARITY", "0")
    )
    with pytest.raises(DeadlockError, match=r"warp 3 of block 0 at line \d+: parity 0 of barrier .* lacks 1 arrivals"):
        four_warps(body)
    with pytest.raises(DeadlockError, match=r"bar\.sync 0 of 160 threads"):
        four_warps("bar.sync 0, 160;")


def test_barriers_are_no_memory() -> None:
    with pytest.raises(RaceError):
        four_warps(BARRIER.replace("COUNT", "1") + "ld.shared.u32 %r2, [%r21];")
    with pytest.raises(RaceError):
        four_warps("mov.u32 %r21, shared; mbarrier.arrive.shared::cta.b64 _, [%r21];")


def test_registers_come_from_those_given_back() -> None:
    body = "setp.ge.u32 %p1, %r1, 128; @%p1 bra B; setmaxnreg.dec.sync.aligned.u32 40; bra C;\n"
    body += "B: setmaxnreg.inc.sync.aligned.u32 232;\nC: st.global.u32 [%rd5], %r1;"
    b = np.zeros(384, np.uint32)
    run(body, np.zeros(1, np.uint32), b, threads=384)
    assert b.tolist() == list(range(384))
    for old, new in (
        ("dec.sync.aligned.u32 40", "dec.sync.aligned.u32 56"),
        ("inc.sync.aligned.u32 232", "inc.sync.aligned.u32 240"),
    ):
        with pytest.raises(DeadlockError, match="registers"):
            run(body.replace(old, new), np.zeros(1, np.uint32), b, threads=384)


def test_registers_that_no_thread_has_are_not_handed_out() -> None:
    """384 threads have 168 registers each; the 1024 more of a multiprocessor go to nobody, as an H100 showed."""
    body = "setp.ge.u32 %p1, %r1, 128; @%p1 bra B; setmaxnreg.dec.sync.aligned.u32 32; bra C;\n"
    body += "B: setmaxnreg.inc.sync.aligned.u32 240;\nC: st.global.u32 [%rd5], %r1;"
    with pytest.raises(DeadlockError, match="registers"):
        run(body, np.zeros(1, np.uint32), np.zeros(384, np.uint32), threads=384)


def test_some_threads_cannot_do_what_all_must() -> None:
    with pytest.raises(DivergenceError):
        four_warps("setp.lt.u32 %p1, %r1, 7; @%p1 bar.sync 0;")
    with pytest.raises(DivergenceError):
        four_warps("setp.lt.u32 %p1, %r1, 7; @%p1 ret; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;")


ALIKE = {
    "add.s32 %r2, %r2, 1;\nL: add.s32 %r2, %r2, 2;": 2,
    "L: add.s32 %r2, %r2, 1;\nadd.s32 %r2, %r2, 2;": 3,
    "L: sub.s32 %r2, %r2, 1;\nadd.s32 %r2, %r2, 2;": 1,
    "L: { .reg .b32 q; mov.u32 q, 5; add.s32 %r2, %r2, q; }\nadd.s32 %r2, %r2, 2;": 7,
    "L: { .reg .b32 p, q; mov.u32 q, 5; mov.u32 p, 9; add.s32 %r2, %r2, q; }\nadd.s32 %r2, %r2, 2;": 7,
}
"""Programs with the same registers and lines: a label moves, an opcode changes, a register of a scope moves."""


@pytest.mark.parametrize("pair", [*itertools.permutations(ALIKE, 2)])
def test_programs_share_steps_only_where_these_are_equal(pair: tuple[str, str]) -> None:
    shared.cache_clear()
    for body in pair:
        a, b = np.zeros(LANES, np.uint32), words(X)
        run(f"ld.global.u32 %r2, [%rd5];\nbra L;\n{body}\nst.global.u32 [%rd4], %r2;", a, b)
        assert a.tolist() == [(x + ALIKE[body]) & 0xFFFFFFFF for x in X]
