"""Matrix products of single warps in the PTX interpreter, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.errors import DivergenceError
from ptx.machine import Machine
from test_ptx_interpreter import HEADER

LOADS = "shl.b32 %r2, %r1, 3; mul.wide.s32 %rd3, %r2, 4; add.s64 %rd4, %rd1, %rd3;\n" + "".join(
    f"ld.global.u32 %r{10 + i}, [%rd4+{4 * i}];\n" for i in range(6)
)
SUMS = "".join(f"mov.f32 %f{i}, 0f3F800000;\n" for i in range(4))
PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 {{{1}}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{{1}}};\n"
)
ACCUMULATOR = "%f0, %f1, %f2, %f3"
STORES = "mul.wide.s32 %rd5, %r1, 16; add.s64 %rd6, %rd2, %rd5;\n" + "".join(
    f"st.global.f32 [%rd6+{4 * i}], %f{i};\n" for i in range(4)
)


def bits(x: np.ndarray, kind: str) -> np.ndarray:
    """Small whole numbers, which both types have, as 16 bits."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def product(kind: str, before: str = "") -> tuple[np.ndarray, np.ndarray]:
    """What the instruction makes of random matrices, and what numpy does: a matrix of ones plus a times b."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 8, (16, 16)), rng.integers(-8, 8, (16, 8))
    words = np.zeros((32, 8, 2), np.uint16)
    for lane in range(32):
        row, pair = lane // 4, lane % 4 * 2
        places = [(row, pair), (row + 8, pair), (row, pair + 8), (row + 8, pair + 8)]
        for i, (y, x) in enumerate(places):
            words[lane, i] = bits(a[y, x : x + 2], kind)
        for i, y in enumerate((pair, pair + 8)):
            words[lane, 4 + i] = bits(b[y : y + 2, row], kind)
    machine = Machine(HEADER + LOADS + SUMS + before + PRODUCT.format(kind, ACCUMULATOR) + STORES + "END: ret;\n}", 0)
    to = np.zeros((32, 4), np.float32)
    given = machine.memory.add("words", words.view(np.uint32).reshape(-1)), machine.memory.add("to", to.reshape(-1))
    machine.launch(1, 32, 1024, [*(np.uint64(place).tobytes() for place in given), bytes(128)])
    found = np.zeros((16, 8), np.float32)
    for lane in range(32):
        for i in range(4):
            found[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = to[lane, i]
    return found, 1.0 + a @ b


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_equals_numpy(kind: str) -> None:
    found, wanted = product(kind)
    np.testing.assert_array_equal(found, wanted)


def test_the_whole_warp_takes_part() -> None:
    with pytest.raises(DivergenceError):
        product("bf16", "setp.lt.s32 %p1, %r1, 4; @%p1 bra END;\n")
