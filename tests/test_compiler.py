"""The backend "gna_flex" and ``recognise_masks``: what they rewrite and what they leave alone; results are right."""

import functools
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import dense_mask
from torch import nn
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    noop_mask,
)
from torch.utils.checkpoint import checkpoint

import gna_flex
from gna_flex import GNA, compile_report, gna_mask, recognise_masks, reference_attention
from gna_flex.dynamo import report, rewrite
from gna_flex.dynamo.backend import gna_flex_backend
from gna_flex.dynamo.graph import bodies
from gna_flex.dynamo.lists import agree
from gna_flex.routing import Route
from gna_flex.torch_private import BLOCK_TABLES

pytestmark = pytest.mark.usefixtures("fresh_compiler", "no_reports")

ROOT = Path(gna_flex.__file__).parent.parent
INNER = pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
ROUTES = pytest.mark.parametrize("route", ["hopper", "flex-tiles"], indirect=True)


@pytest.fixture
def no_reports():
    report._reports.clear()
    yield
    report._reports.clear()


@pytest.fixture
def route(monkeypatch, request):
    """A route that CPU tensors do not take by themselves; the operators have CPU kernels."""
    name = getattr(request, "param", "hopper")
    seen = []

    def route_of(query, key, mask, **options):
        seen.append((query, key, mask, options))
        return Route(name, "for a test", ())

    monkeypatch.setattr(rewrite, "route_of", route_of)
    return seen


@pytest.fixture
def trains_on_cpu(monkeypatch):
    """torch's front end refuses gradients on a CPU, though its operator can compute them."""
    from torch.nn.attention import flex_attention as module

    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)


def compiled(function, inner="aot_eager", **options):
    return torch.compile(function, backend=functools.partial(gna_flex_backend, inner=inner), fullgraph=True, **options)


def tensors(tokens=64, batch=2, heads=2, kv_heads=None, **options):
    """Query, key and value as a model makes them: a view of [batch, tokens, heads, head dim]."""
    return [torch.randn(batch, tokens, h, 16, **options).transpose(1, 2) for h in (heads, *[kv_heads or heads] * 2)]


def plain(query, key, value, mask, score_mod=None, scale=None):
    return flex_attention(query, key, value, score_mod, mask, scale, enable_gqa=True)


