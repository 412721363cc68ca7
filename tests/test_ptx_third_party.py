"""The PTX interpreter runs attention kernels that are known to work on Blackwell GPUs: their results come out right.

So what it makes of the instructions that these kernels use is what the hardware makes of them, as far as results show.
``PTX_SEEDS=5 python -m pytest tests/test_ptx_third_party.py`` takes more seeds and more instances of these kernels.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_within_budget, exact_attention
from machine_code import needs_nvrtc

needs_nvrtc()

from kernel_problems import Problem, check, in_low_precision, tiles  # noqa: E402
from ptx import launch  # noqa: E402
from ptx.errors import PtxError  # noqa: E402
from ptx.parse import Address, Kernel  # noqa: E402
from ptx.tcgen05 import Form, Shape  # noqa: E402
from third_party import Cutlass, Triton  # noqa: E402
from torch import Tensor  # noqa: E402

from gna_flex import GNA  # noqa: E402
from gna_flex.cuda.blackwell import HEAD_DIMS, BlackwellConfig  # noqa: E402
from gna_flex.kernels import FLOAT8  # noqa: E402
from gna_flex.routing import FLOAT8_HEAD_DIMS  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_cache")

COUNT = int(os.getenv("PTX_SEEDS", "2"))
IN_8_BITS = FLOAT8_HEAD_DIMS if COUNT > 2 else (128,)
TRITON = [
    *(Triton(head_dim, dtype=dtype) for head_dim in (32, 64, 128) for dtype in (torch.bfloat16, torch.float16)),
    Triton(128, 64),
    *(Triton(head_dim, 64, dtype, roles=True) for head_dim, dtype in ((64, torch.bfloat16), (128, torch.float16))),
    *(Triton(head_dim, dtype=FLOAT8) for head_dim in IN_8_BITS),
]
CUTLASS = [Cutlass(128)]
if COUNT > 2:  # nvcc takes a minute for each
    CUTLASS += [Cutlass(32), Cutlass(64, float16=True)]
    CUTLASS += [Cutlass(64, causal=True), Cutlass(128, float16=True, causal=True)]
kernels = pytest.mark.parametrize(
    "kernel", [*TRITON, *(pytest.param(kernel, marks=pytest.mark.slow) for kernel in CUTLASS)], ids=str
)
seeds = pytest.mark.parametrize("seed", range(COUNT))


def tensors(kernel: Any, queries: int, keys: int, batch: int = 1, heads: int = 1, group: int = 1) -> list[Tensor]:
    """Queries, keys and values; heads lie within tokens."""
    shapes = (queries, heads * group), (keys, heads), (keys, heads)
    return [torch.randn(batch, n, h, kernel.head_dim).to(kernel.dtype).transpose(1, 2) for n, h in shapes]


def without(kernel: Any) -> dict[str, bool]:
    """Options of a machine that does not ask for the rules that a kernel breaks."""
    return dict.fromkeys(kernel.broken, False)


def assert_right(kernel: Any, qkv: list[Tensor], seed: int) -> None:
    out, lse, _ = kernel.run(*qkv, seed, **without(kernel))
    keep = torch.ones(qkv[0].shape[2], qkv[1].shape[2], dtype=torch.bool)
    keep = keep.tril() if kernel.causal else keep
    exact, low = exact_attention(*qkv, keep), in_low_precision(*qkv, keep, kernel.head_dim**-0.5)
    assert_within_budget("output", out, exact.out, low, factor=2.0)
    assert torch.allclose(lse.double(), exact.lse, atol=1e-5, rtol=1e-5)


@seeds
@kernels
def test_whole_tiles(kernel: Any, seed: int) -> None:
    assert_right(kernel, tensors(kernel, 256, 384), seed)


@seeds
@kernels
def test_partial_tiles(kernel: Any, seed: int) -> None:
    several = {"batch": 2, "heads": 2, "group": 2} if isinstance(kernel, Cutlass) else {}
    assert_right(kernel, tensors(kernel, 300, 300 if kernel.causal else 203, **several), seed)


@kernels
def test_which_rules_they_break(kernel: Any) -> None:
    """Where one of them is asked for, the interpreter finds the place. All others are asked for in the other tests."""
    qkv = tensors(kernel, 256, 384)
    for rule in kernel.broken:
        with pytest.raises(PtxError):
            kernel.run(*qkv, 0, **without(kernel) | {rule: True})


@pytest.mark.slow
def test_cutlass_relies_on_the_order_of_products_as_ours_does() -> None:
    """Scores overwrite weights that an earlier product, of another shape, reads: an order that nothing promises."""
    kernel = CUTLASS[0]
    with pytest.raises(PtxError, match="a read is under way"):
        kernel.run(*tensors(kernel, 256, 256), 0, **without(kernel), same_shape_only=True)


# ---- what ours has in common with theirs

ENGINES = ("tcgen05", "cp", "mbarrier", "fence", "setmaxnreg", "bar", "elect", "shfl", "vote", "stmatrix", "ldmatrix")


def instruction_forms(kernel: Kernel) -> set[str]:
    """Opcodes by which threads meet each other and engines, and of pairs of floats; without hints and defaults."""
    found = set()
    for ins in kernel.instructions:
        parts = [part for part in ins.parts if part not in ("tile", "L2::cache_hint", "rn", "ftz")]
        if parts[0] in ENGINES or parts[-1] == "f32x2":
            name = ".".join(parts)
            if name.startswith("tcgen05.mma"):
                name += f", A in {'tensor' if isinstance(ins.operands[1], Address) else 'shared'} memory"
            found.add(name)
    return found


def ours() -> list[BlackwellConfig]:
    """The shipped configurations."""
    configs = [config for head_dim in HEAD_DIMS for config in BlackwellConfig.defaults(head_dim)]
    in_8_bits = [replace(config, float8=True) for config in configs if config.head_dim in IN_8_BITS]
    return [replace(config, float16=float16) for config in configs for float16 in (False, True)] + in_8_bits


UNSHARED = {
    "tcgen05.fence::before_thread_sync",
    "tcgen05.fence::after_thread_sync",
    "vote.sync.any.pred",
    "vote.sync.all.pred",
    "add.rm.f32x2",
    "tcgen05.st.sync.aligned.32x32b.x8.b32",
}
"""What only our Blackwell kernel uses. Fences have no result; votes are in the Hopper kernel, which has run.

