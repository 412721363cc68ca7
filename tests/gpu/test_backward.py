"""The hand-written backward against float64: random cases, poisoned gradients, repeats, streams, graphs, training."""

import logging
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import dense_gradients
from test_hopper import of_other_heads, poison, random_gna, random_inputs
from torch import Tensor
from torch.nn import functional

import gna_flex
from gna_flex import GNA, flex_attention, gna_mask, kernels
from gna_flex.cuda import backward as cuda_backward
from gna_flex.cuda.forward import Request
from gna_flex.mask_mod import mask_mod

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

CASES, AT_ONCE = 1000, 20
HEAD_DIMS = (64, 128, 64, 128, 32, 96, 8, 40, 72, 104)


@pytest.fixture(autouse=True)
def no_other_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's backward is not what is tested here."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("FlexAttention's backward was asked")

    monkeypatch.setattr("gna_flex.flex_backward.flex_backward", refuse)


def check(inputs: list[Tensor], grads: list[Tensor], gnas: tuple[GNA, ...], scale: float, got: list[Tensor]) -> None:
    """Within twice what a plain run of that type loses, one rounding of the result, and sums in float32."""
    heads = torch.arange(inputs[0].shape[1], device="cuda")[:, None, None]
    idx = torch.arange(gnas[0].tokens, device="cuda")
    keep = mask_mod(gnas)(torch.zeros_like(heads), heads, idx[:, None], idx)
    exact, low = (dense_gradients(*inputs, grads[0], keep, scale, grads[1], low=low)[:3] for low in (False, True))
    largest = [x.detach().double().norm(dim=-1).amax() for x in (*inputs, grads[0])]
    sums = 8 * torch.finfo(torch.float32).eps * scale * largest[3] * largest[2] * max(largest[0], largest[1])
    for name, x, of_exact, of_low in zip("qkv", got, exact, low, strict=True):
        case = f"gradient of {name}: {gnas[0]}, {tuple(inputs[0].shape)}, {x.dtype}"
        budget = 2 * (of_low.double() - of_exact).abs().amax()
        budget += torch.finfo(x.dtype).eps * of_exact.abs().amax() + sums
        error = (x.double() - of_exact).abs().amax()
        assert x.isfinite().all(), case
        assert error <= budget, f"{case}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fused"])
@pytest.mark.parametrize("seed", range(0, CASES, AT_ONCE))
def test_random_gradients_equal_float64(seed: int, deterministic: bool) -> None:
    """Any mask, layout and head dim; not contiguous gradients; a second run has equal bits, where it says so."""
    for case in range(seed, seed + AT_ONCE):
        rng = random.Random(case)
        torch.manual_seed(case)
        dtype, dim, gna = rng.choice([torch.bfloat16, torch.float16]), rng.choice(HEAD_DIMS), random_gna(rng)
        inputs = random_inputs(rng, gna.tokens, dim, dtype)
        heads = inputs[0].shape[1]
        gnas = (gna,) if rng.random() < 0.8 else tuple(of_other_heads(rng, gna, heads))
        scale = rng.choice([dim**-0.5, dim**-0.5, 0.3, 0.0])
        out, lse = kernel_forward(inputs, gnas, scale)
        grads = [torch.randn_like(out), torch.randn_like(lse) * rng.choice([0, 1])]
        if rng.random() < 0.3:
            grads[0] = grads[0].transpose(1, 2).contiguous().transpose(1, 2)
        if rng.random() < 0.1:
            grads[0] = grads[0][..., :1].expand(out.shape)
        runs = []
        for _ in range(2):
            poison(*(x.shape for x in inputs), (*lse.shape, 2), dtype=dtype)
            runs.append(cuda_backward.backward(gnas, *inputs, out, lse, *grads, scale, deterministic=deterministic))
        check(inputs, grads, gnas, scale, list(runs[0]))
        equal = [torch.equal(a, b) for a, b in zip(*runs, strict=True)]
        assert all(equal if deterministic else equal[1:]), str(gna)


def kernel_forward(inputs: list[Tensor], gnas: tuple[GNA, ...], scale: float) -> tuple[Tensor, Tensor]:
    from gna_flex.cuda.forward import plan_for

    return plan_for(gnas, inputs[0]).run(*inputs, scale)


