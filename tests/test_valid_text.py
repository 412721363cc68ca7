"""Lengths of text per batch entry: masks, block lists, every route that runs on a CPU, compiled callers, errors."""

import copy
import functools
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Exact,
    assert_within_budget,
    dense_attention,
    dense_blocks,
    dense_mask,
    exact_attention,
    gna_id,
    listed_blocks,
    random_gna,
    random_tile,
    tile_places,
    tiled_mask,
)
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
from gna_flex.torch_private import BLOCK_TABLES

BOTH = GNA((5, 7), (3, 4), (2, 1), text_first=9, text_last=6)
LAST = GNA((6, 6), 3, dilation=(2, 1), causal=(False, True), text_last=20)
FIRST = GNA(40, 7, 3, text_first=5)
GNAS = pytest.mark.parametrize("gna", [BOTH, LAST, FIRST], ids=gna_id)
FRONTS = pytest.mark.parametrize("front", [flex_attention, torch_flex_attention], ids=["ours", "torchs"])
LENGTHS = ((0, 1), (1, 0), (3, 3), (5, 2))
"""Lengths ``(first, last)`` of four batch entries; all texts of the masks above are at least as long."""


def keep_of(gna: GNA, lengths: Any = LENGTHS) -> np.ndarray:
    """Kept pairs ``[B, 1, S, S]``, from the definition: keys past the lengths are taken out."""
    keep = np.repeat(dense_mask(gna)[None], len(lengths), 0)
    for entry, (first, last) in enumerate(lengths):
        end = gna.tokens - gna.text_last
        keep[entry, :, first : gna.text_first] = False
        keep[entry, :, end + last :] = False
    return keep[:, None]


def given(gna: GNA, lengths: Any = LENGTHS) -> dict[str, Any]:
    """Arguments of ``with_valid_text`` for the texts that there are."""
    first, last = zip(*lengths, strict=True)
    return ({"first": list(first)} if gna.text_first else {}) | ({"last": list(last)} if gna.text_last else {})


def padded(gna: GNA, lengths: Any = LENGTHS, **options: Any) -> GNABlockMask:
    return gna_mask(gna, device="cpu", **options).with_valid_text(**given(gna, lengths))


def inputs(gna: GNA, batch: int = len(LENGTHS), heads: int = 2, **options: Any) -> list[Tensor]:
    return [torch.randn(batch, heads, gna.tokens, 16, **options) for _ in "qkv"]


def assert_attends(out: Tensor, qkv: list[Tensor], gna: GNA, lengths: Any = LENGTHS, keep: Any = None) -> None:
    keep = keep_of(gna, lengths) if keep is None else keep
    exact, plain = (f(*qkv, keep).out for f in (exact_attention, dense_attention))
    assert_within_budget("out", out, exact, plain)


def evaluated(mask: GNABlockMask, batch: int) -> np.ndarray:
    """The mask_mod on all pairs: ``[B, H, Q, K]``."""
    q_len, kv_len = mask.seq_lengths
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(len(mask.plan.gnas))[:, None, None]
    keep = mask.mask_mod(b, h, torch.arange(q_len)[:, None], torch.arange(kv_len))
    return np.broadcast_to(keep.numpy(), (batch, len(mask.plan.gnas), q_len, kv_len))


def random_lengths(rng: random.Random, gna: GNA) -> list[tuple[int, int]]:
    return [(rng.randint(0, gna.text_first), rng.randint(0, gna.text_last)) for _ in range(rng.randint(1, 3))]


@pytest.mark.parametrize("number", range(6))
def test_random_masks(number):
    """mask_mod and block lists, in natural order and in tile orders."""
    rng = random.Random(number)
    for _ in range(40):
        gna = random_gna(rng, text=(1, 5, 9, 17))
        lengths = random_lengths(rng, gna)
        keep = keep_of(gna, lengths)
        options: dict[str, Any] = {"q_block": rng.choice([2, 8, 16]), "kv_block": rng.choice([1, 4, 16])}
        if number % 2:
            options = {"order": (random_tile(rng, gna.ndim), random_tile(rng, gna.ndim))}
        ours, base = padded(gna, lengths, **options), gna_mask(gna, device="cpu", **options)
        if number % 2:
            places = [tile_places(gna, order.tile) for order in (ours.plan.q_order, ours.plan.kv_order)]
            keep = np.stack([tiled_mask(entry[0], *places)[None] for entry in keep])
            text = (places[1] < gna.text_first) | (places[1] >= gna.tokens - gna.text_last)
            text &= places[1] >= 0
        else:
            text = np.arange(gna.tokens) < gna.text_first
            text |= np.arange(gna.tokens) >= gna.tokens - gna.text_last
        assert (evaluated(ours, len(lengths)) == keep).all(), (gna, lengths, options)
        assert_demoted(ours, base, text)


