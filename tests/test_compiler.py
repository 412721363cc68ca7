"""The backend "gna_flex": calls of torch's flex_attention that it rewrites; results are right."""

import pytest
import torch
from foreign_masks import CAUSAL, MASK, STYLES, assert_right, block_mask, clamped, compiled, only, plain, tensors
from helpers import dense_mask
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from gna_flex import GNA, compile_report, gna_mask, reference_attention
from gna_flex.dynamo import rewrite

pytestmark = pytest.mark.usefixtures("fresh_compiler", "no_reports")

INNER = pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
ROUTES = pytest.mark.parametrize("route", ["hopper", "flex-tiles"], indirect=True)


@pytest.fixture
def trains_on_cpu(monkeypatch):
    """torch's front end refuses gradients on a CPU, though its operator can compute them."""
    from torch.nn.attention import flex_attention as module

    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)


@pytest.mark.parametrize(
    ("style", "inner"),
    [
        # Which mask it is decides what is rewritten, and how it is compiled afterwards is another question.
        *((style, "eager") for style in STYLES),
        *((style, "aot_eager") for style in ("clamped", "where", "text-around")),
        pytest.param("clamped", "inductor", marks=pytest.mark.slow),
    ],
)
@ROUTES
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
    # The graph of a checkpoint has nodes for statistics that nobody uses.
    *_, asked = route[0]
    assert (asked["wants_stats"], asked["wants_maximum"]) == (False, False)


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


def test_function_transforms_that_have_ended(route):
    qkv = [x.contiguous() for x in tensors()]

    def model(q, k, v):
        inside = torch.func.vmap(lambda x: x * 2)(q)
        return plain(inside, k, v, MASK)

    assert_right(compiled(model)(*qkv), [qkv[0] * 2, *qkv[1:]], CAUSAL)
    assert only().route == "hopper"
