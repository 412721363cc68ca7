"""Masks with text tokens around a grid are recognised, and what is not quite one is refused."""

import itertools
import random
from typing import Any

import pytest
import torch
from helpers import dense_mask, dim_mask, one_dim_sets, random_gna
from hypothesis import given, settings
from hypothesis import strategies as st
from recognised import (
    SMALL,
    causal,
    clamped_center,
    dense,
    found,
    refused,
    where_edges,
)
from torch.nn.attention.flex_attention import and_masks, create_block_mask

from gna_flex import GNA, TileOrder
from gna_flex.mask_mod import mask_mod
from gna_flex.symbolic.recognise import recognise


def test_attention_gym_with_text():
    """Text follows the tiles. Without an order a last dimension of the grid is inside of a tile."""
    masks = pytest.importorskip("attn_gym.masks")
    gna = GNA((8, 12), (4, 9), (4, 3), text_last=24)
    order = TileOrder(gna, (4, 3))
    sta = masks.generate_sta_mask_mod_2d((8, 12), (4, 9), (4, 3), 24)
    assert recognise(sta, order=order).gna == gna
    assert found(sta, layout=(2, 4, 12), text_last=24) == GNA((2, 4, 12), (1, 3, 12), text_last=24)
    assert found(sta, q_len=120).text_last == 24
    assert "padding sees key" in refused(
        masks.generate_sta_mask_mod_2d((8, 12), (4, 9), (4, 3), 20),
        order=TileOrder(GNA((8, 12), 1, text_last=20), (4, 3)),
    )
    assert "text does not see key" in refused(sta, layout=(2, 4, 12), text_last=25)
    cube = masks.generate_sta_mask_mod_3d((4, 8, 12), (2, 8, 6), (2, 4, 3), 31)
    assert found(cube, q_len=415) == GNA((4, 4, 24), (2, 2, 24), (2, 1, 1), text_last=31)


def test_text_by_hand():
    gna = GNA((5, 7), 3, text_first=2, text_last=4)

    def mod(b, h, q_idx, kv_idx):
        near = clamped_center(GNA((5, 7), 3))(b, h, q_idx - 2, kv_idx - 2)
        text = torch.where((q_idx < 2) | (q_idx >= 37), True, (kv_idx < 2) | (kv_idx > 36))
        return torch.where(text, text, near)

    assert found(mod, layout=(5, 7), text_first=2, text_last=4) == gna
    assert "see" in refused(mod, layout=(5, 7), text_first=3, text_last=3)
    assert "text does not see key 40" in refused(
        lambda b, h, q, k: mod(b, h, q, k) & (k != 40), layout=(5, 7), text_first=2, text_last=4
    )
    assert "tokens" in refused(create_block_mask(mod, None, None, 41, 41, device="cpu"), layout=(5, 7))


def text_or(near, first, end):
    def mod(b, h, q, k):
        keep = near(b, h, q - first, k - first) | (q >= end) | (k >= end)
        return (q < first) | (k < first) | keep if first else keep

    return mod


def text_where(near, first, end):
    def mod(b, h, q, k):
        text = torch.logical_or((q < first) | (q > end - 1), (k < first) | (k > end - 1))
        return torch.where(text, True, near(b, h, q - first, k - first))

    return mod


def text_parts(near, first, end):
    """As sliding tile attention has it: grid to grid, grid to text, text to all."""

    def mod(b, h, q, k):
        grid_q, grid_k = (q >= first) & (q < end), (k >= first) & (k < end)
        return (grid_q & grid_k & near(b, h, q - first, k - first)) | (grid_q & ~grid_k) | ~grid_q

    return mod


def text_not(near, first, end):
    """Only pairs of the grid can be left out; indices are kept inside of the grid."""

    def mod(b, h, q, k):
        i, j = ((x - first).clamp(0, end - first - 1) for x in (q, k))
        return ~((q - first == i) & (k - first == j) & ~near(b, h, i, j))

    return mod


def text_table(near, first, end):
    """Tables of which tokens are text, and of the grid token of every token."""
    places = torch.arange(end + 100)
    is_text, place = (places < first) | (places >= end), (places - first).clamp(0, end - first - 1)

    def mod(b, h, q, k):
        return is_text[q] | is_text[k] | near(b, h, place[q], place[k])

    return mod


WITH_TEXT = (text_or, text_where, text_parts, text_not, text_table)
AROUND = ((0, 5), (4, 0), (3, 6), (77, 0), (0, 90), (1, 1))


