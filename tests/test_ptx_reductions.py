"""Tensor copies that add floats to global memory, in the PTX interpreter: hand-written PTX against plain loops."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from ptx.errors import (
    DescriptorError,
    InFlightError,
    OutOfBoundsError,
    ProxyFenceError,
    RaceError,
    UninitialisedError,
    UnsupportedError,
)
from ptx.launch import Recorder
from ptx.machine import Machine
from ptx.tma import TensorMap
from test_ptx_engines import FENCE, STORE_WAIT, tensor_of
from test_ptx_interpreter import HEADER

from gna_flex.cuda import driver

ADD = "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group"
ADDS = """
mov.u32 %r20, shared; setp.ne.s32 %p7, %r1, 0; shl.b32 %r3, %r1, 2; add.s32 %r3, %r3, %r20;
cvt.rn.f32.u32 %f1, %r1;
{write}
{fence}
bar.sync 0;
@%p7 bra STORED;
{add} [%rd9, {8, {row}, 1, 0, 0}], [{from}];
{add} [%rd9, {12, 2, 1, 0, 0}], [{from}];
cp.async.bulk.commit_group;
{wait}
STORED:
{end}
"""
PARTS = {
    "add": ADD,
    "row": "4",
    "write": "st.shared.f32 [%r3], %f1;",
    "from": "%r20",
    "fence": FENCE,
    "wait": STORE_WAIT,
    "end": "",
}


def add_boxes(seed: int = 0, blocks: int = 1, span: int = 0, kind: Any = np.float32, **parts: str) -> Any:
    """A tensor ``[1, 1, 3, 7, 24]`` of halves, to which each block adds 128 words as two boxes that overlap; %rd1."""
    x, body = np.full((1, 1, 3, 7, 24), 0.5, kind), ADDS
    for name, part in (PARTS | parts).items():
        body = body.replace(f"{{{name}}}", part)
    m = Machine(HEADER + body + "\nret;\n}\n", seed)
    tensor = tensor_of(m, x, (16, 4, 2, 1, 1), span)
    at = np.uint64(tensor.address).tobytes()
    m.launch(blocks, 128, 16384, [at, at, bytes(128)], {(2, 0): tensor})
    return x


@pytest.mark.parametrize("span", [0, 64])
@pytest.mark.parametrize("seed", range(3))
def test_tensor_reductions_add_inside_only(seed: int, span: int) -> None:
    wanted = np.full((3, 7, 24), 0.5, np.float32)
    for number in range(128):
        k, j, i = number // 64, number // 16 % 4, number % 16
        if span:  # word ``number`` of shared memory is in another piece of 16 bytes of the row
            i ^= number // 32 % 4 * 4
        for column, row in ((8 + i, j + 4), (12 + i, j + 2)):
            if row < 7 and column < 24:
                wanted[1 + k, row, column] += 2 * number
    assert add_boxes(seed, 2, span)[0, 0].tolist() == wanted.tolist()


def test_reductions_add_after_they_have_read() -> None:
    """A sum is read after each kind of wait, and written to the tensor's first place."""
    look = f"ld.global.f32 %f2, [%rd1+{4 * (168 + 4 * 24 + 12)}]; st.global.f32 [%rd1], %f2;"  # in row 4 of plane 1
    seen = {kind: set[float]() for kind in ("", ".read")}
    for seed in range(10):
        for kind, sums in seen.items():
            sums.add(float(add_boxes(seed, wait=f"cp.async.bulk.wait_group{kind} 0; {look}").flat[0]))
    assert seen[""] == {0.5 + 4 + 32}
    assert len(seen[".read"]) > 1


OVERWRITE = "st.shared.u32 [%r20], 1;"


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"fence": ""}, ProxyFenceError),
        ({"write": ""}, UninitialisedError),
        ({"wait": ""}, InFlightError),
        ({"wait": OVERWRITE + STORE_WAIT}, RaceError),
        ({"wait": "cp.async.bulk.wait_group 1;" + OVERWRITE + STORE_WAIT}, RaceError),
        ({"wait": "", "end": "bar.sync 0; st.shared.u32 [%r3], 1; cp.async.bulk.wait_group 0;"}, RaceError),
        ({"end": "setp.eq.s32 %p1, %r1, 64; @%p1 st.shared.u32 [%r3], 1;"}, RaceError),
        ({"from": "%r20+16"}, DescriptorError),
        ({"row": "-1"}, DescriptorError),
        ({"from": "%r20+16384"}, OutOfBoundsError),
        ({"add": ADD.replace("add", "min")}, UnsupportedError),
        ({"add": ADD.replace("5d", "4d")}, UnsupportedError),
        ({"kind": np.float16}, DescriptorError),
        ({"span": 128}, DescriptorError),
    ],
)  # fmt: skip
def test_faults_of_tensor_reductions(parts: Any, error: Any) -> None:
    with pytest.raises(error):
        add_boxes(**parts)


def test_memory_of_a_reduction_may_be_written_after_the_wait_for_its_read() -> None:
    wait = "cp.async.bulk.wait_group.read 0;" + OVERWRITE
    end = "bar.sync 0; st.shared.u32 [%r3], 1;"
    wanted = add_boxes().tolist()
    for seed in range(5):
        assert add_boxes(seed, wait=wait, end=end).tolist() == wanted


def test_maps_of_32_bits_come_from_the_package() -> None:
    recorder, given = Recorder(), driver.TensorMap()
    x = np.zeros((1, 1, 3, 7, 24), np.float32)
    box, dims, strides = (16, 4, 2, 1, 1), x.shape[::-1], x.strides[-2::-1]
    encode = functools.partial(driver.encode_tiled, given, 4096, dims, strides, dtype="float32", api=recorder)
    encode(box, swizzle=0)
    assert recorder.maps == {given.address: TensorMap(4096, dims, strides, box, 0, size=4)}
    with pytest.raises(DescriptorError):  # rows of half of the swizzle
        encode(box, swizzle=128)
    with pytest.raises(DescriptorError):
        TensorMap(4096, dims, strides, (2, 4, 2, 1, 1), 0, size=4)
