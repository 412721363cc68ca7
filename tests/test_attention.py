"""``flex_attention``: every route against a float64 softmax over the independent mask, and torch's own front end."""

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from attention_cases import CASES, FLOATS, SMALL, Case
from helpers import Exact, assert_within_budget, dense_attention, dense_mask, exact_attention, tile_places, tiled_mask
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, and_masks, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from gna_flex import GNA, backend, explain, flex_attention, gna_mask, permute, unpermute

COMPILED = {
    # Compiling takes ten seconds on a CPU: every feature once, several at a time.
    "flex": {
        "fp32": ["1d-causal-grouped-heads-value-dim", "dilation-causal-text"],
        "bf16": ["3d-packed-text-first", "dilations-differ-head-dim-40"],
    },
    "flex-tiles": {
        "fp32": ["1d-causal-grouped-heads-value-dim", "3d-packed-text-first", "dilation-causal-text"],
        "fp16": ["tail-tiles-tokens-before-heads", "heads-differ-head-dim-8"],
    },
}
RUNS = [("reference", case, dtype, ()) for case, dtype in itertools.product(CASES, FLOATS)]
RUNS += [
    (route, case, dtype, pytest.mark.slow)
    for route, cases in COMPILED.items()
    for dtype, names in cases.items()
    for case in names
]


@pytest.mark.parametrize(
    ("route", "case", "dtype"),
    [pytest.param(r, CASES[c], FLOATS[d], marks=marks, id=f"{r}-{c}-{d}") for r, c, d, marks in RUNS],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_output(route, case, dtype):
    q, k, v = case.inputs(dtype)
    mask = case.mask()
    gqa = case.heads != case.kv_heads
    with backend(route):
        assert explain(q, k, v, mask).name == route
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
    assert out.dtype == dtype
    assert_within_budget(
        "out", out, exact_attention(q, k, v, case.keep()).out, dense_attention(q, k, v, case.keep()).out
    )


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda out, q, k, v: out * math.nan, id="nan"),
        pytest.param(lambda out, q, k, v: out.index_fill(2, torch.tensor(3), math.nan), id="one-nan-row"),
        pytest.param(lambda out, q, k, v: out.index_fill(2, torch.tensor(3), math.inf), id="one-infinite-row"),
        pytest.param(lambda out, q, k, v: torch.zeros_like(out), id="zeros"),
        pytest.param(lambda out, q, k, v: out.roll(1, 2), id="rolled"),
        pytest.param(lambda out, q, k, v: out * 1.05, id="five-percent"),
        pytest.param(lambda out, q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v), id="no-mask"),
        pytest.param(
            lambda out, q, k, v: flex_attention(
                q, k, v, block_mask=gna_mask(GNA((6, 9), (3, 5), (2, 1), text_last=5), device="cpu")
            ),
            id="wider-window",
        ),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_the_budget_refuses_wrong_outputs(dtype, spoil):
    case = Case(SMALL)
    q, k, v = case.inputs(dtype)
    exact, plain = (f(q, k, v, case.keep()).out for f in (exact_attention, dense_attention))
    out = flex_attention(q, k, v, block_mask=case.mask())
    assert_within_budget("out", out, exact, plain)
    with pytest.raises(AssertionError, match=r"out: .* error"):
        assert_within_budget("out", spoil(out, q, k, v), exact, plain)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ""),
        ({"return_lse": True}, "lse"),
        ({"return_aux": AuxRequest(lse=True)}, "aux-lse"),
        ({"return_aux": AuxRequest(max_scores=True)}, "aux-max"),
        ({"return_aux": AuxRequest(lse=True, max_scores=True)}, "aux-lse-max"),
        ({"return_aux": AuxRequest()}, "aux"),
    ],
    ids=["nothing", "return-lse", "lse", "max", "both", "neither"],
)
@pytest.mark.parametrize("name", ["3d", "grouped-heads", "text-last"])
def test_statistics(name, options, wanted):
    case = CASES[name]
    q, k, v = case.inputs()
    exact, plain = (f(q, k, v, case.keep()) for f in (exact_attention, dense_attention))
    found = flex_attention(q, k, v, block_mask=case.mask(), enable_gqa=case.heads != case.kv_heads, **options)
    if not wanted:
        assert isinstance(found, Tensor)
        found = (found, None)
    out, rest = found
    lse, top = (rest, None) if not wanted.startswith("aux") else (rest.lse, rest.max_scores)
    assert (lse is not None) == ("lse" in wanted)
    assert (top is not None) == ("max" in wanted)
    for kind, actual in {"out": out, "lse": lse, "top": top}.items():
        if actual is not None:
            assert_within_budget(kind, actual, getattr(exact, kind), getattr(plain, kind))


