"""Lengths of text per batch entry: every route that runs on a CPU, operators, compiled callers."""

import functools
from typing import Any

import pytest
import torch
from helpers import Exact, assert_within_budget, dense_attention, exact_attention, gna_id
from text_cases import BOTH, FIRST, FRONTS, GNAS, LAST, LENGTHS, assert_attends, given, inputs, keep_of, padded
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.utils.flop_counter import FlopCounterMode

from gna_flex import (
    GNA,
    GNABlockMask,
    backend,
    explain,
    flex,
    flex_attention,
    flex_backward,
    gna_mask,
    reference_attention,
)
from gna_flex.routing import Route


@GNAS
@FRONTS
def test_eager_calls(gna, front, fresh_compiler):
    """More lengths than torch keeps variants of one function."""
    qkv = inputs(gna)
    for shift in range(12):
        lengths = [((first + shift) % 6, (last + 2 * shift) % 6) for first, last in LENGTHS]
        assert_attends(front(*qkv, block_mask=padded(gna, lengths)), qkv, gna, lengths)


@GNAS
@pytest.mark.parametrize("route", ["flex", "flex-tiles"])
def test_flex_routes_compile_once(counting_compiler, gna, route):
    mask = gna_mask(gna, device="cpu")
    qkv = inputs(gna)
    with backend(route):
        assert explain(*qkv, mask).name == route
        for shift in range(4):
            lengths = [((first + shift) % 6, (last + 2 * shift) % 6) for first, last in LENGTHS]
            ours = mask.with_valid_text(**given(gna, lengths))
            assert_attends(flex_attention(*qkv, block_mask=ours), qkv, gna, lengths)
        assert counting_compiler.frame_count == len(flex._compiled) == 1
        assert_attends(flex_attention(*qkv, block_mask=mask), qkv, gna, [(gna.text_first, gna.text_last)] * 4)
        assert counting_compiler.frame_count == len(flex._compiled) == 2


@pytest.mark.parametrize("route", ["flex", "flex-tiles"])
def test_flex_routes_share_a_function_for_batch_sizes(counting_compiler, route):
    mask = gna_mask(BOTH, device="cpu")
    with backend(route):
        for batch in (2, 3, 4, 5, 2):
            lengths = [(b, 6 - b) for b in range(batch)]
            qkv = inputs(BOTH, batch)
            assert_attends(
                flex_attention(*qkv, block_mask=mask.with_valid_text(**given(BOTH, lengths))), qkv, BOTH, lengths
            )
    assert len(flex._compiled) == 1
    assert counting_compiler.frame_count <= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("route", "batch", "front"),
    [
        # Every pair of these: compiling takes ten seconds.
        ("flex", 1, flex_attention),
        ("flex", 4, torch_flex_attention),
        ("flex-tiles", 1, torch_flex_attention),
        ("flex-tiles", 4, flex_attention),
    ],
    ids=["flex-1-ours", "flex-4-torchs", "flex-tiles-1-torchs", "flex-tiles-4-ours"],
)
def test_flex_routes_in_generated_code(fresh_compiler, route, batch, front):
    mask = gna_mask(BOTH, device="cpu")
    qkv = inputs(BOTH, batch)
    with backend(route), torch.no_grad():
        for lengths in (LENGTHS[:batch], LENGTHS[::-1][:batch]):
            out = front(*qkv, block_mask=mask.with_valid_text(**given(BOTH, lengths)))
            assert_attends(out, qkv, BOTH, lengths)
    assert len(flex._compiled) == 1


@pytest.fixture
def kernel_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes the kernel's route, whose operator is the reference on a CPU."""
    monkeypatch.setattr(flex, "route_of", lambda *_, **__: Route("hopper", "for a test", ()))
    monkeypatch.setattr("gna_flex.attention.route_of", flex.route_of)


def statistics(qkv: list[Tensor], gna: GNA, lengths: Any = LENGTHS) -> tuple[Exact, Exact]:
    keep = keep_of(gna, lengths)
    return exact_attention(*qkv, keep), dense_attention(*qkv, keep)


@GNAS
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_kernel_route(kernel_route, fresh_compiler, gna, how):
    def call(q: Tensor, k: Tensor, v: Tensor, mask: GNABlockMask) -> tuple[Tensor, Tensor]:
        # torch's front end, which graphs go through, takes no gradients on a CPU.
        if how == "compiled":
            return flex.kernel_attention(q, k, v, mask, None)
        return flex_attention(q, k, v, block_mask=mask, return_lse=True)

    counter = CompileCounterWithBackend("aot_eager")
    function = call if how == "eager" else torch.compile(call, fullgraph=True, backend=counter)
    mask = gna_mask(gna, device="cpu")
    qkv = inputs(gna, requires_grad=True)
    for lengths in (LENGTHS, LENGTHS[::-1]):
        out, lse = function(*qkv, mask.with_valid_text(**given(gna, lengths)))
        exact, plain = statistics(qkv, gna, lengths)
        assert_within_budget("out", out, exact.out, plain.out)
        assert_within_budget("lse", lse, exact.lse, plain.lse)
        assert_gradients(out, lse, qkv, exact)
    assert counter.frame_count == (how == "compiled")