Others store weights of 8 bits in other numbers of columns than 8.
"""


@pytest.mark.slow
def test_instructions_that_only_ours_has() -> None:
    theirs = set().union(*(instruction_forms(kernel.kernel()) for kernel in [*TRITON, *CUTLASS]))
    mine = set().union(*(instruction_forms(launch.kernel(config)) for config in ours()))
    assert mine - theirs == UNSHARED
    assert len(mine & theirs) >= 25


def test_products_that_only_ours_has() -> None:
    """Weights times values of head dim 96, whose rows are three pieces of 64 bytes."""
    theirs: set[Form] = set()
    for kernel in TRITON:
        theirs |= kernel.run(*tensors(kernel, 128, 128), 0, **without(kernel))[2].forms
    mine: set[Form] = set()
    for config in ours():
        kind = FLOAT8 if config.float8 else torch.float16 if config.float16 else torch.bfloat16
        problem = Problem(GNA((16, 16), (7, 9)), config, tiles((1, 8, 16), (1, 8, 16), 128), dtype=kind)
        mine |= check(problem, 0).forms
    assert len(mine) == 12 + 2 * len(IN_8_BITS)
    only = [Form(Shape(128, 96, float16, False, True, 1), (0, 0), (64, 512), 8192) for float16 in (False, True)]
    assert mine - theirs == set(only)
