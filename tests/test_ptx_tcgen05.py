"""Tensor memory of the PTX interpreter: hand-written PTX against plain loops and torch, and each fault by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ptx.errors import (
    AllocationError,
    DeadlockError,
    DescriptorError,
    DivergenceError,
    InFlightError,
    OutOfBoundsError,
    ProxyFenceError,
    PtxError,
    RaceError,
    UninitialisedError,
    UnsupportedError,
)
from ptx.machine import Machine
from test_ptx_engines import swizzled
from test_ptx_interpreter import LANES, run

SECOND, BARRIER, ADDRESS = 16384, 32768, 32776
"""Where shared memory holds the second operand, a barrier, and the address of tensor memory."""
COLUMNS = 128
"""Columns of tensor memory that the kernels here allocate."""

START = f"""
.reg .b32 %t<140>;
mov.u32 %r20, shared;
setp.ne.s32 %p7, %r1, 0;
setp.ge.u32 %p6, %r1, 32;
shl.b32 %r3, %r1, 4;
add.s32 %r4, %r3, %r20;
COPY
fence.proxy.async.shared::cta;
@%p7 bra READY;
mbarrier.init.shared::cta.b64 [%r20+{BARRIER}], 1;
fence.mbarrier_init.release.cluster;
READY:
@%p6 bra OTHERS;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r20+{ADDRESS}], {COLUMNS};
tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
OTHERS:
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
ld.shared.u32 %r21, [%r20+{ADDRESS}];
shr.u32 %r22, %r1, 5;
shl.b32 %r22, %r22, 21;
add.s32 %r22, %r22, %r21;
mov.u32 %r26, 0;
setp.ne.s32 %p5, %r26, 0;
"""
COPY = "".join(
    f"shl.b64 %rd6, %rd3, 2; add.s64 %rd6, %rd6, %rd1;\nld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd6+{at}];\n"
    f"st.shared.v4.u32 [%r4+{at}], {{%r5, %r6, %r7, %r8}};\n"
    for at in range(0, BARRIER, 2048)
)
PRODUCT = f"""
SETUP
@%p7 bra DONE;
tcgen05.fence::after_thread_sync;
mov.b64 %rd7, DESC_A;
mov.b64 %rd8, DESC_B;
mov.u32 %r23, SHAPE;
ISSUE
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r20+{BARRIER}];
DONE:
bar.warp.sync -1;
{{ .reg .pred p;
L: mbarrier.try_wait.parity.shared::cta.b64 p, [%r20+{BARRIER}], 0;
@p bra E;
bra L;
E:
}}
tcgen05.fence::after_thread_sync;
"""
END = f"""
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
@%p6 bra END;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r21, {COLUMNS};
END:
"""
SS = "tcgen05.mma.cta_group::1.kind::f16 [%r21], %rd7, %rd8, %r23, %p5;\n"
TS = "tcgen05.mma.cta_group::1.kind::f16 [%r21], [%r21+32], %rd8, %r23, %p5;\n"
MORE = "mov.u32 %r26, 1; setp.ne.s32 %p5, %r26, 0;\n"
SHAPE = 1 << 4 | 1 << 7 | 1 << 10 | 16 >> 3 << 17 | 128 >> 4 << 24


def registers(count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%t{first + i}" for i in range(count)) + "}"


def read_out(columns: int) -> str:
    """Every thread stores the columns of its lane to the second array."""
    text = f"tcgen05.ld.sync.aligned.32x32b.x{columns}.b32 {registers(columns)}, [%r22];\n"
    text += f"tcgen05.wait::ld.sync.aligned;\nmul.wide.u32 %rd6, %r1, {4 * columns};\nadd.s64 %rd6, %rd6, %rd2;\n"
    return text + "".join(f"st.global.u32 [%rd6+{4 * i}], %t{i};\n" for i in range(columns))


def operand(at: int, leading: int, stride: int, swizzle: int = 2) -> int:
    """Shared memory begins at 1024."""
    return (1024 + at) // 16 | leading // 16 << 16 | stride // 16 << 32 | 1 << 46 | swizzle << 61


PLAIN = operand(SECOND, 16, 1024)


def execute(body: str, data: np.ndarray, columns: int, seed: int = 0, **rules: bool) -> np.ndarray:
    """``[128 threads, columns]`` of what a kernel stores."""
    out = np.zeros((128, columns), np.float32)
    made = lambda text, seed: Machine(text, seed, **rules)  # noqa: E731
    run(body.replace("COPY", COPY), data.view(np.uint32), out, threads=128, shared=ADDRESS + 8, seed=seed, machine=made)
    return out


def memory(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Operands in shared memory: rows of 64 values, swizzled."""
    data = np.zeros(BARRIER, np.uint8)
    for at, x in ((0, first), (SECOND, second)):
        data[at : at + 128 * len(x)] = swizzled(x).view(np.uint8)
    return data


