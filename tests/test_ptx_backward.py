"""The Hopper backward kernel in the PTX interpreter: all passes on the problems of the forward, against float64.

``PTX_SEEDS=20 python -m pytest -n 2 tests/test_ptx_backward.py`` tries each problem with 20 seeds.
"""

from __future__ import annotations

import os

import pytest
from machine_code import needs_nvrtc

needs_nvrtc()

from backward_problems import LINE, PASSES, PROBLEMS, check_pass  # noqa: E402
from kernel_problems import TWO, Problem  # noqa: E402
from torch import Tensor  # noqa: E402

from gna_flex import GNA  # noqa: E402
from gna_flex.cuda.kernel import Config  # noqa: E402
from gna_flex.cuda.sums import Ring  # noqa: E402
from gna_flex.cuda.tables import KernelTiles  # noqa: E402


@pytest.mark.parametrize("seed", range(int(os.getenv("PTX_SEEDS", "1"))))
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_equal_float64(name: str, kind: str, seed: int) -> None:
    problem = PROBLEMS[name]
    if kind == "fused" and problem.config.head_dim == 96:
        pytest.skip("no fused pass is written for head dim 96")
    check_pass(problem, kind, seed)


WINDOW = GNA((8, 16), (5, 9))
SHORT = KernelTiles((1, 1, 16), 2, 2, (1, 1, 32), 32)
RINGS = {
    "a place less than groups": (Problem(WINDOW, Config(64, 32), TWO, heads=4, key_heads=4, blocks=2), (4, 3, 1, 32)),
    "one place": (Problem(WINDOW, Config(64, 32), TWO, heads=3, key_heads=3, blocks=3), (3, 1, 1, 64)),
    "two places, two that round": (
        Problem(WINDOW, Config(64, 32), TWO, batch=2, heads=3, key_heads=3, blocks=4),
        (6, 2, 2, 32),
    ),
    "grouped heads": (Problem(WINDOW, Config(64, 32), TWO, heads=8, key_heads=4, blocks=3), (4, 2, 1, 64)),
    "more rows than copies": (
        Problem(GNA(300, 40), Config(64, 32), LINE, heads=2, key_heads=2, blocks=2),
        (2, 1, 1, 256),
    ),
    "slices that are complete before their group": (
        Problem(GNA(300, 24), Config(64, 32), SHORT, heads=3, key_heads=3, blocks=3),
        (3, 1, 1, 32),
    ),
    "counters of several slices, and grouped heads": (
        Problem(GNA(600, 24), Config(64, 32), SHORT, heads=4, key_heads=2, blocks=2),
        (2, 1, 1, 32),
    ),
    "dilation, whose items meet slices far apart": (
        Problem(GNA(300, 24, 1, 3), Config(64, 32), SHORT, heads=3, key_heads=3, blocks=2),
        (3, 1, 1, 32),
    ),
    "room for all, and one that rounds": (
        Problem(GNA((8, 16), (5, 9), text_first=5), Config(64, 32), TWO, heads=4, key_heads=2, blocks=2),
        (2, 2, 1, 32),
    ),
}


@pytest.mark.parametrize("seed", range(int(os.getenv("PTX_SEEDS", "1"))))
@pytest.mark.parametrize("name", RINGS)
def test_sums_in_a_ring(name: str, seed: int) -> None:
    """Fewer places for sums than there are groups: some CTAs round, and others wait for them."""
    problem, ring = RINGS[name]
    check_pass(problem, "fused", seed, ring=Ring(*ring))


class Opposites(Problem):
    """Every query's only key is its opposite, so that a key of zeros would weigh infinitely much."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        query, _, value = super().tensors()
        return query, -query, value


def test_rows_that_no_box_fills_stay_zero() -> None:
    """In a fused pass all keys of a slot meet the next item's gradients of scores."""
    tiles = KernelTiles((1, 5, 7), 2, 2, (1, 4, 7), 32)
    check_pass(Opposites(GNA((9, 9), 1), Config(64, 32), tiles, heads=4, key_heads=4, scale=4.0), "fused", 0)
