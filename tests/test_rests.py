"""Key boxes of two shapes: estimated times against those of each choice, and what a second shape saves."""

import math
import random

import numpy as np
import pytest
from helpers import gna_id, random_gna
from hypothesis import given
from hypothesis import strategies as st

from gna_flex import GNA
from gna_flex.cuda import rests
from gna_flex.cuda.forward import Request, estimated
from gna_flex.cuda.shapes import choose, cost, key_shapes, query_shapes, query_sides
from gna_flex.cuda.tables import KernelTiles, count
from gna_flex.presets import PRESETS, preset

HUNYUAN = preset("hunyuan-video-sliding").gna
GRIDS = [
    GNA((12, 24), (5, 9)),
    GNA((12, 24), (12, 12), (4, 8)),
    GNA((5, 13, 15), (3, 8, 9)),
    GNA((9, 22), (3, 7), dilation=(1, 2)),
    GNA((20, 20), (5, 9), causal=(True, False), text_first=5, text_last=40),
]


def pairs_of(gna: GNA, kv_slots: int) -> np.ndarray:
    return rests.shape_pairs([s for s in key_shapes(gna, kv_slots) if math.prod(s) == kv_slots], kv_slots)


@given(st.randoms(use_true_random=False), st.sampled_from([16, 48, 96, 144]), st.sampled_from([1, 2, 3]))
def test_table_of_costs_is_the_cost_of_each_choice(rng, kv_slots, groups):
    gna = random_gna(rng, text=(0, 0, 1, 9, 300))
    pairs = pairs_of(gna, kv_slots)
    if not len(pairs):
        return
    queries = rng.choices(query_shapes(gna, groups, 64), k=5)
    pairs = np.array(rng.choices(pairs.tolist(), k=4))
    costs = rests.pair_costs(gna, query_sides(queries, groups), pairs, kv_slots, groups, 64)
    for axis in range(3):
        for (box, split), row in zip(queries, costs[axis], strict=True):
            for (tile, rest), estimate in zip(pairs.tolist(), row, strict=True):
                tiles = KernelTiles(box, groups, split, tuple(tile), kv_slots, 64, tuple(rest), axis)
                assert estimate == pytest.approx(cost(gna, tiles))


@pytest.mark.parametrize("gna", GRIDS, ids=gna_id)
def test_nothing_is_better_than_the_choice(gna):
    """Of all pairs of shapes along all dimensions, with the boxes of queries that it has chosen."""
    best = rests.best(gna, 48, 2, 64)
    assert best is not None
    least = min(
        cost(gna, KernelTiles(best.box, 2, best.split, tuple(tile), 48, 64, tuple(rest), axis))
        for tile, rest in pairs_of(gna, 48).tolist()
        for axis in range(3)
    )
    assert cost(gna, best) == pytest.approx(least)


def test_heads_share_one_choice():
    heads = (GNA((24, 24), 9), GNA((24, 24), 11), GNA((24, 24), 9))
    best = rests.best(heads, 48, 2, 64)
    assert best is not None
    assert cost(heads, best) == pytest.approx(2 * cost(heads[0], best) + cost(heads[1], best))
    alone = rests.best(heads[0], 48, 2, 64)
    assert alone is not None
    assert cost(heads, best) <= cost(heads, alone)


@pytest.mark.parametrize("name", [name for name, entry in PRESETS.items() if entry.head_dim == 128])
def test_a_second_shape_is_taken_only_where_it_saves_time(name):
    gna = PRESETS[name].gna
    one = choose(gna, 144)
    two = rests.improved(gna, one)
    assert cost(gna, two) <= cost(gna, one)
    assert (two == one) == (two.kv_rest is None)


@pytest.mark.parametrize(("gna", "most"), [(HUNYUAN, 0.95), (preset("cosmos-sliding").gna, 0.985)], ids=gna_id)
def test_what_a_second_shape_saves(gna, most):
    one, (_, two) = choose(gna, 144), estimated(Request((gna,), 128, float16=False, device=0))
    assert two.kv_rest is not None
    assert count(gna, two).boxes < most * count(gna, one).boxes


def test_one_shape_where_a_line_has_no_other_or_windows_are_whole_boxes():
    assert rests.best(GNA(512, 64), 128, 2, 64) is None
    tiles = choose(GNA(512, 64), 128)
    assert rests.improved(GNA(512, 64), tiles) is tiles
    strided = preset("flux-4k").gna
    assert rests.improved(strided, choose(strided, 128)).kv_rest is None


def test_other_head_dims_have_one_shape():
    """The kernel has two for all of them, but they were not measured."""
    for head_dim in (64, 96, 256):
        _, tiles = estimated(Request((HUNYUAN,), head_dim, float16=False, device=0))
        assert tiles.kv_rest is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_rest": (1, 4, 16)}, "as many keys as kv_tile"),
        ({"kv_rest": (8, 16)}, "three sides"),
        ({"kv_rest": (0, 8, 16)}, "three sides"),
        ({"kv_rest": (1, 1, 128)}, "sides add up to kv_slots=128"),
        ({"rest_axis": 3}, "rest_axis=3"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    shapes = {"box": (1, 8, 8), "groups": 2, "split": 1, "kv_tile": (1, 8, 16), "kv_slots": 128}
    with pytest.raises(ValueError, match=message):
        KernelTiles(**(shapes | change))


def test_pairs_are_of_different_shapes():
    rng = random.Random(0)
    pairs = pairs_of(GNA((64, 64, 64), 9), 96)
    assert len(pairs) > 100
    for a, b in rng.choices(pairs.tolist(), k=50):
        assert a != b
        assert math.prod(a) == math.prod(b) == 96
        assert sum(a) + sum(b) < 96
