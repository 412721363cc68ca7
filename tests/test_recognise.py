"""Which foreign masks are a GNA: styles that have to be found, near misses that must not be, and random mutations."""

import functools
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Sizes, dense_mask, dim_mask, gna_id, one_dim_sets, random_gna, random_tile
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, noop_mask

from gna_flex import GNA, TileOrder, gna_mask
from gna_flex.mask_mod import mask_mod
from gna_flex.symbolic import match
from gna_flex.symbolic.exact import Tables, conditions, rows
from gna_flex.symbolic.recognise import keeps, recognise
from gna_flex.symbolic.trace import ElementIndexing, Refused, trace

SMALL = Sizes(one=30, two=8, three=4)


def dense(mod, q_len, kv_len=None, head=0):
    """A mask_mod on all pairs, called by torch's vmap as FlexAttention does."""
    b, h = torch.tensor(0), torch.tensor(head)
    call = torch.vmap(torch.vmap(mod, in_dims=(None, None, None, 0)), in_dims=(None, None, 0, None))
    with ElementIndexing():
        keep = call(b, h, torch.arange(q_len), torch.arange(kv_len or q_len))
    return torch.broadcast_to(keep, (q_len, kv_len or q_len)).numpy()


def found(mod, **options):
    """The recognised GNA of a mask_mod; its dense mask is the mask that torch evaluates."""
    result = recognise(mod, **options)
    assert result, result.reason
    assert isinstance(result.gna, GNA)
    if result.gna.tokens <= 3000:
        assert (dense(mod, result.gna.tokens) == dense_mask(result.gna)).all()
    return result.gna


def refused(mod, **options):
    """The reason why a mask is not recognised."""
    result = recognise(mod, **options)
    assert not result, f"recognised as {result}"
    assert result.gna is None
    assert str(result) == f"not recognised: {result.reason}"
    return result.reason


# Masks of this package.


@pytest.mark.parametrize("number", range(30))
def test_our_mask_mods_in_natural_order(number):
    gna = random_gna(random.Random(number), sizes=SMALL)
    options = {"text_first": gna.text_first, "text_last": gna.text_last}
    assert (dense_mask(found(mask_mod((gna,)), layout=gna.layout, **options)) == dense_mask(gna)).all()


@pytest.mark.parametrize("number", range(20))
def test_our_mask_mods_in_tile_order(number):
    rng = random.Random(number)
    gna = random_gna(rng, sizes=SMALL)
    orders = TileOrder(gna, random_tile(rng, gna.ndim)), TileOrder(gna, random_tile(rng, gna.ndim))
    result = recognise(mask_mod((gna,), *orders), order=orders)
    assert (dense_mask(result.gna) == dense_mask(gna)).all(), result
    assert result.orders == orders
    # Without the order it is another mask: found only if it happens to be a GNA in natural order, too.
    natural = recognise(mask_mod((gna,), *orders), q_len=orders[0].tokens, kv_len=orders[1].tokens)
    if natural:
        assert (dense(mask_mod((gna,), *orders), orders[0].tokens) == dense_mask(natural.gna)).all()


@pytest.mark.parametrize("order", ["row-major", "tiles", (2, 3)])
def test_our_block_masks_carry_their_gna(order):
    gna = GNA((8, 9), (3, 4), (2, 1), causal=(True, False), text_last=3)
    result = recognise(gna_mask(gna, order=order, device="cpu"))
    assert result.gna == gna
    assert result.how == "carried"
    assert (result.orders is None) == (order == "row-major")


def test_changed_block_mask_is_not_trusted():
    mask = gna_mask(GNA((8, 8), 3), device="cpu")
    mask.mask_mod = noop_mask
    assert recognise(mask).gna == GNA.dense(64)
    mask.mask_mod = lambda b, h, q, k: q > k
    assert not recognise(mask)


