"""Small problems for the CUDA kernels in the PTX interpreter, one list of features for all kernels, and their check."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from helpers import assert_within_budget, dense_mask, exact_attention
from ptx import launch
from ptx.machine import Machine
from torch import Tensor

from gna_flex import GNA
from gna_flex.cuda.blackwell import BlackwellConfig
from gna_flex.cuda.config import KernelConfig
from gna_flex.cuda.kernel import Config
from gna_flex.cuda.tables import KernelTiles
from gna_flex.kernels import FLOAT8, output_type
from gna_flex.selftest.problems import rounded_weights

Inputs = tuple[Tensor, Tensor, Tensor]
Launched = tuple[Tensor, Tensor, Machine]


class Problem(NamedTuple):
    """A launch. ``heads_last``, ``values_last``: how tensors lie; ``valid``: text tokens that count, of each batch."""

    gnas: GNA | tuple[GNA, ...]
    config: KernelConfig
    tiles: KernelTiles
    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 0
    heads_last: bool = False
    values_last: bool = False
    blocks: int = 1
    scale: float | None = None
    valid: tuple[tuple[int, int], ...] = ()

    @property
    def gna(self) -> GNA:
        return self.gnas if isinstance(self.gnas, GNA) else self.gnas[0]

    def tensors(self) -> Inputs:
        torch.manual_seed(0)
        width = self.head_dim or self.config.head_dim

        def make(heads: int, last: bool = self.heads_last) -> Tensor:
            sizes = (self.gna.tokens, heads) if last else (heads, self.gna.tokens)
            drawn = torch.float32 if self.dtype == FLOAT8 else self.dtype
            x = torch.randn(self.batch, *sizes, width, dtype=drawn).to(self.dtype)
            return x.transpose(1, 2) if last else x

        return make(self.heads), make(self.key_heads), make(self.key_heads, self.heads_last or self.values_last)

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


def tiles(box: tuple[int, int, int], kv_tile: tuple[int, int, int], keys: int, split: int = 1) -> KernelTiles:
    """Two boxes of queries side by side, for the Blackwell kernel."""
    return KernelTiles(box, 2, split, kv_tile, keys, rows=128)


Shapes = tuple[KernelConfig, KernelTiles]
HALF = torch.float16
TWO = KernelTiles((1, 4, 8), 2, 1, (1, 4, 8), 32)
PAIR = tiles((1, 8, 8), (1, 4, 8), 32)
FEATURES: dict[str, tuple[GNA | tuple[GNA, ...], Shapes, Shapes, dict[str, Any]]] = {
    "2-D": (
        GNA((8, 12), (3, 5)),
        (Config(64, 32), TWO),
        (BlackwellConfig(64, 32), tiles((1, 4, 8), (1, 4, 8), 32)),
        {},
    ),
    "whole windows": (
        GNA((8, 16), (8, 16)),
        (Config(64, 32), TWO),
        (BlackwellConfig(64, 64), tiles((1, 4, 16), (1, 4, 16), 64)),
        {"heads": 2},
    ),
    "3-D, stride, float16": (
        GNA((3, 6, 7), (2, 3, 5), (1, 2, 3)),
        (Config(32, 32, float16=True), KernelTiles((1, 3, 5), 2, 1, (2, 3, 5), 32)),
        (BlackwellConfig(32, 32, float16=True), tiles((2, 3, 5), (2, 3, 5), 32, split=0)),
        {"dtype": HALF, "heads": 2},
    ),
    "text": (
        GNA((6, 7), (3, 4), text_first=5, text_last=70),
        (Config(64, 32), TWO),
        (BlackwellConfig(64, 32), PAIR),
        {},
    ),
    "text, some of it valid": (
        GNA((6, 7), (3, 4), text_first=40, text_last=9),
        (Config(32, 32), TWO),
        (BlackwellConfig(32, 32), PAIR),
        {"batch": 3, "valid": ((0, 9), (33, 0), (40, 4))},
    ),
    "dilation": (
        GNA((9, 11), (3, 2), (2, 1), (2, 3)),
        (Config(32, 16), KernelTiles((1, 4, 4), 2, 2, (1, 2, 8), 16)),
        (BlackwellConfig(32, 32), tiles((1, 4, 4), (1, 4, 8), 32, split=2)),
        {},
    ),
    "dilation and text": (
        GNA((5, 8), (2, 3), dilation=(2, 1), text_first=3, text_last=2),
        (Config(64, 16), KernelTiles((1, 3, 8), 2, 1, (1, 2, 8), 16)),
        (BlackwellConfig(64, 32), tiles((1, 2, 8), (1, 3, 8), 32)),
        {},
    ),
    "causal, head dim 128": (
        GNA(150, 40, causal=True),
        (Config(128, 32), KernelTiles((1, 1, 64), 2, 2, (1, 1, 32), 32)),
        (BlackwellConfig(128, 32), tiles((1, 1, 64), (1, 1, 32), 32, split=2)),
        {},
    ),
    "causal in one of two, float16, head dim 128": (
        GNA((7, 9), (4, 3), causal=(True, False)),
        (Config(128, 16, float16=True), KernelTiles((1, 4, 8), 2, 1, (1, 4, 4), 16)),
        (BlackwellConfig(128, 32, float16=True), tiles((1, 4, 8), (1, 4, 8), 32)),
        {"dtype": HALF},
    ),
    "grouped heads": (
        GNA((8, 8), (3, 3)),
        (Config(32, 32), TWO),
        (BlackwellConfig(32, 32), PAIR),
        {"batch": 2, "heads": 4, "key_heads": 2},
    ),
    "heads last": (
        GNA((5, 9), (3, 3)),
        (Config(64, 32), TWO),
        (BlackwellConfig(64, 32), PAIR),
        {"batch": 2, "heads": 2, "key_heads": 2, "heads_last": True},
    ),
    "values that lie otherwise than keys": (
        GNA((5, 9), (3, 3)),
        (Config(64, 32), TWO),
        (BlackwellConfig(64, 32), PAIR),
        {"batch": 2, "heads": 2, "key_heads": 2, "values_last": True},
    ),
    "a window per head": (
        (GNA((8, 8), (3, 3)), GNA((8, 8), (7, 2)), GNA((8, 8), (8, 8))),
        (Config(32, 32), TWO),
        (BlackwellConfig(32, 32), tiles((1, 4, 8), (1, 4, 8), 32)),
        {"heads": 3, "key_heads": 3},
    ),
    "slots that boxes do not fill": (
        GNA((9, 9), (5, 4)),
        (Config(64, 48), KernelTiles((1, 5, 7), 2, 2, (1, 4, 9), 48)),
        (BlackwellConfig(64, 64), tiles((1, 5, 7), (1, 5, 9), 64, split=2)),
        {},
    ),
    "three chunks of columns": (
        GNA((6, 8), (3, 3)),
        (Config(96, 16), KernelTiles((1, 3, 8), 2, 1, (1, 2, 8), 16)),
        (BlackwellConfig(96, 32), tiles((1, 3, 8), (1, 3, 8), 32)),
        {},
    ),
    "padded head dim": (
        GNA((8, 8), (3, 3)),
        (Config(64, 32), TWO),
        (BlackwellConfig(64, 32), PAIR),
        {"head_dim": 40, "heads": 2, "key_heads": 2},
    ),
    "two blocks": (
        GNA((8, 16), (3, 5)),
        (Config(32, 32), TWO),
        (BlackwellConfig(32, 32), PAIR),
        {"heads": 3, "key_heads": 3, "blocks": 2},
    ),
    "masks of several words": (
        GNA((12, 14), (5, 11)),
        (Config(32, 144), KernelTiles((1, 6, 7), 2, 1, (1, 12, 12), 144)),
        (BlackwellConfig(32, 128), tiles((1, 6, 14), (1, 9, 14), 128)),
        {},
    ),
    "large scores": (
        GNA((8, 16), (8, 16)),
        (Config(64, 32), TWO),
        (BlackwellConfig(64, 32), tiles((1, 4, 16), (1, 4, 8), 32)),
        {"heads": 2, "key_heads": 2, "scale": 1.0},
    ),
    "large scores and masks": (
        GNA((8, 16), (5, 9)),
        (Config(64, 32), TWO),
        (BlackwellConfig(64, 32), PAIR),
        {"scale": 1.0},
    ),
    "bounded waits": (
        GNA((8, 12), (3, 5)),
        (Config(32, 32, bounded_waits=9), TWO),
        (BlackwellConfig(32, 32, bounded_waits=9), PAIR),
        {},
    ),
    "scale of zero": (
        GNA((8, 12), (3, 5)),
        (Config(32, 32), TWO),
        (BlackwellConfig(32, 32), PAIR),
        {"scale": 0.0},
    ),
}
"""Masks, shapes for Hopper and for Blackwell, and what else there is to a problem."""
HOPPER = {name: Problem(gnas, *shapes, **rest) for name, (gnas, shapes, _, rest) in FEATURES.items()} | {
    "three warpgroups": Problem(
        GNA((10, 9), (5, 5)), Config(64, 48, consumers=3, key_stages=3), KernelTiles((1, 4, 9), 3, 1, (1, 5, 9), 48)
    ),
    "three warpgroups, slots that boxes do not fill, text": Problem(
        GNA((10, 9), (5, 5), text_last=5),
        Config(32, 128, consumers=3, key_stages=3),
        KernelTiles((1, 4, 9), 3, 1, (1, 6, 9), 128),
    ),
    "boxes that a warpgroup skips": Problem(
        GNA(768, 256, 128),
        Config(32, 32, consumers=3, key_stages=3, skips=True),
        KernelTiles((1, 1, 64), 3, 2, (1, 1, 32), 32, skips=True),
        blocks=2,
    ),
    "boxes that a warpgroup skips, a row's first key after them": Problem(
        GNA(512, 200),
        Config(32, 32, consumers=3, key_stages=3, skips=True),
        KernelTiles((1, 1, 64), 3, 2, (1, 1, 32), 32, skips=True),
    ),
    "boxes that a warpgroup skips, dilation, causal, float16": Problem(
        GNA(700, 90, 40, 3, causal=True),
        Config(32, 32, consumers=3, key_stages=3, float16=True, skips=True),
        KernelTiles((1, 1, 64), 3, 2, (1, 1, 32), 32, skips=True),
        heads=2,
        blocks=2,
        dtype=HALF,
    ),
    "boxes that a warpgroup skips, slots that they do not fill, text": Problem(
        GNA(300, 64, 32, text_last=40, text_first=3),
        Config(64, 32, consumers=3, key_stages=3, skips=True),
        KernelTiles((1, 1, 60), 3, 2, (1, 1, 30), 32, skips=True),
    ),
    "two shapes of key boxes": Problem(
        GNA((20, 20), (5, 9)),
        Config(64, 32),
        KernelTiles((1, 4, 8), 2, 1, (1, 8, 4), 32, kv_rest=(1, 4, 8), rest_axis=1),
    ),
    "two shapes, strides, whole boxes of both": Problem(
        GNA((12, 24), (12, 12), (4, 8)),
        Config(64, 32),
        KernelTiles((1, 4, 8), 2, 1, (1, 4, 8), 32, kv_rest=(1, 8, 4), rest_axis=2),
        heads=2,
        blocks=2,
    ),
    "two shapes, text, queries held": Problem(
        GNA((20, 20), (5, 9), text_first=5, text_last=40),
        Config(64, 32, holds_queries=True, query_stages=1),
        KernelTiles((1, 4, 8), 2, 1, (1, 8, 4), 32, kv_rest=(1, 4, 8), rest_axis=1),
    ),
    "two shapes, dilation, slots that they do not fill": Problem(
        GNA((9, 22), (3, 7), dilation=(1, 2)),
        Config(32, 32, float16=True),
        KernelTiles((1, 4, 8), 2, 1, (1, 5, 6), 32, kv_rest=(1, 10, 3), rest_axis=2),
        dtype=HALF,
    ),
    "two shapes, 3-D, a window per head, masks of several words": Problem(
        (GNA((5, 13, 15), (3, 8, 9)), GNA((5, 13, 15), (2, 13, 4))),
        Config(32, 144),
        KernelTiles((2, 4, 8), 2, 2, (2, 6, 12), 144, kv_rest=(2, 24, 3), rest_axis=2),
        heads=2,
        key_heads=2,
    ),
    "one query slot": Problem(GNA((8, 20), (3, 5)), Config(32, 32, query_stages=1), TWO, heads=2),
    "maxima that do not last": Problem(GNA((8, 16), (5, 9)), Config(64, 32), TWO, heads=2, key_heads=2, scale=30.0),
    "maxima that do not last, float16, text, head dim 96": Problem(
        GNA((7, 9), (4, 3), text_last=40),
        Config(96, 16, float16=True),
        KernelTiles((1, 4, 8), 2, 1, (1, 4, 4), 16),
        dtype=HALF,
        scale=2.0,
    ),
}
ONE_BOX = Problem(
    GNA(192, 32, stride=32),
    Config(64, 32, holds_queries=True, query_stages=1),
    KernelTiles((1, 1, 32), 2, 1, (1, 1, 32), 32),
    heads=2,
    key_heads=2,
)
"""Items with one key box, and queries in registers: nothing but barriers of queries orders one item after another."""
BLACKWELL = {name: Problem(gnas, *shapes, **rest) for name, (gnas, _, shapes, rest) in FEATURES.items()} | {
    **{
        f"head dim {head_dim}, {keys} keys": Problem(
            GNA((16, 20), (7, 9)),
            BlackwellConfig(head_dim, keys, key_stages=stages, output_stages=outputs, polynomial=polynomial),
            tiles((1, 8, 16), (1, keys // 16, 16), keys),
        )
        for head_dim, keys, stages, outputs, polynomial in (
            (32, 64, 2, 1, 0), (32, 96, 6, 3, 2), (64, 96, 4, 2, 8), (64, 128, 6, 2, 0), (96, 64, 3, 1, 0),
            (96, 128, 3, 2, 3), (128, 64, 2, 4, 0), (128, 96, 4, 2, 0), (128, 128, 3, 2, 2),
        )
    },
    "much text": Problem(GNA((4, 5), (3, 4), text_first=3, text_last=300), BlackwellConfig(32, 96),
                         tiles((1, 4, 8), (1, 6, 16), 96)),
    "long rows": Problem(GNA(700, 650), BlackwellConfig(32, 128, key_stages=2), tiles((1, 1, 128), (1, 1, 128), 128, 2),
                         scale=0.5),
}  # fmt: skip


def in_8_bits(problem: Problem) -> Problem:
    """The same in float8_e4m3fn, with a head dim that it may have."""
    head_dim = 128 if problem.config.head_dim > 64 else 64
    return problem._replace(config=replace(problem.config, head_dim=head_dim, float8=True), dtype=FLOAT8)


IN_8_BITS = {name: in_8_bits(BLACKWELL[name]) for name in (
    "2-D", "text, some of it valid", "dilation", "causal, head dim 128",
    "values that lie otherwise than keys", "large scores and masks", "head dim 64, 96 keys", "head dim 128, 128 keys",
)}  # fmt: skip
"""Problems of the Blackwell kernel in float8_e4m3fn."""


def in_low_precision(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, scale: float) -> Tensor:
    """What attention loses with weights and output in few bits, everything else in float32."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x.float() for x in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    scores = (q @ k.mT * scale).masked_fill(~keep, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (rounded_weights(weights, query.dtype) @ v / weights.sum(-1, keepdim=True)).to(output_type(query.dtype))


def launched(problem: Problem, seed: int = 0, inputs: Inputs | None = None, **options: Any) -> Launched:
    """Output, log-sum-exp and machine of a problem, with its own tensors by default."""
    valid = torch.tensor(problem.valid, dtype=torch.int32) if problem.valid else None
    return launch.run(
        problem.gnas,
        inputs or problem.tensors(),
        problem.config,
        problem.tiles,
        seed,
        blocks=problem.blocks,
        scale=problem.scale,
        text_valid=valid,
        **options,
    )


def check(problem: Problem, seed: int, **options: Any) -> Machine:
    """Runs a problem and compares it with float64."""
    tensors, keep = problem.tensors(), problem.keep()
    scale = tensors[0].shape[-1] ** -0.5 if problem.scale is None else problem.scale
    out, lse, machine = launched(problem, seed, tensors, **options)
    exact = exact_attention(*tensors, keep, scale=scale)
    low = in_low_precision(*tensors, keep, scale)
    assert_within_budget("output", out, exact.out, low, factor=2.0)
    assert torch.allclose(lse.double(), exact.lse, atol=1e-5, rtol=1e-5)
    return machine
