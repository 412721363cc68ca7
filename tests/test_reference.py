"""The dense reference against an explicit float64 softmax over the independent mask."""

import math

import pytest
import torch
from helpers import assert_within_budget, dense_attention, dense_mask, exact_attention

from gna_flex import GNA, reference, reference_attention
from gna_flex.mask_mod import mask_mod

SHAPE = GNA((5, 6), (3, 4), (1, 2), causal=(False, True), text_last=3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def inputs(dtype=torch.float32, batch=2, heads=4, kv_heads=4, tokens=SHAPE.tokens, dim=16, value_dim=16):
    sizes = [(heads, dim), (kv_heads, dim), (kv_heads, value_dim)]
    return [torch.randn(batch, h, tokens, d, dtype=torch.float32).to(dtype) for h, d in sizes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"kv_heads": 2},
        {"kv_heads": 1, "value_dim": 5},
        {"dim": 8, "value_dim": 24},
        {"batch": 1, "heads": 1, "kv_heads": 1, "dim": 1, "value_dim": 1},
    ],
    ids=["plain", "grouped", "one-kv-head", "value-dim", "tiny"],
)
def test_output_and_statistics(dtype, sizes):
    q, k, v = inputs(dtype, **sizes)
    found = reference_attention(q, k, v, mask_mod((SHAPE,)))
    exact = exact_attention(q, k, v, dense_mask(SHAPE))
    plain = dense_attention(q, k, v, dense_mask(SHAPE))
    stats_type = torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in found] == [dtype, stats_type, stats_type]
    for name, *values in zip(("out", "lse", "max"), found, exact, plain, strict=True):
        assert_within_budget(name, *values)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 2.5])
def test_scale(scale):
    q, k, v = inputs(torch.float64)
    out, lse, top = reference_attention(q, k, v, mask_mod((SHAPE,)), scale=scale)
    exact = exact_attention(q, k, v, dense_mask(SHAPE), scale=scale)
    torch.testing.assert_close((out, lse, top), tuple(exact))
    if scale == 0:
        keys = torch.from_numpy(dense_mask(SHAPE)).sum(-1).double()
        torch.testing.assert_close(lse, keys.log().expand_as(lse))


def test_score_mod_gets_every_index():
    q, k, v = inputs(torch.float64, heads=4, kv_heads=2)
    table = torch.randn(2, 4, SHAPE.tokens, SHAPE.tokens, dtype=torch.float64)
    out, lse, _ = reference_attention(
        q, k, v, mask_mod((SHAPE,)), score_mod=lambda score, b, h, i, j: score * 0.5 + table[b, h, i, j]
    )
    exact = exact_attention(q, k, v, dense_mask(SHAPE), scale=0.5 * q.shape[-1] ** -0.5, bias=table)
    torch.testing.assert_close(out, exact.out)
    torch.testing.assert_close(lse, exact.lse)


def test_mask_mod_gets_every_index():
    q, k, v = inputs(torch.float64)
    keep = torch.rand(2, 4, SHAPE.tokens, SHAPE.tokens) < 0.5
    found = reference_attention(q, k, v, lambda b, h, i, j: keep[b, h, i, j])
    torch.testing.assert_close(found, tuple(exact_attention(q, k, v, keep)))


@pytest.mark.parametrize("chunk", [1, 300, 3000])
def test_chunks_of_queries_fit_together(monkeypatch, chunk):
    q, k, v = inputs(torch.float64, heads=4, kv_heads=2)
    mod = mask_mod((SHAPE,))

    def bias(score, b, h, i, j):
        return score + 0.1 * i - 0.2 * j + h

    whole = reference_attention(q, k, v, mod, score_mod=bias)
    monkeypatch.setattr(reference, "CHUNK", chunk)
    torch.testing.assert_close(reference_attention(q, k, v, mod, score_mod=bias), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", ["all", "some"])
def test_rows_without_keys(rows):
    q, k, v = (x.requires_grad_() for x in inputs(torch.float64))
    first = 0 if rows == "all" else 7
    out, lse, top = reference_attention(q, k, v, lambda b, h, i, j: (i < first) & (j < 5))
    assert (out[:, :, first:] == 0).all()
    assert (lse[:, :, first:] == -math.inf).all()
    assert (top[:, :, first:] == -math.inf).all()
    assert out[:, :, :first].abs().sum() > 0 or rows == "all"
    (out.sum() + lse[:, :, :first].sum()).backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
    assert (q.grad[:, :, first:] == 0).all()


def test_gradients_of_everything():
    gna = GNA((3, 3), 2, causal=(True, False))
    q, k, v = (x.requires_grad_() for x in inputs(torch.float64, 1, 2, 1, gna.tokens, 3, 2))
    weight = torch.randn((), dtype=torch.float64, requires_grad=True)

    def attention(q, k, v, weight):
        return reference_attention(
            q, k, v, mask_mod((gna,)), score_mod=lambda score, b, h, i, j: score + weight * (i - j), scale=0.7
        )

    assert torch.autograd.gradcheck(attention, (q, k, v, weight))


def test_gradients_in_chunks_where_rows_are_empty(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 1)
    q, k, v = (x.requires_grad_() for x in inputs(torch.float64, 1, 1, 1, 6, 3, 2))

    def attention(q, k, v):
        out, lse, _ = reference_attention(q, k, v, lambda b, h, i, j: (i != 2) & (j <= i))
        return out, lse.nan_to_num(neginf=0)

    assert torch.autograd.gradcheck(attention, (q, k, v))


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 9), (7, 1), (7, 9)])
def test_queries_and_keys_of_different_lengths(q_len, kv_len):
    q = torch.randn(2, 3, q_len, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, kv_len, 8, dtype=torch.float64)
    keep = torch.ones(q_len, kv_len, dtype=torch.bool)
    found = reference_attention(q, k, v, lambda b, h, i, j: i + j >= 0)
    torch.testing.assert_close(found, tuple(exact_attention(q, k, v, keep)))


def test_huge_scores_do_not_overflow():
    q, k, v = inputs()
    found = reference_attention(q * 300, k * 300, v, mask_mod((SHAPE,)))
    exact = exact_attention(q * 300, k * 300, v, dense_mask(SHAPE))
    plain = dense_attention(q * 300, k * 300, v, dense_mask(SHAPE))
    for name, *values in zip(("out", "lse", "max"), found, exact, plain, strict=True):
        assert_within_budget(name, *values)