@pytest.mark.parametrize("style", WITH_TEXT)
def test_text_is_found(style):
    """With the layout of masks without text, and nothing given but the number of tokens."""
    for near, gna in (
        (clamped_center(GNA((9, 14), (3, 7))), GNA((9, 14), (3, 7))),
        (where_edges(GNA((4, 6, 5), (2, 5, 3))), GNA((4, 6, 5), (2, 5, 3))),
        (and_masks(causal, lambda b, h, q, k: q - k < 8), GNA(40, 8, causal=True)),
    ):
        for first, last in AROUND:
            text = GNA(gna.layout, gna.window, causal=gna.causal, text_first=first, text_last=last)
            assert found(style(near, first, first + gna.tokens), q_len=text.tokens) == text


@settings(max_examples=30)
@given(st.integers(0, 1 << 30), st.sampled_from(WITH_TEXT), st.integers(0, 9), st.integers(0, 9))
def test_random_masks_with_text(seed, style, first, last):
    """Found wherever they are found without text, and as what they are."""
    gna = random_gna(random.Random(seed), sizes=SMALL, text=(0,))
    near = mask_mod((gna,))
    alone = recognise(near, q_len=gna.tokens)
    mod = style(near, first, first + gna.tokens)
    result = recognise(mod, q_len=first + gna.tokens + last)
    assert bool(result) == bool(alone), (alone, result)
    if result:
        assert (dense_mask(result.gna) == dense(mod, result.gna.tokens)).all()
        everything = dense_mask(gna).all()
        wanted = (0, 0) if everything else (first, last)
        assert (result.gna.text_first, result.gna.text_last) == wanted


@pytest.mark.parametrize("style", WITH_TEXT)
def test_text_that_is_not_quite(style):
    """One of the two ends off by one, in what sees or in what is seen: never recognised as anything that it is not."""
    gna = GNA((6, 7), (3, 5))
    near = clamped_center(gna)
    first, end, tokens = 3, 45, 50
    mod = style(near, first, end)
    cuts = {
        "no text key seen by the grid": lambda q, k: (q < first) | (q >= end) | ((k >= first) & (k < end)),
        "text sees no grid": lambda q, k: ((q >= first) & (q < end)) | (k < first) | (k >= end),
        "padded text": lambda q, k: k < tokens - 1,
        "one text query": lambda q, k: (q != 1) | (k != 20),
        "one text key": lambda q, k: (q != 20) | (k != 47),
        "text is causal": lambda q, k: (q < end) | (q >= k),
    }
    for name, cut in cuts.items():
        reason = refused(lambda b, h, q, k, cut=cut: mod(b, h, q, k) & cut(q, k), q_len=tokens)
        assert "query" in reason or "dimension" in reason, (name, reason)
    for q0, k0 in itertools.product((first, end - 1), repeat=2):
        mixed = lambda b, h, q, k, q0=q0, k0=k0: mod(b, h, q, k) | (q == q0) | (k == k0)  # noqa: E731
        result = recognise(mixed, q_len=tokens)
        assert not result or (dense_mask(result.gna) == dense(mixed, tokens)).all()


def test_text_of_heads_that_differ():
    """Text is what is text for all heads; one of them may be dense."""
    windows: list[dict[str, Any]] = [{"window": 3}, {"window": (5, 4), "causal": True}, {"window": -1}]
    mod = text_or(mask_mod(tuple(GNA((6, 7), **options) for options in windows)), 4, 46)
    gnas = tuple(GNA((6, 7), **options, text_first=4, text_last=3) for options in windows)
    assert recognise(mod, q_len=49, heads=3).gna == gnas
    assert recognise(create_block_mask(mod, None, 3, 49, 49, device="cpu")).gna == gnas
    only_first_head = lambda b, h, q, k: mod(b, h, q, k) & ((h == 0) | (q < 46))  # noqa: E731
    assert "text" in refused(only_first_head, q_len=49, heads=3, text_first=4, text_last=3)
    assert not recognise(only_first_head, q_len=49, heads=3)


def test_a_grid_with_text_has_no_other_token_that_is_like_text():
    """What finding text relies on, over all one-dimensional neighborhoods: nothing or everything sees all of them."""
    for length, *parameters in one_dim_sets(12):
        keep = dim_mask(length, *parameters)
        like_text = keep.all(0) & keep.all(1)
        assert like_text.all() == like_text.any()


def test_text_that_is_nearly_everything():
    """A grid too small to be found among its text is not recognised; with the text given it is."""
    gna = GNA(8, 3, text_first=1020, text_last=1000)
    mod = mask_mod((gna,))
    assert recognise(mod, text_first=1020, text_last=1000, q_len=gna.tokens).gna == gna
    assert "not one window" in refused(mod, q_len=gna.tokens)
    assert found(lambda b, h, q, k: q >= 0, q_len=500) == GNA.dense(500)
