"""Compiled callers, torch's own front end, and one compiled function per plan."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_within_budget, dense_attention, dense_mask, exact_attention
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.utils.checkpoint import checkpoint

from gna_flex import GNA, backend, flex, flex_attention, gna_mask
from gna_flex.torch_private import flex_attention_hop

pytestmark = pytest.mark.usefixtures("fresh_compiler")

GRID = GNA((6, 9), (3, 4), (2, 1), text_last=5)
FRONTS = pytest.mark.parametrize("front", [flex_attention, torch_flex_attention], ids=["ours", "torchs"])
COMPILERS = pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


def inputs(gna: GNA = GRID, batch: int = 2, heads: int = 2, kv_heads: int = 2, **options: Any) -> list[Tensor]:
    return [torch.randn(batch, h, gna.tokens, 16, **options) for h in (heads, kv_heads, kv_heads)]


def assert_attends(
    out: Tensor, qkv: list[Tensor], gna: GNA = GRID, then: Callable[[Tensor], Tensor] = lambda x: x, **options
):
    """``out`` is ``then`` of attention under the mask."""
    exact, plain = (then(f(*qkv, dense_mask(gna), **options).out) for f in (exact_attention, dense_attention))
    assert_within_budget("out", out, exact, plain)


def six(tokens: int = 28) -> list[GNA]:
    """Six masks of one length, by default one that compiled attention takes on every CPU; see ``routing.cpu_fault``."""
    return [GNA((4, tokens // 4), (w, x)) for w in (1, 2, 4) for x in (2, 5)]


LIMIT = 3
MANY = LIMIT + 1
"""More than torch compiles one function for, under a low limit."""


@pytest.fixture
def low_limit() -> Iterator[None]:
    """torch compiles a function three times at most, not eight times: few calls show what happens beyond that."""
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield


def linear_bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + 0.1 * (q_idx - kv_idx)


def linear_bias_matrix(tokens: int) -> Tensor:
    return 0.1 * (torch.arange(tokens)[:, None] - torch.arange(tokens))


@FRONTS
class TestFrontEnds:
    def test_eager(self, front):
        qkv = inputs()
        assert_attends(front(*qkv, block_mask=gna_mask(GRID, device="cpu")), qkv)

    def test_eager_grouped_heads(self, front):
        qkv = inputs(heads=4, kv_heads=2)
        assert_attends(front(*qkv, block_mask=gna_mask(GRID, device="cpu"), enable_gqa=True), qkv)

    def test_eager_score_mod_and_scale(self, front):
        qkv = inputs()
        out = front(*qkv, linear_bias, gna_mask(GRID, device="cpu"), 0.0)
        assert_attends(out, qkv, scale=0.0, bias=linear_bias_matrix(GRID.tokens))

    def test_eager_statistics(self, front):
        qkv = inputs()
        out, lse = front(*qkv, block_mask=gna_mask(GRID, device="cpu"), return_lse=True)
        assert_attends(out, qkv)
        exact, plain = (f(*qkv, dense_mask(GRID)).lse for f in (exact_attention, dense_attention))
        assert_within_budget("lse", lse, exact, plain)

    def test_eager_with_many_masks(self, front):
        qkv = inputs(six()[0])
        for gna in six():
            assert_attends(front(*qkv, block_mask=gna_mask(gna, device="cpu")), qkv, gna)

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_eager_without_gradients(self, front, mode):
        qkv = inputs()
        with mode():
            out = front(*qkv, block_mask=gna_mask(GRID, device="cpu"))
        assert_attends(out, qkv)

    def test_eager_autocast(self, front):
        qkv = inputs()
        halves = [x.bfloat16() for x in qkv]
        with torch.autocast("cpu", torch.bfloat16):
            out = front(*qkv, block_mask=gna_mask(GRID, device="cpu"))
        assert out.dtype == torch.bfloat16
        assert_attends(out, halves)

    def test_eager_in_tile_order_plain_block_masks(self, front):
        """Slices and the plain twin of a mask are ordinary BlockMasks."""
        qkv = inputs()
        assert_attends(front(*qkv, block_mask=gna_mask(GRID, device="cpu").plain), qkv)

    @COMPILERS
    def test_compiled_with_epilogue(self, front, compiler):
        mask = gna_mask(GRID, device="cpu")
        qkv = inputs()
        compiled = torch.compile(
            lambda q, k, v: front(q * 2, k, v, block_mask=mask).relu() + 1, fullgraph=True, backend=compiler
        )
        out = compiled(*qkv)
        assert_attends(out, [qkv[0] * 2, *qkv[1:]], then=lambda x: x.relu() + 1)

    @COMPILERS
    def test_compiled_mask_as_argument(self, front, compiler):
        qkv = inputs()
        compiled = torch.compile(
            lambda q, k, v, mask: front(q, k, v, block_mask=mask), fullgraph=True, backend=compiler
        )
        other = GNA((9, 6), (4, 3), causal=(False, True), text_last=5)
        masks = {gna: gna_mask(gna, device="cpu") for gna in (GRID, other)}
        for _ in range(2):
            for gna, mask in masks.items():
                assert_attends(compiled(*qkv, mask), qkv, gna)

    @COMPILERS
    def test_compiled_score_mod(self, front, compiler):
        mask = gna_mask(GRID, device="cpu")
        qkv = inputs()
        compiled = torch.compile(lambda q, k, v: front(q, k, v, linear_bias, mask), fullgraph=True, backend=compiler)
        assert_attends(compiled(*qkv), qkv, bias=linear_bias_matrix(GRID.tokens))

    @COMPILERS
    def test_compiled_statistics(self, front, compiler):
        mask = gna_mask(GRID, device="cpu")
        qkv = inputs(heads=4, kv_heads=2)
        compiled = torch.compile(
            lambda q, k, v: front(q, k, v, block_mask=mask, return_lse=True, enable_gqa=True),
            fullgraph=True,
            backend=compiler,
        )
        out, lse = compiled(*qkv)
        assert_attends(out, qkv)
        exact, plain = (f(*qkv, dense_mask(GRID)).lse for f in (exact_attention, dense_attention))
        assert_within_budget("lse", lse, exact, plain)

    def test_compiled_per_head_masks(self, front):
        heads = (GRID, GNA((6, 9), (6, 2), causal=True, text_last=5))
        mask = gna_mask(heads, device="cpu")
        qkv = inputs()
        compiled = torch.compile(lambda q, k, v: front(q, k, v, block_mask=mask), fullgraph=True, backend="aot_eager")
        out = compiled(*qkv)
        for h, gna in enumerate(heads):
            assert_attends(out[:, h : h + 1], [x[:, h : h + 1] for x in qkv], gna)

    @pytest.mark.parametrize("dynamic", [None, True, False], ids=["automatic", "dynamic", "static"])
    def test_compiled_batch_sizes(self, front, dynamic):
        mask = gna_mask(GRID, device="cpu")
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(
            lambda q, k, v: front(q, k, v, block_mask=mask), fullgraph=True, backend=counter, dynamic=dynamic
        )
        batches = (2, 3, 7)
        for batch in batches:
            qkv = inputs(batch=batch)
            assert_attends(compiled(*qkv), qkv)
        # A graph for one batch size and one for all others; an analysis that torch restarts counts twice.
        assert counter.frame_count == len(batches) if dynamic is False else counter.frame_count <= 3

    def test_compiled_autocast(self, front):
        mask = gna_mask(GRID, device="cpu")
        qkv = inputs()
        compiled = torch.compile(lambda q, k, v: front(q, k, v, block_mask=mask), fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            out = compiled(*qkv)
        assert out.dtype == torch.bfloat16
        assert_attends(out, [x.bfloat16() for x in qkv])

    def test_compiled_without_gradients(self, front):
        mask = gna_mask(GRID, device="cpu")
        qkv = inputs()
        compiled = torch.compile(lambda q, k, v: front(q, k, v, block_mask=mask), fullgraph=True, backend="aot_eager")
        with torch.inference_mode():
            assert_attends(compiled(*qkv), qkv)

    @pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
    @pytest.mark.usefixtures("low_limit")
    def test_compiled_with_many_masks(self, front, compiler):
        """Past torch's limit of recompilations the caller runs uncompiled; it must stay right."""
        compiled = torch.compile(lambda q, k, v, mask: front(q, k, v, block_mask=mask) * 2, backend=compiler)
        qkv = inputs(six()[0])
        for gna in six()[:MANY]:
            assert_attends(compiled(*qkv, gna_mask(gna, device="cpu")), qkv, gna, then=lambda x: x * 2)


