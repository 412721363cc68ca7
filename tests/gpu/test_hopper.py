"""The kernel of the GPU against float64: random cases with poisoned outputs, real sizes, graphs, threads, fallback."""

import gc
import math
import random
import threading
from dataclasses import replace

import pytest
import torch
from helpers import random_rest
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.utils.flop_counter import FlopCounterMode

import gna_flex
from gna_flex import GNA, explain, flex_attention, gna_mask, kernels, reference_attention
from gna_flex.cuda import tune
from gna_flex.cuda.blackwell import BlackwellConfig
from gna_flex.cuda.config import KernelConfig
from gna_flex.cuda.forward import Plan, Request
from gna_flex.cuda.kernel import Config
from gna_flex.cuda.tables import KernelTiles
from gna_flex.presets import preset
from gna_flex.routing import KERNEL_MAX_HEAD_DIM, ROUTES

KERNEL = kernels.kernel_for(torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
"""Route of the GPU. That of Blackwell needs a self-test that passed, or GNA_FLEX_SELFTEST=trust."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not KERNEL, reason="needs a GPU that there is a kernel for"),
]

CASES, AT_ONCE = 3000, 25
HEAD_DIMS = (64, 128, 64, 128, 32, 96, 256, 8, 40, 72, 80, 112, 160, 192, 248)
"""Those that random cases have; of larger ones than a kernel takes, half."""


def random_gna(rng: random.Random) -> GNA:
    """A mask of up to about 1,200 tokens: odd sizes, even windows, tails, dilation that does not divide, text."""
    ndim = rng.choice([1, 2, 2, 3, 3])
    layout = [rng.randint(1, {1: 1200, 2: 34, 3: 11}[ndim]) for _ in range(ndim)]
    dilation = [min(n, rng.choice([1, 1, 1, 1, 2, 3])) for n in layout]
    window = [rng.randint(1, n // d) for n, d in zip(layout, dilation, strict=True)]
    stride = [rng.choice([1, rng.randint(1, w), w]) for w in window]
    causal = [rng.random() < 0.25 for _ in layout]
    text = {"text_first": rng.choice([0, 0, 1, 77]), "text_last": rng.choice([0, 0, 130])}
    return GNA(layout, window, stride, dilation, causal, **text)


def of_other_heads(rng: random.Random, gna: GNA, heads: int) -> list[GNA]:
    """Other windows on the same grid, one for each head."""
    masks = []
    for _ in range(heads):
        window = [rng.randint(1, n // d) for n, d in zip(gna.layout, gna.dilation, strict=True)]
        stride = [rng.randint(1, w) for w in window]
        text = {"text_first": gna.text_first, "text_last": gna.text_last}
        masks.append(GNA(gna.layout, window, stride, gna.dilation, [rng.random() < 0.3 for _ in window], **text))
    return masks


def random_inputs(rng: random.Random, tokens: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value in one of the layouts that models have."""
    batch, heads, groups = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 4])
    kind = rng.choice(["heads first", "heads last", "packed", "every second batch", "odd columns"])
    if kind == "packed":
        parts = torch.randn(batch, tokens, groups + 2, heads, dim, device="cuda", dtype=dtype)
        query = parts[:, :, :groups].transpose(2, 3).flatten(2, 3).transpose(1, 2)
        return [query, parts[:, :, groups].transpose(1, 2), parts[:, :, groups + 1].transpose(1, 2)]
    tensors = []
    for count in (heads * groups, heads, heads):
        if kind == "heads last":
            x = torch.randn(batch, tokens, count, dim, device="cuda", dtype=dtype).transpose(1, 2)
        elif kind == "every second batch":
            x = torch.randn(2 * batch, count, tokens, dim, device="cuda", dtype=dtype)[::2]
        elif kind == "odd columns":
            x = torch.randn(batch, count, tokens, dim + 1, device="cuda", dtype=dtype)[..., 1:]
        else:
            x = torch.randn(batch, count, tokens, dim, device="cuda", dtype=dtype)
        tensors.append(x)
    return tensors