def clamped(height, width, rows, columns):
    """Distance to a center that is kept away from the edges."""

    def mod(b, h, q_idx, kv_idx):
        y = (q_idx // width).clamp(rows // 2, height - 1 - rows // 2)
        x = (q_idx % width).clamp(columns // 2, width - 1 - columns // 2)
        return ((kv_idx // width - y).abs() <= rows // 2) & ((kv_idx % width - x).abs() <= columns // 2)

    return mod


def window_start(height, width, rows, columns):
    """``start <= key < start + window``, with a loop over dimensions."""

    def mod(b, h, q_idx, kv_idx):
        keep = q_idx >= 0
        for length, window in ((width, columns), (height, rows)):
            q, k = q_idx % length, kv_idx % length
            q_idx, kv_idx = q_idx // length, kv_idx // length
            start = torch.clamp(q - window // 2, 0, length - window)
            keep = keep & (k >= start) & (k < start + window)
        return keep

    return mod


def block_mask(mod, tokens=64, heads=None, **options):
    return create_block_mask(mod, None, heads, tokens, tokens, device="cpu", **{"BLOCK_SIZE": 16, **options})


STYLES = {
    "clamped": (clamped(8, 8, 3, 5), GNA((8, 8), (3, 5))),
    "window-start": (window_start(8, 8, 3, 4), GNA((8, 8), (3, 4))),
    "causal": (lambda b, h, q, k: q >= k, GNA(64, -1, causal=True)),
    "sliding": (and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < 9), GNA(64, 9, causal=True)),
    "blocks": (lambda b, h, q, k: q // 16 == k // 16, GNA(64, 16, 16)),
    "where": (lambda b, h, q, k: torch.where(q < k, False, k > q - 7), GNA(64, 7, causal=True)),
    "everything": (noop_mask, GNA(64, -1)),
}


def only():
    """The one call that was reported."""
    (call,) = compile_report().calls
    return call


def assert_right(out, qkv, mask_mod):
    torch.testing.assert_close(out, reference_attention(*qkv, mask_mod)[0])


@INNER
@ROUTES
@pytest.mark.parametrize("style", STYLES)
def test_foreign_masks(route, style, inner):
    if inner == "inductor" and "tiles" in route_name(route):
        pytest.skip("Inductor's FlexAttention on a CPU takes no copied block lists")
    mod, gna = STYLES[style]
    qkv = tensors()
    out = compiled(plain, inner)(*qkv, block_mask(mod))
    assert_right(out, qkv, mod)
    assert (only().gna, only().route) == (gna, route_name(route))
    assert (dense_mask(gna) == reference_keep(mod)).all()


def route_name(seen):
    return rewrite.route_of(None, None, None).name


def reference_keep(mod, tokens=64):
    i = torch.arange(tokens)
    zero = torch.tensor(0)
    return torch.broadcast_to(mod(zero, zero, i[:, None], i), (tokens, tokens)).numpy()


@INNER
@ROUTES
def test_statistics_and_what_follows(route, inner):
    if inner == "inductor" and route_name(route) != "hopper":
        pytest.skip("Inductor's FlexAttention on a CPU returns no statistics")
    mod, _ = STYLES["clamped"]
    qkv = tensors()

    def model(q, k, v, mask):
        out, lse = flex_attention(q * 2, k, v, block_mask=mask, return_lse=True, scale=0.3)
        return out.transpose(1, 2).reshape(2, 64, 32).relu(), lse.exp()

    out, total = compiled(model, inner)(*qkv, block_mask(mod))
    exact, lse, _ = reference_attention(qkv[0] * 2, *qkv[1:], mod, scale=0.3)
    torch.testing.assert_close(out, exact.transpose(1, 2).reshape(2, 64, 32).relu())
    torch.testing.assert_close(total, lse.exp())
    assert only().route
    assert route[-1][3]["wants_stats"]


@INNER
@ROUTES
def test_training(route, trains_on_cpu, inner):
    if inner == "inductor" and route_name(route) != "hopper":
        pytest.skip("Inductor has no FlexAttention backward on a CPU")
    mod, _ = STYLES["window-start"]
    leaves = [x.detach().requires_grad_() for x in tensors(heads=4, kv_heads=2)]
    target, weight = torch.randn(2, 4, 64, 16), torch.randn(2, 4, 64)

    def model(q, k, v, mask):
        out, lse = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
        return (out * target).sum() + (lse * weight).sum()

    loss = compiled(model, inner)(*leaves, block_mask(mod))
    grads = torch.autograd.grad(loss, leaves)
    out, lse, _ = reference_attention(*leaves, mod)
    expected = (out * target).sum() + (lse * weight).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves))
    assert only().route
    assert route[-1][3]["needs_grad"]


@ROUTES
@pytest.mark.parametrize("inner", ["aot_eager"])
def test_checkpoints(route, trains_on_cpu, inner):
    mod, gna = STYLES["clamped"]
    mask = block_mask(mod)
    leaves = [x.detach().requires_grad_() for x in tensors()]

    def model(q, k, v):
        return checkpoint(lambda *qkv: plain(*qkv, mask).relu(), q, k, v, use_reentrant=False).sum()

    loss = compiled(model, inner)(*leaves)
    expected = reference_attention(*leaves, mod)[0].relu().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
    assert (only().gna, only().route) == (gna, route_name(route))


@ROUTES
def test_autocast(route):
    mod, _ = STYLES["clamped"]
    qkv = tensors()

    def model(q, k, v, mask):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(q, k, v, mask)

    out = compiled(model)(*qkv, block_mask(mod))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, reference_attention(*(x.bfloat16() for x in qkv), mod)[0], atol=2e-2, rtol=2e-2)
    assert route[-1][0].dtype == torch.bfloat16
    assert only().route


@ROUTES
@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)], ids=str)
def test_memory_order_is_that_of_torchs_operator(route, dims):
    """Whatever follows in the graph was traced with its strides."""
    mod, _ = STYLES["causal"]
    sizes = [(2, 3, 64, 16)[dim] for dim in dims]
    qkv = [torch.randn(sizes).permute(*(dims.index(dim) for dim in range(4))) for _ in range(3)]
    out = compiled(plain)(*qkv, block_mask(mod))
    assert_right(out, qkv, mod)
    assert only().route
    torch.compiler.reset()
    assert out.stride() == torch.compile(plain, backend="aot_eager")(*qkv, block_mask(mod)).stride()