def assert_demoted(ours: GNABlockMask, base: GNABlockMask, text: np.ndarray) -> None:
    """The blocks of ``base``, all of which are visited, but those with ``text`` keys are not full."""
    rows, columns = ours.plan.block_counts
    starts = range(0, len(text), ours.plan.kv_block)
    with_text = np.array([text[start : start + ours.plan.kv_block].any() for start in starts])
    for side, shape, cut in (("kv", (rows, columns), with_text), ("q", (columns, rows), with_text[:, None])):
        partial, full = (
            [
                listed_blocks(getattr(m, name + "_num_blocks")[0, 0], getattr(m, name + "_indices")[0, 0], shape[1])
                for m in (ours, base)
            ]
            for name in (side, f"full_{side}")
        )
        assert (full[0] == full[1] & ~cut).all()
        assert (partial[0] == partial[1] | (full[1] & cut)).all()
    assert ours.counts.visited == base.counts.visited
    assert ours.counts.full == int(ours.full_kv_num_blocks.sum())


def test_blocks_without_text_stay_full():
    gna = GNA.blocked((16, 16), 8, text_last=16)
    ours = padded(gna, [(0, 3)], order=(4, 4))
    assert ours.counts.full == 16 * 4 + 16
    keep = tiled_mask(keep_of(gna, [(0, 16)])[0, 0], *[tile_places(gna, (4, 4))] * 2)
    assert dense_blocks(keep, 16, 16)[1].sum() == 17 * 17 - 16 * 12


def test_narrow_tables(monkeypatch):
    monkeypatch.setattr("gna_flex.mask.FULL_WIDTH_ENTRIES", 1)
    for gna in (BOTH, LAST, FIRST):
        for options in ({"q_block": 8, "kv_block": 4}, {"order": (4,) * gna.ndim}):
            ours = padded(gna, **options)
            tables = [getattr(ours, name) for name in BLOCK_TABLES]
            assert len({(table.shape[-1], table.stride()) for table in tables[1:4:2]}) == 1
            qkv = inputs(gna)
            if "order" not in options:
                with backend("reference"):
                    assert_attends(flex_attention(*qkv, block_mask=ours.canonical()), qkv, gna)


def banned(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx + kv_idx) % 3 != 0


@GNAS
@pytest.mark.parametrize("tiled", [False, True], ids=["natural", "tiles"])
def test_with_a_further_condition(gna, tiled):
    ours = padded(gna, and_mask=banned, **({"order": (4,) * gna.ndim} if tiled else {}))
    q, k = np.indices((gna.tokens, gna.tokens))
    keep = keep_of(gna) & ((q + k) % 3 != 0)
    if tiled:
        places = tile_places(gna, ours.plan.q_order.tile)
        keep = np.stack([tiled_mask(entry[0], places, places)[None] for entry in keep])
    assert (evaluated(ours, len(LENGTHS)) == keep).all()
    assert ours.counts.full == 0
    if not tiled:
        qkv = inputs(gna)
        assert_attends(flex_attention(*qkv, block_mask=ours), qkv, gna, keep=keep)


def test_a_mask_per_head():
    gnas = [GNA((5, 7), 3, text_last=8), GNA((5, 7), (5, 2), causal=True, text_last=8)]
    ours = gna_mask(gnas, device="cpu").with_valid_text(last=[8, 0, 5])
    keep = np.concatenate([keep_of(gna, [(0, 8), (0, 0), (0, 5)]) for gna in gnas], 1)
    assert (evaluated(ours, 3) == keep).all()
    qkv = inputs(gnas[0], 3)
    for out in (flex_attention(*qkv, block_mask=ours), flex.kernel_attention(*qkv, ours, None)[0]):
        assert_attends(out, qkv, gnas[0], keep=keep)