def relative_bias(table: Tensor, width: int) -> Any:
    """Bias by the difference of coordinates, from a captured table."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + table[h, q_idx // width - kv_idx // width + 5, q_idx % width - kv_idx % width + 8]

    return score_mod


@pytest.mark.parametrize(
    "route",
    ["reference", pytest.param("flex", marks=pytest.mark.slow), pytest.param("flex-tiles", marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_score_mod_with_a_captured_table(route):
    """And a negative scale, which it adds to."""
    gna = GNA((6, 9), (3, 4), (2, 1))
    q, k, v = Case(gna).inputs()
    table = torch.randn(2, 11, 17)
    i, j = (torch.arange(54)[:, None], torch.arange(54))
    options = {"bias": table[:, i // 9 - j // 9 + 5, i % 9 - j % 9 + 8], "scale": -0.4}
    with backend(route), torch.no_grad():
        out = flex_attention(q, k, v, relative_bias(table, 9), gna_mask(gna, device="cpu"), -0.4)
    exact, plain = (f(q, k, v, dense_mask(gna), **options) for f in (exact_attention, dense_attention))
    assert_within_budget("out", out, exact.out, plain.out)


def test_gradient_of_a_captured_table():
    gna = GNA((6, 9), (3, 4), (2, 1))
    q, k, v = Case(gna).inputs(torch.float64)
    table = torch.randn(2, 11, 17, dtype=torch.float64, requires_grad=True)
    flex_attention(q, k, v, relative_bias(table, 9), gna_mask(gna, device="cpu")).sum().backward()
    again = table.detach().clone().requires_grad_()
    i, j = (torch.arange(54)[:, None], torch.arange(54))
    dense_attention(
        q, k, v, dense_mask(gna), bias=again[:, i // 9 - j // 9 + 5, i % 9 - j % 9 + 8]
    ).out.sum().backward()
    torch.testing.assert_close(table.grad, again.grad)


@pytest.mark.parametrize(
    ("route", "scale"),
    [
        *(("reference", scale) for scale in (0.0, 1.0, -0.4)),
        pytest.param("flex-tiles", 0.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_scale(route, scale):
    case = Case(SMALL)
    q, k, v = case.inputs()
    with backend(route):
        out = flex_attention(q, k, v, block_mask=case.mask(), scale=scale)
    exact, plain = (f(q, k, v, case.keep(), scale=scale) for f in (exact_attention, dense_attention))
    assert_within_budget("out", out, exact.out, plain.out)
    if scale == 0:
        keep = torch.from_numpy(case.keep()).float()
        torch.testing.assert_close(out, (keep / keep.sum(-1, keepdim=True)) @ v)


@pytest.mark.parametrize("tile", [(2, 4), (4, 2), (8, 16)], ids=str)
def test_tokens_already_in_tile_order(tile):
    """The caller permutes; padding gives zeros."""
    q, k, v = Case(SMALL).inputs()
    mask = gna_mask(SMALL, order=tile, device="cpu")
    out, lse = flex_attention(*(permute(x, SMALL, tile) for x in (q, k, v)), block_mask=mask, return_lse=True)
    exact, plain = (f(q, k, v, dense_mask(SMALL)) for f in (exact_attention, dense_attention))
    assert_within_budget("out", unpermute(out, SMALL, tile), exact.out, plain.out)
    assert_within_budget("lse", unpermute(lse, SMALL, tile, -1), exact.lse, plain.lse)
    padding = torch.from_numpy(tile_places(SMALL, tile) < 0)
    assert (out[:, :, padding] == 0).all()
    assert (lse[:, :, padding] == -math.inf).all()


DOCUMENTS = torch.tensor([0] * 20 + [1] * 39)


def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]


def nothing(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx < 0


def same_document_but_for_ten(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Of which ten queries see no key."""
    return same_document(b, h, q_idx, kv_idx) & (q_idx >= 10)