def in_low_precision(query: Tensor, key: Tensor, value: Tensor, mask, scale: float) -> Tensor:
    """What attention loses with weights and output in 16 bits, everything else in float32."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x.float() for x in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    idx = torch.arange(q.shape[2], device=q.device)
    heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
    keep = mask.mask_mod(torch.zeros_like(heads), heads, idx[:, None], idx)
    scores = (q @ k.mT * scale).masked_fill(~keep, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights.to(query.dtype).float() @ v / weights.sum(-1, keepdim=True)).to(query.dtype)


def poison(*shapes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Leaves NaN in the memory that the next tensors of these shapes are given."""
    tensors = [torch.full(shape, math.nan, device="cuda", dtype=dtype) for shape in shapes]
    del tensors


def check(out: Tensor, lse: Tensor, inputs: list[Tensor], mask, scale: float, case: str) -> None:
    exact, exact_lse, _ = reference_attention(*(x.double() for x in inputs), mask.mask_mod, scale=scale)
    low = in_low_precision(*inputs, mask, scale)
    rounding = torch.finfo(out.dtype).eps * exact.abs().amax()
    # Weights may be up to 2^8 before the division, and their sum is of all keys: twice the loss of the plain run.
    budget = 2 * (low.double() - exact).abs().amax() + rounding
    assert out.isfinite().all(), case
    error = (out.double() - exact).abs().amax()
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}: {case}"
    assert torch.allclose(lse.double(), exact_lse, atol=1e-5, rtol=1e-5), case