@ROUTES
def test_dynamic_batch(route):
    mod, gna = STYLES["clamped"]
    function, mask = compiled(plain), block_mask(mod)
    for batch in (2, 3, 5, 7):
        qkv = tensors(batch=batch)
        assert_right(function(*qkv, mask), qkv, mod)
    calls = compile_report().calls
    assert len(calls) == 2
    assert {(call.gna, call.route) for call in calls} == {(gna, route_name(route))}


def test_keys_that_begin_to_broadcast_are_compiled_anew(route):
    mod, _ = STYLES["clamped"]
    function, mask = compiled(plain), block_mask(mod)
    for batch in (2, 3, 4):
        qkv = tensors(batch=batch)
        assert_right(function(*qkv, mask), qkv, mod)
    q, k, v = tensors(batch=6)
    out = function(q, k[:1], v[:1], create_block_mask(mod, 6, None, 64, 64, device="cpu", BLOCK_SIZE=16))
    assert_right(out, [q, k[:1].expand_as(q), v[:1].expand_as(q)], mod)
    assert "broadcast" in compile_report(last=1).calls[0].reason


@pytest.mark.parametrize("dynamic", [None, False])
def test_another_window_is_another_plan(route, dynamic):
    """Numbers that a mask captures become symbols at the second compilation."""
    function = compiled(plain, dynamic=dynamic)
    qkv = tensors()
    for columns in (3, 5, 7, 3, 5):
        mod = clamped(8, 8, 3, columns)
        assert_right(function(*qkv, block_mask(mod)), qkv, mod)
    calls = compile_report().calls
    assert [call.gna for call in calls] == [GNA((8, 8), (3, w)) for w in (3, 5, 7)]
    assert all(call.route for call in calls)


def test_many_windows_leave_torch_a_way(route, monkeypatch):
    """torch gives a function up after eight graphs; before that there is one for any window."""
    function = compiled(plain)
    qkv = tensors()
    for window in range(2, 16):
        mod = sliding(window)
        assert_right(function(*qkv, block_mask(mod)), qkv, mod)
    calls = compile_report().calls
    assert len(calls) <= torch._dynamo.config.recompile_limit
    assert sum(bool(call.route) for call in calls) >= 5
    assert "takes any number" in calls[-1].reason


def sliding(window):
    return lambda b, h, q, k: (q >= k) & (q - k < window)


def test_dynamic_tokens_are_left_alone(route):
    mod = STYLES["causal"][0]
    function = compiled(plain, dynamic=True)
    for tokens in (64, 96):
        qkv = tensors(tokens)
        assert_right(function(*qkv, block_mask(mod, tokens)), qkv, mod)
    assert {(call.route, call.reason) for call in compile_report().calls} == {("", "the number of tokens is dynamic")}


def test_two_masks_in_one_graph(route):
    mods = [STYLES["clamped"][0], STYLES["window-start"][0]]
    masks = [block_mask(mod) for mod in mods]

    def model(q, k, v):
        for _ in range(3):
            for mask in masks:
                q = plain(q, k, v, mask)
        return q

    q, k, v = tensors()
    out = compiled(model)(q, k, v)
    for _ in range(3):
        for mod in mods:
            q = reference_attention(q, k, v, mod)[0]
    torch.testing.assert_close(out, q)
    gnas = [call.gna for call in compile_report().calls]
    assert gnas == [STYLES["clamped"][1], STYLES["window-start"][1]] * 3