class Block(nn.Module):
    """A model that holds its mask."""

    def __init__(self, gna: GNA, width: int = 32) -> None:
        super().__init__()
        self.mask = gna_mask(gna, device="cpu")
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
        return self.out(flex_attention(q, k, v, block_mask=self.mask).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x)


class CheckpointedBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.attend, x, use_reentrant=False)


def train(model: nn.Module, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients of all parameters and the input after two steps."""
    x = torch.linspace(-1, 1, 2 * GRID.tokens * 32).view(2, GRID.tokens, 32).requires_grad_()
    for _ in range(2):
        model.zero_grad()
        run(x).square().sum().backward()
    return {"x": x.grad} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("compiler", "kind"),
    [
        *itertools.product(["none", "aot_eager"], [Block, CheckpointedBlock]),
        # Without checkpoints, test_compile_modes.py trains in generated code.
        pytest.param("inductor", CheckpointedBlock, marks=pytest.mark.slow),
    ],
)
def test_training(kind, compiler):
    torch.manual_seed(1)
    model = Block(GRID)
    keep = torch.from_numpy(dense_mask(GRID))

    def dense(x: Tensor) -> Tensor:
        q, k, v = model.qkv(x).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
        return x + model.out(dense_attention(q, k, v, keep).out.transpose(1, 2).flatten(2))

    expected = train(model, dense)
    other = kind(GRID)
    other.load_state_dict(model.state_dict())
    run = other if compiler == "none" else torch.compile(other, fullgraph=True, backend=compiler)
    for name, gradient in train(other, run).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_training_through_compiled_statistics():
    mask = gna_mask(GRID, device="cpu")

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, aux = flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True, max_scores=True))
        return out.square().sum() + aux.lse.sum() + aux.max_scores.sum()

    first, second = ([x.requires_grad_() for x in qkv] for qkv in (inputs(dtype=torch.float64), inputs()))
    for x, y in zip(first, second, strict=True):
        y.data.copy_(x.data)
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*second).backward()
    exact = dense_attention(*first, dense_mask(GRID))
    (exact.out.square().sum() + exact.lse.sum() + exact.top.sum()).backward()
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(y.grad.double(), x.grad, rtol=1e-4, atol=1e-4)


def test_torchs_front_end_keeps_its_own_errors():
    qkv = inputs()
    mask = gna_mask(GRID, device="cpu")
    with pytest.raises(NotImplementedError, match=r"[Mm]ax scores"):
        torch_flex_attention(*qkv, block_mask=mask, return_aux=AuxRequest(max_scores=True))
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        torch_flex_attention(qkv[0].requires_grad_(), *qkv[1:], block_mask=mask)


@pytest.mark.usefixtures("low_limit")
@pytest.mark.parametrize("route", ["flex", "flex-tiles"])
class TestOneFunctionPerPlan:
    def test_many_masks(self, counting_compiler, route, caplog):
        qkv = inputs(six()[0])
        with backend(route), caplog.at_level(logging.WARNING):
            for _ in range(2):
                for gna in six()[:MANY]:
                    assert_attends(flex_attention(*qkv, block_mask=gna_mask(gna, device="cpu")), qkv, gna)
        assert counting_compiler.frame_count == len(flex._compiled) == MANY
        assert "recompile_limit" not in caplog.text

    def test_batch_sizes_share_a_function(self, counting_compiler, route):
        mask = gna_mask(GRID, device="cpu")
        with backend(route):
            for batch in (2, 3, 4, 5, 9, 2):
                qkv = inputs(batch=batch)
                assert_attends(flex_attention(*qkv, block_mask=mask), qkv)
        assert len(flex._compiled) == 1
        assert counting_compiler.frame_count <= 2

    def test_types_and_head_dims_have_functions_of_their_own(self, counting_compiler, route):
        mask = gna_mask(GRID, device="cpu")
        with backend(route):
            for dtype in (torch.float32, torch.bfloat16):
                for dim in range(8, 8 + MANY // 2):
                    qkv = [x[..., :1].expand(-1, -1, -1, dim) for x in inputs(dtype=dtype)]
                    assert_attends(flex_attention(*qkv, block_mask=mask), qkv)
        assert counting_compiler.frame_count == len(flex._compiled) == MANY

    def test_scales_have_functions_of_their_own(self, counting_compiler, route):
        mask = gna_mask(GRID, device="cpu")
        qkv = inputs()
        with backend(route):
            for scale in range(MANY):
                assert_attends(flex_attention(*qkv, block_mask=mask, scale=scale / 10), qkv, scale=scale / 10)
        assert counting_compiler.frame_count == len(flex._compiled) == MANY

    def test_tables_captured_by_one_score_mod(self, counting_compiler, route):
        mask = gna_mask(GRID, device="cpu")
        qkv = inputs()
        with backend(route), torch.no_grad():
            for _ in range(MANY):
                table = torch.randn(2, GRID.tokens, GRID.tokens)
                out = flex_attention(*qkv, lambda s, b, h, i, j, t=table: s + t[h, i, j], mask)
                assert_attends(out, qkv, bias=table)
        assert counting_compiler.frame_count == len(flex._compiled) == 1

    @pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
    def test_many_score_mods(self, counting_compiler, route, wrapped):
        """Each has code of its own, also inside a wrapper that all share."""
        mask = gna_mask(GRID, device="cpu")
        qkv = inputs()

        def twice(score_mod: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda s, b, h, i, j: score_mod(score_mod(s, b, h, i, j), b, h, i, j)

        with backend(route), torch.no_grad():
            for slope in range(MANY):
                score_mod = eval(f"lambda s, b, h, i, j: s + {slope} * 0.01 * (i - j)")
                out = flex_attention(*qkv, twice(score_mod) if wrapped else score_mod, mask)
                assert_attends(out, qkv, bias=(2 if wrapped else 1) * slope * 0.1 * linear_bias_matrix(GRID.tokens))

    def test_numbers_captured_by_one_score_mod(self, counting_compiler, route):
        """A slope per layer, as a Python float."""
        mask = gna_mask(GRID, device="cpu")
        qkv = inputs()

        def slope(x: float) -> Callable[..., Tensor]:
            return lambda s, b, h, i, j: s + x * (i - j)

        with backend(route), torch.no_grad():
            for layer in range(MANY):
                out = flex_attention(*qkv, slope(0.01 * layer), mask)
                assert_attends(out, qkv, bias=0.1 * layer * linear_bias_matrix(GRID.tokens))

    def test_rebuilt_masks_share_a_function(self, counting_compiler, route):
        qkv = inputs()
        with backend(route):
            for _ in range(MANY):
                flex_attention(*qkv, block_mask=gna_mask(GRID, device="cpu"))
        assert counting_compiler.frame_count == len(flex._compiled) == 1


def test_warns_once_at_half_of_the_limit(counting_compiler, monkeypatch, caplog):
    monkeypatch.setattr(flex, "COMPILED_LIMIT", 8)
    qkv = inputs(six()[0])
    told = []
    with backend("flex"), caplog.at_level(logging.WARNING, logger="gna_flex"):
        for gna in six():
            flex_attention(*qkv, block_mask=gna_mask(gna, device="cpu"))
            told.append(len([record for record in caplog.records if record.name == "gna_flex"]))
    assert told == [0] * 3 + [1] * 3
    assert "compiled FlexAttention for 4 different combinations" in caplog.text
    assert "Reuse masks and sizes" in caplog.text


def test_least_recently_used_function_is_dropped(counting_compiler, monkeypatch):
    monkeypatch.setattr(flex, "COMPILED_LIMIT", 4)
    masks = [gna_mask(gna, device="cpu") for gna in six()]
    qkv = inputs(six()[0])

    def call(number: int) -> int:
        """Functions compiled by a call."""
        before = counting_compiler.frame_count
        assert_attends(flex_attention(*qkv, block_mask=masks[number]), qkv, six()[number])
        assert len(flex._compiled) <= 4
        return counting_compiler.frame_count - before

    with backend("flex"):
        assert [call(n) for n in (0, 1, 2, 3)] == [1, 1, 1, 1]
        assert [call(n) for n in (0, 4, 0, 2, 3)] == [0, 1, 0, 0, 0]
        assert call(1) == 1


def graphs_of(front: Callable[..., Any], masks: list[BlockMask], tokens: int) -> list[torch.fx.GraphModule]:
    """Graphs that one compiled function makes of calls with these masks."""
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, mask: front(q, q, q, block_mask=mask), fullgraph=True, backend=capture)
    q = torch.randn(1, 2, tokens, 16)
    for mask in masks:
        compiled(q, mask)
    return graphs


def symbolic_sizes(graph: torch.fx.GraphModule) -> list[str]:
    """Symbolic integers among the inputs of a graph, and what its mask functions capture."""
    found = []
    for node in graph.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("example_value"), torch.SymInt):
            found.append(node.name)
        if node.target is flex_attention_hop:
            found += [str(buffer) for buffers in node.args[7:9] for buffer in buffers]
    return found


def closure_mask(window: int) -> BlockMask:
    """A sliding window that captures its window, as most code does it."""

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j < window) & (j - i < window)

    return torch.nn.attention.flex_attention.create_block_mask(mask_mod, None, None, 24, 24, device="cpu")


def test_two_masks_give_no_symbolic_sizes():
    masks = [gna_mask(gna, device="cpu").plain for gna in six(24)[:3]]
    graphs = graphs_of(torch_flex_attention, masks, 24)
    assert [symbolic_sizes(graph) for graph in graphs] == [[]] * 3


def test_captured_integers_do_give_symbolic_sizes():
    """What the test above guards against; without it that test would prove nothing."""
    graphs = graphs_of(torch_flex_attention, [closure_mask(window) for window in (2, 3, 4)], 24)
    assert any(symbolic_sizes(graph) for graph in graphs[1:])


@FRONTS
def test_routed_graphs_have_no_symbolic_sizes(front):
    masks = [gna_mask(gna, device="cpu") for gna in six(24)[:3]]
    graphs = graphs_of(front, masks, 24)
    assert [symbolic_sizes(graph) for graph in graphs] == [[]] * 3


def test_same_mask_rebuilt_is_one_graph():
    masks = [gna_mask(GNA((4, 6), 3), device="cpu").plain for _ in range(4)]
    assert len(graphs_of(torch_flex_attention, masks, 24)) == 1


def test_export():
    """A model with a mask exports as a graph of plain operations."""
    model = Block(GRID).eval()
    x = torch.randn(2, GRID.tokens, 32)
    program = torch.export.export(model, (x,), strict=True)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("route", ["flex", "flex-tiles"])
def test_torchs_front_end_takes_the_compiled_routes(counting_compiler, route):
    """With generated code in test_valid_text_routes.py."""
    qkv = inputs()
    with backend(route):
        out = torch_flex_attention(*qkv, block_mask=gna_mask(GRID, device="cpu"))
    assert len(flex._compiled) == 1
    assert_attends(out, qkv)
    assert math.isfinite(out.sum())


def test_mask_inside_a_compiled_function(fresh_compiler):
    qkv = inputs()

    def block(q, k, v):
        return flex_attention(q, k, v, block_mask=gna_mask(GRID, device="cpu"))

    assert_attends(torch.compile(block, backend="eager")(*qkv), qkv)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="build the mask outside"):
        torch.compile(block, backend="eager", fullgraph=True)(*qkv)
