"""What the PTX interpreter knows for kernels of others: their instructions, and rules of which they break some."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from ptx.errors import (
    DeadlockError,
    DescriptorError,
    DivergenceError,
    InFlightError,
    OutOfBoundsError,
    ProxyFenceError,
    PtxError,
    RaceError,
    UnsupportedError,
)
from ptx.machine import Machine
from ptx.parse import parse
from ptx.tma import TensorMap
from test_ptx_engines import LOAD, load_box
from test_ptx_interpreter import BARRIER, WAIT, run

KEEP = "st.global.u32 [%rd5], %r4;\n"
SHARED = "mov.u32 %r20, shared; shl.b32 %r3, %r1, 2; add.s32 %r3, %r3, %r20;\n"


def result(body: str, threads: int = 32, seed: int = 0, **rules: bool) -> list[int]:
    """%r4 of each thread; words of ``a`` are the threads' numbers plus 100."""
    a, b = np.arange(100, 100 + threads, dtype=np.uint32), np.zeros(threads, np.uint32)
    run(body + KEEP, a, b, threads=threads, seed=seed, machine=functools.partial(Machine, **rules))
    return b.tolist()


# ---- leaders and clusters

ELECT = "elect.sync %r4|%p1, -1; elect.sync _|%p2, -1; selp.u32 %r5, 1, 0, %p1; selp.u32 %r6, 1, 0, %p2;\n"


def test_one_leader_of_a_warp() -> None:
    leaders = set()
    for seed in range(20):
        (leader,) = set(result(ELECT, seed=seed))
        assert result(ELECT + "mov.b32 %r4, %r5;", seed=seed) == [int(lane == leader) for lane in range(32)]
        assert result(ELECT + "xor.b32 %r4, %r5, %r6;", seed=seed) == [0] * 32
        leaders.add(leader)
    assert len(leaders) > 5, "any lane may be the leader"


def test_all_threads_elect() -> None:
    with pytest.raises(DivergenceError):
        result("setp.lt.u32 %p3, %r1, 9;\n@%p3 bra E;\nret;\nE:\n" + ELECT)
    with pytest.raises(UnsupportedError, match="part of the warp"):
        result(ELECT.replace("-1", "15"))


def test_a_cluster_has_one_block() -> None:
    sync = BARRIER.replace("COUNT", "32").replace("bar.sync 0;", "bar.warp.sync -1;")
    sync += "mapa.shared::cluster.u32 %r22, %r21, RANK;\nmbarrier.arrive.shared::cluster.b64 _, [%r22];\n"
    body = sync + WAIT.replace("PARITY", "0") + "mov.u32 %r4, %cluster_ctarank;"
    assert result(body.replace("RANK", "0")) == [0] * 32
    with pytest.raises(OutOfBoundsError):
        result(body.replace("RANK", "1"))


# ---- addresses

GENERIC = SHARED + "cvt.u64.u32 %rd6, %r3; cvta.shared.u64 %rd6, %rd6; add.u32 %r2, %r1, 7;\n"


def test_generic_addresses() -> None:
    assert result(GENERIC + "st.u32 [%rd6], %r2; ld.shared.u32 %r4, [%r3];") == list(range(7, 39))
    assert result(GENERIC + "st.shared.u32 [%r3], %r2; ld.u32 %r4, [%rd6];") == list(range(7, 39))
    assert result("ld.u32 %r4, [%rd4];") == list(range(100, 132)), "global memory"
    back = "cvta.to.shared.u64 %rd6, %rd6; cvt.u32.u64 %r5, %rd6; ld.shared.u32 %r4, [%r5];"
    assert result(GENERIC + "st.u32 [%rd6], %r2;" + back) == list(range(7, 39))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (GENERIC + "cvt.u64.u32 %rd6, %r3; st.u32 [%rd6], %r2;", OutOfBoundsError),
        (GENERIC + "st.shared.u32 [%rd6], %r2;", OutOfBoundsError),
        (GENERIC + "add.s64 %rd6, %rd6, 1048576; st.u32 [%rd6], %r2;", OutOfBoundsError),
        ("cvta.to.shared.u64 %rd6, %rd4;", OutOfBoundsError),
        (GENERIC + "setp.lt.u32 %p1, %r1, 5; selp.b64 %rd6, %rd6, %rd4, %p1; st.u32 [%rd6], %r2;", UnsupportedError),
    ],
    ids=["not converted", "converted twice", "outside", "not shared", "two spaces"],
)
def test_wrong_addresses(body: str, error: Any) -> None:
    with pytest.raises(error):
        result(body + "mov.u32 %r4, 0;")


def test_tensor_maps_are_prefetched_where_they_are() -> None:
    def prefetch(at: str) -> None:
        tensor = TensorMap(4096, (16, 1), (32,), (16, 1), 0)
        run(f"prefetch.tensormap [{at}];", np.zeros(1, np.uint32), np.zeros(1, np.uint32), tensor=tensor)

    prefetch("%rd9")
    with pytest.raises(DescriptorError):
        prefetch("%rd9+64")