def test_equal_masks_are_recognised_once(route, monkeypatch):
    asked = []
    recognise = rewrite.recognise
    monkeypatch.setattr(rewrite, "recognise", lambda *args, **options: asked.append(1) or recognise(*args, **options))
    mod, gna = STYLES["clamped"]
    masks = nn.ModuleList()
    masks.lists = [block_mask(mod) for _ in range(8)]

    def model(q, k, v):
        for mask in masks.lists:
            q = plain(q, k, v, mask)
        return q

    q, k, v = tensors()
    out = compiled(model)(q, k, v)
    for _ in range(8):
        q = reference_attention(q, k, v, mod)[0]
    torch.testing.assert_close(out, q)
    assert len(asked) == 1
    assert [call.gna for call in compile_report().calls] == [gna] * 8


def test_one_mask_per_head(route):
    def mod(b, h, q, k):
        return (q >= k) & (q - k < torch.where(h == 0, 4, 9))

    qkv = tensors()
    out = compiled(plain)(*qkv, block_mask(mod, heads=2))
    assert_right(out, qkv, mod)
    assert only().gna == (GNA(64, 4, causal=True), GNA(64, 9, causal=True))


def test_own_masks_route_themselves(route):
    gna = GNA((8, 8), (3, 4), (2, 1))
    qkv = tensors()
    out = compiled(plain)(*qkv, gna_mask(gna, device="cpu"))
    torch.testing.assert_close(out, reference_attention(*qkv, gna_mask(gna, device="cpu").mask_mod)[0])
    plain_mask = gna_mask(gna, device="cpu").plain
    assert_right(compiled(plain)(*qkv, plain_mask), qkv, plain_mask.mask_mod)
    assert (compile_report(last=1).calls[0].gna, compile_report(last=1).calls[0].route) == (gna, "hopper")


def linear_bias(score, b, h, q, k):
    return score + 0.1 * (q - k)


TABLE = torch.arange(64) // 16
CAUSAL = STYLES["causal"][0]
LEFT = {
    "documents": (lambda q, k, v: plain(q, k, v, DOCUMENTS), lambda b, h, q, k: TABLE[q] == TABLE[k], "a tensor"),
    "diagonal": (lambda q, k, v: plain(q, k, v, DIAGONAL), lambda b, h, q, k: (q - k).abs() <= 2, "no GNA"),
    "options": (
        lambda q, k, v: flex_attention(q, k, v, block_mask=MASK, kernel_options={"BLOCK_M": 16}),
        CAUSAL,
        "BLOCK_M=16",
    ),
    "backend": (
        lambda q, k, v: flex_attention(q, k, v, block_mask=MASK, kernel_options={"BACKEND": "TRITON"}),
        CAUSAL,
        "BACKEND=TRITON",
    ),
    "no-mask": (lambda q, k, v: flex_attention(q, k, v), noop_mask, "sizes of mask"),
    "computed": (lambda q, k, v: plain(q, k, v, copied()), CAUSAL, "inside of the graph"),
}
MASK = block_mask(CAUSAL)


def copied():
    """The mask with block lists that a compiled function computes."""
    full = MASK.full_kv_num_blocks, MASK.full_kv_indices
    return BlockMask.from_kv_blocks(MASK.kv_num_blocks + 0, MASK.kv_indices, *full, BLOCK_SIZE=16, mask_mod=CAUSAL)


DIAGONAL = block_mask(LEFT["diagonal"][1])
DOCUMENTS = block_mask(LEFT["documents"][1])


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(route, name):
    function, mod, reason = LEFT[name]
    qkv = tensors()
    assert_right(compiled(function)(*qkv), qkv, mod)
    assert only().route == ""
    assert reason in only().reason


def test_score_mods_are_left_alone(route):
    qkv = tensors()
    out = compiled(plain)(*qkv, MASK, linear_bias)
    torch.testing.assert_close(out, reference_attention(*qkv, CAUSAL, score_mod=linear_bias)[0])
    assert (only().route, only().reason) == ("", "it has a score_mod")


