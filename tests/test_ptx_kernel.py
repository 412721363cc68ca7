"""The forward kernels in the PTX interpreter: small problems of every kind against float64, each with its own seed.

``PTX_SEEDS=20 python -m pytest -n 2 tests/test_ptx_kernel.py`` tries each problem with 20 seeds.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from machine_code import needs_nvrtc

needs_nvrtc()

from helpers import dense_mask  # noqa: E402
from kernel_problems import BLACKWELL, FEATURES, HOPPER, Problem, check, launched, tiles  # noqa: E402
from ptx.errors import RaceError  # noqa: E402

from gna_flex import GNA  # noqa: E402
from gna_flex.cuda.blackwell import HEAD_DIMS  # noqa: E402
from gna_flex.cuda.forward import Places  # noqa: E402
from gna_flex.cuda.kernel import Config  # noqa: E402
from gna_flex.cuda.tables import BOXES, REST_BOXES, REST_FREE_BOXES, KernelTiles, work_records  # noqa: E402

PROBLEMS = {f"hopper, {name}": problem for name, problem in HOPPER.items()}
PROBLEMS |= {f"blackwell, {name}": problem for name, problem in BLACKWELL.items()}
SEEDS = int(os.getenv("PTX_SEEDS", "1"))
RUNS = [(name, SEEDS * place + more) for place, name in enumerate(PROBLEMS) for more in range(SEEDS)]


@pytest.mark.parametrize(("name", "seed"), RUNS)
def test_kernel_equals_float64(name: str, seed: int) -> None:
    check(PROBLEMS[name], seed)


def test_both_kernels_have_every_feature() -> None:
    assert FEATURES.keys() <= HOPPER.keys() & BLACKWELL.keys()
    configs = [problem.config for problem in BLACKWELL.values()]
    assert {config.head_dim for config in configs} == set(HEAD_DIMS)
    assert {config.keys for config in configs} == {32, 64, 96, 128}
    assert {config.polynomial for config in configs} >= {0, 2, 8}


def test_problems_with_two_shapes_have_boxes_of_both() -> None:
    problems = [problem for problem in HOPPER.values() if problem.tiles.kv_rest]
    records = [work_records(problem.gna, problem.tiles) for problem in problems]
    assert len(problems) == 5
    for each in records:
        assert each[:, BOXES].prod(axis=1).min() > 0 < each[:, REST_BOXES].prod(axis=1).max()
    assert any((each[:, REST_BOXES] != each[:, REST_FREE_BOXES]).any() for each in records), "some need masks"
    assert any(each[:, REST_FREE_BOXES].prod(axis=1).any() for each in records), "some need none"


@pytest.mark.parametrize("holds", [False, True])
def test_scores_are_computed_again_only_where_a_maximum_does_not_last(holds: bool) -> None:
    """Weights are up to 2^40 in bfloat16, or 2^12 in float16. In these windows the first box has keys of all rows."""
    again = [name for name in HOPPER if "do not last" in name]
    for name in ("whole windows", "large scores", *again):
        problem = HOPPER[name]
        machine = check(problem._replace(config=replace(problem.config, holds_queries=holds)), 0)
        assert (machine.warp_products > 0) == (name in again), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("kv_tile", "steps"), [((1, 4, 8), 1), ((1, 2, 16), 2)])
def test_what_hidden_keys_are_reaches_nobody(value: float, kv_tile: tuple[int, int, int], steps: int) -> None:
    """Masks are added to scores: where that gives no number, the box is computed again, and keys are left out."""
    gna = GNA((8, 32), (5, 9))
    assert Places.of(kv_tile, 32, (False, True, True)).steps == steps
    problem = Problem(gna, Config(64, 32), KernelTiles((1, 4, 16), 2, 1, kv_tile, 32))
    q, k, v = problem.tensors()
    wanted, _, _ = launched(problem, 0, (q, k, v))
    k = k.clone()
    token = 3 * 32 + 20
    k[:, :, token] = value
    out, _, machine = launched(problem, 0, (q, k, v))
    sees = torch.tensor(dense_mask(gna))[:, token]
    assert machine.warp_products > 0
    assert 0 < sees.sum() < len(sees)
    torch.testing.assert_close(out[:, :, ~sees], wanted[:, :, ~sees], atol=2**-8, rtol=2**-6)


CORRECTION = range(8, 12)
"""Warps of the Blackwell kernel that multiply outputs in tensor memory where a maximum has risen."""


@pytest.mark.parametrize(("scale", "least", "most"), [(0.01, 0, 0), (0.5, 1, 11), (1e4, 12, 12)])
def test_outputs_are_rescaled_only_where_that_is_needed(scale: float, least: int, most: int) -> None:
    """By 2 warps of rows that exist, of 2 tiles, at 3 boxes after the first."""
    problem = BLACKWELL["large scores"]._replace(heads=1, key_heads=1, scale=scale)
    problem = problem._replace(tiles=tiles((1, 4, 16), (1, 2, 16), 32))
    (block,) = check(problem, 0).grid
    stores = sum(block.tensor_memory.stores[warp] for warp in CORRECTION)
    assert least <= stores // (problem.config.head_dim // 32) <= most


def test_the_order_of_products_that_the_blackwell_kernel_relies_on() -> None:
    """With more than 64 keys scores overwrite weights that the product before them reads, with another shape."""
    with pytest.raises(RaceError, match="a read is under way"):
        check(BLACKWELL["head dim 32, 96 keys"], 0, same_shape_only=True)
    check(BLACKWELL["head dim 32, 64 keys"], 0, same_shape_only=True)
