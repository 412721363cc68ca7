"""Problems of the forward for the backward kernel in the PTX interpreter, and their check."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from helpers import assert_within_budget, dense_gradients
from kernel_problems import HOPPER, TWO, Problem
from ptx import backward

from gna_flex import GNA
from gna_flex.cuda.backward import BackwardConfig
from gna_flex.cuda.kernel import Config
from gna_flex.cuda.tables import KernelTiles

LINE = KernelTiles((1, 1, 64), 2, 2, (1, 1, 32), 32)
"""Of one dimension, with two boxes of queries."""
PROBLEMS = {name: x for name, x in HOPPER.items() if x.config.consumers == 2 and not x.tiles.kv_rest}
PROBLEMS["text, grouped heads, some of it valid"] = Problem(
    GNA((5, 6), (3, 4), (1, 2), text_first=9, text_last=70), Config(32, 32), TWO, 2, 2, 1, valid=((9, 66), (3, 0))
)


PASSES = ("queries", "keys", "fused")


def pass_shapes(problem: Problem, kind: str) -> tuple[BackwardConfig, KernelTiles]:
    """The configuration and tiles of a pass with the sizes of those of the forward; a fused one has slots of 64."""
    sizes = {field.name: getattr(problem.config, field.name) for field in fields(problem.config)}
    config, tiles = BackwardConfig(**sizes, rows_are_keys=kind != "queries", fused=kind == "fused"), problem.tiles
    if kind != "fused":
        return config, tiles
    sides = list(tiles.kv_tile)
    while math.prod(sides) > 64:
        sides[sides.index(max(sides))] //= 2
    while math.prod(sides) <= 32:
        sides[sides.index(max(sides))] *= 2
    # As many slots as fit, and as many as sums need that are rounded there at the end.
    rows, stages = (1, 3) if config.head_dim == 128 else (config.query_stages, config.key_stages)
    return replace(config, keys=64, query_stages=rows, key_stages=stages), replace(
        tiles, kv_tile=tuple(sides), kv_slots=64
    )


def check_pass(problem: Problem, kind: str, seed: int, **options: Any) -> None:
    """Runs one pass of a problem, of :data:`PASSES`, and compares its gradients with float64.

    ``options`` are those of :func:`ptx.backward.run`.
    """
    if kind == "fused":  # 64 columns are the least that it is written for
        problem = problem._replace(config=replace(problem.config, head_dim=max(64, problem.config.head_dim)))
    q, k, v = problem.tensors()
    grad, keep = torch.randn_like(q), problem.keep()
    scale = q.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    *exact, lse, delta = dense_gradients(q, k, v, grad, keep, scale)
    low = dense_gradients(q, k, v, grad, keep, scale, low=True)
    results = backward.run(
        (problem.gnas,) if isinstance(problem.gnas, GNA) else problem.gnas,
        (q, grad, k, v) if kind == "queries" else (k, v, q, grad),
        torch.stack([lse * math.log2(math.e), delta * scale], -1).float(),
        *pass_shapes(problem, kind),
        seed,
        blocks=problem.blocks,
        scale=scale,
        text_valid=torch.tensor(problem.valid, dtype=torch.int32) if problem.valid else None,
        **options,
    )
    for i, result in enumerate(results, kind == "keys"):
        name = ("query", "key", "value")[i]
        assert result.isfinite().all(), name
        assert_within_budget(name, result, exact[i], low[i], factor=2.0)