def test_maximum_is_a_reason_for_routing(monkeypatch):
    """Our kernel returns none; the decision is routing's."""
    qkv = tensors()

    def model(q, k, v):
        out, aux = flex_attention(q, k, v, block_mask=MASK, return_aux=AuxRequest(max_scores=True))
        return out, aux.max_scores

    seen = []
    choose = rewrite.route_of
    monkeypatch.setattr(rewrite, "route_of", lambda *args, **options: seen.append(options) or choose(*args, **options))
    try:
        out, top = compiled(model, "eager")(*qkv)
    except Exception as error:
        pytest.skip(f"torch returns no maximum on a CPU: {str(error).splitlines()[0]}")
    exact = reference_attention(*qkv, CAUSAL)
    torch.testing.assert_close((out, top), (exact[0], exact[2]))
    assert seen[0]["wants_maximum"]
    assert only().route == ""


def test_nothing_is_rewritten_on_a_cpu():
    qkv = tensors()
    assert_right(compiled(plain)(*qkv, MASK), qkv, CAUSAL)
    assert "nothing of ours is better here" in only().reason
    with gna_flex.backend("hopper"):
        torch.compiler.reset()
        assert_right(compiled(plain)(*qkv, MASK), qkv, CAUSAL)
    assert "the forced route cannot take this call" in compile_report(last=1).calls[0].reason


def test_errors_of_ours_do_not_stop_torch(monkeypatch, caplog):
    monkeypatch.setattr(rewrite, "recognise", lambda *args, **options: 1 / 0)
    qkv = tensors()
    assert_right(compiled(plain)(*qkv, MASK), qkv, CAUSAL)
    assert only().reason == "ZeroDivisionError: division by zero"
    assert "left alone because of an error" in caplog.text


# Block lists.


def lists(mask):
    return tuple(getattr(mask, name) for name in BLOCK_TABLES)


@pytest.mark.parametrize("style", STYLES)
def test_block_lists_agree(style):
    mod, gna = STYLES[style]
    assert agree(lists(block_mask(mod)), (gna,), 16, 16)
    assert agree(lists(block_mask(mod, BLOCK_SIZE=(24, 40))), (gna,), 24, 40)
    assert agree(lists(gna_mask(gna, device="cpu", q_block=16, kv_block=16)), (gna,), 16, 16)
    assert agree(lists(block_mask(mod)), (GNA(64, -1),), 16, 16) == (style == "everything")


@pytest.mark.parametrize("number", range(60))
def test_block_lists_that_disagree(number):
    """Any change of a list that counts is seen; the same lists in another order are the same."""
    generator = torch.Generator().manual_seed(number)
    mod, gna = STYLES["sliding"]
    mask = block_mask(mod)
    order = [[0, 1], [2, 3], [4, 5], [6, 7]][number % 4]
    tables = [table.clone() for table in lists(mask)]
    counts, indices = (tables[at] for at in order)
    row = int(torch.randint(4, (1,), generator=generator))
    if number % 3 == 0:
        counts[0, 0, row] = (counts[0, 0, row] + 1) % 4
    elif counts[0, 0, row] > 0:
        indices[0, 0, row, 0] = (indices[0, 0, row, 0] + 1 + int(torch.randint(3, (1,), generator=generator))) % 4
    same = all(torch.equal(a, b) for a, b in zip(used(tables), used(lists(mask)), strict=True))
    assert bool(agree(tuple(tables), (gna,), 16, 16)) == same


def used(tables):
    for counts, indices in zip(tables[::2], tables[1::2], strict=True):
        for n, row in zip(counts[0, 0].tolist(), indices[0, 0], strict=True):
            yield row[:n].sort().values


