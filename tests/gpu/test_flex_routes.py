"""The FlexAttention routes on a GPU against float64: random masks, sizes, types; forward, statistics, backward."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

import gna_flex
from gna_flex import GNA, flex_attention, gna_mask, reference_attention
from gna_flex.presets import preset

pytestmark = pytest.mark.gpu

CASES = 204
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_gna(rng: random.Random) -> GNA:
    """A mask of up to about 1,600 tokens: odd sizes, even windows, tails, dilation that does not divide, text."""
    ndim = rng.choice([1, 2, 2, 3, 3])
    layout = [rng.randint(1, {1: 1500, 2: 40, 3: 12}[ndim]) for _ in range(ndim)]
    dilation = [min(n, rng.choice([1, 1, 1, 2, 3])) for n in layout]
    window = [rng.randint(1, n // d) for n, d in zip(layout, dilation, strict=True)]
    stride = [rng.choice([1, rng.randint(1, w), w]) for w in window]
    causal = [rng.random() < 0.25 for _ in layout]
    return GNA(
        layout,
        window,
        stride,
        dilation,
        causal,
        text_first=rng.choice([0, 0, 1, 77]),
        text_last=rng.choice([0, 0, 130]),
    )


def random_inputs(rng: random.Random, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value, sometimes with grouped heads, as views of [B, S, H, D] or [B, H, S, D] tensors."""
    batch, heads, groups, dim = (
        rng.choice([1, 2]),
        rng.choice([1, 2, 6]),
        rng.choice([1, 1, 2]),
        rng.choice([16, 32, 64, 128, 80]),
    )
    heads_last = rng.random() < 0.5
    tensors = []
    for count in (heads * groups, heads, heads):
        shape = (batch, tokens, count, dim) if heads_last else (batch, count, tokens, dim)
        x = torch.randn(shape, device="cuda", dtype=torch.float64).to(dtype)
        tensors.append((x.transpose(1, 2) if heads_last else x).requires_grad_())
    return tensors


