"""Gradients of the plain reference: against float64, against differences, and the oracle of all backward kernels."""

from typing import Any

import pytest
import torch
from attention_cases import CASES, FLOATS, SMALL, Case
from helpers import assert_within_budget, dense_attention, dense_gradients, exact_attention, gna_id
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from gna_flex import GNA, flex_attention, gna_mask

GRADIENT_CASES = [
    "1d-causal",
    "3d",
    "dilation-causal-text",
    "grouped-heads",
    "packed",
    "value-dim",
    "heads-differ",
    "one-token",
]


def gradients(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("through", ["out", "lse", "out-and-lse"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients(name, dtype, through):
    case = CASES[name]
    inputs = case.inputs(dtype, grad=True)
    weights = torch.randn(case.batch, case.heads, case.gnas[0].tokens, case.value_dim, dtype=torch.float64)

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        parts = {"out": (out.double() * weights).sum(), "lse": (lse.double() * weights[..., 0]).sum()}
        return sum(part for part_name, part in parts.items() if part_name in through)

    out, aux = flex_attention(
        *inputs, block_mask=case.mask(), enable_gqa=case.heads != case.kv_heads, return_aux=AuxRequest(lse=True)
    )
    used = inputs if "out" in through else inputs[:2]
    found = gradients(loss(out, aux.lse), used)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = gradients(loss(*dense_attention(*exact_inputs, case.keep())[:2]), exact_inputs[: len(used)])
    plain = gradients(loss(*dense_attention(*inputs, case.keep())[:2]), used)
    for tensor, *values in zip(("query", "key", "value"), found, exact, plain, strict=False):
        assert_within_budget(f"gradient of {tensor}", *values)


GRADCHECKED = [
    GNA((3, 3), 2, causal=(True, False), text_last=1),
    GNA(7, 3, 2, causal=True),
    GNA((5, 3), (2, 1), dilation=(2, 3)),
    GNA((3, 5), (1, 2), dilation=2, causal=(False, True), text_first=2, text_last=1),
    GNA((3, 1, 3), (2, 1, 3), (1, 1, 2), text_first=1),
]


@pytest.mark.parametrize("gna", GRADCHECKED, ids=gna_id)
def test_gradcheck(gna):
    """Against differences of outputs, with grouped heads and both statistics; derivatives of gradients once."""
    mask = gna_mask(gna, device="cpu")
    inputs = [torch.randn(1, h, gna.tokens, 3, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, aux = flex_attention(
            q, k, v, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True, max_scores=True)
        )
        return out, aux.lse, aux.max_scores

    assert torch.autograd.gradcheck(attention, inputs)
    if gna == GRADCHECKED[0]:
        assert torch.autograd.gradgradcheck(lambda *x: attention(*x)[:2], inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_oracle_of_gradients_agrees_with_autograd(dtype):
    """In float64; its plain run in 16 bits is off by some roundings, and not by none."""
    case = Case(SMALL, heads=4, kv_heads=2)
    inputs, keep = case.inputs(dtype), torch.from_numpy(case.keep())
    wide = [x.double().requires_grad_() for x in inputs]
    exact = exact_attention(*wide, case.keep(), scale=0.3)
    grad, grad_lse = torch.randn_like(exact.out).to(dtype), torch.randn_like(exact.lse)
    expected = torch.autograd.grad((exact.out, exact.lse), wide, (grad.double(), grad_lse))
    found, low = (dense_gradients(*inputs, grad, keep, 0.3, grad_lse, low=low) for low in (False, True))
    eps = torch.finfo(dtype).eps
    for of_wide, of_found, of_low in zip(expected, found[:3], low[:3], strict=True):
        top = of_wide.abs().max()
        assert (of_found - of_wide).abs().max() <= 8 * eps * top
        assert dtype == torch.float64 or 0.1 * eps * top <= (of_low - of_wide).abs().max() <= 8 * eps * top
    torch.testing.assert_close(found.lse, exact.lse)
    delta = (exact.out * grad).sum(-1) - grad_lse
    assert (found.delta - delta).abs().max() <= 8 * eps * delta.abs().max()
