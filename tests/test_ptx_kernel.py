"""The Hopper forward kernel in the PTX interpreter: small problems of every kind against float64, with seeds."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from helpers import assert_within_budget, dense_mask, exact_attention
from machine_code import needs_nvrtc
from torch import Tensor

from gna_flex import GNA
from gna_flex.cuda.kernel import Config
from gna_flex.cuda.tables import KernelTiles

needs_nvrtc()

from ptx import launch  # noqa: E402


class Problem(NamedTuple):
    """A launch. ``layout`` is how tensors lie: heads first, or last; ``valid`` are text tokens that count."""

    gnas: GNA | tuple[GNA, ...]
    config: Config
    tiles: KernelTiles
    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 0
    heads_last: bool = False
    blocks: int = 1
    scale: float | None = None
    valid: tuple[tuple[int, int], ...] = ()

    @property
    def gna(self) -> GNA:
        return self.gnas if isinstance(self.gnas, GNA) else self.gnas[0]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        width = self.head_dim or self.config.head_dim

        def make(heads: int) -> Tensor:
            if self.heads_last:
                return torch.randn(self.batch, self.gna.tokens, heads, width, dtype=self.dtype).transpose(1, 2)
            return torch.randn(self.batch, heads, self.gna.tokens, width, dtype=self.dtype)

        return make(self.heads), make(self.key_heads), make(self.key_heads)

    def keep(self) -> Tensor:
        """Which pairs count, from the definition: ``[batch or 1, heads or 1, S, S]``."""
        gnas = (self.gnas,) if isinstance(self.gnas, GNA) else self.gnas
        keep = torch.stack([torch.tensor(dense_mask(gna)) for gna in gnas])[None]
        if self.valid:
            places = torch.arange(self.gna.tokens)
            end = self.gna.text_first + self.gna.grid_tokens
            counts = [
                ((places < first) | (places >= self.gna.text_first)) & (places < end + last)
                for first, last in self.valid
            ]
            keep = keep & torch.stack(counts)[:, None, None, :]
        return keep


TWO = KernelTiles((1, 4, 8), 2, 1, (1, 4, 8), 32)
PROBLEMS = {
    "2-D": Problem(GNA((8, 12), (3, 5)), Config(64, 32), TWO),
    "whole windows": Problem(GNA((8, 16), (8, 16)), Config(64, 32), TWO, heads=2),
    "3-D, stride, float16": Problem(
        GNA((3, 6, 7), (2, 3, 5), (1, 2, 3)),
        Config(32, 32, float16=True),
        KernelTiles((1, 3, 5), 2, 1, (2, 3, 5), 32),
        dtype=torch.float16,
        heads=2,
    ),
    "text": Problem(GNA((6, 7), (3, 4), text_first=5, text_last=70), Config(64, 32), TWO),
    "text, some of it valid": Problem(
        GNA((6, 7), (3, 4), text_first=40, text_last=9),
        Config(32, 32),
        TWO,
        batch=3,
        valid=((0, 9), (33, 0), (40, 4)),
    ),
    "dilation": Problem(
        GNA((9, 11), (3, 2), (2, 1), (2, 3)), Config(32, 16), KernelTiles((1, 4, 4), 2, 2, (1, 2, 8), 16)
    ),
    "dilation and text": Problem(
        GNA((5, 8), (2, 3), dilation=(2, 1), text_first=3, text_last=2),
        Config(64, 16),
        KernelTiles((1, 3, 8), 2, 1, (1, 2, 8), 16),
    ),
    "causal, head dim 128": Problem(
        GNA(150, 40, causal=True), Config(128, 32), KernelTiles((1, 1, 64), 2, 2, (1, 1, 32), 32)
    ),
    "causal in one of two, float16, head dim 128": Problem(
        GNA((7, 9), (4, 3), causal=(True, False)),
        Config(128, 16, float16=True),
        KernelTiles((1, 4, 8), 2, 1, (1, 4, 4), 16),
        dtype=torch.float16,
    ),
    "grouped heads": Problem(GNA((8, 8), (3, 3)), Config(32, 32), TWO, batch=2, heads=4, key_heads=2),
    "heads last": Problem(GNA((5, 9), (3, 3)), Config(64, 32), TWO, batch=2, heads=2, key_heads=2, heads_last=True),
    "a window per head": Problem(
        (GNA((8, 8), (3, 3)), GNA((8, 8), (7, 2)), GNA((8, 8), (8, 8))), Config(32, 32), TWO, heads=3, key_heads=3
    ),
    "three warpgroups": Problem(
        GNA((10, 9), (5, 5)), Config(64, 48, consumers=3, key_stages=3), KernelTiles((1, 4, 9), 3, 1, (1, 5, 9), 48)
    ),
    "one query slot": Problem(GNA((8, 20), (3, 5)), Config(32, 32, query_stages=1), TWO, heads=2),
    "slots that boxes do not fill": Problem(
        GNA((9, 9), (5, 4)), Config(64, 48), KernelTiles((1, 5, 7), 2, 2, (1, 4, 9), 48)
    ),
    "three chunks of columns": Problem(
        GNA((6, 8), (3, 3)), Config(96, 16), KernelTiles((1, 3, 8), 2, 1, (1, 2, 8), 16)
    ),
    "padded head dim": Problem(GNA((8, 8), (3, 3)), Config(64, 32), TWO, head_dim=40, heads=2, key_heads=2),
    "two blocks": Problem(GNA((8, 16), (3, 5)), Config(32, 32), TWO, heads=3, key_heads=3, blocks=2),
    "masks of two words": Problem(
        GNA((12, 14), (5, 11)), Config(32, 144), KernelTiles((1, 6, 7), 2, 1, (1, 12, 12), 144)
    ),
    "large scores": Problem(GNA((8, 16), (8, 16)), Config(64, 32), TWO, heads=2, key_heads=2, scale=1.0),
    "large scores and masks": Problem(GNA((8, 16), (5, 9)), Config(64, 32), TWO, scale=1.0),
    "bounded waits": Problem(GNA((8, 12), (3, 5)), Config(32, 32, bounded_waits=9), TWO),
    "scale of zero": Problem(GNA((8, 12), (3, 5)), Config(32, 32), TWO, scale=0.0),
}


def in_low_precision(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, scale: float) -> Tensor:
    """What attention loses with weights and output in 16 bits, everything else in float32."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x.float() for x in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    scores = (q @ k.mT * scale).masked_fill(~keep, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights.to(query.dtype).float() @ v / weights.sum(-1, keepdim=True)).to(query.dtype)


def check(problem: Problem, seed: int, **options) -> launch.Machine:
    """Runs a problem and compares it with float64."""
    tensors, keep = problem.tensors(), problem.keep()
    scale = tensors[0].shape[-1] ** -0.5 if problem.scale is None else problem.scale
    valid = torch.tensor(problem.valid, dtype=torch.int32) if problem.valid else None
    out, lse, machine = launch.run(
        problem.gnas,
        tensors,
        problem.config,
        problem.tiles,
        seed,
        blocks=problem.blocks,
        scale=scale,
        text_valid=valid,
        **options,
    )
    exact = exact_attention(*tensors, keep, scale=scale)
    low = in_low_precision(*tensors, keep, scale)
    assert_within_budget("output", out, exact.out, low, factor=2.0)
    assert torch.allclose(lse.double(), exact.lse, atol=1e-5, rtol=1e-5)
    return machine


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernel_equals_float64(name: str, seed: int) -> None:
    check(PROBLEMS[name], seed)
