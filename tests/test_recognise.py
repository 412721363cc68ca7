"""Which foreign masks are a GNA: styles that have to be found, near misses that must not be, and random mutations."""

import functools
import random

import pytest
import torch
from helpers import Sizes, dense_mask, gna_id, random_gna, random_tile
from recognised import (
    SMALL,
    bits,
    causal,
    chebyshev,
    clamped_center,
    dense,
    found,
    lookup_bounds,
    lookup_of_tokens,
    refused,
    where_edges,
    window_start,
    without_and,
)
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, noop_mask

from gna_flex import GNA, TileOrder, gna_mask
from gna_flex.mask_mod import mask_mod
from gna_flex.symbolic import match
from gna_flex.symbolic.recognise import keeps, recognise


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