@pytest.mark.parametrize("order", ["row-major", (4, 4)])
def test_our_block_masks_with_a_condition(order):
    gna = GNA((8, 8), 4, 2)
    assert recognise(gna_mask(gna, order=order, device="cpu", and_mask=lambda b, h, q, k: q >= 0)).gna == gna
    assert not recognise(gna_mask(gna, order=order, device="cpu", and_mask=lambda b, h, q, k: q // 9 == k // 9))
    assert not recognise(gna_mask(gna, order=order, device="cpu", and_mask=lambda b, h, q, k: q >= 1))


def test_one_gna_per_head():
    gnas = GNA((6, 7), 3), GNA((6, 7), (5, 4), causal=True), GNA((6, 7), 3)
    mod = mask_mod(gnas)
    assert recognise(mod, layout=(6, 7), heads=3).gna == gnas
    assert "depends on the head" in refused(mod, layout=(6, 7))
    assert recognise(mod, layout=(6, 7), heads=1).gna == gnas[0]
    assert recognise(create_block_mask(mod, None, 3, 42, 42, device="cpu"), layout=(6, 7)).gna == gnas
    windows = torch.tensor([2, 4])
    by_table = lambda b, h, q, k: (q >= k) & (q - k < windows[h])  # noqa: E731
    assert recognise(by_table, q_len=20, heads=2).gna == (GNA(20, 2, causal=True), GNA(20, 4, causal=True))


# Styles of other people.


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


@pytest.mark.parametrize("length", [1, 2, 300, 5000, 32768])
def test_causal(length):
    assert found(causal, q_len=length) == GNA(length, -1, causal=length > 1)


@pytest.mark.parametrize("length", [100, 4096, 65536])
@pytest.mark.parametrize("look_back", [0, 1, 63])
def test_causal_sliding_window(length, look_back):
    mod = and_masks(lambda b, h, q, k: q - k <= look_back, causal)
    assert found(mod, q_len=length) == GNA(length, look_back + 1, causal=look_back > 0)


def test_long_dimensions_agree_with_short_ones():
    """The two ways to compare a dimension: all pairs, and only where conditions change."""
    for number in range(60):
        gna = random_gna(random.Random(number), 1, sizes=Sizes(one=40), text=(0,))
        if gna.window == (1,) and gna.dilation != (1,):
            continue  # A single key shows no dilation, so nothing tells along which groups the conditions are monotone.
        results = []
        for limit in (10_000, 0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(match, "MATRIX_LENGTH", limit)
                results.append(found(mask_mod((gna,)), layout=gna.layout))
        assert results[0] == results[1], gna


def test_attention_gym():
    masks = pytest.importorskip("attn_gym.masks")
    assert found(masks.causal_mask, q_len=200) == GNA(200, -1, causal=True)
    assert found(masks.generate_sliding_window(16), q_len=200) == GNA(200, 17, causal=True)
    assert found(masks.generate_natten(12, 12, 5, 3), layout=(12, 12)) == GNA((12, 12), (5, 3))
    assert found(masks.generate_natten(12, 12, 5, 3), q_len=144) == GNA((12, 12), (5, 3))
    for width, height in ((12, 8), (8, 12)):
        natten = masks.generate_natten(width, height, 3, 3)
        for layout in ((height, width), (width, height)):
            reason = refused(natten, layout=layout)
            assert "the condition is" in reason or "depends on dimensions" in reason, reason
    # An even kernel is one token too wide there.
    assert recognise(masks.generate_natten(12, 12, 4, 4), layout=(12, 12)).gna in (None, GNA((12, 12), 5))
    order = TileOrder(GNA((8, 12), 1), (4, 3))
    tiled = recognise(masks.generate_tiled_natten(12, 8, 5, 3, 3, 4), order=order)
    assert tiled.gna == GNA((8, 12), (3, 5))
    sta = recognise(masks.generate_sta_mask_mod_2d((8, 12), (4, 9), (4, 3)), order=order)
    assert sta.gna == GNA((8, 12), (4, 9), (4, 3))


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


def wrong_canvas(width, height, window):
    """The sides of the canvas mixed up: rows are kept inside of the width, columns inside of the height."""

    def near(q, k, length):
        start = (q - window // 2).clamp(0, length - window)
        return (k >= start) & (k < start + window)

    def mod(b, h, q_idx, kv_idx):
        return near(q_idx // width, kv_idx // width, width) & near(q_idx % width, kv_idx % width, height)

    return mod


def test_mixed_up_coordinates():
    assert found(wrong_canvas(9, 9, 5), layout=(9, 9)) == GNA((9, 9), 5)
    assert "dimension 0: query" in refused(wrong_canvas(12, 8, 5), layout=(8, 12))
    assert "depends on dimensions" in refused(wrong_canvas(80, 60, 5), layout=(80, 60))
    assert refused(wrong_canvas(12, 8, 5), q_len=96)


@pytest.mark.oracle
@pytest.mark.parametrize("number", range(12))
def test_natten(number):
    from natten.backends.flex import get_na_flex_mask

    rng = random.Random(number)
    gna = random_gna(rng, sizes=SMALL, text=(0,))
    while min(gna.window) < 2:
        gna = random_gna(rng, sizes=SMALL, text=(0,))
    arguments = {"kernel_size": gna.window, "stride": gna.stride, "dilation": gna.dilation, "is_causal": gna.causal}
    theirs = get_na_flex_mask(device="cpu", na_dim=gna.ndim, qkv_shape=gna.layout, **arguments)
    assert (dense_mask(found(theirs.mask_mod, layout=gna.layout)) == dense_mask(gna)).all()
    assert (dense_mask(recognise(theirs, layout=gna.layout).gna) == dense_mask(gna)).all()
    assert recognise(theirs)


def clamped_center(gna):
    """Distance to a center that is kept away from the edges."""
    (height, width), (rows, columns) = gna.layout, gna.window

    def mod(b, h, q_idx, kv_idx):
        center_y = (q_idx // width).clamp(rows // 2, height - 1 - rows // 2)
        center_x = (q_idx % width).clamp(columns // 2, width - 1 - columns // 2)
        near_y = (kv_idx // width - center_y).abs() <= rows // 2
        return near_y & ((kv_idx % width - center_x).abs() <= columns // 2)

    return mod


def chebyshev(gna):
    """The larger of two distances."""
    (height, width), (rows, columns) = gna.layout, gna.window
    assert rows == columns

    def mod(b, h, q_idx, kv_idx):
        y = torch.clamp(torch.div(q_idx, width, rounding_mode="floor"), rows // 2, height - 1 - rows // 2)
        x = torch.clamp(torch.remainder(q_idx, width), rows // 2, width - 1 - rows // 2)
        return torch.maximum((kv_idx // width - y).abs(), (x - kv_idx % width).abs()) <= rows // 2

    return mod


def window_start(gna):
    """``start <= key < start + window`` in every dimension, with a loop over them."""

    def mod(b, h, q_idx, kv_idx):
        keep = q_idx >= 0
        for length, window in zip(gna.layout[::-1], gna.window[::-1], strict=True):
            q, k = q_idx % length, kv_idx % length
            q_idx, kv_idx = q_idx // length, kv_idx // length
            start = torch.minimum(torch.maximum(q - window // 2, torch.zeros_like(q)), length - torch.tensor(window))
            keep = keep & (k >= start) & (k < start + window)
        return keep

    return mod


def where_edges(gna):
    """Three cases per dimension: first edge, last edge, between."""

    def near(q, k, length, window):
        half = window // 2
        inside = (k >= q - half) & (k < q - half + window)
        last = torch.where(q - half + window > length, k >= length - window, inside)
        return torch.where(q < half, k < window, last)

    def mod(b, h, q_idx, kv_idx):
        keep = True
        for axis, (length, window) in enumerate(zip(gna.layout, gna.window, strict=True)):
            weight = int(np.prod(gna.layout[axis + 1 :]))
            keep = near(q_idx // weight % length, kv_idx // weight % length, length, window) & keep
        return keep

    return mod


def lookup_bounds(gna):
    """Tables of the first and last key per coordinate."""
    tables = []
    for length, window in zip(gna.layout, gna.window, strict=True):
        low = (torch.arange(length) - window // 2).clamp(0, length - window)
        tables.append((low, low + window))

    def mod(b, h, q_idx, kv_idx):
        keep = torch.ones_like(q_idx, dtype=torch.bool)
        for (low, high), length in list(zip(tables, gna.layout, strict=True))[::-1]:
            q, k = torch.fmod(q_idx, length), torch.fmod(kv_idx, length)
            q_idx, kv_idx = q_idx // length, kv_idx // length
            keep = torch.logical_and(keep, (low[q] <= k) & (k < high[q]))
        return keep

    return mod


def lookup_of_tokens(gna):
    """Tables of the coordinates of every token, and of the allowed pairs of coordinates."""
    places = [torch.from_numpy(x) for x in np.unravel_index(np.arange(gna.tokens), gna.layout)]
    allowed = [torch.from_numpy(dense_mask(GNA(n, w))) for n, w in zip(gna.layout, gna.window, strict=True)]

    def mod(b, h, q_idx, kv_idx):
        keep = True
        for place, table in zip(places, allowed, strict=True):
            keep = table[place[q_idx], place[kv_idx]] & keep
        return keep

    return mod


def without_and(gna):
    """Logic by negation: not (too early or too late)."""

    def mod(b, h, q_idx, kv_idx):
        outside = q_idx < 0
        for axis, (length, window) in enumerate(zip(gna.layout, gna.window, strict=True)):
            weight = int(np.prod(gna.layout[axis + 1 :]))
            q, k = q_idx // weight % length, kv_idx // weight % length
            start = (q - window // 2).clamp(min=0).clamp(max=length - window)
            outside = outside | (k < start) | torch.logical_not(k - start < window)
        return ~outside

    return mod


def bits(gna):
    """Shifts and masks, for sides that are powers of two."""
    (height, width), (rows, columns) = gna.layout, gna.window
    shift = width.bit_length() - 1

    def mod(b, h, q_idx, kv_idx):
        y0 = ((q_idx >> shift) - rows // 2).clamp(0, height - rows)
        x0 = ((q_idx & (width - 1)) - columns // 2).clamp(0, width - columns)
        dy, dx = (kv_idx >> shift) - y0, (kv_idx & (width - 1)) - x0
        return (dy >= 0) & (dy < rows) & (dx >= 0) & (dx < columns)

    return mod


@pytest.mark.parametrize(
    ("style", "gna"),
    [
        (clamped_center, GNA((9, 14), (3, 7))),
        (clamped_center, GNA((60, 80), (13, 7))),
        (chebyshev, GNA((9, 14), 5)),
        (chebyshev, GNA((90, 120), 5)),
        *[
            (style, gna)
            for style in (window_start, where_edges, lookup_bounds, lookup_of_tokens, without_and)
            for gna in (GNA(30, 7), GNA((9, 14), (4, 7)), GNA((4, 6, 5), (2, 5, 3)), GNA((30, 48, 80), (18, 24, 24)))
        ],
        (bits, GNA((8, 16), (3, 8))),
    ],
    ids=lambda value: gna_id(value) or value.__name__,
)
def test_styles(style, gna):
    assert found(style(gna), layout=gna.layout) == gna
    assert recognise(style(gna), q_len=gna.tokens)


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


# Text around the grid: a mask_mod of the grid, text tokens before it and all tokens without those after it.


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


def test_equality_of_two_coordinates_at_once():
    gna = GNA((6, 5, 8), (1, 1, 3))

    def mod(b, h, q_idx, kv_idx):
        start = (q_idx % 8 - 1).clamp(0, 5)
        return (q_idx // 8 == kv_idx // 8) & (kv_idx % 8 >= start) & (kv_idx % 8 < start + 3)

    assert found(mod, layout=(6, 5, 8)) == gna
    assert recognise(mod, q_len=30000 * 8).gna == GNA((30000, 8), (1, 3))


def test_mixed_dimensions_are_decided_by_all_pairs():
    def both(b, h, q, k):
        first = (q // 8 == k // 8).int()
        return first + (q % 8 // 4 == k % 8 // 4).int() == 2

    result = recognise(both, layout=(6, 8))
    assert result.gna == GNA((6, 8), (1, 4), (1, 4))
    assert result.how == "pairs"
    assert "too many to compare all pairs" in refused(both, layout=(600, 8))
    assert "do not act on their own" in refused(
        lambda b, h, q, k: (q // 8 - k // 8).abs() + (q % 8 - k % 8).abs() <= 3, layout=(6, 8)
    )


# Near misses.


def near_misses():
    gna = GNA((9, 14), (3, 7))
    good = clamped_center(gna)
    document = torch.arange(126) // 60
    return {
        "one row more": lambda b, h, q, k: good(b, h, q, k) | ((k == q + 28) & (q == 70)),
        "one pair less": lambda b, h, q, k: good(b, h, q, k) & ((q != 70) | (k != 71)),
        "window shrinks at the edge": lambda b, h, q, k: (
            ((q // 14 - k // 14).abs() <= 1) & ((q % 14 - k % 14).abs() <= 3)
        ),
        "height and width swapped": lambda b, h, q, k: clamped_center(GNA((14, 9), (3, 7)))(b, h, q, k),
        "documents": and_masks(good, lambda b, h, q, k: document[q] == document[k]),
        "diagonal": and_masks(good, causal),
        "wraps around": lambda b, h, q, k: ((q // 14 - k // 14).abs() <= 1) & ((q % 14 - k % 14 + 3) % 14 <= 6),
        "dilation wraps": lambda b, h, q, k: (q // 14 == k // 14) & ((q - k) % 3 == 0) & ((q - k).abs() <= 3),
        "strictly causal": lambda b, h, q, k: q > k,
        "nothing": lambda b, h, q, k: q < 0,
        "upper": lambda b, h, q, k: q <= k,
        "two windows": lambda b, h, q, k: (q == k) | (q == k + 5),
    }


@pytest.mark.parametrize("name", near_misses())
def test_near_misses(name):
    mod = near_misses()[name]
    assert refused(mod, layout=(9, 14))
    natural = recognise(mod, q_len=126)
    if natural:  # Of another layout, and then exactly.
        assert (dense(mod, 126) == dense_mask(natural.gna)).all()


@pytest.mark.parametrize("length", [20, 5000])
def test_one_dimensional_near_misses(length):
    misses = {
        "shrinks": lambda b, h, q, k: (q - k).abs() <= 3,
        "one key too many at the end": lambda b, h, q, k: (
            (k >= (q - 3).clamp(0, length - 7)) & (k < (q - 3).clamp(0, length - 7) + 7 + (q == 9).int())
        ),
        "one key missing": lambda b, h, q, k: (q >= k) & (q - k < 4) & ~((q == 11) & (k == 9)),
        "wrong group": lambda b, h, q, k: (q % 2 != k % 2) & (q >= k) & (q - k < 4),
        "sink": lambda b, h, q, k: (q >= k) & ((q - k < 4) | (k < 2)),
        "wrong leader": lambda b, h, q, k: (k >= q // 4 * 4) & (k < q // 4 * 4 + 4 - (q > 12).int()),
        "wrapping dilation": lambda b, h, q, k: (q >= k) & ((q - k) % 3 == 0) & (q - k <= 6) & (k < length - 1),
    }
    for name, mod in misses.items():
        reason = refused(mod, layout=length)
        assert "dimension 0" in reason, (name, reason)


def test_reasons_name_the_first_pair():
    assert refused(lambda b, h, q, k: (q - k).abs() <= 3, layout=20) == (
        "dimension 0: query 0 sees keys 0 to 3, but with window 7, stride 1, dilation 1 it would see keys 0 to 6; "
        "the condition is (abs(q - k) <= 3)"
    )


@pytest.mark.parametrize(
    ("mod", "words"),
    [
        (lambda b, h, q, k: q >= k if q > 3 else q == k, "Python condition"),
        (lambda b, h, q, k: q >= k.item(), "item"),
        (lambda b, h, q, k: q >= int(k), "int"),
        (lambda b, h, q, k: q >= int(k.numpy()), "numpy"),
        (lambda b, h, q, k: q >= (k > 3).nonzero().numel(), "nonzero"),
        (lambda b, h, q, k: q in (1, 2), "Python condition"),
        (lambda b, h, q, k: (q >= k) & (torch.rand(()) > 2), "rand"),
        (lambda b, h, q, k: (q - k).float().exp() < 3, "exp"),
        (lambda b, h, q, k: torch.floor(q / 3) == torch.floor(k / 3), "floating-point division"),
        (lambda b, h, q, k: (q * 0.1).floor() == (k * 0.1).floor(), "exact"),
        (lambda b, h, q, k: (q.float() - k.float()) <= 3, "floating-point arithmetic"),
        (lambda b, h, q, k: q.half() >= k, "float16"),
        (lambda b, h, q, k: (q >= k) & (q.view(torch.float32) < 1), "view"),
        (lambda b, h, q, k: q * 100_000_000 >= k * 100_000_000, "overflow"),
        (lambda b, h, q, k: (q << 28) >= (k << 28), "overflow"),
        (lambda b, h, q, k: q.to(torch.int8) * 8 >= k, "overflow"),
        (lambda b, h, q, k: torch.arange(30)[q] >= k, "place 39 of a table of 30"),
        (lambda b, h, q, k: q // k >= 1, "divide by zero"),
        (lambda b, h, q, k: q + b >= k, "batch"),
        (lambda b, h, q, k: q + h >= k, "head"),
        (lambda b, h, q, k: q - k, "returns"),
        (lambda b, h, q, k: (torch.arange(40) == q).any(), "one pair"),
        (lambda b, h, q, k: q.add_(1) > k, "in place"),
        (lambda b, h, q: q > 1, "TypeError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_functions_that_cannot_be_decided(mod, words):
    reason = refused(mod, layout=40)
    assert words in reason


def test_numbers_that_are_exact():
    length = 40
    for mod in (
        lambda b, h, q, k: (q / 4).floor() == (k / 4).floor(),
        lambda b, h, q, k: (q.to(torch.float32) + 0.25).to(torch.int32) // 4 == k // 4,
        lambda b, h, q, k: (q.float() * 0.25).int() == k >> 2,
    ):
        assert found(mod, q_len=length) == GNA(length, 4, 4)
    assert found(lambda b, h, q, k: (q - k <= 2.5) & (q - k >= 0.0), q_len=length) == GNA(length, 3, causal=True)


def test_negative_numbers_round_as_torch_does():
    shifted = torch.div
    for rounding, expected in (("floor", True), ("trunc", False)):
        mod = functools.partial(
            lambda b, h, q, k, mode: shifted(q - 20, 4, rounding_mode=mode) == shifted(k - 20, 4, rounding_mode=mode),
            mode=rounding,
        )
        assert bool(recognise(mod, q_len=40)) == expected
    assert found(lambda b, h, q, k: (q - 20) // 4 == (k - 20) // 4, q_len=40) == GNA(40, 4, 4)
    assert not recognise(lambda b, h, q, k: torch.fmod(q - 20, 4) == torch.fmod(k - 20, 4), q_len=40)
    assert found(lambda b, h, q, k: (q - 20) % 4 == (k - 20) % 4, q_len=40) == GNA(40, 10, 1, 4)


def test_what_is_not_known():
    assert "give layout= or q_len=" in refused(causal)
    assert "as many of both" in refused(causal, q_len=4, kv_len=5)
    with pytest.raises(ValueError, match="q_len=5, but the layout has 4"):
        recognise(causal, layout=4, q_len=5)
    with pytest.raises(TypeError, match="takes a mask_mod or a BlockMask"):
        recognise(3)
    with pytest.raises(ValueError, match="must not be negative"):
        recognise(causal, layout=4, text_first=-1)


def test_functions_that_change_their_mind():
    calls = []

    def mod(b, h, q, k):
        calls.append(1)
        return q >= k if len(calls) == 1 else q <= k

    assert "unlike when it was traced" in refused(mod, q_len=40)


# Block lists.


def rebuilt(mask, **changes):
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    tables = {name: getattr(mask, name) for name in names}
    tables = {name: value if value is None else value.clone() for name, value in tables.items()} | changes
    return BlockMask.from_kv_blocks(
        **tables, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask.mask_mod, seq_lengths=mask.seq_lengths
    )


def test_block_masks_of_torch():
    gna = GNA((8, 10), (3, 5))
    mod = clamped_center(gna)
    mask = create_block_mask(mod, None, None, 80, 80, device="cpu", BLOCK_SIZE=16)
    assert recognise(mask, layout=(8, 10)).gna == gna
    assert recognise(mask).gna == gna
    assert recognise(rebuilt(mask)).gna == gna
    assert "as many of both" in refused(create_block_mask(causal, None, None, 64, 80, device="cpu"))
    assert not recognise(create_block_mask(mod, None, None, 80, 80, device="cpu", BLOCK_SIZE=16)[:, :, :2])


def test_block_lists_that_say_something_else():
    mask = create_block_mask(causal, None, None, 72, 72, device="cpu", BLOCK_SIZE=16)
    assert recognise(mask).gna == GNA(72, -1, causal=True)
    everything = torch.zeros_like(mask.kv_num_blocks)
    assert "not listed" in refused(rebuilt(mask, full_kv_num_blocks=everything))
    assert "not listed" in refused(rebuilt(mask, kv_num_blocks=everything))
    wrong = mask.full_kv_indices.clone()
    wrong[0, 0, 3, 0] = 3
    assert "both as partial and as full" in refused(rebuilt(mask, full_kv_indices=wrong))
    wrong[0, 0, 3, 0] = 4
    assert "listed" in refused(rebuilt(mask, full_kv_indices=wrong))
    twice = mask.full_kv_indices.clone()
    twice[0, 0, 3, 1] = 0
    assert refused(rebuilt(mask, full_kv_indices=twice))
    needless = BlockMask.from_kv_blocks(
        torch.full((1, 1, 5), 5, dtype=torch.int32),
        torch.arange(5, dtype=torch.int32).expand(1, 1, 5, 5).contiguous(),
        BLOCK_SIZE=16,
        mask_mod=causal,
        seq_lengths=(72, 72),
    )
    assert recognise(needless).gna == GNA(72, -1, causal=True)
    whole = create_block_mask(noop_mask, None, None, 72, 72, device="cpu", BLOCK_SIZE=16)
    full = BlockMask.from_kv_blocks(
        torch.zeros(1, 1, 5, dtype=torch.int32),
        needless.kv_indices,
        torch.full((1, 1, 5), 5, dtype=torch.int32),
        needless.kv_indices,
        BLOCK_SIZE=16,
        mask_mod=noop_mask,
        seq_lengths=(72, 72),
    )
    assert recognise(whole).gna == recognise(full).gna == GNA.dense(72)
    full.mask_mod = causal
    assert "listed as full" in refused(full)
    mask.q_indices = mask.q_indices.flip(2)
    assert "do not agree" in refused(mask)


# Properties.


def random_expression(rng, q, k, depth):
    """A random integer built from the two indices; division and remainder by positive and negative numbers too."""
    if depth == 0:
        return rng.choice([q, k, q, k, rng.randint(-9, 9) + torch.zeros_like(q)])
    a, b = (random_expression(rng, q, k, depth - 1) for _ in range(2))
    number = rng.choice([-7, -3, -2, 1, 2, 3, 5, 8])
    return rng.choice(
        [
            lambda: a + b,
            lambda: a - b,
            lambda: b - number,
            lambda: number - a,
            lambda: a * rng.randint(-3, 3),
            lambda: -a,
            lambda: a.abs(),
            lambda: torch.square(a % 5),
            lambda: a // number,
            lambda: a % number,
            lambda: torch.fmod(a, number),
            lambda: torch.div(a, number, rounding_mode="trunc"),
            lambda: torch.div(a, abs(number), rounding_mode="floor"),
            lambda: a >> abs(number) % 4,
            lambda: a & abs(number),
            lambda: (a | 3) ^ b,
            lambda: ~a,
            lambda: torch.minimum(a, b),
            lambda: torch.maximum(a, b),
            lambda: a.clamp(-2, number),
            lambda: torch.where(a < b, a, number),
            lambda: (a > number) + b,
            lambda: (a.float() * 0.5).floor().int() + b,
            lambda: torch.arange(13, 0, -1)[a % 13],
            lambda: torch.arange(35).view(5, 7)[a % 5, b % 7],
            lambda: torch.arange(35).view(5, 7)[a % 5][b % 7],
            lambda: a.long().to(torch.int16).to(b.dtype),
        ]
    )()


def random_condition(rng, q, k, depth):
    a, b = (random_expression(rng, q, k, depth) for _ in range(2))
    kind = rng.choice(["lt", "le", "gt", "ge", "eq", "ne"])
    return rng.choice(
        [
            lambda: getattr(torch, kind)(a, b),
            lambda: getattr(torch, kind)(a, rng.randint(-3, 9)),
            lambda: (a <= b) & ((a - b).abs() < 4),
            lambda: torch.logical_or(a, b > 2),
            lambda: (a < b) ^ (a % 2 == 0),
            lambda: torch.where(a > 3, b < 2, a == b),
            lambda: ~((a < 3) | (b >= 2)),
            lambda: torch.maximum(a.abs(), b) <= 6,
            lambda: torch.minimum(a.abs(), b) > 5,
            lambda: (a < 1.5) == (b > 0.5),
        ]
    )()


@pytest.mark.parametrize("number", range(300))
def test_values_are_those_of_torch(number):
    """Whatever is not refused has the value that torch gives it, for every pair, in both integer types."""

    def mod(b, h, q, k):
        rng = random.Random(number)
        return random_condition(rng, q, k, rng.randint(0, 3))

    try:
        tables = Tables(trace(mod), 24, 24)
    except Refused:
        return
    part = tables.part(np.arange(24), np.arange(24))
    values = np.concatenate([keep for _, keep in rows(part, 24, 24)])
    assert (values == dense(mod, 24)).all()
    assert (values == dense(lambda b, h, q, k: mod(b, h, q.int(), k.int()), 24)).all()
    every = np.ones((24, 24), dtype=bool)
    for condition in conditions(part):
        every &= np.concatenate([keep for _, keep in rows(condition, 24, 24)])
    assert (values == every).all()


def random_window(rng, q, k, length):
    """A random condition of the kind that long dimensions are decided by: often one window, often not."""
    number = rng.randint(1, 6)
    low = (q - number).clamp(0, length - number) if rng.random() < 0.5 else q // number * number
    parts = [k >= low, k < low + number, q >= k, (q - k).abs() <= number, q % number == k % number, k // number <= q]
    parts += [torch.maximum(q - k, k - low) <= number, ~(k + 1 < low), (k < 3) | (q - k < 5), 2 * k - q != 3]
    parts += [torch.where(q > 9, k > low, k <= low), (q - k) // 2 == 0, (low == k) ^ (k <= q)]
    keep = rng.choice(parts)
    for part in rng.sample(parts, rng.randint(0, 3)):
        keep = keep & part if rng.random() < 0.8 else keep | part
    return keep


@pytest.mark.parametrize("number", range(150))
def test_long_dimensions_are_never_guessed(number):
    """Where conditions change is enough to know all pairs: the same keys, or no answer."""

    def mod(b, h, q, k):
        return random_window(random.Random(number), q, k, 23)

    part = Tables(trace(mod), 23, 23).part(np.arange(23), np.arange(23))
    keep = dense(mod, 23)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(match, "MATRIX_LENGTH", 0)
            seen = match.key_intervals(part, 23)
    except Refused:
        return
    expected = np.zeros_like(keep)
    for query in range(23):
        keys = np.arange(seen.low[query], seen.high[query]) * seen.dilation + query % seen.dilation
        expected[query, keys] = True
    assert (keep == expected).all()


@st.composite
def gnas(draw):
    return random_gna(random.Random(draw(st.integers(0, 1 << 30))), sizes=SMALL)


@settings(max_examples=40)
@given(gnas())
def test_random_masks_are_recognised(gna):
    result = recognise(mask_mod((gna,)), layout=gna.layout, text_first=gna.text_first, text_last=gna.text_last)
    assert result, result.reason
    assert (dense_mask(result.gna) == dense_mask(gna)).all()


@settings(max_examples=60)
@given(gnas(), st.integers(0, 1 << 30), st.booleans())
def test_one_pair_flipped(gna, seed, drop):
    """A mask that differs in one pair is recognised only if it really is another GNA."""
    keep = dense_mask(gna)
    candidates = np.argwhere(keep == drop)
    if not len(candidates):
        return
    q0, k0 = (int(x) for x in candidates[seed % len(candidates)])
    base = mask_mod((gna,))

    def mod(b, h, q_idx, kv_idx):
        pair = (q_idx == q0) & (kv_idx == k0)
        return base(b, h, q_idx, kv_idx) & ~pair if drop else base(b, h, q_idx, kv_idx) | pair

    changed = keep.copy()
    changed[q0, k0] = not drop
    result = recognise(mod, layout=gna.layout, text_first=gna.text_first, text_last=gna.text_last)
    if result:
        assert (dense_mask(result.gna) == changed).all()


def every_mask(length):
    """Dense masks of all one-dimensional GNAs."""
    return {
        dense_mask(GNA(length, w, s, d, c)).tobytes()
        for d in range(1, length + 1)
        for w in range(1, length // d + 1)
        for s in range(1, w + 1)
        for c in (False, True)
    }


@pytest.mark.parametrize("length", [1, 2, 3])
def test_every_mask_of_a_few_tokens(length):
    """Recognised if and only if it is a GNA, by brute force over all masks."""
    possible = every_mask(length)
    for number in range(1 << (length * length)):
        table = torch.tensor([(number >> bit) & 1 == 1 for bit in range(length * length)]).view(length, length)
        if length == 3 and number % 7 and table.numpy().tobytes() not in possible:
            continue
        result = recognise(lambda b, h, q, k, table=table: table[q, k], layout=length)
        assert bool(result) == (table.numpy().tobytes() in possible), (table, result)


def test_answers_are_readable():
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(recognise(causal, q_len=8))
    console.print(recognise(lambda b, h, q, k: q > k, q_len=8))
    text = console.export_text()
    assert "layout 8, window 8, causal yes" in text
    assert "query 0 sees no key" in text
    assert "GNA of layout 8" in str(recognise(causal, q_len=8))


def test_pairs_of_a_gna():
    gna = GNA((3, 4), (2, 3), causal=(True, False), text_first=1)
    expected = dense_mask(gna)
    assert [[keeps(gna, q, k) for k in range(gna.tokens)] for q in range(gna.tokens)] == expected.tolist()
