"""Copies of lines, and counters in global memory that order blocks, in the PTX interpreter: hand-written PTX."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.errors import DeadlockError, DescriptorError, InFlightError, ProxyFenceError, RaceError
from ptx.machine import Machine
from test_ptx_interpreter import HEADER

HANDOVER = """
mov.u32 %r20, shared; mov.u32 %r2, %ctaid.x; add.s64 %rd6, %rd2, 512; setp.ne.s32 %p1, %r1, 0; @%p1 bra END;
mbarrier.init.shared::cta.b64 [%r20+512], 1; fence.mbarrier_init.release.cluster;
setp.ne.s32 %p2, %r2, 0; @%p2 bra SECOND;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20+512], {bytes};
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%rd1], {bytes}, [%r20+512];
{load_wait}
cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r20], 512;
cp.async.bulk.commit_group;
{store_wait}
red.release.gpu.global.add.s32 [%rd6], {more};
cp.async.bulk.wait_group 0;
bra END;
SECOND:
ld.acquire.gpu.global.s32 %r3, [%rd6];
setp.ge.s32 %p3, %r3, 3; @%p3 bra READY;
nanosleep.u32 64;
bra SECOND;
READY:
{fence}
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20+512], 512;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%rd2], 512, [%r20+512];
M: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r20+512], 0; @%p4 bra THERE; bra M;
THERE:
ld.shared.u32 %r4, [%r20+508]; st.global.u32 [%rd2+516], %r4;
END:
ret;
}
"""
PARTS = {
    "bytes": "512",
    "load_wait": "L: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r20+512], 0; @%p4 bra LOADED; bra L; LOADED:",
    "store_wait": "cp.async.bulk.wait_group 0;",
    "more": "3",
    "fence": "fence.proxy.async;",
}


def hand_over(seed: int = 0, **parts: str) -> np.ndarray:
    """One block copies 128 words to another place and counts, another one waits for it and reads the last of them."""
    body = HANDOVER
    for name, part in (PARTS | parts).items():
        body = body.replace(f"{{{name}}}", part)
    machine = Machine(HEADER + body, seed)
    words, to = np.arange(1, 129, dtype=np.uint32), np.zeros(132, np.uint32)
    places = [np.uint64(machine.memory.add(name, x)).tobytes() for name, x in (("words", words), ("to", to))]
    machine.launch(2, 32, 1024, [*places, bytes(128)])
    return to


@pytest.mark.parametrize("seed", range(5))
def test_lines_are_copied_and_counters_order_blocks(seed: int) -> None:
    assert hand_over(seed).tolist() == [*range(1, 129), 3, 128, 0, 0]


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"bytes": "504"}, DescriptorError),
        ({"bytes": "528"}, RaceError),
        ({"load_wait": ""}, RaceError),
        ({"store_wait": ""}, InFlightError),
        ({"store_wait": "cp.async.bulk.wait_group.read 0;"}, InFlightError),
        ({"store_wait": "cp.async.bulk.wait_group 1;"}, InFlightError),
        ({"more": "2"}, DeadlockError),
        ({"fence": ""}, ProxyFenceError),
        ({"fence": "fence.proxy.async.shared::cta;"}, ProxyFenceError),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_faults_are_caught(parts: dict[str, str], error: type[Exception]) -> None:
    """With every seed."""
    for seed in range(5):
        with pytest.raises(error):
            hand_over(seed, **parts)
