"""``GNA``: normalisation, validation, special cases."""

import copy
import dataclasses
import pickle
import random
import re

import numpy as np
import pytest
from helpers import dense_mask, gna_id, random_gna

from gna_flex import GNA


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param({"layout": 8, "window": 3}, ((8,), (3,), (1,), (1,), (False,)), id="ints"),
        pytest.param({"layout": (4, 6), "window": 3}, ((4, 6), (3, 3), (1, 1), (1, 1), (False, False)), id="repeated"),
        pytest.param(
            {"layout": [8, 9], "window": [3, 4], "stride": [1, 2], "dilation": [2, 1], "causal": [True, False]},
            ((8, 9), (3, 4), (1, 2), (2, 1), (True, False)),
            id="lists",
        ),
        pytest.param(
            {"layout": range(4, 7), "window": np.array([1, 2, 3]), "stride": np.int64(1), "causal": np.True_},
            ((4, 5, 6), (1, 2, 3), (1, 1, 1), (1, 1, 1), (True, True, True)),
            id="index-types",
        ),
        pytest.param({"layout": 9, "window": -1}, ((9,), (9,), (1,), (1,), (False,)), id="whole"),
        pytest.param(
            {"layout": (9, 8), "window": -1, "dilation": (3, 2)},
            ((9, 8), (3, 4), (1, 1), (3, 2), (False, False)),
            id="whole-dilated",
        ),
        pytest.param(
            {"layout": (9, 8), "window": (-1, 3)}, ((9, 8), (9, 3), (1, 1), (1, 1), (False, False)), id="whole-one-dim"
        ),
        pytest.param({"layout": 1, "window": 1}, ((1,), (1,), (1,), (1,), (False,)), id="single-token"),
        pytest.param(
            {"layout": (4, 40), "window": 16, "stride": (1, 16), "clamp": True},
            ((4, 40), (4, 16), (1, 16), (1, 1), (False, False)),
            id="clamped-window",
        ),
        pytest.param(
            {"layout": 6, "window": 16, "stride": 8, "clamp": True},
            ((6,), (6,), (6,), (1,), (False,)),
            id="clamped-stride",
        ),
        pytest.param(
            {"layout": 5, "window": 3, "dilation": 8, "clamp": True},
            ((5,), (1,), (1,), (5,), (False,)),
            id="clamped-dilation",
        ),
        pytest.param(
            {"layout": 7, "window": 3, "dilation": 3, "clamp": True},
            ((7,), (2,), (1,), (3,), (False,)),
            id="clamped-product",
        ),
        pytest.param(
            {"layout": 40, "window": 16, "stride": 8, "dilation": 2, "clamp": True},
            ((40,), (16,), (8,), (2,), (False,)),
            id="clamp-without-need",
        ),
    ],
)
def test_normalises_arguments(arguments, expected):
    gna = GNA(**arguments)
    assert (gna.layout, gna.window, gna.stride, gna.dilation, gna.causal) == expected
    for values in expected[:4]:
        assert all(type(value) is int for value in values)
    assert all(type(value) is bool for value in gna.causal)