def some(dim: int = 64, tokens: int = 1200, heads: int = 4) -> list[Tensor]:
    return [torch.randn(2, heads, tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]


GNA_OF_SOME = GNA((30, 40), (7, 9), (2, 3))


@pytest.mark.parametrize(("heads", "key_heads"), [(48, 48), (96, 24)])
@pytest.mark.parametrize("heads_last", [False, True])
def test_sums_in_a_ring_equal_two_passes(heads: int, key_heads: int, heads_last: bool) -> None:
    """So many heads that some CTAs only round sums, for which others wait; in each run."""
    gna, scale = GNA(4096, 512), 0.1
    inputs = []
    for count in (heads, key_heads, key_heads, heads):
        shape = (3, 4096, count, 128) if heads_last else (3, count, 4096, 128)
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        inputs.append(x.transpose(1, 2) if heads_last else x)
    *inputs, grad = inputs
    fused = cuda_backward.pass_for(Request((gna,), 128, False, inputs[0].device.index), rows_are_keys=True, fused=True)
    ring = fused.ring(*inputs[:2])
    assert ring.rounders > 0
    assert ring.places < ring.groups
    out, lse = kernel_forward(inputs, (gna,), scale)
    call = ((gna,), *inputs, out, lse, grad, None, scale)
    exact = cuda_backward.backward(*call, deterministic=True)
    for _ in range(5):
        poison(*(x.shape for x in inputs), dtype=torch.bfloat16)
        for x, other in zip(cuda_backward.backward(*call, deterministic=False), exact, strict=True):
            budget = torch.finfo(torch.bfloat16).eps * other.abs().amax()  # another order of adding, then rounded
            assert x.isfinite().all()
            assert (x - other).abs().amax() <= budget


def test_text_that_does_not_count_has_no_gradient() -> None:
    gna = GNA((10, 12), (5, 4), text_first=20, text_last=70)
    inputs = some(64, gna.tokens)
    valid = torch.tensor([[20, 0], [7, 66]], dtype=torch.int32, device="cuda")
    arguments = ([*gna.layout], [*gna.window], [*gna.stride], [*gna.dilation], [*gna.causal], 20, 70, 0.125, valid)
    out, lse = torch.ops.gna_flex.attention(*inputs, *arguments)
    grads = [torch.randn_like(out), torch.randn_like(lse)]
    got = torch.autograd.grad((out, lse), inputs, grads)
    idx = torch.arange(gna.tokens, device="cuda")
    end = gna.text_first + gna.grid_tokens
    counts = ((idx < valid[:, :1]) | (idx >= gna.text_first)) & (idx < end + valid[:, 1:])
    keep = mask_mod((gna,))(0, 0, idx[:, None], idx) & counts[:, None, None, :]
    exact, low = (dense_gradients(*inputs, grads[0], keep, 0.125, grads[1], low=low)[:3] for low in (False, True))
    for x, of_exact, of_low in zip(got, exact, low, strict=True):
        budget = 2 * (of_low.double() - of_exact).abs().amax() + torch.finfo(x.dtype).eps * of_exact.abs().amax()
        assert (x.double() - of_exact).abs().amax() <= budget
    for x in got[1:]:
        assert (x.movedim(1, 3)[~counts] == 0).all()


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_a_hundred_runs_are_equal_in_every_bit() -> None:
    """On two streams in turn, while the GPU has other work beside."""
    inputs, mask = some(128), gna_mask(GNA_OF_SOME, device="cuda")
    out = flex_attention(*inputs, block_mask=mask)
    grad, streams = torch.randn_like(out), [torch.cuda.Stream(), torch.cuda.Stream()]
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    torch.cuda.synchronize()
    noise = torch.randn(4096, 4096, device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS, which makes the noise, would ask for a setting
    for run in range(100):
        with torch.cuda.stream(streams[run % 2]):
            again = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        noise = noise @ noise * 1e-3
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), run


def test_torch_decides_whether_a_pass_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, mask = some(128), gna_mask(GNA_OF_SOME, device="cuda")
    out, asked = flex_attention(*inputs, block_mask=mask), []
    pass_for = cuda_backward.pass_for

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append(options.get("fused", False))
        return pass_for(*arguments, **options)

    monkeypatch.setattr(cuda_backward, "pass_for", spy)
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        try:
            torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, False, True]


