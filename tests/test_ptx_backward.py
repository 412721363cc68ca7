"""The Hopper backward kernel in the PTX interpreter: both passes on the problems of the forward, against float64."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from helpers import assert_within_budget
from machine_code import needs_nvrtc
from torch import Tensor

needs_nvrtc()

from kernel_problems import HOPPER, TWO, Problem  # noqa: E402
from ptx import backward as ptx_backward  # noqa: E402

from gna_flex import GNA  # noqa: E402
from gna_flex.cuda.backward import BackwardConfig  # noqa: E402
from gna_flex.cuda.kernel import Config  # noqa: E402

PROBLEMS = {name: problem for name, problem in HOPPER.items() if name != "three warpgroups"}
PROBLEMS["text, grouped heads, some of it valid"] = Problem(
    GNA((5, 6), (3, 4), (1, 2), text_first=9, text_last=70), Config(32, 32), TWO, 2, 4, 2, valid=((9, 66), (3, 0))
)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, keep: Tensor, scale: float, low: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, log-sum-exp and delta, in float64; delta comes from an output of 16 bits.

    Or with weights, their gradients and results rounded to ``low``, as a plain run of that type has them.
    """
    groups, dtype = q.shape[1] // k.shape[1], q.dtype

    def rounded(x: Tensor) -> Tensor:
        return x if low is None else x.to(low).double()

    wide = [x.double().repeat_interleave(groups, 1) for x in (k, v)]
    scores = (q.double() @ wide[0].mT * scale).masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    out = (weights @ wide[1]).to(dtype).double()
    delta = (out * grad.double()).sum(-1)
    of_scores = rounded(weights * (grad.double() @ wide[1].mT - delta[..., None]) * scale)
    dk, dv = of_scores.mT @ q.double(), rounded(weights).mT @ grad.double()
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return *(rounded(x) for x in (of_scores @ wide[0], dk, dv)), lse, delta


def check(problem: Problem, seed: int) -> None:
    """Runs both passes of a problem and compares the gradients with float64."""
    q, k, v = problem.tensors()
    grad, keep = torch.randn_like(q), problem.keep()
    scale = q.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    *exact, lse, delta = gradients(q, k, v, grad, keep, scale)
    low = gradients(q, k, v, grad, keep, scale, q.dtype)
    statistics = torch.stack([lse * math.log2(math.e), delta * scale], -1).float()
    gnas = (problem.gnas,) if isinstance(problem.gnas, GNA) else problem.gnas
    valid = torch.tensor(problem.valid, dtype=torch.int32) if problem.valid else None
    config = BackwardConfig(**{field.name: getattr(problem.config, field.name) for field in fields(problem.config)})
    for rows_are_keys in (False, True):
        results = ptx_backward.run(
            gnas,
            (k, v, q, grad) if rows_are_keys else (q, grad, k, v),
            statistics,
            replace(config, rows_are_keys=rows_are_keys),
            problem.tiles,
            seed,
            blocks=problem.blocks,
            scale=scale,
            text_valid=valid,
        )[: 1 + rows_are_keys]
        for i, result in enumerate(results, rows_are_keys):
            name = ("query", "key", "value")[i]
            assert result.isfinite().all(), name
            assert_within_budget(name, result, exact[i], low[i], factor=2.0)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_equal_float64(name: str, seed: int) -> None:
    check(PROBLEMS[name], seed)
