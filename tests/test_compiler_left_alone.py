"""The backend "gna_flex": calls of torch's flex_attention that it leaves to torch, and why."""

import pytest
import torch
from foreign_masks import CAUSAL, MASK, STYLES, assert_right, block_mask, compiled, linear_bias, only, plain, tensors
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention, noop_mask

import gna_flex
from gna_flex import compile_report, reference_attention
from gna_flex.dynamo import rewrite
from gna_flex.dynamo.graph import bodies

pytestmark = pytest.mark.usefixtures("fresh_compiler", "no_reports")

TABLE = torch.arange(64) // 16
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


def test_dynamic_tokens_are_left_alone(route):
    mod = STYLES["causal"][0]
    function = compiled(plain, dynamic=True)
    for tokens in (64, 96):
        qkv = tensors(tokens)
        assert_right(function(*qkv, block_mask(mod, tokens)), qkv, mod)
    assert {(call.route, call.reason) for call in compile_report().calls} == {("", "the number of tokens is dynamic")}


def test_without_assertions_calls_are_left_alone(route):
    qkv = tensors()
    with torch._inductor.config.patch(assert_indirect_indexing=False):
        assert_right(compiled(plain)(*qkv, MASK), qkv, CAUSAL)
    assert (only().route, only().reason.partition(",")[0]) == ("", "Inductor is set to leave assertions out")


def test_inner_graphs_that_are_used_twice():
    inner = torch.fx.symbolic_trace(lambda x: x.sin())
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for _ in range(2):
        x = graph.call_module("inner", (x,))
    graph.output(x)
    outer = torch.fx.GraphModule({"inner": inner}, graph)
    assert [body.obstacle for body in bodies(outer)] == ["", "its part of the graph is used several times"]


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
