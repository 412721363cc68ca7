"""The Hopper backward kernel in the PTX interpreter: all passes on the problems of the forward, against float64.

``PTX_SEEDS=20 python -m pytest -n 2 tests/test_ptx_backward.py`` tries each problem with 20 seeds.
"""

from __future__ import annotations

import os

import pytest
from machine_code import needs_nvrtc

needs_nvrtc()

from backward_problems import PASSES, PROBLEMS, check_pass  # noqa: E402


@pytest.mark.parametrize("seed", range(int(os.getenv("PTX_SEEDS", "1"))))
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_equal_float64(name: str, kind: str, seed: int) -> None:
    problem = PROBLEMS[name]
    if kind == "fused" and problem.config.head_dim == 96:
        pytest.skip("no fused pass is written for head dim 96")
    check_pass(problem, kind, seed)