# ---- branches, calls, numbers

TABLE = """and.b32 %r2, %r1, 3;
brx.idx %r2, T;
T: .branchtargets A, B, A, C;
A: mov.u32 %r4, 10; bra END;
B: mov.u32 %r4, 11; bra END;
C: mov.u32 %r4, 12;
END:
"""


def test_branches_by_a_table() -> None:
    assert result(TABLE) == [10, 11, 10, 12] * 8
    with pytest.raises(OutOfBoundsError):
        result(TABLE.replace("%r1, 3", "%r1, 4"))


PRINT = """setp.gt.u32 %p1, %r1, LAST;
mov.u32 %r4, 3;
@!%p1 bra END;
{
.param .b64 param0;
st.param.b64 [param0], %rd1;
.param .b32 retval0;
call.uni (retval0), vprintf, (param0);
ld.param.b32 %r4, [retval0];
}
END:
"""


def test_printing_may_be_there_but_not_reached() -> None:
    assert result(PRINT.replace("LAST", "31")) == [3] * 32
    with pytest.raises(UnsupportedError, match=r"st\.param\.b64 is reached"):
        result(PRINT.replace("LAST", "30"))


def test_division_and_maximum_of_floats() -> None:
    a, b = np.linspace(-3, 5, 32, dtype=np.float32), np.zeros(32, np.float32)
    body = "ld.global.f32 %f1, [%rd4]; max.f32 %f2, %f1, 0f3F800000, 0f40000000; div.full.f32 %f3, %f1, %f2;\n"
    run(body + "st.global.f32 [%rd5], %f3;", a.view(np.uint32), b.view(np.uint32))
    assert np.allclose(b, a / np.maximum(a, 2), rtol=1e-6)


def test_line_numbers_and_pointers_are_no_part_of_a_program() -> None:
    text = """.file 1 "x.py"
.visible .entry f(.param .u64 .ptr .global .align 1 a, .param .align 64 .b8 b[128])
{
.loc 1 7 0
.reg .b32 %r<2>;
{
.reg .pred complete;
.loc 1 12 9
waitLoop:
.loc 1 13 9
setp.eq.s32 complete, 1, 1;
@!complete bra.uni waitLoop;
}
ret;
}"""
    kernel = parse(text)
    assert [(name, size) for name, size, _ in kernel.params] == [("a", 8), ("b", 128)]
    assert [ins.opcode for ins in kernel.instructions] == ["setp.eq.s32", "bra.uni", "ret"]
    assert list(kernel.labels) == ["waitLoop#1"]


# ---- matrices


@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_to_and_from_shared_memory(count: int) -> None:
    """Two columns of row ``lane / 4`` of each of the 8x8 matrices, whose rows have addresses of their own."""
    values = ", ".join(f"%r{10 + i}" for i in range(count))
    body = "mov.u32 %r20, shared; and.b32 %r2, %r1, 31; shl.b32 %r3, %r2, 4; add.s32 %r3, %r3, %r20;\n"
    body += "".join(f"mad.lo.s32 %r{10 + i}, %r1, 16, {i};\n" for i in range(count))
    body += f"stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r3], {{{values}}};\n"
    read = "shl.b32 %r5, %r1, 2; add.s32 %r5, %r5, %r20;\n"
    for i in range(count):
        got = result(body + read + f"ld.shared.u32 %r4, [%r5+{128 * i}];")
        assert got == [16 * lane + i for lane in range(32)]
    targets = ", ".join(f"%r{30 + i}" for i in range(count))
    body += f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{targets}}}, [%r3];\n"
    for i in range(count):
        assert result(body + f"mov.b32 %r4, %r{30 + i};") == [16 * lane + i for lane in range(32)]


# ---- barriers that end

END = BARRIER.replace("COUNT", "1") + "@!%p7 mbarrier.inval.shared::cta.b64 [%r21];\n"


def test_memory_of_a_barrier_that_has_ended() -> None:
    assert result(END + "bar.sync 0; st.shared.u32 [%r21], 7; mov.u32 %r4, 5;") == [5] * 32
    with pytest.raises(RaceError, match="no barrier was made"):
        result(END + WAIT.replace("PARITY", "0"))
    write = "setp.eq.u32 %p1, %r1, 64; @%p1 st.shared.u32 [%r21], 7; mov.u32 %r4, 5;"
    assert result(END + "bar.sync 0;" + write, threads=128) == [5] * 128
    with pytest.raises(RaceError):
        result(END + write, threads=128)


