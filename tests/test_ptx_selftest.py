"""Problems of the self-test in the PTX interpreter, with the configuration, tiles and budgets that a B200 would have.

``PTX_SEEDS=5 python -m pytest tests/test_ptx_selftest.py`` runs all of them, with more seeds, in some minutes.
"""

from __future__ import annotations

import os

import pytest
import torch
from machine_code import needs_nvrtc

needs_nvrtc()

from ptx import launch  # noqa: E402

from gna_flex.cuda.forward import Request, estimated  # noqa: E402
from gna_flex.selftest.problems import PROBLEMS, Problem, compare  # noqa: E402
from gna_flex.selftest.worker import problems_of, wanted_of  # noqa: E402

SEEDS = int(os.getenv("PTX_SEEDS", "1"))
QUICK = (
    "stride, 3-D, float16",
    "causal",
    "causal in one of three",
    "dilation",
    "causal, grouped heads, float8",
    "values that lie otherwise than keys",
    "a window per head",
    "one token",
    "head dim 8",
)
COPIED = ("keys that have to be copied", "head dim 40")
"""They are run as copies, which need a GPU."""
CHOSEN = [p for p in problems_of("blackwell") if p.name not in COPIED and (SEEDS > 1 or p.name in QUICK)]


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("problem", CHOSEN, ids=lambda problem: problem.name)
def test_the_kernel_passes_its_self_test(problem: Problem, seed: int) -> None:
    request = Request(problem.gnas, problem.head_dim, problem.dtype == "float16", 0, capability=(10, 0))
    config, tiles = estimated(request)
    valid = torch.tensor(problem.valid, dtype=torch.int32) if problem.valid else None
    options = {"blocks": 2, "scale": problem.factor, "text_valid": valid}
    out, lse, _ = launch.run(problem.gnas, problem.tensors(), config, tiles, seed, **options)
    found = compare(out, lse, wanted_of("blackwell", problem))
    assert found.passed, found


def test_names_are_those_of_problems() -> None:
    assert {*QUICK, *COPIED} <= {problem.name for problem in PROBLEMS}