def random_tiles(rng: random.Random, gna: GNA, config: KernelConfig) -> KernelTiles:
    """Any boxes that fit: odd ones, larger than the grid, not filling their slots."""

    def box(most: int) -> tuple[int, int, int]:
        a = rng.randint(1, 4) if gna.ndim == 3 else 1
        b = rng.randint(1, min(12, most // a)) if gna.ndim >= 2 else 1
        return a, b, rng.randint(max(1, most // (a * b) // 2), most // (a * b))

    if config.may_skip and gna.ndim == 1 and rng.random() < 0.7:
        return KernelTiles(box(config.rows), config.groups, 2, box(config.keys), config.keys, config.rows, skips=True)
    split = rng.choice(range(3 - gna.ndim, 3))
    tiles = KernelTiles(box(config.rows), config.groups, split, box(config.keys), config.keys, config.rows)
    rest = (
        random_rest(rng, tiles.kv_tile, tiles.kv_slots) if config.most_key_shapes > 1 and rng.random() < 0.5 else None
    )
    return replace(tiles, kv_rest=rest, rest_axis=rng.randrange(3))


CONFIGS: dict[str, tuple[KernelConfig, ...]] = {
    "hopper": (
        Config(128, 96),
        Config(128, 160, query_stages=1),
        Config(64, 192),
        Config(64, 112, consumers=3, key_stages=3),
        Config(128, 64, consumers=3, key_stages=3),
        Config(32, 128, key_stages=3),
        Config(96, 128),
        Config(192, 96, query_stages=1),
        Config(256, 64, query_stages=1),
    ),
    "blackwell": (
        BlackwellConfig(128, 96, key_stages=4),
        BlackwellConfig(128, 64, key_stages=2, output_stages=1),
        BlackwellConfig(128, 128, polynomial=2),
        BlackwellConfig(64, 128, key_stages=6, polynomial=8),
        BlackwellConfig(64, 32, key_stages=6),
        BlackwellConfig(32, 128, key_stages=6),
        BlackwellConfig(96, 128, key_stages=6),
    ),
}


def check_case(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice([torch.bfloat16, torch.float16])
    gna = random_gna(rng)
    config = rng.choice(CONFIGS[KERNEL]) if seed % 3 == 0 else None
    dim = config.head_dim if config else rng.choice(HEAD_DIMS)
    dim = dim if dim <= KERNEL_MAX_HEAD_DIM[KERNEL] else dim // 2 // 8 * 8
    inputs = random_inputs(rng, gna.tokens, dim, dtype)
    gnas = of_other_heads(rng, gna, inputs[0].shape[1]) if rng.random() < 0.2 else [gna]
    mask = gna_mask(gnas if len(gnas) > 1 else gnas[0], device="cuda")
    scale = rng.choice([dim**-0.5, dim**-0.5, 0.0, 0.3])
    shapes = [(tuple(x.shape), x.stride()) for x in inputs]
    case = f"seed {seed}: {gnas[0]}, {len(gnas)} masks, {shapes}, {dtype}, scale {scale}"
    plan = None
    if config:
        tiles = random_tiles(rng, gna, config)
        plan = Plan(Request(tuple(gnas), dim, dtype == torch.float16, 0, tiles=tiles, config=config))
        case += f", {tiles}"

    def run() -> tuple[Tensor, Tensor]:
        poison(inputs[0].shape, dtype=dtype)
        poison(inputs[0].shape[:3], dtype=torch.float32)
        if plan is not None:
            return plan.run(*inputs, scale)
        with gna_flex.backend(KERNEL):
            return flex_attention(*inputs, block_mask=mask, scale=scale, enable_gqa=True, return_lse=True)

    out, lse = run()
    check(out, lse, inputs, mask, scale, case)
    again, lse_again = run()
    assert torch.equal(out, again), case
    assert torch.equal(lse, lse_again), case


@pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
def test_random_cases_equal_float64(first: int) -> None:
    for seed in range(first, first + AT_ONCE):
        check_case(seed)


@pytest.mark.parametrize("seed", range(40))
def test_gradients_equal_float64(seed: int) -> None:
    rng = random.Random(10_000 + seed)
    torch.manual_seed(seed)
    dtype = rng.choice([torch.bfloat16, torch.float16])
    gna = random_gna(rng)
    inputs = [x.requires_grad_() for x in random_inputs(rng, gna.tokens, rng.choice([32, 64, 128]), dtype)]
    mask = gna_mask(gna, device="cuda")
    scale = inputs[0].shape[-1] ** -0.5
    with gna_flex.backend(KERNEL):
        out, lse = flex_attention(*inputs, block_mask=mask, enable_gqa=True, return_lse=True)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact, exact_lse, _ = reference_attention(*exact_inputs, mask.mask_mod)
    wanted = torch.autograd.grad((exact, exact_lse), exact_inputs, (grad_out.double(), grad_lse.double()))
    low = torch.autograd.grad(in_low_precision(*inputs, mask, scale), inputs, grad_out)
    exact_of_low = torch.autograd.grad(
        reference_attention(*exact_inputs, mask.mask_mod)[0], exact_inputs, grad_out.double()
    )
    for name, grad, want, lossy, lossless in zip("qkv", grads, wanted, low, exact_of_low, strict=True):
        assert grad.isfinite().all()
        assert grad.stride() == torch.empty_like(inputs["qkv".index(name)]).stride()
        # What a run with 16-bit weights loses, and the rounding of scores in the recomputed weights.
        budget = 3 * (lossy.double() - lossless).norm() + 4 * torch.finfo(dtype).eps * want.norm() + 1e-3
        assert (grad.double() - want).norm() <= budget, (name, str(gna))


def test_training_in_a_compiled_function() -> None:
    inputs = [torch.randn(2, 4, SMALL.tokens, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv"]
    mask = gna_mask(SMALL, device="cuda")
    wanted = torch.autograd.grad(flex_attention(*inputs, block_mask=mask).sum(), inputs)
    for door in (flex_attention, torch_flex_attention):
        compiled = torch.compile(lambda q, k, v, door=door: door(q, k, v, block_mask=mask).sum(), fullgraph=True)
        grads = torch.autograd.grad(compiled(*inputs), inputs)
        assert all(torch.equal(grad, want) for grad, want in zip(grads, wanted, strict=True))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("route", [route for route in ROUTES if route not in kernels.KERNELS or route == KERNEL])
def test_valid_text_tokens_per_batch_entry(route: str, compiled: bool) -> None:
    gna = GNA((9, 14), (4, 5), text_first=70, text_last=200)
    shape = (3, 2, gna.tokens, 64)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    base, end = gna_mask(gna, device="cuda"), gna.text_first + gna.grid_tokens

    def call(q: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, Tensor]:
        return flex_attention(q, k, v, block_mask=mask, return_lse=True)

    function = torch.compile(call, fullgraph=True) if compiled else call
    # Numbers on the GPU are not looked at: those outside count as the nearest inside.
    for first, last, given in (
        ([70, 3, 0], [200, 129, 0], [200, 129, -7]),
        ([1, 70, 64], [0, 200, 128], [0, 1 << 40, 128]),
    ):
        valid = torch.tensor([first, last], device="cuda")
        mask = base.with_valid_text(first=first, last=torch.tensor(given, device="cuda"))
        assert mask.valid_text.tolist() == valid.T.tolist()
        assert mask.tiles.order.tile  # built outside of graphs, which cannot

        def mask_mod(b, h, q, k, valid=valid):
            first, last = valid[0, b], valid[1, b]
            return base.mask_mod(b, h, q, k) & ((k >= gna.text_first) | (k < first)) & ((k < end) | (k - end < last))

        with gna_flex.backend(route):
            out, lse = function(*inputs, mask)
            grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
            grads = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
        exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
        exact, exact_lse, _ = reference_attention(*exact_inputs, mask_mod)
        wanted = torch.autograd.grad((exact, exact_lse), exact_inputs, (grad_out.double(), grad_lse.double()))
        assert (out.double() - exact).norm() / exact.norm() < 4e-3
        # FlexAttention's kernels round scaled queries to 16 bits.
        assert torch.allclose(lse.double(), exact_lse, rtol=0, atol=2e-2 if route.startswith("flex") else 1e-5)
        for name, grad, want in zip("qkv", grads, wanted, strict=True):
            assert (grad.double() - want).norm() / want.norm() < 2e-2, name


@pytest.mark.parametrize(
    "name",
    ["hunyuan-video", "hunyuan-video-sliding", "flux-4k-sliding", "flux-4k-text", "cosmos-predict2-95", "lm-32k"],
)
def test_real_sizes_at_sampled_queries(name: str) -> None:
    entry = preset(name)
    q, k, v = (
        torch.randn(1, 2, entry.gna.tokens, entry.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    mask = gna_mask(entry.gna, device="cuda")
    poison(q.shape, dtype=q.dtype)
    with gna_flex.backend(KERNEL):
        out = flex_attention(q, k, v, block_mask=mask)
    assert out.isfinite().all()
    rows = torch.randint(entry.gna.tokens, (64,), device="cuda")
    keys = torch.arange(entry.gna.tokens, device="cuda")
    keep = mask.mask_mod(torch.zeros((), device="cuda"), torch.zeros((), device="cuda"), rows[:, None], keys)
    scores = (q[:, :, rows].double() @ k.double().mT * entry.head_dim**-0.5).masked_fill(~keep, -torch.inf)
    exact = scores.softmax(-1) @ v.double()
    assert (out[:, :, rows].double() - exact).norm() / exact.norm() < 4e-3


SMALL = GNA((24, 40), (9, 12), text_last=30)


@pytest.fixture
def small() -> tuple[list[Tensor], object, Tensor]:
    inputs = [torch.randn(2, 4, SMALL.tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    mask = gna_mask(SMALL, device="cuda")
    return inputs, mask, flex_attention(*inputs, block_mask=mask)


def test_the_route_is_chosen_and_explained(small) -> None:
    inputs, mask, _ = small
    assert explain(*inputs, mask).name == KERNEL
    trained = [x.clone().requires_grad_() for x in inputs]
    assert explain(*trained, mask).name == KERNEL


@pytest.mark.parametrize("door", [flex_attention, torch_flex_attention])
def test_all_doors_lead_to_the_same_result(small, door) -> None:
    inputs, mask, out = small
    assert torch.equal(door(*inputs, block_mask=mask), out)
    assert torch.equal(torch.compile(door, fullgraph=True)(*inputs, block_mask=mask), out)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(door(*(x.float() for x in inputs), block_mask=mask), out)


def test_repeated_calls_take_the_short_way(small, monkeypatch) -> None:
    inputs, mask, out = small
    assert mask.launchers
    monkeypatch.setattr(gna_flex.attention, "eager_attention", None)
    for _ in range(3):
        poison(out.shape, dtype=out.dtype)
        assert torch.equal(flex_attention(*inputs, block_mask=mask), out)
    assert torch.equal(flex_attention(*inputs, block_mask=mask, return_lse=True)[0], out)
    with torch.inference_mode():
        assert torch.equal(flex_attention(*inputs, block_mask=mask), out)


def test_what_the_short_way_cannot_do_goes_the_whole_way(small) -> None:
    inputs, mask, out = small
    with FlopCounterMode(display=False) as flops:
        flex_attention(*inputs, block_mask=mask)
    assert flops.get_total_flops() == 4 * 2 * 4 * SMALL.kept_pairs() * 128
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(flex_attention(*inputs, block_mask=mask), out)
    query = inputs[0].clone().requires_grad_()
    assert flex_attention(query, *inputs[1:], block_mask=mask).requires_grad
    negated = [torch.complex(torch.zeros_like(x.float()), x.float()).conj().imag.to(x.dtype) for x in inputs]
    lazy = [torch._neg_view(x) for x in inputs]
    want = flex_attention(*negated, block_mask=mask)
    assert torch.equal(flex_attention(*lazy, block_mask=mask), want)
    with gna_flex.backend("flex"):
        assert torch.allclose(flex_attention(*inputs, block_mask=mask).float(), out.float(), atol=0.02)
    with pytest.raises(ValueError, match="the mask has"):
        flex_attention(*(x[:, :, :-1] for x in inputs), block_mask=mask)


def test_cuda_graphs(small) -> None:
    inputs, mask, out = small
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flex_attention(*inputs, block_mask=mask)
    for _ in range(3):
        captured.fill_(math.nan)
        graph.replay()
        assert torch.equal(captured, out)


def test_graphs_that_run_beside_each_other(small) -> None:
    inputs, mask, out = small
    graphs, results, streams = [], [], [torch.cuda.Stream() for _ in range(4)]
    for _ in streams:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append([flex_attention(*inputs, block_mask=mask) for _ in range(20)])
    for x in (x for several in results for x in several):
        x.fill_(math.nan)
    torch.cuda.synchronize()
    for stream, graph in zip(streams, graphs, strict=True):
        with torch.cuda.stream(stream):
            graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, out) for several in results for x in several)


def test_graphs_outlive_the_plans_that_they_were_captured_with(small) -> None:
    inputs, mask, out = small
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flex_attention(*inputs, block_mask=mask)
    tune.forget_plans()
    mask.launchers.clear()
    gc.collect()
    poison(*[(1 << size,) for size in range(8, 20)] * 8, dtype=torch.float32)
    captured.fill_(math.nan)
    graph.replay()
    assert torch.equal(captured, out)


def test_threads_and_streams(small) -> None:
    inputs, mask, out = small
    results: list[Tensor] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            results.extend(flex_attention(*inputs, block_mask=mask) for _ in range(20))
        stream.synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(result, out) for result in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(small) -> None:
    inputs, _, out = small
    there = [x.to("cuda:1").requires_grad_() for x in inputs]
    mask = gna_mask(SMALL, device="cuda:1")
    assert torch.cuda.current_device() == 0
    # The last of these takes the short way.
    results = [flex_attention(*(x.detach() for x in there), block_mask=mask) for _ in range(3)]
    assert all(x.device.index == 1 and torch.equal(x.to("cuda:0"), out) for x in results)
    with gna_flex.backend(KERNEL):
        grads = torch.autograd.grad(flex_attention(*there, block_mask=mask).sum(), there)
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)
    with torch.cuda.device(1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = flex_attention(*(x.detach() for x in there), block_mask=mask)
        captured.fill_(math.nan)
        graph.replay()
    assert torch.equal(captured.to("cuda:0"), out)


def test_operator(small) -> None:
    inputs, mask, out = small
    arguments = (*inputs, *mask.lists, 128**-0.5)
    assert torch.equal(torch.ops.gna_flex.attention(*arguments)[0], out)
    torch.library.opcheck(torch.ops.gna_flex.attention, arguments)


def test_a_failing_kernel_falls_back_once(small, monkeypatch, caplog) -> None:
    inputs, mask, out = small
    mask.launchers.clear()

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    monkeypatch.setattr(gna_flex.flex, "kernel_attention", broken)
    try:
        for _ in range(2):
            assert torch.allclose(flex_attention(*inputs, block_mask=mask).float(), out.float(), atol=0.02)
        assert len([r for r in caplog.records if "another route" in r.message]) == 1
        assert "failed before" in dict(explain(*inputs, mask).rejected)[KERNEL]
    finally:
        gna_flex.kernels.try_again()
