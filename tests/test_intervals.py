"""The mask rule of one dimension against a definition of its own, and the properties it promises."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from helpers import attended, dense_mask, dim_mask, one_dim_sets
from hypothesis import given
from hypothesis import strategies as st

from gna_flex import GNA
from gna_flex.intervals import (
    attends,
    ceil_div,
    group_length,
    key_interval,
    leader,
    maximum,
    minimum,
    query_interval,
    sees,
    select,
)

GOLDEN_MASKS = json.loads((Path(__file__).parent / "data" / "golden_masks.json").read_text())

# (length, window, stride, dilation, causal): attended keys of each query, "query:first-last" or "query:key.key.key"
GOLDEN_VECTORS = {
    (10, 3, 1, 1, 0): "0:0-2 1:0-2 2:1-3 3:2-4 4:3-5 5:4-6 6:5-7 7:6-8 8:7-9 9:7-9",
    (10, 4, 1, 1, 0): "0:0-3 1:0-3 2:0-3 3:1-4 4:2-5 5:3-6 6:4-7 7:5-8 8:6-9 9:6-9",
    (10, 4, 2, 1, 0): "0:0-3 1:0-3 2:1-4 3:1-4 4:3-6 5:3-6 6:5-8 7:5-8 8:6-9 9:6-9",
    (10, 4, 3, 1, 0): "0:0-3 1:0-3 2:0-3 3:2-5 4:2-5 5:2-5 6:5-8 7:5-8 8:5-8 9:6-9",
    (10, 4, 4, 1, 0): "0:0-3 1:0-3 2:0-3 3:0-3 4:4-7 5:4-7 6:4-7 7:4-7 8:6-9 9:6-9",
    (11, 5, 3, 1, 0): "0:0-4 1:0-4 2:0-4 3:2-6 4:2-6 5:2-6 6:5-9 7:5-9 8:5-9 9:6-10 10:6-10",
    (12, 8, 4, 1, 0): "0..3:0-7 4..7:2-9 8..11:4-11",
    (12, 7, 4, 1, 0): "0..3:0-6 4..7:3-9 8..11:5-11",
    (10, 10, 7, 1, 0): "0..9:0-9",
    (10, 3, 1, 3, 0): "0:0.3.6 1:1.4.7 2:2.5.8 3:0.3.6 4:1.4.7 5:2.5.8 6:3.6.9 7:1.4.7 8:2.5.8 9:3.6.9",
    (10, 3, 2, 3, 0): "0:0.3.6 1:1.4.7 2:2.5.8 3:0.3.6 4:1.4.7 5:2.5.8 6:3.6.9 7:1.4.7 8:2.5.8 9:3.6.9",
    (11, 4, 4, 2, 0): (
        "0:0.2.4.6 1:1.3.5.7 2:0.2.4.6 3:1.3.5.7 4:0.2.4.6 5:1.3.5.7 6:0.2.4.6 7:1.3.5.7 "
        "8:4.6.8.10 9:3.5.7.9 10:4.6.8.10"
    ),
    (9, 2, 1, 4, 0): "0:0.4 1:1.5 2:2.6 3:3.7 4:0.4 5:1.5 6:2.6 7:3.7 8:4.8",
    (8, 3, 1, 1, 1): "0:0 1:0-1 2:0-2 3:1-3 4:2-4 5:3-5 6:4-6 7:5-7",
    (10, 4, 3, 1, 1): "0:0 1:0-1 2:0-2 3:2-3 4:2-4 5:2-5 6:5-6 7:5-7 8:5-8 9:6-9",
    (10, 4, 4, 1, 1): "0:0 1:0-1 2:0-2 3:0-3 4:4 5:4-5 6:4-6 7:4-7 8:6-8 9:6-9",
    (11, 3, 2, 2, 1): "0:0 1:1 2:0.2 3:1.3 4:2.4 5:3.5 6:2.4.6 7:3.5.7 8:6.8 9:5.7.9 10:6.8.10",
    (10, 5, 5, 2, 1): "0:0 1:1 2:0.2 3:1.3 4:0.2.4 5:1.3.5 6:0.2.4.6 7:1.3.5.7 8:0.2.4.6.8 9:1.3.5.7.9",
}


def parse(vector: str) -> tuple[tuple[int, ...], ...]:
    """Keys of every query from the notation of the golden vectors."""
    rows = []
    for entry in vector.split():
        queries, keys = entry.split(":")
        first, _, last = queries.partition("..")
        if "-" in keys:
            start, stop = keys.split("-")
            row = tuple(range(int(start), int(stop) + 1))
        else:
            row = tuple(int(key) for key in keys.split("."))
        rows += [row] * (int(last or first) - int(first) + 1)
    return tuple(rows)


def case_id(case: tuple[int, ...]) -> str:
    return "L{}-w{}-s{}-d{}-c{:d}".format(*case)


@pytest.mark.parametrize("case", GOLDEN_VECTORS, ids=case_id)
def test_golden_vectors(case):
    *numbers, causal = case
    expected = parse(GOLDEN_VECTORS[case])
    length = numbers[0]
    rows = tuple(tuple(k for k in range(length) if attends(q, k, *numbers, causal=bool(causal))) for q in range(length))
    assert rows == expected
    assert attended(*numbers, bool(causal)) == expected


def test_golden_masks():
    assert len(GOLDEN_MASKS) == 300
    for entry in GOLDEN_MASKS:
        gna = GNA(*(entry[name] for name in ("layout", "window", "stride", "dilation", "causal")))
        coordinates = np.indices(gna.layout).reshape(gna.ndim, -1)
        keep = np.ones((gna.tokens, gna.tokens), dtype=bool)
        for x, dim in zip(coordinates, gna.dims(), strict=True):
            keep &= attends(x[:, None], x, *dim)
        for mask in (keep, dense_mask(gna)):
            assert hashlib.sha256(mask.astype(np.uint8).tobytes()).hexdigest() == entry["sha256"], gna
        assert gna.kept_pairs() == entry["kept"] == keep.sum(), gna


@pytest.mark.parametrize("length", range(1, 25))
def test_every_parameter_set(length):
    """All legal parameters of this length: the mask, and both intervals of every dilation group."""
    sets = [case for case in one_dim_sets(length) if case[0] == length]
    assert sets
    x = np.arange(length)
    for case in sets:
        _, window, stride, dilation, causal = case
        keep = dim_mask(*case)
        assert (attends(x[:, None], x, *case) == keep).all(), case
        for group in range(dilation):
            part = keep[group::dilation, group::dilation]
            size = group_length(length, dilation, group)
            assert size == len(part), case
            places = np.arange(size)
            lo, hi = key_interval(places, size, window, stride, causal)
            assert (((lo[:, None] <= places) & (places < hi[:, None])) == part).all(), case
            assert (sees(places[:, None], places, size, window, stride, causal) == part).all(), case
            first, last = query_interval(places, size, window, stride, causal)
            assert (((first <= places[:, None]) & (places[:, None] < last)) == part).all(), case


def test_number_of_parameter_sets():
    sets = list(one_dim_sets())
    assert len(sets) == len(set(sets)) == 8254
    assert sum(window >= 2 for _, window, *_ in sets) == 7654


@st.composite
def groups(draw: st.DrawFn, causal: bool | None = None) -> tuple[int, int, int, bool]:
    """``(length, window, stride, causal)`` of a dilation group."""
    length = draw(st.integers(1, 400))
    window = draw(st.integers(1, length))
    stride = draw(st.integers(1, window))
    return length, window, stride, draw(st.booleans()) if causal is None else causal


@given(groups())
def test_both_intervals_are_monotone_and_inside(group):
    length, *rest = group
    places = np.arange(length)
    for interval in (key_interval, query_interval):
        lo, hi = interval(places, length, *rest)
        assert (np.diff(lo) >= 0).all()
        assert (np.diff(hi) >= 0).all()
        assert (np.broadcast_to(lo, length) >= 0).all()
        assert (np.broadcast_to(hi, length) <= length).all()
        assert (hi > lo).all(), "a token always sees, and is seen by, at least one"


@given(groups())
def test_query_interval_is_the_inverse(group):
    length, *rest = group
    i, j = np.arange(length)[:, None], np.arange(length)
    lo, hi = key_interval(i, length, *rest)
    first, last = query_interval(j, length, *rest)
    assert (((lo <= j) & (j < hi)) == ((first <= i) & (i < last))).all()


@given(groups(causal=False))
def test_every_query_sees_exactly_a_window(group):
    length, window, *rest = group
    lo, hi = key_interval(np.arange(length), length, window, *rest)
    assert (hi - lo == window).all()


@given(groups(causal=True))
def test_causal_ends_at_the_query(group):
    length, window, stride, causal = group
    places = np.arange(length)
    lo, hi = key_interval(places, length, window, stride, causal)
    assert (hi == places + 1).all()
    assert (hi - lo <= window).all()
    assert (leader(places, length, stride, causal) >= places).all()


@given(groups())
def test_a_stride_group_shares_its_leader(group):
    length, _, stride, causal = group
    places = np.arange(length)
    leaders = leader(places, length, stride, causal)
    assert (leaders // stride == places // stride).all()
    assert (leaders < length).all()
    assert (leaders == leaders[places // stride * stride]).all()


@given(st.integers(1, 400), st.data())
def test_whole_window_is_dense(length, data):
    stride = data.draw(st.integers(1, length))
    lo, hi = key_interval(np.arange(length), length, length, stride, causal=False)
    assert (lo == 0).all()
    assert (hi == length).all()


@given(st.integers(1, 40), st.integers(1, 12))
def test_stride_equal_to_window_gives_aligned_blocks(window, blocks):
    places = np.arange(window * blocks)
    lo, hi = key_interval(places, len(places), window, window, causal=False)
    assert (lo == places // window * window).all()
    assert (hi == lo + window).all()


@given(st.integers(1, 200), st.data())
def test_window_leans_left(length, data):
    window = data.draw(st.integers(1, length))
    places = np.arange(length)
    lo, hi = key_interval(places, length, window, 1, causal=False)
    inner = (lo > 0) & (hi < length)
    assert (places - lo == window // 2)[inner].all()
    assert (hi - 1 - places == window - 1 - window // 2)[inner].all()


@given(st.data())
def test_dilation_splits_into_independent_problems(data):
    length = data.draw(st.integers(1, 60))
    dilation = data.draw(st.integers(1, length))
    window = data.draw(st.integers(1, length // dilation))
    stride, causal = data.draw(st.integers(1, window)), data.draw(st.booleans())
    x = np.arange(length)
    keep = attends(x[:, None], x, length, window, stride, dilation, causal)
    assert not keep[x[:, None] % dilation != x % dilation].any()
    for group in range(dilation):
        part = keep[group::dilation, group::dilation]
        size = len(part)
        assert size == group_length(length, dilation, group)
        places = np.arange(size)
        assert (part == attends(places[:, None], places, size, window, stride, 1, causal)).all()


@given(st.integers(1, 500), st.integers(1, 20))
def test_group_lengths_cover_the_dimension(length, dilation):
    sizes = group_length(length, dilation, np.arange(dilation))
    assert sizes.sum() == length
    assert sizes.tolist() == [len(range(group, length, dilation)) for group in range(dilation)]


def random_sets(count: int) -> list[tuple[int, int, int, int, bool]]:
    return random.Random(1).sample(list(one_dim_sets()), count)


@pytest.mark.parametrize("interval", [key_interval, query_interval], ids=lambda f: f.__name__)
def test_ints_arrays_and_tensors_agree(interval):
    for length, window, stride, _, causal in random_sets(400):
        expected = [interval(i, length, window, stride, causal) for i in range(length)]
        assert all(type(bound) is int for pair in expected for bound in pair)
        array = np.arange(length)
        tensor = torch.arange(length)
        # lengths, windows and strides may be arrays too: dilation groups, heads
        many = [(np.full(length, n), torch.full((length,), n)) for n in (length, window, stride)]
        for values in (
            interval(array, length, window, stride, causal),
            interval(tensor, length, window, stride, causal),
            interval(array, *(a for a, _ in many), causal),
            interval(tensor, *(t for _, t in many), causal),
            interval(tensor.to(torch.int32), length, window, stride, causal),
        ):
            pairs = np.stack(np.broadcast_arrays(*(np.asarray(bound) for bound in values)), 1)
            assert pairs.tolist() == [list(pair) for pair in expected], (length, window, stride, causal)


def test_attends_agrees_for_ints_arrays_and_tensors():
    for case in random_sets(150):
        x, t = np.arange(case[0]), torch.arange(case[0])
        expected = [[bool(attends(q, k, *case)) for k in range(case[0])] for q in range(case[0])]
        assert attends(x[:, None], x, *case).tolist() == expected, case
        assert attends(t[:, None], t, *case).tolist() == expected, case


@pytest.mark.parametrize("assumptions", [{}, {"integer": True}, {"integer": True, "nonnegative": True}], ids=str)
@pytest.mark.parametrize("interval", [key_interval, query_interval], ids=lambda f: f.__name__)
def test_sympy_symbol_agrees(interval, assumptions):
    x = sympy.Symbol("x", **assumptions)
    for length, window, stride, _, causal in random_sets(25):
        bounds = [sympy.sympify(bound) for bound in interval(x, length, window, stride, causal)]
        for i in range(length):
            values = tuple(int(bound.subs(x, i)) for bound in bounds)
            assert values == interval(i, length, window, stride, causal), (length, window, stride, causal)


@pytest.mark.parametrize("causal", [False, True], ids=["not-causal", "causal"])
@pytest.mark.parametrize("interval", [key_interval, query_interval], ids=lambda f: f.__name__)
def test_sympy_with_every_number_a_symbol(interval, causal):
    names = sympy.symbols("x length window stride", integer=True, positive=True)
    bounds = [sympy.lambdify(names, bound, "math") for bound in interval(*names, causal)]
    for length, window, stride, _, _ in random_sets(60):
        for i in range(length):
            expected = interval(i, length, window, stride, causal)
            assert tuple(int(bound(i, length, window, stride)) for bound in bounds) == expected


def test_sympy_attends_agrees():
    q, k = sympy.symbols("q k", integer=True, nonnegative=True)
    for case in random_sets(12):
        condition = attends(q, k, *case)
        for i in range(case[0]):
            kept = tuple(j for j in range(case[0]) if condition.subs({q: i, k: j}) == sympy.true)
            assert kept == attended(*case)[i], case


VALUES = {"int": int, "array": np.array, "tensor": torch.tensor, "sympy": sympy.Integer}


@pytest.mark.parametrize(
    ("kind_a", "kind_b"),
    [*zip(VALUES, VALUES, strict=True), *(("int", x) for x in VALUES), *((x, "int") for x in VALUES)],
)
def test_minimum_and_maximum(kind_a, kind_b):
    for a, b in [(2, 5), (5, 2), (-3, 4), (-3, -7), (3, 3)]:
        assert int(minimum(VALUES[kind_a](a), VALUES[kind_b](b))) == min(a, b)
        assert int(maximum(VALUES[kind_a](a), VALUES[kind_b](b))) == max(a, b)


def test_select_of_every_kind():
    assert select(True, 1, 2) == 1
    assert select(np.array([True, False]), 1, np.array([5, 6])).tolist() == [1, 6]
    assert select(torch.tensor([True, False]), torch.tensor([3, 4]), 7).tolist() == [3, 7]
    x = sympy.Symbol("x")
    assert select(x < 3, 1, x).subs(x, 2) == 1
    assert select(x < 3, 1, x).subs(x, 9) == 9


@given(st.integers(-1000, 1000), st.integers(1, 50))
def test_ceil_div_rounds_up(a, b):
    assert ceil_div(a, b) == -(-a // b)
    assert (ceil_div(a, b) - 1) * b < a <= ceil_div(a, b) * b