def test_where_sums_find_no_memory_there_are_two_passes(caplog: pytest.LogCaptureFixture) -> None:
    """Which repeat in every bit, so that their results are known."""
    caplog.set_level(logging.INFO, "gna_flex")
    gna = GNA((256, 256), 9)
    inputs, mask = some(128, gna.tokens), gna_mask(gna, device="cuda")
    out = flex_attention(*inputs, block_mask=mask)
    grad = torch.randn_like(out)

    def grads() -> list[Tensor]:
        return [x.cpu() for x in torch.autograd.grad(out, inputs, grad, retain_graph=True)]

    torch.use_deterministic_algorithms(True)
    try:
        wanted = grads()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        grads()
    finally:
        torch.use_deterministic_algorithms(False)
    memory = torch.cuda.max_memory_reserved() + (64 << 20)  # of 256 MiB that sums need
    torch.cuda.empty_cache()
    assert "two passes" not in caplog.text
    torch.cuda.set_per_process_memory_fraction(memory / torch.cuda.mem_get_info()[1])
    try:
        found = grads()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "two passes" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_one_tensor_as_query_and_key() -> None:
    x, v = some()[:2]
    mask = gna_mask(GNA_OF_SOME, device="cuda")
    (both,) = torch.autograd.grad(flex_attention(x, x, v, block_mask=mask).float().sum(), x)
    q, k = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    parts = torch.autograd.grad(flex_attention(q, k, v, block_mask=mask).float().sum(), (q, k))
    torch.testing.assert_close(both, parts[0] + parts[1])


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fused"])
def test_a_graph_of_forward_and_backward(deterministic: bool) -> None:
    """Results repeat, in a fused pass but for the order of sums, which begin at zero in each replay."""
    inputs, mask = some(128), gna_mask(GNA_OF_SOME, device="cuda")
    grad = torch.randn_like(inputs[0])

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(flex_attention(*inputs, block_mask=mask), inputs, grad)

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with torch.cuda.stream(side):
            expected = [step() for _ in range(3)][-1]
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = step()
    finally:
        torch.use_deterministic_algorithms(False)
    for _ in range(3):
        for x in captured:
            x.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        first = 0 if deterministic else 1
        assert all(torch.equal(a, b) for a, b in zip(captured[first:], expected[first:], strict=True))
        error = (captured[0].float() - expected[0].float()).abs().amax()
        assert error <= torch.finfo(torch.bfloat16).eps * expected[0].float().abs().amax()


def test_larger_head_dims_have_the_backward_of_flexattention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs, mask = some(192), gna_mask(GNA_OF_SOME, device="cuda")
    assert "backward is FlexAttention's" in gna_flex.explain(*inputs, mask).reason
    assert "FlexAttention's" not in gna_flex.explain(*some(128), mask).reason
    grads = torch.autograd.grad(flex_attention(*inputs, block_mask=mask), inputs, torch.ones_like(inputs[0]))
    assert all(grad.isfinite().all() for grad in grads)


def test_a_failing_backward_falls_back_once(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.undo()
    inputs, mask = some(), gna_mask(GNA_OF_SOME, device="cuda")
    grad = torch.randn_like(inputs[0])
    wanted = torch.autograd.grad(flex_attention(*inputs, block_mask=mask), inputs, grad)
    out = flex_attention(*inputs, block_mask=mask)

    def fail(*arguments: object) -> None:
        raise RuntimeError("no such kernel today")

    monkeypatch.setattr(cuda_backward, "backward", fail)
    try:
        got = torch.autograd.grad(out, inputs, grad)
        assert "no such kernel today" in caplog.text
    finally:
        kernels.try_again()
    for a, b in zip(got, wanted, strict=True):
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


class Digits(torch.nn.Module):
    """A transformer of two layers whose 64 tokens are the pixels of an image."""

    def __init__(self, route: str) -> None:
        super().__init__()
        self.route, self.mask = route, gna_mask(GNA((8, 8), 5), device="cuda")
        self.place = torch.nn.Parameter(torch.randn(64, 64) * 0.02)
        self.pixel = torch.nn.Linear(1, 64)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(64, 192) for _ in range(2))
        self.out = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))
        self.head = torch.nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pixel(pixels[..., None]) + self.place
        for qkv, out in zip(self.qkv, self.out, strict=True):
            parts = qkv(functional.layer_norm(x, (64,))).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
            q, k, v = parts.to(torch.bfloat16).unbind()
            with gna_flex.backend(self.route):
                y = flex_attention(q, k, v, block_mask=self.mask)
            x = x + out(functional.gelu(y.transpose(1, 2).flatten(2).float()))
        return self.head(functional.layer_norm(x, (64,)).mean(1))


def losses(route: str, images: Tensor, labels: Tensor, steps: int = 150) -> Tensor:
    torch.manual_seed(0)
    model = Digits(route).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    found = []
    for step in range(steps):
        batch = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:256]
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).cpu()


def test_training_on_images_of_digits_follows_the_reference() -> None:
    """Two correct runs part by rounding, which training amplifies; they stay together within what bfloat16 explains."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(digits.data / 16 - 0.5, dtype=torch.float32, device="cuda")
    labels = torch.tensor(digits.target, device="cuda")
    ours, reference = (losses(route, images, labels) for route in ("hopper", "reference"))
    assert reference[-20:].mean() < 0.7 < 2 < reference[0]
    assert (ours[:10] - reference[:10]).abs().max() < 0.02
    assert (ours[-20:].mean() - reference[-20:].mean()).abs() < 0.05