@FRONTS
@pytest.mark.parametrize("route", ["hopper", "flex-tiles", "flex"])
def test_routes_of_a_gpu_in_graphs(monkeypatch, fresh_compiler, front, route):
    monkeypatch.setattr(flex, "route_of", lambda *_, **__: Route(route, "for a test", ()))
    monkeypatch.setattr("gna_flex.attention.route_of", flex.route_of)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v, m: front(q, k, v, block_mask=m), fullgraph=True, backend=counter)
    mask = gna_mask(BOTH, device="cpu")
    qkv = inputs(BOTH)
    for lengths in (LENGTHS, LENGTHS[::-1]):
        ours = mask.with_valid_text(**given(BOTH, lengths))
        assert ours.tiles.order.tile  # built outside of graphs, which cannot
        assert_attends(compiled(*qkv, ours), qkv, BOTH, lengths)
    assert counter.frame_count == 1


@pytest.mark.parametrize("tiles", [False, True], ids=["natural", "tiles"])
def test_eager_calls_of_a_gpu(counting_compiler, tiles):
    """There the compiled function permutes tokens itself."""
    statics = flex.Statics(scale=None, enable_gqa=False, lse=True, top=False, kernel_options=())
    mask = gna_mask(BOTH, device="cpu")
    qkv = inputs(BOTH)
    for lengths in (LENGTHS, LENGTHS[::-1]):
        ours = mask.with_valid_text(**given(BOTH, lengths))
        order = ours.tiles if tiles else None
        function = flex.compiled(statics, ours, order, *qkv, False, None)
        assert_attends(function(statics, *qkv, ours.plain, None, order)[0], qkv, BOTH, lengths)
    assert counting_compiler.frame_count == len(flex._compiled) == 1


def assert_gradients(out: Tensor, lse: Tensor, qkv: list[Tensor], exact: Exact) -> None:
    grads = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), qkv, grads)
    wanted = torch.autograd.grad((exact.out, exact.lse), qkv, [grad.double() for grad in grads])
    for grad, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


@GNAS
def test_reference_has_gradients(gna):
    qkv = inputs(gna, requires_grad=True)
    out, lse = flex_attention(*qkv, block_mask=padded(gna), return_lse=True)
    assert_gradients(out, lse, qkv, statistics(qkv, gna)[0])


def test_reference_attention_under_a_mask_of_plain_python():
    """The definition once more, this time as anybody would write it for FlexAttention."""
    valid = torch.tensor(LENGTHS)
    base = gna_mask(BOTH, device="cpu").mask_mod

    def mask_mod(b, h, q, k):
        end = BOTH.text_first + BOTH.grid_tokens
        in_first, in_last = k < BOTH.text_first, k >= end
        counts = torch.where(in_first, k < valid[b, 0], torch.where(in_last, k - end < valid[b, 1], True))
        return base(b, h, q, k) & counts

    qkv = inputs(BOTH)
    exact = reference_attention(*qkv, mask_mod)[0]
    torch.testing.assert_close(flex_attention(*qkv, block_mask=padded(BOTH)), exact)


@pytest.mark.parametrize("gna", [BOTH, LAST, FIRST, GNA((16, 16), (8, 8), 8, text_last=6)], ids=gna_id)
@pytest.mark.parametrize("tiles", [False, True], ids=["natural", "tiles"])
def test_backward_of_flex_attention(monkeypatch, gna, tiles):
    """Its graph, run as it is; a second batch takes the same one with lengths of its own."""
    graphs = []
    monkeypatch.setattr(flex_backward, "compile_graph", lambda graph, inputs: graphs.append(graph) or graph)
    monkeypatch.setattr(GNABlockMask, "tiles_pay", lambda self, compiling=False: tiles)
    flex_backward._compiled.cache_clear()
    flex_backward._mask.cache_clear()
    monkeypatch.setattr(flex_backward, "gna_mask", functools.partial(gna_mask, device="cpu"))
    qkv = [x.double() for x in inputs(gna)]
    for lengths in (LENGTHS, LENGTHS[::-1], None):
        keep = keep_of(gna, lengths or [(gna.text_first, gna.text_last)] * 4)
        leaves = [x.clone().requires_grad_() for x in qkv]
        exact = exact_attention(*leaves, keep)
        grads = torch.randn_like(exact.out), torch.randn_like(exact.lse)
        wanted = torch.autograd.grad((exact.out, exact.lse), leaves, grads)
        valid = None if lengths is None else padded(gna, lengths).valid_text
        with torch.no_grad():
            arguments = (*qkv, exact.out.detach(), exact.lse.detach(), *grads)
            found = flex_backward.flex_backward((gna,), *arguments, 0.25, valid)
        for grad, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(grad, want)
    assert len(graphs) == 2
    flex_backward._compiled.cache_clear()
    flex_backward._mask.cache_clear()


