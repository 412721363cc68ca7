"""Floats of 8 bits (e4m3) in the PTX interpreter: products, the Blackwell kernel, and the kernel with one thing wrong.

``PTX_SEEDS=20 PTX_MUTANTS=all python -m pytest -n 2 tests/test_ptx_float8.py`` tries more seeds, and all changes.
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import pytest
import torch
from machine_code import needs_nvrtc

needs_nvrtc()

from kernel_mutants import ALL, COMMON, Change, Mutation, more  # noqa: E402
from kernel_problems import IN_8_BITS, check, in_8_bits  # noqa: E402
from ptx.errors import DescriptorError, UnsupportedValueError  # noqa: E402
from ptx.operands import E4M3, e4m3_bits  # noqa: E402
from ptx.tcgen05 import shape  # noqa: E402
from test_ptx_blackwell_mutants import ALL_COLUMNS  # noqa: E402
from test_ptx_blackwell_mutants import BITS as SIXTEEN_BITS  # noqa: E402
from test_ptx_engines import swizzled  # noqa: E402
from test_ptx_tcgen05 import SECOND, SS, TS, WEIGHTS, close, multiply, operand  # noqa: E402

from gna_flex.kernels import FLOAT8  # noqa: E402

SHAPE = 1 << 4 | 16 >> 3 << 17 | 128 >> 4 << 24
KIND = "kind::f8f6f4"


def test_bytes_are_those_of_torch() -> None:
    all_bytes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(all_bytes.view(FLOAT8).float().numpy(), E4M3)
    middles = (E4M3[:126] + E4M3[1:127]) / 2
    drawn = np.random.default_rng(0).normal(size=10_000) * 2.0 ** np.random.default_rng(1).uniform(-12, 9, 10_000)
    x = np.concatenate([drawn, middles, -middles, E4M3[:127], -E4M3[:127]]).astype(np.float32)
    wanted = torch.from_numpy(x.clip(-448, 448)).to(FLOAT8).view(torch.uint8).numpy()
    np.testing.assert_array_equal(e4m3_bits(x), wanted)
    odd = np.array([np.inf, -np.inf, np.nan, 1e9, 0, -0.0], np.float32)
    assert e4m3_bits(odd).tolist() == [0x7E, 0xFE, 0x7F, 0x7E, 0, 0x80]


def pair(rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 128 numbers, which are those of :func:`test_ptx_tcgen05.pair` in bytes."""
    torch.manual_seed(3)
    return torch.randn(128, 128).to(FLOAT8), torch.randn(rows, 128).to(FLOAT8)


def multiplied(a: torch.Tensor, b: torch.Tensor, **parts: Any) -> np.ndarray:
    given = {"SHAPE": SHAPE, "ISSUE": SS.replace("kind::f16", KIND)} | parts
    return multiply(a.view(torch.bfloat16), b.view(torch.bfloat16), **given)


@pytest.mark.parametrize("step", [0, 32, 96])
def test_products_of_shared_memory(step: int) -> None:
    a, b = pair()
    parts = {"DESC_A": operand(step, 16, 1024), "DESC_B": operand(SECOND + step, 16, 1024)}
    k = slice(step, step + 32)
    close(multiplied(a, b, **parts), a.double()[:, k] @ b.double()[:, k].T)


def test_second_operand_transposed() -> None:
    """It is ``[k, 128 columns]``, of which 64 are used, 32 rows of k further down."""
    a, b = pair(rows=64)
    parts = {"SHAPE": SHAPE ^ (16 ^ 64) >> 3 << 17 | 1 << 16, "DESC_B": operand(SECOND + 4096, 0, 1024)}
    close(multiplied(a, b, columns=64, **parts), a.double()[:, :32] @ b.double()[32:, :64])


def test_first_operand_in_tensor_memory() -> None:
    """Four to a column, the first one in the lowest byte."""
    a, b = pair()
    lying = torch.from_numpy(swizzled(a.view(torch.bfloat16)).view(np.uint8)).view(FLOAT8).reshape(128, 128)[:, :32]
    wanted = lying.double() @ b.double()[:, :32].T
    close(multiplied(a, b, SETUP=WEIGHTS, ISSUE=TS.replace("kind::f16", KIND)), wanted)


