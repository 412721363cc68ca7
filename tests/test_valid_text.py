"""Lengths of text per batch entry: masks, block lists, the mask as an object, errors."""

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import dense_blocks, listed_blocks, random_gna, random_tile, tile_places, tiled_mask
from text_cases import BOTH, FIRST, FRONTS, GNAS, LAST, LENGTHS, assert_attends, inputs, keep_of, padded
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from gna_flex import GNA, GNABlockMask, backend, flex, flex_attention, gna_mask
from gna_flex.torch_private import BLOCK_TABLES


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