# The operators


@GNAS
def test_operator_declares_what_it_does(gna):
    ours = padded(gna)
    for grad in (False, True):
        arguments = (*inputs(gna, requires_grad=grad), *ours.lists, 0.25, ours.valid_text)
        torch.library.opcheck(torch.ops.gna_flex.attention.default, arguments)


def test_operator_counts_flops_as_without_lengths():
    ours = padded(BOTH)
    found = []
    for valid in (None, ours.valid_text):
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            out, lse = torch.ops.gna_flex.attention(*inputs(BOTH, requires_grad=True), *ours.lists, 0.25, valid)
            (out.sum() + lse.sum()).backward()
        found.append(counter.get_flop_counts()["Global"])
    ops = (torch.ops.gna_flex.attention, torch.ops.gna_flex.attention_backward)
    assert [found[0][op] for op in ops] == [found[1][op] for op in ops]


def test_operator_takes_numbers_outside_as_the_nearest_inside():
    """As the kernel does, which cannot refuse them."""
    qkv = inputs(BOTH)
    wild = torch.tensor([[-3, 1], [99, -1], [2**31 - 1, 99], [-(2**31), 3]], dtype=torch.int32)
    out, _ = torch.ops.gna_flex.attention(*qkv, *gna_mask(BOTH, device="cpu").lists, 0.25, wild)
    assert_attends(out, qkv, BOTH, [(0, 1), (9, 0), (9, 6), (0, 3)])


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), torch.zeros(4, 2)]
)
def test_operator_refuses_other_lengths(wrong):
    with pytest.raises(ValueError, match=r"text_valid must be int32 \(4, 2\)"):
        torch.ops.gna_flex.attention(*inputs(BOTH), *gna_mask(BOTH, device="cpu").lists, 0.25, wrong)


# Compiled callers


@FRONTS
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_callers_take_lengths_as_inputs(front, compiler, fresh_compiler):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(lambda q, k, v, mask: front(q, k, v, block_mask=mask) + 1, fullgraph=True, backend=counter)
    mask = gna_mask(BOTH, device="cpu")
    qkv = inputs(BOTH)
    for shift in range(10):
        lengths = [((first + shift) % 6, (last + 2 * shift) % 6) for first, last in LENGTHS]
        out = compiled(*qkv, mask.with_valid_text(**given(BOTH, lengths)))
        assert_attends(out - 1, qkv, BOTH, lengths)
    assert counter.frame_count == 1
    assert_attends(compiled(*qkv, mask) - 1, qkv, BOTH, [(9, 6)] * 4)


@FRONTS
def test_compiled_batch_sizes(front, fresh_compiler):
    compiled = torch.compile(lambda q, k, v, mask: front(q, k, v, block_mask=mask), fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 4, 1):
        qkv = inputs(BOTH, batch)
        assert_attends(compiled(*qkv, padded(BOTH, LENGTHS[:batch])), qkv, BOTH, LENGTHS[:batch])


@FRONTS
def test_a_mask_that_a_compiled_function_captures(front, fresh_compiler):
    holder = {"mask": padded(BOTH)}
    compiled = torch.compile(
        lambda q, k, v: front(q, k, v, block_mask=holder["mask"]), fullgraph=True, backend="aot_eager"
    )
    qkv = inputs(BOTH)
    assert_attends(compiled(*qkv), qkv, BOTH)
    holder["mask"] = padded(BOTH, LENGTHS[::-1])
    assert_attends(compiled(*qkv), qkv, BOTH, LENGTHS[::-1])
    holder["mask"].valid_text.copy_(torch.tensor(LENGTHS))
    assert_attends(compiled(*qkv), qkv, BOTH)


def test_training_in_a_compiled_function(fresh_compiler):
    compiled = torch.compile(
        lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask, return_lse=True),
        fullgraph=True,
        backend="aot_eager",
    )
    for lengths in (LENGTHS, LENGTHS[::-1]):
        qkv = inputs(BOTH, requires_grad=True)
        out, lse = compiled(*qkv, padded(BOTH, lengths))
        assert_gradients(out, lse, qkv, statistics(qkv, BOTH, lengths)[0])