def test_a_barrier_that_is_made_again_is_a_new_one() -> None:
    again = END + "bar.sync 0;" + BARRIER.replace("COUNT", "32").replace("READY", "AGAIN")
    wait = WAIT.replace("PARITY", "0").replace("L:", "L2:").replace("bra L;", "bra L2;")
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r21];\n"
    assert result(again + arrive + wait + "mov.u32 %r4, 5;") == [5] * 32
    with pytest.raises(DeadlockError):
        result(again + wait + "mov.u32 %r4, 5;")


# ---- rules that can be waived


def load(edit: Any, **rules: bool) -> np.ndarray:
    x = np.arange(1, 1 + 4 * 7 * 72, dtype=np.uint16).reshape(1, 1, 4, 7, 72)
    return load_box(x, (16, 8, 2, 1, 1), (0, 0, 0), 0, edit=edit, **rules)


def test_barrier_fences() -> None:
    def edit(body: str) -> str:
        return body.replace("fence.mbarrier_init.release.cluster;", "")

    with pytest.raises(ProxyFenceError, match="mbarrier_init"):
        load(edit)
    assert load(edit, barrier_fences=False).tolist() == load(str).tolist()


def test_overwrite_fences() -> None:
    def edit(body: str) -> str:
        return body.replace(LOAD.split(";")[0], "@!%p7 st.shared.u32 [%r20], 5;\n" + LOAD.split(";")[0])

    with pytest.raises(ProxyFenceError, match="plain write"):
        load(edit)
    assert load(edit, overwrite_fences=False).tolist() == load(str).tolist()


def test_equal_writes() -> None:
    body = "mov.u32 %r20, shared; mov.u32 %r2, 9; st.shared.u32 [%r20], %r2; bar.sync 0; ld.shared.u32 %r4, [%r20];"
    with pytest.raises(RaceError):
        result(body, threads=128)
    assert result(body, threads=128, equal_writes=False) == [9] * 128
    with pytest.raises(RaceError):
        result(body.replace("%r2, 9", "%r2, %r1"), threads=128, equal_writes=False)


BEFORE, AFTER = "tcgen05.fence::before_thread_sync;\n", "tcgen05.fence::after_thread_sync;\n"
SYNC = BEFORE + "bar.sync 0;\n" + AFTER
ALLOCATE = f"""
mov.u32 %r20, shared;
setp.lt.u32 %p8, %r1, 32;
@%p8 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r20], 32;
{SYNC}
ld.shared.u32 %r21, [%r20];
shr.u32 %r22, %r1, 5; and.b32 %r22, %r22, 3; shl.b32 %r22, %r22, 21; add.u32 %r22, %r22, %r21;
"""
STORE = "add.u32 %r2, %r1, 5; tcgen05.st.sync.aligned.32x32b.x2.b32 [%r22], {%r1, %r2};\n"
STORED = "tcgen05.wait::st.sync.aligned;\n"
LOAD_BACK = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r4, %r5}, [%r22];\n"
LOADED = "tcgen05.wait::ld.sync.aligned;\n"
SUM = "add.u32 %r4, %r4, %r5;\n"
FREE = SYNC + "@%p8 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r21, 32;\n"
SUMS = [2 * thread + 5 for thread in range(256)]


def tensor(body: str, threads: int = 128, **rules: bool) -> list[int]:
    return result(ALLOCATE + body + FREE, threads, **rules)


def test_load_waits() -> None:
    assert tensor(STORE + STORED + LOAD_BACK + LOADED + SUM) == SUMS[:128]
    early = STORE + STORED + LOAD_BACK + SUM
    with pytest.raises(InFlightError, match="loaded from tensor memory"):
        tensor(early)
    assert tensor(early, load_waits=False) == SUMS[:128]


def test_loads_that_nobody_waits_for_end_with_a_fault() -> None:
    never = STORE + STORED + LOAD_BACK.replace("%r4, %r5", "%r6, %r7") + "mov.u32 %r4, 1;\n"
    with pytest.raises(PtxError):
        tensor(never, load_waits=False)


def test_store_waits() -> None:
    early = STORE + LOAD_BACK + LOADED + SUM
    with pytest.raises(RaceError, match="under way"):
        tensor(early)
    assert tensor(early, store_waits=False) == SUMS[:128]


def test_tensor_fences() -> None:
    """Warps 4 to 7 store, warps 0 to 3 load."""
    store = "setp.lt.u32 %p5, %r1, 128;\n@%p5 bra STORED;\n" + STORE + STORED + "STORED:\n"
    load = "@!%p5 bra LOADED;\n" + LOAD_BACK + LOADED + SUM + "LOADED:\n"
    assert tensor(store + SYNC + load, 256)[:128] == SUMS[128:]
    for sync in ("bar.sync 0;\n", BEFORE + "bar.sync 0;\n", "bar.sync 0;\n" + AFTER):
        with pytest.raises(RaceError):
            tensor(store + sync + load, 256)
    assert tensor(store + "bar.sync 0;\n" + load, 256, tensor_fences=False)[:128] == SUMS[128:]