@pytest.mark.parametrize(
    ("bits", "error"),
    [
        (1 << 4, DescriptorError),  # an accumulator in 16 bits
        (2 << 7 | 2 << 10, DescriptorError),  # no such type
        (1 << 7 | 1 << 10, UnsupportedValueError),  # e5m2
        (1 << 7, UnsupportedValueError),  # two types
    ],
)
def test_instruction_descriptors(bits: int, error: type[Exception]) -> None:
    assert shape(SHAPE, KIND).float8
    with pytest.raises(error):
        shape(SHAPE ^ bits, KIND)


@pytest.mark.parametrize("seed", range(int(os.getenv("PTX_SEEDS", "1"))))
@pytest.mark.parametrize("name", IN_8_BITS)
def test_kernel_equals_float64(name: str, seed: int) -> None:
    check(IN_8_BITS[name], seed)


def constant(number: float) -> str:
    """A float32 as PTX has it."""
    return f"0f{np.float32(number).view(np.uint32):08X}"


# Older compilers have registers of floats, %f.
LIFTED = rf"(mov\.[bf]32\s+%[rf]\d+, ){constant(8)};"
NOT_LIFTED = rf"(add\.f32\s+%[rf]\d+, %[rf]\d+, ){constant(-8)};"
RAISED = rf"(setp\.leu\.f32\s+%p\d+, %[rf]\d+, ){constant(0)};"
CHANGES: dict[str, Change] = {
    "no product": (r"tcgen05\.mma[^;]*;", "", 3),
    "floats of 16 bits": (r"(tcgen05\.mma\S+)kind::f8f6f4", r"\1kind::f16", 3),
    "weights elsewhere": (r"(tcgen05\.mma\S+ \[%r\d+\], \[)(%r\d+)(\][^;]*;)", more(4), 1),
    "pairs of weights swapped": (r"(cvt\.rn\.satfinite\.e4m3x2\.f32 \w+, )(%\w+), (%\w+);", r"\1\3, \2;", 7),
    "halves swapped": (r"mov\.b32 (%r\d+), \{low, high\};", r"mov.b32 \1, {high, low};", 5),
    "one pair twice": (r"mov\.b32 (%r\d+), \{low, high\};", r"mov.b32 \1, {low, low};", 5),
    "weights not stored": (r"tcgen05\.st\.\S+x8\.b32[^;]*;", "", 1),
    "stored to other columns": (r"(tcgen05\.st\.\S+x8\.b32 \[)(%r\d+)(\][^;]*;)", more(8), 1),
    "lifted less": (LIFTED, rf"\g<1>{constant(7)};", 1),
    "lifted beyond the largest float": (LIFTED, rf"\g<1>{constant(9)};", 1),
    "lift left in the log-sum-exp": (NOT_LIFTED, rf"\g<1>{constant(0)};", 1),
    "maximum kept": (RAISED, rf"\g<1>{constant(2)};", 1),
    "more bytes": COMMON["more bytes"],
}
# All columns lie in one chunk: how far it is to the next one means nothing.
BITS = {
    name: change
    for name, change in SIXTEEN_BITS.items()
    if name not in {f"transposed operand bit {i}" for i in range(16, 30)}
}
MUTATIONS = {
    "main": Mutation([(IN_8_BITS[name], 0) for name in ("2-D", "large scores and masks")], CHANGES),
    "descriptors": Mutation([(in_8_bits(ALL_COLUMNS), 0)], BITS),
}
CHOSEN = {"main": list(CHANGES), "descriptors": list(BITS) if ALL else list(BITS)[::16]}


@pytest.mark.parametrize("which", MUTATIONS)
def test_nothing_is_caught_where_nothing_is_wrong(which: str) -> None:
    mutation = MUTATIONS[which]
    assert mutation.caught(mutation.text, mutation.runs) is None
    assert set(re.findall(r"tcgen05\.mma\.\S+::(\w+) ", mutation.text)) == {"f8f6f4"}


@pytest.mark.parametrize(("which", "name"), [(which, name) for which, names in CHOSEN.items() for name in names])
def test_mutants_are_caught(which: str, name: str) -> None:
    assert MUTATIONS[which].survivors(name) == []