def dense_in(dtype: torch.dtype, query, key, value, mask):
    """Dense attention computed in ``dtype`` throughout: what a plain run in that type loses."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x.to(dtype) for x in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    idx = torch.arange(q.shape[2], device=q.device)
    heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
    keep = mask.mask_mod(torch.zeros_like(heads), heads, idx[:, None], idx)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    return scores.softmax(-1) @ v


def gradients(out, inputs, grad_out):
    return torch.autograd.grad(out, inputs, grad_out.to(out.dtype))


def term_sizes(query, key, value, grad_out) -> dict[str, float]:
    """Size of the terms that are added up for the output and each gradient, times that of the exponents.

    A kernel that recomputes probabilities from the log-sum-exp rounds their exponents in float32, and the terms of dq
    and dk are differences: where these cancel exactly, a dense run may lose nothing at all.
    """
    q, k, v, do = (x.detach().abs().max().item() for x in (query, key, value, grad_out))
    exponents = 1 + q * k * query.shape[-1] ** 0.5
    return {"out": exponents * v, "dq": exponents * do * v * k, "dk": exponents * do * v * q, "dv": exponents * do}


def assert_close(
    name: str, got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, terms: dict[str, float]
) -> None:
    """Within three times what a dense run in the same type loses on the same data, and the roundings no run avoids."""
    rounding = torch.finfo(got.dtype).eps * exact.abs().max() + torch.finfo(torch.float32).eps * terms[name]
    budget = 3 * (plain.double() - exact).abs().max() + rounding
    error = (got.double() - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("seed", range(CASES))
def test_random_case_equals_float64(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 3]
    route = "flex-tiles" if seed // 3 % 2 else "flex"
    gna = random_gna(rng)
    mask = gna_mask(gna, device="cuda")
    inputs = random_inputs(rng, gna.tokens, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact, exact_lse, _ = reference_attention(*exact_inputs, mask.mask_mod)
    plain = dense_in(dtype, *inputs, mask)
    grad_out = torch.randn_like(exact)

    with gna_flex.backend(route):
        out, aux = flex_attention(*inputs, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
    terms = term_sizes(*inputs, grad_out)
    assert_close("out", out, exact, plain, terms)
    assert torch.allclose(aux.lse.double(), exact_lse, atol=2e-2 if dtype != torch.float32 else 1e-4, rtol=0)
    exact_grads = gradients(exact, exact_inputs, grad_out)
    plain_grads = gradients(plain, inputs, grad_out)
    grads = gradients(out, inputs, grad_out)
    for name, got, want, lossy in zip("qkv", grads, exact_grads, plain_grads, strict=True):
        assert_close(f"d{name}", got, want, lossy, terms)


GNA_3D = GNA((8, 24, 20), (3, 8, 8), (1, 4, 2), text_last=40)


def make(batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(batch, 4, GNA_3D.tokens, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("order", ["auto", "flex", "flex-tiles"])
@pytest.mark.parametrize("front", ["torch", "gna_flex"])
@pytest.mark.parametrize("mode", ["eager", "fullgraph", "reduce-overhead", "dynamic"])
def test_both_front_ends(front: str, mode: str, order: str) -> None:
    torch.compiler.reset()
    attention = torch_flex_attention if front == "torch" else flex_attention
    mask = gna_mask(GNA_3D, device="cuda")
    mask.tiles  # noqa: B018 - a forced route inside a graph needs the tables beforehand

    def block(q, k, v):
        return attention(q, k, v, block_mask=mask) * 2

    compiled = {
        "eager": lambda f: f,
        "fullgraph": lambda f: torch.compile(f, fullgraph=True),
        "reduce-overhead": lambda f: torch.compile(f, fullgraph=True, mode="reduce-overhead"),
        "dynamic": lambda f: torch.compile(f, fullgraph=True, dynamic=True),
    }[mode](block)
    with gna_flex.backend(None if order == "auto" else order):
        for batch in (1, 2, 3) if mode == "dynamic" else (1, 1):
            inputs = make(batch)
            out = compiled(*inputs)
            grad_out = torch.randn_like(out)
            terms = term_sizes(*inputs, 2 * grad_out)
            exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
            exact_out = 2 * reference_attention(*exact_inputs, mask.mask_mod)[0]
            lossy_out = 2 * dense_in(torch.bfloat16, *inputs, mask)
            assert_close("out", out, exact_out, lossy_out, terms)
            grads = gradients(out, inputs, grad_out)
            exact = gradients(exact_out, exact_inputs, grad_out)
            lossy = gradients(lossy_out, inputs, grad_out)
            for name, got, want, low in zip("qkv", grads, exact, lossy, strict=True):
                assert_close(f"d{name}", got, want, low, terms)


def test_score_mod_in_tile_order() -> None:
    mask = gna_mask(GNA_3D, device="cuda")
    table = torch.randn(2 * GNA_3D.tokens, device="cuda")

    def bias(score, b, h, q_idx, kv_idx):
        return score + table[q_idx - kv_idx + GNA_3D.tokens]

    inputs = make(dtype=torch.float32)
    exact = reference_attention(*(x.detach().double() for x in inputs), mask.mask_mod, score_mod=bias)[0]
    for route in ("flex", "flex-tiles"):
        with gna_flex.backend(route):
            out = flex_attention(*inputs, bias, block_mask=mask)
        assert (out.double() - exact).abs().max() < 1e-4


def test_heads_with_masks_of_their_own() -> None:
    gnas = [GNA((16, 24), w, s) for w, s in [(3, 1), (8, 4), (5, 5), (16, 1)]]
    mask = gna_mask(gnas, device="cuda")
    inputs = [torch.randn(2, 4, 384, 32, device="cuda") for _ in range(3)]
    exact = reference_attention(*(x.double() for x in inputs), mask.mask_mod)[0]
    for head, gna in enumerate(gnas):
        alone = gna_mask(gna, device="cuda")
        one = reference_attention(*(x[:, head : head + 1].double() for x in inputs), alone.mask_mod)[0]
        assert torch.equal(one, exact[:, head : head + 1])
    for route in ("flex", "flex-tiles"):
        with gna_flex.backend(route):
            out = flex_attention(*inputs, block_mask=mask)
        assert (out.double() - exact).abs().max() < 1e-5


def test_narrow_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gna_flex.mask.FULL_WIDTH_ENTRIES", 0)
    gna = GNA((40, 64), (5, 16))
    mask = gna_mask(gna, device="cuda")
    assert mask.kv_indices.shape[-1] < mask.kv_indices.shape[-2]
    inputs = [torch.randn(1, 2, gna.tokens, 64, device="cuda", requires_grad=True) for _ in range(3)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = reference_attention(*exact_inputs, mask.mask_mod)[0]
    want = gradients(exact, exact_inputs, torch.ones_like(exact))
    for route in ("flex", "flex-tiles"):
        with gna_flex.backend(route):
            out = flex_attention(*inputs, block_mask=mask)
        assert (out.double() - exact).abs().max() < 1e-5
        for got, exact_grad in zip(gradients(out, inputs, torch.ones_like(out)), want, strict=True):
            assert (got.double() - exact_grad).abs().max() < 1e-4


def test_many_masks_in_one_compiled_function_stay_fused() -> None:
    """Past torch's recompile limit a compiled function runs eagerly; the call must then not become dense attention."""
    torch.compiler.reset()
    attend = torch.compile(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask))
    q, k, v = (torch.randn(1, 8, 128 * 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for window in range(3, 15):
        mask = gna_mask(GNA((128, 128), window), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(q, k, v, mask)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < 1 << 30, f"window {window}: {peak / 2**30:.1f} GiB; dense scores would take 4 GiB"


@pytest.mark.parametrize("route", ["flex-tiles", "flex"])
@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-sliding", "hunyuan-video-text", "flux-4k-sliding"])
def test_real_sizes_at_sampled_queries(name: str, route: str) -> None:
    """Masks of so many blocks have tables that are narrower than a row of blocks."""
    gna = preset(name).gna
    q, k, v = (torch.randn(1, 2, gna.tokens, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv")
    mask = gna_mask(gna, device="cuda")
    with gna_flex.backend(route):
        out = flex_attention(q, k, v, block_mask=mask)
        grads = torch.autograd.grad(out.float().square().sum() / 2, (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    rows = torch.randint(gna.tokens, (128,), device="cuda")
    zero, keys = torch.zeros((), device="cuda", dtype=torch.int64), torch.arange(gna.tokens, device="cuda")
    keep = mask.mask_mod(zero, zero, rows[:, None], keys)
    scores = (q[:, :, rows].double() @ k.double().mT / 8).masked_fill(~keep, -torch.inf)
    exact = scores.softmax(-1) @ v.double()
    assert (out[:, :, rows].double() - exact).norm() / exact.norm() < 5e-3
    # With the output as its own gradient, a query's gradient needs nothing but its own row.
    weights, grad_out = scores.softmax(-1), out[:, :, rows].double()
    delta = (grad_out * out[:, :, rows].double()).sum(-1, keepdim=True)
    exact_dq = (weights * (grad_out @ v.double().mT - delta)) @ k.double() / 8
    assert (grads[0][:, :, rows].double() - exact_dq).norm() / exact_dq.norm() < 2e-2
