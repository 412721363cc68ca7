"""float8_e4m3fn at the front door, without a Blackwell GPU: which route takes it, what comes out, what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers import assert_within_budget, dense_mask, exact_attention
from machine_code import needs_nvrtc
from torch import Tensor

needs_nvrtc()

from gna_flex import GNA, explain, flex_attention, gna_mask, tune  # noqa: E402
from gna_flex.cuda import jit  # noqa: E402
from gna_flex.kernels import FLOAT8  # noqa: E402
from gna_flex.routing import Facts, facts_on, obstacle_to  # noqa: E402
from gna_flex.selftest.problems import LIFT, Problem, compare, expected, rounded_weights  # noqa: E402
from gna_flex.selftest.worker import problems_of  # noqa: E402

MASK = GNA((8, 12), (3, 5))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 96, 64).to(FLOAT8) for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("compiling", [False, True])
def test_the_reference_computes_in_float32(compiling: bool) -> None:
    q, k, v = inputs()
    mask = gna_mask(MASK, device="cpu")

    def call() -> tuple[Tensor, Tensor]:
        out, lse = flex_attention(q, k, v, block_mask=mask, scale=0.1, enable_gqa=True, return_lse=True)
        return out, lse

    assert explain(q, k, v, mask, enable_gqa=True).name == "reference"
    out, lse = (torch.compile(call, backend="eager") if compiling else call)()
    exact = exact_attention(q, k, v, torch.tensor(dense_mask(MASK)), scale=0.1)
    assert out.dtype == torch.bfloat16
    assert_within_budget("output", out, exact.out, exact.out.bfloat16(), factor=1.0)
    assert torch.allclose(lse.double(), exact.lse, atol=1e-5, rtol=1e-5)


def on(capability: tuple[int, int], head_dim: int = 128) -> Facts:
    facts = facts_on(torch.device("cpu"), FLOAT8, head_dim, 1 << 20)
    return facts._replace(device="cuda", capability=capability, missing="")


@pytest.mark.parametrize(
    ("route", "facts", "words"),
    [
        ("blackwell", on((10, 0)), "^$"),
        ("blackwell", on((10, 3), 64), "^$"),
        ("blackwell", on((10, 0), 96), "takes head dims 64 and 128, not 96"),
        ("blackwell", on((10, 0))._replace(compiling=True), "inside a compiled graph"),
        ("blackwell", on((10, 0))._replace(untested="not tested"), "not tested"),
        ("hopper", on((9, 0)), "float16 and bfloat16, not in torch.float8_e4m3fn"),
        ("flex", on((10, 0)), "no kernel for torch.float8_e4m3fn"),
        ("flex-tiles", on((10, 0)), "no kernel for torch.float8_e4m3fn"),
    ],
)
def test_routes(route: str, facts: Facts, words: str) -> None:
    assert re.search(words, obstacle_to(route, facts))


def test_what_is_refused() -> None:
    q, k, v = inputs()
    mask = gna_mask(MASK, device="cpu")
    with pytest.raises(ValueError, match="has no gradient"):
        flex_attention(q.requires_grad_(), k, v, block_mask=mask, enable_gqa=True)
    with pytest.raises(ValueError, match="share one floating-point type"):
        flex_attention(q.detach(), k, v.bfloat16(), block_mask=mask, enable_gqa=True)
    with pytest.raises(ValueError, match="takes the shapes of bfloat16"):
        tune(MASK, heads=2, head_dim=64, dtype=FLOAT8)
    with pytest.raises(ValueError, match=r"only torch\.float8_e4m3fn is possible"):
        flex_attention(*(x.detach().to(torch.float8_e5m2) for x in (q, k, v)), block_mask=mask, enable_gqa=True)


def test_the_self_test_has_problems_for_blackwell_only() -> None:
    assert len([p for p in problems_of("blackwell") if p.type == FLOAT8]) == 4
    assert not [p for route in ("hopper", "reference", "flex") for p in problems_of(route) if p.type == FLOAT8]


def test_weights_are_as_large_as_in_the_kernel() -> None:
    text = (jit.source_folder() / "blackwell" / "softmax.cuh").read_text()
    found = re.search(r"kLift = FLOAT8 \? ([\d.]+)f : 0\.f, kSlack = FLOAT8 \? ([\d.]+)f", text)
    assert found
    lift, slack = map(float, found.groups())
    assert 2**lift == LIFT <= torch.finfo(FLOAT8).max
    assert slack == 0


def box_by_box(problem: Problem, order: Tensor, slack: float) -> Tensor:
    """What a kernel computes that visits keys in an order, 128 at a time, and keeps a maximum up to 2^slack times."""
    q, k, v = (x.float() for x in problem.tensors())
    scores = q @ k.mT * (problem.factor / math.log(2))
    scores = scores.masked_fill(~torch.tensor(dense_mask(problem.gnas[0])), -math.inf)
    maximum, total, out = torch.full_like(q[..., :1], -math.inf), torch.zeros_like(q[..., :1]), torch.zeros_like(q)
    for box in order.split(128):
        top = scores[..., box].amax(-1, keepdim=True)
        raised = torch.where(top - maximum > slack, top, maximum)
        rescale = torch.where(raised > maximum, (maximum - raised).exp2(), 1)
        maximum = raised
        weights = (scores[..., box] - maximum.nan_to_num(neginf=0)).exp2()
        total = total * rescale + weights.sum(-1, keepdim=True)
        out = out * rescale + rounded_weights(weights, FLOAT8) @ v[..., box, :]
    return (out / total).bfloat16()


def test_budgets_let_a_kernel_visit_keys_in_any_order_but_not_keep_a_maximum() -> None:
    """Which would round the largest weight, by up to 2^-4 of it."""
    problem = Problem("large scores", (GNA((14, 20), -1),), 128, "float8_e4m3fn", scale=1.0)
    wanted, tokens = expected(problem), problem.gnas[0].tokens
    in_order = torch.arange(tokens)
    for order in (in_order, torch.randperm(tokens)):
        assert compare(box_by_box(problem, order, slack=0.0), None, wanted).share < 0.75
    assert compare(box_by_box(problem, in_order, slack=0.75), None, wanted).share > 1