def test_lists_without_full_blocks_or_queries():
    _, gna = STYLES["causal"]
    partial = torch.arange(4, dtype=torch.int32)[None, None, None].expand(1, 1, 4, 4).contiguous()
    counts = torch.full((1, 1, 4), 4, dtype=torch.int32)
    every = (counts, partial, None, None, None, None, None, None)
    assert agree(every, (gna,), 16, 16)
    assert not agree((counts - 1, *every[1:]), (gna,), 16, 16)
    assert not agree((counts + 1, *every[1:]), (gna,), 16, 16)
    assert not agree((counts, partial.clamp(max=2), *every[2:]), (gna,), 16, 16)
    assert not agree((counts, partial + 1, *every[2:]), (gna,), 16, 16)
    assert not agree((counts, partial, counts, partial, *every[4:]), (gna,), 16, 16)
    assert not agree((counts[..., :3], partial[..., :3, :], *every[2:]), (gna,), 16, 16)


def some_blocks():
    """Lists that leave blocks out, on purpose, of a mask_mod that keeps them."""
    counts = torch.ones(1, 1, 4, dtype=torch.int32)
    indices = torch.arange(4, dtype=torch.int32)[None, None, :, None].expand(1, 1, 4, 4).contiguous()
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, mask_mod=noop_mask)


def test_lists_that_are_too_long_are_left_alone(route, monkeypatch):
    monkeypatch.setattr(rewrite, "MOST_BLOCKS", 15)
    qkv = tensors()
    assert_right(compiled(plain)(*qkv, MASK), qkv, CAUSAL)
    assert "too long" in only().reason


def test_lists_that_choose_blocks_are_left_alone(route):
    qkv = tensors()
    out = compiled(plain)(*qkv, some_blocks())
    torch.testing.assert_close(out, torch.compile(plain, backend="aot_eager")(*qkv, some_blocks()))
    assert "block lists keep other pairs" in only().reason


@INNER
def test_lists_that_change_later_are_an_error(route, inner):
    mod, _ = STYLES["clamped"]
    qkv = tensors()
    mask = block_mask(mod)
    function = compiled(plain, inner)
    assert_right(function(*qkv, mask), qkv, mod)
    assert_right(function(*qkv, block_mask(mod)), qkv, mod)
    mask.kv_num_blocks[..., 1] = 1
    with pytest.raises(RuntimeError, match="have changed"):
        function(*qkv, mask)


# Graphs.


def test_inner_graphs_that_are_used_twice():
    inner = torch.fx.symbolic_trace(lambda x: x.sin())
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for _ in range(2):
        x = graph.call_module("inner", (x,))
    graph.output(x)
    outer = torch.fx.GraphModule({"inner": inner}, graph)
    assert [body.obstacle for body in bodies(outer)] == ["", "its part of the graph is used several times"]


def test_function_transforms_that_have_ended(route):
    qkv = [x.contiguous() for x in tensors()]

    def model(q, k, v):
        inside = torch.func.vmap(lambda x: x * 2)(q)
        return plain(inside, k, v, MASK)

    assert_right(compiled(model)(*qkv), [qkv[0] * 2, *qkv[1:]], CAUSAL)
    assert only().route == "hopper"


@pytest.mark.parametrize("inner", ["aot_eager"])
def test_branches_are_left_alone(route, inner):
    def model(x, q, k, v):
        return torch.cond(x.sum() > 0, lambda q, k, v: plain(q, k, v, MASK), lambda q, k, v: q + 0, (q, k, v))

    qkv = [x.contiguous() for x in tensors()]
    try:
        out = compiled(model, inner)(torch.ones(2), *qkv)
    except Exception as error:
        pytest.skip(f"torch takes no FlexAttention in a branch: {str(error).splitlines()[0]}")
    assert_right(out, qkv, CAUSAL)
    assert only().reason == "it is inside of cond"


# Reports.


def test_report(route, caplog):
    assert str(compile_report()) == "no FlexAttention call was compiled"
    qkv = tensors()
    with caplog.at_level(logging.DEBUG, "gna_flex"):
        compiled(plain)(*qkv, MASK)
        compiled(plain)(*qkv, MASK, linear_bias)
    result = compile_report()
    assert (len(result.graphs), result.routed) == (2, 1)
    text = str(result)
    assert re.search(r"test_compiler\.py:\d+ +layout 64, window 64, causal.* hopper +for a test", text), text
    assert re.search(r"left alone +it has a score_mod", text), text
    assert "1 of 2 FlexAttention calls take our routes" in text
    assert json.loads(json.dumps(result.to_json()))["routed"] == 1
    assert len(compile_report(last=1).calls) == 1
    assert len(compile_report(last=9).calls) == 2
    assert "1 of 1 FlexAttention calls" in caplog.text
    assert "it has a score_mod" in caplog.text
    with pytest.raises(ValueError, match="last=-1"):
        compile_report(last=-1)


