"""Random conditions and masks: recognised as what they are by all their pairs, or not at all."""

import random

import numpy as np
import pytest
import torch
from helpers import dense_mask, random_gna
from hypothesis import given, settings
from hypothesis import strategies as st
from recognised import SMALL, dense

from gna_flex import GNA
from gna_flex.mask_mod import mask_mod
from gna_flex.symbolic import match
from gna_flex.symbolic.exact import Tables, conditions, rows
from gna_flex.symbolic.recognise import recognise
from gna_flex.symbolic.trace import Refused, trace


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