@pytest.mark.parametrize(
    "route",
    ["reference", pytest.param("flex", marks=pytest.mark.slow), pytest.param("flex-tiles", marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_further_condition(route):
    case = Case(SMALL)
    q, k, v = case.inputs()
    keep = case.keep() & (DOCUMENTS[:, None] == DOCUMENTS).numpy()
    keep[:, :10] = False
    with backend(route):
        out = flex_attention(q, k, v, block_mask=case.mask(and_mask=same_document_but_for_ten))
    assert (out[:, :, :10] == 0).all()
    assert_within_budget("out", out, exact_attention(q, k, v, keep).out, dense_attention(q, k, v, keep).out)


def test_mask_mod_composes_with_others():
    """torch's own way: ``and_masks`` and ``create_block_mask``, which gives an ordinary BlockMask."""
    case = Case(SMALL)
    q, k, v = case.inputs()
    both = and_masks(case.mask().mask_mod, same_document)
    mask = create_block_mask(both, None, None, SMALL.tokens, SMALL.tokens, device="cpu")
    keep = case.keep() & (DOCUMENTS[:, None] == DOCUMENTS).numpy()
    exact, plain = (f(q, k, v, keep) for f in (exact_attention, dense_attention))
    for function in (flex_attention, torch_flex_attention):
        assert_within_budget("out", function(q, k, v, block_mask=mask), exact.out, plain.out)


def test_queries_that_see_no_key():
    case = Case(SMALL)
    q, k, v = case.inputs(torch.float64, grad=True)
    out, aux = flex_attention(
        q, k, v, block_mask=case.mask(and_mask=nothing), return_aux=AuxRequest(lse=True, max_scores=True)
    )
    assert (out == 0).all()
    assert (aux.lse == -math.inf).all()
    assert (aux.max_scores == -math.inf).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (gradient == 0).all()


def test_batch_and_heads_of_the_mask():
    q, k, v = Case(SMALL).inputs()
    plain = flex_attention(q, k, v, block_mask=gna_mask(SMALL, device="cpu"))
    for batch, heads in [(2, None), (None, 2), (2, 2), (1, 1)]:
        assert torch.equal(flex_attention(q, k, v, block_mask=gna_mask(SMALL, device="cpu", B=batch, H=heads)), plain)


@pytest.mark.parametrize("gna", [SMALL, GNA((1, 1), 1)], ids=["grid", "one-token"])
def test_autocast(gna):
    q, k, v = Case(gna).inputs()
    mask = gna_mask(gna, device="cpu")
    halves = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = flex_attention(q, k, v, block_mask=mask, return_lse=True)
    expected, expected_lse = flex_attention(*halves, block_mask=mask, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected), "half precision computes in float32, under autocast too"
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(mode):
    case = Case(SMALL)
    q, k, v = case.inputs(grad=True)
    with mode():
        out = flex_attention(q, k, v, block_mask=case.mask())
    assert not out.requires_grad
    assert_within_budget(
        "out", out, exact_attention(q, k, v, case.keep()).out, dense_attention(q, k, v, case.keep()).out
    )


def test_other_masks_are_torchs_business():
    q, k, v = torch.randn(3, 1, 2, 48, 16).unbind()
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, 48, 48, device="cpu")
    for options in ({}, {"block_mask": causal}, {"scale": 0.3}, {"score_mod": lambda s, b, h, i, j: s + i - j}):
        torch.testing.assert_close(flex_attention(q, k, v, **options), torch_flex_attention(q, k, v, **options))


def test_signature_is_torchs():
    ours, theirs = (inspect.signature(f).parameters for f in (flex_attention, torch_flex_attention))
    assert list(ours) == list(theirs)
    for name in ours:
        assert (ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default), name


def zeros(batch=1, heads=2, tokens=59, dim=16, **options: Any) -> Tensor:
    return torch.zeros(batch, heads, tokens, dim, **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(
            {"query": zeros()[0]}, r"\[batch, heads, tokens, head dim\].*\(2, 59, 16\)", id="three-dimensions"
        ),
        pytest.param({"query": zeros(tokens=54)}, r"mask has 59 queries and 59 keys \(layout 6x9.*54", id="queries"),
        pytest.param({"key": zeros(tokens=60), "value": zeros(tokens=60)}, "59 keys .*60", id="keys"),
        pytest.param({"value": zeros(tokens=58)}, "59 keys .*58", id="values"),
        pytest.param({"key": zeros(dim=8)}, "same head dim", id="head-dim"),
        pytest.param({"key": zeros(heads=1), "value": zeros(heads=1)}, "2 heads and key 1.*enable_gqa", id="heads"),
        pytest.param(
            {"query": zeros(heads=3), "key": zeros(heads=2), "value": zeros(heads=2), "enable_gqa": True},
            "3 heads and key 2.*multiple",
            id="no-multiple",
        ),
        pytest.param({"value": zeros(heads=1)}, "heads of key and value", id="value-heads"),
        pytest.param({"query": zeros(batch=2)}, "batch", id="batch"),
        pytest.param({"key": zeros(dtype=torch.float64)}, "one floating-point type.*float64", id="types-differ"),
        pytest.param(
            {"query": zeros().int(), "key": zeros().int(), "value": zeros().int()}, "floating-point", id="integers"
        ),
        pytest.param({"key": zeros(device="meta")}, "one device.*meta", id="devices-differ"),
        pytest.param(
            {"block_mask": gna_mask(SMALL, device="meta")}, r"one device.*meta.*\.to\(device\)", id="mask-elsewhere"
        ),
        pytest.param(
            {"block_mask": gna_mask(SMALL, device="cpu", B=3)}, "made for 3 batch, but query has 1", id="mask-batch"
        ),
        pytest.param(
            {"block_mask": gna_mask([SMALL] * 3, device="cpu")}, "made for 3 heads, but query has 2", id="mask-heads"
        ),
        pytest.param({"return_lse": True, "return_aux": AuxRequest(lse=True)}, "not both", id="two-ways"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    whole = {
        "query": zeros(),
        "key": zeros(),
        "value": zeros(),
        "block_mask": gna_mask(SMALL, device="cpu"),
    } | arguments
    with pytest.raises(ValueError, match=words):
        flex_attention(**whole)


def test_positions_of_arguments_are_torchs():
    case = Case(SMALL, heads=4, kv_heads=2)
    q, k, v = case.inputs()
    out, lse = flex_attention(q, k, v, None, case.mask(), 0.5, True, True, None)
    exact, plain = (f(q, k, v, case.keep(), scale=0.5) for f in (exact_attention, dense_attention))
    assert_within_budget("out", out, exact.out, plain.out)
    assert_within_budget("lse", lse, exact.lse, plain.lse)


def test_oracle_agrees_with_torch():
    """The oracle of this file against torch's own dense attention."""
    case = Case(SMALL, heads=4, kv_heads=2)
    q, k, v = case.inputs(torch.float64)
    exact = exact_attention(q, k, v, case.keep())
    keep = torch.from_numpy(case.keep())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    assert isinstance(exact, Exact)
    torch.testing.assert_close(exact.out, expected)
    places = tile_places(SMALL, (2, 4))
    assert tiled_mask(dense_mask(SMALL), places, places).sum() == dense_mask(SMALL).sum()