def multiply(first: torch.Tensor, second: torch.Tensor, seed: int = 0, edit: Any = str, **parts: Any) -> np.ndarray:
    """``[128, N]`` after the products of ISSUE."""
    columns = parts.pop("columns", 16)
    rules = parts.pop("rules", {})
    body = START + PRODUCT + read_out(columns) + END
    given = {
        "SETUP": "",
        "DESC_A": operand(0, 16, 1024),
        "DESC_B": PLAIN,
        "SHAPE": SHAPE,
        "ISSUE": SS,
    }
    for name, part in (given | parts).items():
        body = body.replace(name, str(part))
    return execute(edit(body), memory(first, second), columns, seed, **rules)


def pair(dtype: torch.dtype = torch.bfloat16, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(128, 64).to(dtype), torch.randn(rows, 64).to(dtype)


def close(got: np.ndarray, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step", [0, 16, 48])
def test_products_of_shared_memory(step: int, seed: int) -> None:
    a, b = pair()
    k = slice(step, step + 16)
    parts = {"DESC_A": operand(2 * step, 16, 1024), "DESC_B": operand(SECOND + 2 * step, 16, 1024)}
    close(multiply(a, b, seed, **parts), a[:, k].double() @ b[:, k].double().T)


@pytest.mark.parametrize("seed", range(3))
def test_products_add_up(seed: int) -> None:
    """The second product of four has another first operand; the third one does not accumulate."""
    a, b = pair()
    again = "add.s64 %rd7, %rd7, 2;\n"
    issue = SS + MORE + again + SS + "mov.u32 %r26, 0; setp.ne.s32 %p5, %r26, 0;\n" + SS + MORE + again + SS
    x, y = a.double(), b[:, :16].double().T
    close(multiply(a, b, seed, ISSUE=issue), x[:, 16:32] @ y + x[:, 32:48] @ y)


@pytest.mark.parametrize(
    ("bits", "sign", "dtype"),
    [(0, 1, torch.bfloat16), (1 << 13, -1, torch.bfloat16), (1 << 14, -1, torch.bfloat16), (3 << 13, 1, torch.bfloat16),
     (1 << 7 | 1 << 10, 1, torch.float16)],
)  # fmt: skip
def test_types_and_signs(bits: int, sign: int, dtype: torch.dtype) -> None:
    a, b = pair(dtype)
    close(multiply(a, b, SHAPE=SHAPE ^ bits), sign * a[:, :16].double() @ b[:, :16].double().T)


@pytest.mark.parametrize("columns", [32, 64])
def test_more_columns(columns: int) -> None:
    a, b = pair(rows=columns)
    shape = SHAPE ^ (16 ^ columns) >> 3 << 17
    close(multiply(a, b, SHAPE=shape, columns=columns), a[:, :16].double() @ b[:, :16].double().T)


def test_second_operand_transposed() -> None:
    """It is ``[k, 64 columns]``, of which 32 are used, 16 rows of k further down."""
    a, b = pair(rows=64)
    parts = {"SHAPE": SHAPE ^ (16 ^ 32) >> 3 << 17 | 1 << 16, "DESC_B": operand(SECOND + 2048, 0, 1024)}
    close(multiply(a, b, columns=32, **parts), a[:, :16].double() @ b[16:32, :32].double())


def test_first_operand_transposed() -> None:
    """It is ``[k, 64 rows]`` twice, the second half 4096 bytes behind the first."""
    a, b = pair()
    parts = {"SHAPE": SHAPE | 1 << 15, "DESC_A": operand(0, 4096, 1024)}
    close(multiply(a, b, **parts), torch.cat([a[:16], a[32:48]], 1).double().T @ b[:, :16].double().T)


def test_swizzle_of_64_bytes() -> None:
    """Two rows of 32 values lie in each row of 64: piece ``p`` of row ``r`` is at ``p ^ (r / 2 % 4)``."""
    a, b = pair()

    def narrow(x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, 4, 8)
        return torch.stack([row[[p ^ r // 2 % 4 for p in range(4)]] for r, row in enumerate(rows)]).view(-1, 32)

    def plain(x: torch.Tensor) -> torch.Tensor:
        """As :func:`memory` will swizzle it back: rows of 64 values whose pieces it permutes."""
        rows = x.view(-1, 8, 8)
        return torch.stack([row[[p ^ r % 8 for p in range(8)]] for r, row in enumerate(rows)]).view(-1, 64)

    x, y = a[:64].reshape(128, 32), b[:8].reshape(16, 32)
    parts = {"DESC_A": operand(32, 16, 512, swizzle=4), "DESC_B": operand(SECOND, 16, 512, swizzle=4)}
    got = multiply(plain(narrow(x).reshape(64, 64)), plain(narrow(y).reshape(8, 64)), **parts)
    close(got, x[:, 16:].double() @ y[:, :16].double().T)


FIRST = "".join(f"ld.shared.u32 %t{i}, [%r27+{4 * i}];\n" for i in range(8))
WEIGHTS = f"""
shl.b32 %r27, %r1, 7;
add.s32 %r27, %r27, %r20;
{FIRST}
add.s32 %r28, %r22, 32;
tcgen05.st.sync.aligned.32x32b.x8.b32 [%r28], {registers(8)};
tcgen05.wait::st.sync.aligned;
tcgen05.fence::before_thread_sync;
bar.sync 1;
"""
"""Every thread stores the first 16 bytes of its row, and the next 16, as they lie in shared memory."""


@pytest.mark.parametrize("seed", range(3))
def test_first_operand_in_tensor_memory(seed: int) -> None:
    a, b = pair()
    lying = torch.from_numpy(swizzled(a).view(np.int16)).view(torch.bfloat16).reshape(128, 64)[:, :16]
    close(multiply(a, b, seed, SETUP=WEIGHTS, ISSUE=TS), lying.double() @ b[:, :16].double().T)


def test_lanes_that_are_left_alone() -> None:
    a, b = pair()
    masks = "mov.u32 %r30, 5; mov.u32 %r31, 0; mov.u32 %r32, -1; mov.u32 %r33, 0x80000000;\n"
    some = SS.replace("%p5", "{%r30, %r31, %r32, %r33}, %p5").replace("%rd7", "%rd8")
    off = torch.zeros(128, dtype=torch.bool)
    off[[0, 2, *range(64, 96), 127]] = True
    x, y = a[:, :16].double(), b[:, :16].double().T
    padded = torch.cat([b, torch.zeros(112, 64)]).double()[:, :16]
    wanted = torch.where(off[:, None], x @ y, padded @ y)
    close(multiply(a, torch.cat([b, torch.zeros(112, 64).bfloat16()]), ISSUE=SS + masks + some), wanted)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32, 64, 128])
def test_loads_and_stores(count: int) -> None:
    """Thread ``t`` stores ``1000 t + i`` to column ``i``."""
    store = "".join(f"mad.lo.s32 %t{i}, %r1, 1000, {i};\n" for i in range(count))
    store += (
        f"tcgen05.st.sync.aligned.32x32b.x{count}.b32 [%r22], {registers(count)};\ntcgen05.wait::st.sync.aligned;\n"
    )
    out = execute(START + store + read_out(count) + END, memory(*pair()), count).view(np.uint32)
    assert out.tolist() == [[1000 * thread + i for i in range(count)] for thread in range(128)]


# ---- allocation

ALLOCATE = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r20+AT], COUNT;\n"
FREE = "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %rREG, COUNT;\n"


def allocated(*calls: tuple[str, int, int], seed: int = 0) -> list[int]:
    """What one warp finds in shared memory after calls: what, columns, and where the address goes or comes from."""
    body = "mov.u32 %r20, shared;\n"
    for what, columns, at in calls:
        if what == "alloc":
            body += ALLOCATE.replace("AT", str(4 * at)).replace("COUNT", str(columns))
            body += f"ld.shared.u32 %r{at + 30}, [%r20+{4 * at}];\nst.global.u32 [%rd2+{4 * at}], %r{at + 30};\n"
        elif what == "free":
            body += FREE.replace("REG", str(at + 30)).replace("COUNT", str(columns))
        else:
            body += "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;\n"
    out = np.zeros(LANES, np.uint32)
    run(body, np.zeros(1, np.uint32), out, seed=seed)
    return out.tolist()


def test_allocations_lie_anywhere_and_apart() -> None:
    calls = [("alloc", 128, 0), ("alloc", 32, 1), ("alloc", 64, 2)]
    frees = [("free", columns, at) for _, columns, at in calls]
    seen = set()
    for seed in range(5):
        starts = allocated(*calls, *frees, seed=seed)[:3]
        used = [c for start, (_, count, _) in zip(starts, calls, strict=True) for c in range(start, start + count)]
        assert len(set(used)) == len(used)
        assert max(used) < 512
        seen.add(tuple(starts))
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ([("alloc", 32, 0)], AllocationError),
        ([("alloc", 48, 0)], AllocationError),
        ([("alloc", 16, 0)], AllocationError),
        ([("alloc", 1024, 0)], AllocationError),
        ([("relinquish", 0, 0), ("alloc", 32, 0), ("free", 32, 0)], AllocationError),
        ([("alloc", 64, 0), ("free", 32, 0)], AllocationError),
        ([("alloc", 64, 0), ("free", 64, 0), ("free", 64, 0)], AllocationError),
        ([("alloc", 512, 0), ("alloc", 32, 1)], DeadlockError),
    ],
)
def test_faults_of_allocations(calls: list[tuple[str, int, int]], error: type[PtxError]) -> None:
    with pytest.raises(error):
        allocated(*calls)


# ---- faults

BEFORE, AFTER = "tcgen05.fence::before_thread_sync;\n", "tcgen05.fence::after_thread_sync;\n"
COMMIT = f"tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r20+{BARRIER}];"
LOADED = "tcgen05.wait::ld.sync.aligned;\n"
OUT = "tcgen05.ld.sync.aligned.32x32b.x16.b32"


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        # Order between threads.
        ("E:\n}\n" + AFTER, "E:\n}\n", RaceError),
        ("}\n" + AFTER + OUT, "}\n" + OUT, RaceError),
        (f"[%r20+{BARRIER}], 0;", f"[%r20+{BARRIER}], 1;", (RaceError, UninitialisedError)),
        (LOADED, LOADED + "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r22+16], {%t0};\n", InFlightError),
        # Completion.
        (COMMIT, "", DeadlockError),
        (COMMIT, COMMIT + "\n" + SS, RaceError),
        (LOADED, "", InFlightError),
        (LOADED, "add.s32 %t3, %t3, 1;\n" + LOADED, InFlightError),
        (LOADED, "mov.u32 %r9, %t3;\n" + LOADED, InFlightError),
        # Shared memory.
        ("fence.proxy.async.shared::cta;", "", ProxyFenceError),
        (COMMIT, COMMIT + "\nst.shared.u32 [%r20], 1;", RaceError),
        (AFTER + "mov.b64 %rd7", "st.shared.u32 [%r20], 1;\n" + AFTER + "mov.b64 %rd7", ProxyFenceError),
        (str(PLAIN), str(operand(BARRIER - 1024, 16, 1024)), (RaceError, OutOfBoundsError)),
        # Addresses.
        (SS, SS.replace("[%r21]", f"[%r21+{COLUMNS - 8}]"), OutOfBoundsError),
        (SS, SS.replace("[%r21]", "[%r21+2097152]"), OutOfBoundsError),
        (OUT + " {", "add.s32 %r22, %r22, 2097152;\n" + OUT + " {", OutOfBoundsError),
        ("[%r22];", "[%r22+16];", UninitialisedError),
        (SS, MORE + SS, UninitialisedError),
        (SS, TS, UninitialisedError),
        (f"b32 %r21, {COLUMNS};", f"b32 %r21, {COLUMNS}; tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%t0}}, [%r21];",
         OutOfBoundsError),
        # Who may do what.
        ("@%p7 bra DONE;", "setp.ge.u32 %p4, %r1, 2; @%p4 bra DONE;", DivergenceError),
        ("@%p6 bra OTHERS;", "@%p7 bra OTHERS;", (DivergenceError, DeadlockError)),
        (OUT + " {", "setp.ge.u32 %p4, %r1, 7;\n@%p4 " + OUT + " {", DivergenceError),
    ],
)  # fmt: skip
def test_faults(old: str, new: str, error: Any) -> None:
    def edit(body: str) -> str:
        assert old in body
        return body.replace(old, new)

    for seed in range(2):
        with pytest.raises(error):
            multiply(*pair(), seed, edit=edit)


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        *[({"DESC_B": PLAIN ^ 1 << bit}, DescriptorError) for bit in (14, 15, 30, 31, 46, 47, 48, 53, 60)],
        *[({"DESC_B": PLAIN ^ 1 << bit}, UnsupportedError) for bit in (49, 50, 51, 52)],
        ({"DESC_B": operand(SECOND, 16, 1024, swizzle=0)}, UnsupportedError),
        ({"DESC_B": operand(SECOND, 16, 1024, swizzle=1)}, UnsupportedError),
        ({"DESC_B": operand(SECOND, 16, 1024, swizzle=3)}, DescriptorError),
        ({"DESC_B": operand(SECOND + 128, 16, 1024)}, DescriptorError),
        *[({"SHAPE": SHAPE ^ 1 << bit}, DescriptorError) for bit in (3, 5, 6, 8, 9, 11, 12, 23, 29, 30, 31)],
        *[({"SHAPE": SHAPE ^ 1 << bit}, UnsupportedError) for bit in (0, 1, 2, 4, 7, 10)],
        *[({"SHAPE": SHAPE & 0xFFFFFF | rows >> 4 << 24}, DescriptorError) for rows in (0, 16, 32, 112, 256)],
        ({"SHAPE": SHAPE & 0xFFFFFF | 64 >> 4 << 24}, UnsupportedError),
        *[({"SHAPE": SHAPE ^ (16 ^ n) >> 3 << 17}, DescriptorError) for n in (0, 8, 24, 264, 504)],
        ({"SHAPE": SHAPE | 1 << 15, "ISSUE": TS, "SETUP": WEIGHTS}, DescriptorError),
    ],
)  # fmt: skip
def test_descriptors_that_the_hardware_or_the_interpreter_does_not_take(parts: dict[str, Any], error: Any) -> None:
    with pytest.raises(error) as found:
        multiply(*pair(), **parts)
    assert isinstance(found.value, UnsupportedError) == (error is UnsupportedError)