# Routes


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> CompileCounterWithBackend:
    """``torch.compile`` without code generation, counting its graphs."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


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
def test_flex_routes_compile_once(quick_compiler, gna, route):
    mask = gna_mask(gna, device="cpu")
    qkv = inputs(gna)
    with backend(route):
        assert explain(*qkv, mask).name == route
        for shift in range(4):
            lengths = [((first + shift) % 6, (last + 2 * shift) % 6) for first, last in LENGTHS]
            ours = mask.with_valid_text(**given(gna, lengths))
            assert_attends(flex_attention(*qkv, block_mask=ours), qkv, gna, lengths)
        assert quick_compiler.frame_count == len(flex._compiled) == 1
        assert_attends(flex_attention(*qkv, block_mask=mask), qkv, gna, [(gna.text_first, gna.text_last)] * 4)
        assert quick_compiler.frame_count == len(flex._compiled) == 2


@pytest.mark.parametrize("route", ["flex", "flex-tiles"])
def test_flex_routes_share_a_function_for_batch_sizes(quick_compiler, route):
    mask = gna_mask(BOTH, device="cpu")
    with backend(route):
        for batch in (2, 3, 4, 5, 2):
            lengths = [(b, 6 - b) for b in range(batch)]
            qkv = inputs(BOTH, batch)
            assert_attends(
                flex_attention(*qkv, block_mask=mask.with_valid_text(**given(BOTH, lengths))), qkv, BOTH, lengths
            )
    assert len(flex._compiled) == 1
    assert quick_compiler.frame_count <= 3


@pytest.mark.slow
@pytest.mark.parametrize("route", ["flex", "flex-tiles"])
@pytest.mark.parametrize("batch", [1, 4])
def test_flex_routes_in_generated_code(fresh_compiler, route, batch):
    mask = gna_mask(BOTH, device="cpu")
    qkv = inputs(BOTH, batch)
    with backend(route), torch.no_grad():
        for lengths in (LENGTHS[:batch], LENGTHS[::-1][:batch]):
            for front in (flex_attention, torch_flex_attention):
                out = front(*qkv, block_mask=mask.with_valid_text(**given(BOTH, lengths)))
                assert_attends(out, qkv, BOTH, lengths)
    assert len(flex._compiled) == 2, "one for each front end, as torch's names the scale"


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
def test_eager_calls_of_a_gpu(quick_compiler, tiles):
    """There the compiled function permutes tokens itself."""
    statics = flex.Statics(scale=None, enable_gqa=False, lse=True, top=False, kernel_options=())
    mask = gna_mask(BOTH, device="cpu")
    qkv = inputs(BOTH)
    for lengths in (LENGTHS, LENGTHS[::-1]):
        ours = mask.with_valid_text(**given(BOTH, lengths))
        order = ours.tiles if tiles else None
        function = flex.compiled(statics, ours, order, *qkv, False, None)
        assert_attends(function(statics, *qkv, ours.plain, None, order)[0], qkv, BOTH, lengths)
    assert quick_compiler.frame_count == len(flex._compiled) == 1


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


# The mask as an object


def test_lengths_are_a_tensor_of_the_mask():
    mask = gna_mask(BOTH, device="cpu")
    assert mask.valid_text is None
    for lengths in ([9, 0, 4], (9, 0, 4), torch.tensor([9, 0, 4]), torch.tensor([9, 0, 4], dtype=torch.uint8)):
        valid = mask.with_valid_text(first=lengths).valid_text
        assert (valid.dtype, valid.is_contiguous(), valid.device) == (torch.int32, True, mask.device)
        assert valid.tolist() == [[9, 6], [0, 6], [4, 6]]
    lengths = torch.tensor([9, 0, 4], dtype=torch.int32)
    ours = mask.with_valid_text(first=lengths, last=[1, 2, 3])
    lengths.zero_()
    assert ours.valid_text.tolist() == [[9, 1], [0, 2], [4, 3]]
    assert ours.with_valid_text(last=[5]).valid_text.tolist() == [[9, 5]]


def test_tables_are_built_once(monkeypatch):
    mask = gna_mask(BOTH, device="cpu")
    first = mask.with_valid_text(last=[1])
    tiles = first.tiles
    monkeypatch.setattr("gna_flex.mask._tables", None)
    for other in (mask.with_valid_text(last=[1, 2]), first.with_valid_text(first=[3])):
        for name in BLOCK_TABLES:
            assert getattr(other, name) is getattr(first, name) is getattr(other.plain, name)
            assert getattr(other.tiles.block_mask, name) is getattr(tiles.block_mask, name)
        assert other.plan == first.plan != mask.plan
        assert other.tiles.permute is tiles.permute
        assert other.handle != first.handle


@pytest.mark.parametrize("copier", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, copy.copy])
def test_copies_are_whole(copier):
    ours = padded(BOTH)
    other = copier(ours)
    assert (type(other), other.plan, repr(other)) == (GNABlockMask, ours.plan, repr(ours))
    assert torch.equal(other.valid_text, ours.valid_text)
    assert all(torch.equal(getattr(other, name), getattr(ours, name)) for name in BLOCK_TABLES)
    qkv = inputs(BOTH)
    assert_attends(flex_attention(*qkv, block_mask=other), qkv, BOTH)


def test_moves_and_canonical_form():
    ours = padded(BOTH)
    there = ours.to("meta")
    assert (there.device.type, there.valid_text.device.type, there.plan) == ("meta", "meta", ours.plan)
    assert ours.to("cpu") is ours
    qkv = inputs(BOTH)
    assert_attends(torch_flex_attention(*qkv, block_mask=ours.canonical()), qkv, BOTH)
    assert_attends(torch_flex_attention(*qkv, block_mask=ours.plain), qkv, BOTH)
    assert torch.equal(ours.to_dense(), gna_mask(BOTH, device="cpu").to_dense())


def test_descriptions():
    ours = padded(BOTH)
    assert "6 text tokens last; lengths of text for batches of 4; order row-major" in repr(ours)
    assert str(ours).startswith(repr(ours))
    assert ours.gna is BOTH
    assert str(ours.report()) == str(gna_mask(BOTH, device="cpu").report())


@pytest.mark.parametrize(
    ("gna", "arguments", "words"),
    [
        pytest.param(BOTH, {}, "give first, last or both.*layout 5x7", id="nothing"),
        pytest.param(LAST, {"first": [1]}, r"first=\[1\]: layout 6x6.*text_first=0", id="no-first"),
        pytest.param(FIRST, {"last": torch.ones(2)}, r"last=tensor.*\(2,\): layout 40.*text_last=0", id="no-last"),
        pytest.param(BOTH, {"last": [3, 7]}, r"last\[1\]=7, but layout 5x7.*from 0 to 6", id="too-long"),
        pytest.param(BOTH, {"first": torch.tensor([-1])}, r"first\[0\]=-1, but layout 5x7.*from 0 to 9", id="negative"),
        pytest.param(BOTH, {"last": [2**40]}, rf"last\[0\]={2**40}", id="beyond-32-bits"),
        pytest.param(BOTH, {"last": [[1, 2]]}, r"last has shape \(1, 2\).*layout 5x7.*\[B\]", id="shape"),
        pytest.param(BOTH, {"last": torch.tensor(1)}, r"last has shape \(\)", id="scalar"),
        pytest.param(BOTH, {"last": []}, r"last has shape \(0,\)", id="empty"),
        pytest.param(BOTH, {"last": [1.0]}, "last is of torch.float32.*layout 5x7.*integers", id="floats"),
        pytest.param(BOTH, {"last": [True]}, "last is of torch.bool", id="flags"),
        pytest.param(
            BOTH, {"first": [1], "last": [1, 2]}, r"first and last have \[1, 2\] lengths", id="batches-differ"
        ),
    ],
)
def test_errors(gna, arguments, words):
    with pytest.raises(ValueError, match=words):
        gna_mask(gna, device="cpu").with_valid_text(**arguments)


def test_batch_of_the_mask():
    with pytest.raises(ValueError, match="lengths of 2 batch entries, but the mask was made for 3"):
        gna_mask(BOTH, device="cpu", B=3).with_valid_text(last=[1, 2])
    lengths = LENGTHS[:3]
    qkv = inputs(BOTH, 3)
    assert_attends(flex_attention(*qkv, block_mask=padded(BOTH, lengths, B=3)), qkv, BOTH, lengths)


@FRONTS
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("batch", [1, 3])
def test_other_batch_sizes_are_refused(front, how, batch, fresh_compiler):
    function = front if how == "eager" else torch.compile(front, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=f"text lengths of {batch} batch entries"):
        function(*inputs(BOTH, 2), block_mask=padded(BOTH, LENGTHS[:batch]))


def test_lengths_inside_a_compiled_function(fresh_compiler):
    mask = gna_mask(BOTH, device="cpu")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask.with_valid_text(last=[1, 2, 3, 4]))

    with pytest.raises(Exception, match="call it outside"):
        torch.compile(call, fullgraph=True, backend="eager")(*inputs(BOTH))