def test_equal_descriptions_are_one_value():
    first = GNA((8, 8), 3, stride=(1, 1), dilation=[1, 1], causal=False)
    second = GNA([8, 8], (3, 3))
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, second, GNA((8, 8), 3, clamp=True)}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"layout": (8, 9)},
        {"window": (3, 4)},
        {"stride": 2},
        {"dilation": (1, 2)},
        {"causal": (True, False)},
        {"text_first": 1},
        {"text_last": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_counts_for_equality(change):
    base = {"layout": (8, 8), "window": 3}
    assert GNA(**base) != GNA(**(base | change))


@pytest.mark.parametrize("name", ["layout", "window", "stride", "dilation", "causal", "text_first", "text_last"])
def test_is_frozen(name):
    gna = GNA(8, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(gna, name, 1)


def test_copies_and_pickles():
    gna = GNA((4, 6), (3, 2), stride=(2, 1), dilation=(1, 2), causal=(False, True), text_first=2, text_last=3)
    assert pickle.loads(pickle.dumps(gna)) == gna
    assert copy.deepcopy(gna) == gna
    assert dataclasses.replace(gna, text_last=0).tokens == 26


BAD_VALUES = [
    # arguments, argument named in the message, its value, words of the rule
    ({"layout": (), "window": 1}, "layout", r"\(\)", "1, 2 or 3"),
    ({"layout": (2, 2, 2, 2), "window": 1}, "layout", r"\(2, 2, 2, 2\)", "1, 2 or 3"),
    ({"layout": 0, "window": 1}, "layout", "0", "at least 1"),
    ({"layout": (4, -3), "window": 1}, "layout", "-3", "at least 1"),
    ({"layout": (4, 6), "window": 0}, "window", "0", "at least 1"),
    ({"layout": (4, 6), "window": (3, -2)}, "window", "-2", "at least 1"),
    ({"layout": (4, 6), "window": (3, 7)}, "window", "7", "must not exceed 6"),
    ({"layout": (4, 6), "window": (3, 4), "dilation": (1, 2)}, "window", "4", "4 * 2 = 8 must not exceed 6"),
    ({"layout": (4, 6), "window": -1, "dilation": (1, 4)}, "window", "-1", "dilation=4 to divide 6"),
    ({"layout": (4, 6), "window": (3, 3, 3)}, "window", r"\(3, 3, 3\)", "2 dimensions"),
    ({"layout": (4, 6), "window": 3, "stride": 0}, "stride", "0", "at least 1"),
    ({"layout": (4, 6), "window": 3, "stride": (1, -1)}, "stride", "-1", "at least 1"),
    ({"layout": (4, 6), "window": 3, "stride": (1, 4)}, "stride", "4", "must not exceed the window 3"),
    ({"layout": (4, 6), "window": 3, "stride": (1,)}, "stride", r"\(1,\)", "2 dimensions"),
    ({"layout": (4, 6), "window": 2, "dilation": 0}, "dilation", "0", "at least 1"),
    ({"layout": (4, 6), "window": 2, "dilation": (1, -2)}, "dilation", "-2", "at least 1"),
    ({"layout": (4, 6), "window": 2, "dilation": (1, 2, 1)}, "dilation", r"\(1, 2, 1\)", "2 dimensions"),
    ({"layout": (4, 6), "window": 2, "causal": (True,)}, "causal", r"\(True,\)", "2 dimensions"),
    ({"layout": (4, 6), "window": 2, "text_first": -1}, "text_first", "-1", "must not be negative"),
    ({"layout": (4, 6), "window": 2, "text_last": -5}, "text_last", "-5", "must not be negative"),
    # clamp shrinks what is larger than the grid, nothing else
    ({"layout": (4, 6), "window": 0, "clamp": True}, "window", "0", "at least 1"),
    ({"layout": (4, 6), "window": 3, "stride": 0, "clamp": True}, "stride", "0", "at least 1"),
    ({"layout": (4, 6), "window": 3, "dilation": 0, "clamp": True}, "dilation", "0", "at least 1"),
    ({"layout": (8, 8), "window": 3, "stride": 5, "clamp": True}, "stride", "5", "must not exceed the window 3"),
]


@pytest.mark.parametrize(
    ("arguments", "name", "value", "rule"),
    BAD_VALUES,
    ids=["-".join(f"{k}={v}" for k, v in case[0].items()).replace(" ", "") for case in BAD_VALUES],
)
def test_value_errors_name_argument_value_layout_and_rule(arguments, name, value, rule):
    with pytest.raises(ValueError, match=rf"^{name}={value}\b|^{name}={value} ") as caught:
        GNA(**arguments)
    message = str(caught.value)
    layout = arguments["layout"] if isinstance(arguments["layout"], tuple) else (arguments["layout"],)
    assert str(layout) in message
    assert rule in message


@pytest.mark.parametrize("value", [True, 2.0, "2", None, (2, 2.0), (2, False), 1 + 0j], ids=repr)
@pytest.mark.parametrize("name", ["layout", "window", "stride", "dilation"])
def test_integers_only(name, value):
    arguments = {"layout": (8, 8), "window": 4} | {name: value}
    with pytest.raises(TypeError, match=rf"^{name} takes integers") as caught:
        GNA(**arguments)
    refused = value[1] if isinstance(value, tuple) else value
    assert repr(refused) in str(caught.value)


@pytest.mark.parametrize("value", [1, 0, "yes", None, (True, 0)], ids=repr)
def test_causal_takes_booleans_only(value):
    with pytest.raises(TypeError, match=r"^causal takes True or False") as caught:
        GNA((8, 8), 4, causal=value)
    assert repr(value[1] if isinstance(value, tuple) else value) in str(caught.value)


@pytest.mark.parametrize("value", [True, 1.5, "3", None, (1, 2)], ids=repr)
@pytest.mark.parametrize("name", ["text_first", "text_last"])
def test_text_takes_one_integer(name, value):
    with pytest.raises(TypeError, match=rf"^{name} takes integers") as caught:
        GNA((8, 8), 4, **{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("made", "by_hand"),
    [
        pytest.param(GNA.sliding_window(32, 5), GNA(32, 5), id="sliding-window"),
        pytest.param(GNA.sliding_window(32, 5, causal=True), GNA(32, 5, causal=True), id="language-model"),
        pytest.param(GNA.blocked((8, 9), (4, 3)), GNA((8, 9), (4, 3), stride=(4, 3)), id="blocked"),
        pytest.param(GNA.halo((12, 8), (4, 2), (2, 1)), GNA((12, 8), (8, 4), stride=(4, 2)), id="halo"),
        pytest.param(GNA.halo((12, 8), block=2, halo=1), GNA((12, 8), 4, stride=2), id="halo-ints"),
        pytest.param(GNA.dense((4, 6)), GNA((4, 6), (4, 6)), id="dense"),
        pytest.param(
            GNA.blocked(9, 3, text_first=1, text_last=2),
            GNA(9, 3, 3, text_first=1, text_last=2),
            id="options-pass-through",
        ),
        pytest.param(GNA.halo(6, 4, 3, clamp=True), GNA(6, 6, 4), id="halo-clamped"),
    ],
)
def test_constructors(made, by_hand):
    assert made == by_hand


def test_language_model_window_is_a_band():
    q, k = np.indices((20, 20))
    assert (dense_mask(GNA.sliding_window(20, 6, causal=True)) == ((k <= q) & (k > q - 6))).all()


@pytest.mark.parametrize(("length", "block"), [(12, 4), (12, 3), (20, 5), (7, 1), (9, 9)])
def test_blocked_attends_inside_aligned_blocks(length, block):
    q, k = np.indices((length, length))
    assert (dense_mask(GNA.blocked(length, block)) == (q // block == k // block)).all()


def test_ragged_last_block_attends_to_the_last_tokens():
    keep = dense_mask(GNA.blocked(10, 4))
    assert np.flatnonzero(keep[8]).tolist() == np.flatnonzero(keep[9]).tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize(("block", "halo"), [(4, 2), (3, 1), (2, 3), (5, 2)])
def test_halo_sees_the_block_and_its_surroundings(block, halo):
    length = 6 * block
    keep = dense_mask(GNA.halo(length, block, halo))
    for q in range(block * 2, block * 4):
        start = q // block * block
        assert np.flatnonzero(keep[q]).tolist() == list(range(start - halo, start + block + halo))


def test_dense_masks_nothing():
    assert dense_mask(GNA.dense((3, 5), text_last=2)).all()


@pytest.mark.parametrize(
    ("gna", "dense"),
    [
        (GNA((4, 6), -1), True),
        (GNA((4, 6), (4, 6), stride=2, text_first=3), True),
        (GNA((4, 6), (4, 5)), False),
        (GNA((4, 6), -1, causal=(False, True)), False),
        (GNA((4, 6), -1, dilation=(1, 2)), False),
        (GNA((1, 1), 1), True),
    ],
    ids=gna_id,
)
def test_is_dense(gna, dense):
    assert gna.is_dense is dense
    assert bool(dense_mask(gna).all()) is dense


@pytest.mark.parametrize("number", range(5))
def test_counts_of_random_cases(number):
    rng = random.Random(number)
    for _ in range(100):
        gna = random_gna(rng)
        keep = dense_mask(gna)
        assert gna.tokens == len(keep), gna
        assert gna.grid_tokens == len(keep) - gna.text_first - gna.text_last, gna
        assert gna.kept_pairs() == keep.sum(), gna


def test_kept_pairs_of_a_huge_grid_is_exact():
    gna = GNA((121, 360, 368), 11)
    assert gna.kept_pairs() == 121 * 360 * 368 * 11**3


def test_dims_lists_one_dimension_after_the_other():
    gna = GNA((8, 9), (3, 4), (1, 2), (2, 1), (True, False))
    assert list(gna.dims()) == [(8, 3, 1, 2, True), (9, 4, 2, 1, False)]
    assert gna.ndim == 2


@pytest.mark.parametrize(
    ("gna", "text"),
    [
        (GNA(8, 3), "layout 8, window 3"),
        (GNA((8, 9), (3, 4), (1, 2)), "layout 8x9, window 3x4, stride 1x2"),
        (
            GNA((8, 9), (3, 4), (1, 2), (2, 1), (True, False), 5, 6),
            "layout 8x9, window 3x4, stride 1x2, dilation 2x1, causal yes/no, 5 text tokens first, 6 text tokens last",
        ),
    ],
    ids=gna_id,
)
def test_str_shows_what_differs_from_the_default(gna, text):
    assert str(gna) == text


def test_repr_builds_an_equal_value():
    gna = GNA((8, 9), (3, 4), (1, 2), (2, 1), (True, False), 5, 6)
    fields = re.fullmatch(r"GNA\((.*)\)", repr(gna))
    assert fields is not None
    assert eval(repr(gna), {"GNA": GNA}) == gna
