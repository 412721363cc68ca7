"""The PTX interpreter on hand-written PTX: single instructions against plain Python, and each fault that it names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ptx.errors import (
    ArrivalError,
    DeadlockError,
    DescriptorError,
    DivergenceError,
    InFlightError,
    OutOfBoundsError,
    ProxyFenceError,
    RaceError,
    UninitialisedError,
    UnsupportedError,
)
from ptx.machine import Machine
from ptx.parse import parse
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


def test_some_threads_cannot_do_what_all_must() -> None:
    with pytest.raises(DivergenceError):
        four_warps("setp.lt.u32 %p1, %r1, 7; @%p1 bar.sync 0;")
    with pytest.raises(DivergenceError):
        four_warps("setp.lt.u32 %p1, %r1, 7; @%p1 ret; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;")


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
    return TensorMap(machine.memory.add("tensor", x), x.shape[::-1], strides, box, span, steps)


def load_box(
    x: np.ndarray,
    box: tuple[int, ...],
    at: tuple[int, int, int],
    span: int,
    steps: tuple[int, ...] = (),
    edit: Any = str,
) -> np.ndarray:
    """What a load of a box of 256 elements leaves in shared memory, as 16-bit words."""
    b = np.zeros(128, np.uint32)
    tensor: list[TensorMap] = []

    def machine(text: str, seed: int) -> Machine:
        made = Machine(text, seed)
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
    box, steps = (32, 15, 3, 1, 1), (2, 2, 2, 1, 1)
    assert load_box(x, box, (0, 3, -1), 0, steps).tolist() == boxed(x, box, (0, 3, -1), steps)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("fence.mbarrier_init.release.cluster;", "", ProxyFenceError),
        ("], 512;", "], 528;", DeadlockError),
        ("[%r20], [%rd9", "[%r20+8], [%rd9", DescriptorError),
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
mov.f32 %f0, 0f3F800000; mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f3F800000; mov.f32 %f3, 0f3F800000;
mov.f32 %f4, 0f3F800000; mov.f32 %f5, 0f3F800000; mov.f32 %f6, 0f3F800000; mov.f32 %f7, 0f3F800000;
SETUP
mov.b64 %rd7, DESC_A;
mov.b64 %rd8, DESC_B;
wgmma.fence.sync.aligned;
ISSUE
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
shl.b64 %rd6, %rd3, 3;
add.s64 %rd6, %rd2, %rd6;
st.global.v4.f32 [%rd6], {%f0, %f1, %f2, %f3};
st.global.v4.f32 [%rd6+16], {%f4, %f5, %f6, %f7};
"""
COPY = "".join(
    f"shl.b64 %rd6, %rd3, 2; add.s64 %rd6, %rd6, %rd1;\nld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd6+{at}];\n"
    f"st.shared.v4.u32 [%r4+{at}], {{%r5, %r6, %r7, %r8}};\n"
    for at in range(0, 16384, 2048)
)
MULTIPLY = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3, %f4, %f5, %f6, %f7}, "
SS = MULTIPLY + "%rd7, %rd8, 1, 1, 1, 0, 0;"
RS = MULTIPLY + "{%r10, %r11, %r12, %r13}, %rd8, 1, 1, 1, 1;"
REGISTERS_OF_A = """
shl.b64 %rd6, %rd3, 2; add.s64 %rd6, %rd6, %rd1;
ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd6+16384];
"""


def descriptor(at: int, leading: int, stride: int) -> int:
    """Swizzle of 128 bytes; shared memory begins at 1024."""
    return (1024 + at) // 16 | leading // 16 << 16 | stride // 16 << 32 | 1 << 62


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
    body = PRODUCT
    for name, part in parts.items():
        body = body.replace(name, part)
    out = np.zeros((128, 8), np.float32)
    run(body.replace("COPY", COPY), data.view(np.uint32), out, threads=128, seed=seed)
    matrix = np.zeros((64, 16), np.float32)
    for thread in range(128):
        for j in range(8):
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