STORED = "tcgen05.wait::st.sync.aligned;\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (STORED, ""),
        (STORED + BEFORE, STORED),
        ("bar.sync 1;\n", ""),
        (AFTER + "ld.shared.u32", "ld.shared.u32"),
        (f"OTHERS:\n{BEFORE}", "OTHERS:\n"),
        (AFTER + "mov.b64 %rd7", "mov.b64 %rd7"),
        (STORED, "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%t9}, [%r28];\n" + STORED),
        (STORED, f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r28], {registers(8)};\n" + STORED),
    ],
)
def test_stores_must_be_complete_and_known(old: str, new: str) -> None:
    def edit(body: str) -> str:
        assert old in body
        return body.replace(old, new, 1)

    with pytest.raises((RaceError, UninitialisedError)):
        multiply(*pair(), edit=edit, SETUP=WEIGHTS, ISSUE=TS)


def test_fences_count_only_where_they_are_asked_for() -> None:
    a, b = pair()
    without = lambda body: body.replace(BEFORE, "").replace(AFTER, "")  # noqa: E731
    got = multiply(a, b, edit=without, rules={"tensor_fences": False}, SETUP=WEIGHTS, ISSUE=SS + MORE + TS)
    assert np.isfinite(got).all()
    with pytest.raises(RaceError):
        multiply(a, b, edit=without, SETUP=WEIGHTS, ISSUE=SS + MORE + TS)
    with pytest.raises(RaceError):  # but waits do
        multiply(a, b, edit=lambda body: without(body).replace(STORED, ""), rules={"tensor_fences": False},
                 SETUP=WEIGHTS, ISSUE=TS)  # fmt: skip


def test_only_products_of_one_shape_have_an_order_by_the_rules() -> None:
    """The second product overwrites what the first one reads: in order on all hardware, but nothing says so."""
    overwrite = TS + SS.replace("[%r21]", "[%r21+32]")
    result = multiply(*pair(), SETUP=WEIGHTS, ISSUE=overwrite)
    assert np.isfinite(result).all()
    with pytest.raises(RaceError):
        multiply(*pair(), SETUP=WEIGHTS, ISSUE=overwrite, rules={"same_shape_only": True})
    multiply(*pair(), ISSUE=SS + MORE + SS, rules={"same_shape_only": True})