# By name, and inside of Inductor.

SCRIPT = """
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
assert "gna_flex" in torch._dynamo.list_backends()
import sys
assert "gna_flex" not in sys.modules
mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 64, 64, device="cpu")
model = torch.compile(lambda *qkv: flex_attention(*qkv, block_mask=mask), backend="gna_flex", **OPTIONS)
qkv = [torch.randn(1, 1, 64, 16) for _ in range(3)]
out = model(*qkv)
expected = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
torch.testing.assert_close(out, expected)
import gna_flex
(call,) = gna_flex.compile_report().calls
assert "nothing of ours is better here" in call.reason, call
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_fusion_size": 8}}])
def test_the_name_is_found_without_an_import(tmp_path, options):
    """An installation is a folder with metadata beside the package."""
    (tmp_path / "gna_flex").symlink_to(ROOT / "gna_flex")
    metadata = tmp_path / "gna_flex-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gna-flex\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[torch_dynamo_backends]\n" + entry_point() + "\n")
    script = tmp_path / "script.py"
    script.write_text(f"OPTIONS = {options!r}\n{SCRIPT}")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def entry_point():
    """The line of pyproject.toml as metadata have it."""
    toml = (ROOT / "pyproject.toml").read_text()
    name, target = re.search(r'\[project\.entry-points\.torch_dynamo_backends\]\n(\w+) = "(.*)"', toml).groups()
    return f"{name} = {target}"


def test_entry_point():
    name, target = entry_point().split(" = ")
    module, function = target.split(":")
    assert name == "gna_flex"
    assert getattr(sys.modules[module], function) is gna_flex_backend


@pytest.mark.parametrize("given", [{}, {"mode": "reduce-overhead"}, {"options": {"x": 1}}])
def test_options_reach_inductor(monkeypatch, given):
    seen = []

    def inductor(mode, options):
        seen.append((mode, options))
        return lambda graph, inputs: graph

    monkeypatch.setattr("gna_flex.dynamo.backend.inductor", inductor)
    torch.compile(torch.sin, backend=gna_flex_backend, **given)(torch.zeros(2))
    assert seen == [(given.get("mode"), given.get("options"))]


def config():
    from torch._inductor import config

    return config.pre_grad_custom_pass


def test_recognise_masks_is_undone():
    before = config()
    with recognise_masks():
        assert config() is not before
        with recognise_masks():
            pass
    assert config() is before
    with pytest.raises(KeyError), recognise_masks():
        raise KeyError
    assert config() is before


@pytest.mark.slow
def test_recognise_masks(route):
    from torch._inductor import config

    mod, gna = STYLES["clamped"]
    qkv = tensors()
    graphs = []
    with config.patch(pre_grad_custom_pass=graphs.append), recognise_masks():
        function = torch.compile(lambda *args: plain(*args).relu(), fullgraph=True)
        out = function(*qkv, block_mask(mod))
    torch.testing.assert_close(out, reference_attention(*qkv, mod)[0].relu())
    assert (only().gna, only().route) == (gna, "hopper")
    assert graphs
    mask = block_mask(mod)
    mask.kv_num_blocks[..., 1] = 1
    with pytest.raises(RuntimeError, match="have changed"):
        function(*qkv, mask)


@pytest.mark.slow
def test_backend_inside_of_recognise_masks(route):
    qkv = tensors()
    with recognise_masks():
        out = torch.compile(plain, backend=gna_flex_backend)(*qkv, MASK)
    assert_right(out, qkv, CAUSAL)
    assert only().route == "hopper"
