"""The shapes of least estimated time: against every shape there is, on small grids."""

import itertools
import math
import random
import time

import pytest
from helpers import gna_id, random_gna
from hypothesis import given
from hypothesis import strategies as st

from gna_flex import GNA
from gna_flex.cuda import shapes
from gna_flex.cuda.forward import Request, estimated
from gna_flex.cuda.kernel import Config
from gna_flex.cuda.shapes import candidates, choose, cost, key_shapes, query_shapes
from gna_flex.cuda.tables import KernelTiles, count, padded_dims

HUNYUAN = GNA((30, 48, 80), (18, 24, 24))
SMALL = [
    GNA(40, 9),
    GNA(90, 21, 4, causal=True),
    GNA(37, 5, 2, dilation=3),
    GNA((6, 7), (3, 4)),
    GNA((9, 8), (6, 3), (3, 3), causal=(False, True)),
    GNA((7, 6), (3, 2), dilation=(2, 3)),
    GNA((5, 4), (5, 2), text_first=9, text_last=40),
    GNA((3, 4, 2), (2, 3, 2), (1, 3, 2)),
    GNA(1, 1),
]


def all_boxes(limits: list[int], most: int, fewest: int = 1) -> list[tuple[int, ...]]:
    sides = itertools.product(*(range(1, limit + 1) for limit in limits))
    return [box for box in sides if fewest <= math.prod(box) <= most]


def all_tiles(gna: GNA, kv_slots: int, groups: int, rows: int) -> list[KernelTiles]:
    """Every shape, key boxes a little larger than the grid included."""
    lengths = [-(-dim[0] // dim[3]) for dim in padded_dims(gna)]
    boxes = all_boxes(lengths, rows, rows // 2 if math.prod(lengths) >= rows else 1)
    keys = all_boxes([dim[0] + (dim[0] > 1) for dim in padded_dims(gna)], kv_slots)
    splits = [axis for axis in range(3) if lengths[axis] > 1] or [2]
    return [KernelTiles(box, groups, split, kv, kv_slots, rows) for box in boxes for split in splits for kv in keys]


@pytest.mark.parametrize(("groups", "rows"), [(1, 64), (2, 64), (2, 128)])
@pytest.mark.parametrize("gna", SMALL, ids=gna_id)
def test_nothing_is_better_than_the_choice(gna, groups, rows):
    best = min(cost(gna, tiles) for tiles in all_tiles(gna, 16, groups, rows))
    chosen = cost(gna, choose(gna, 16, groups, rows))
    # Boxes of text may be longer than a small grid, so the choice can be better than all of these.
    assert chosen <= best + 1e-9 if gna.text_first else chosen == pytest.approx(best)


@given(
    st.randoms(use_true_random=False),
    st.integers(1, 4),
    st.sampled_from([16, 48, 64, 128, 160]),
    st.sampled_from([64, 128]),
)
def test_table_of_costs_is_the_cost_of_each_shape(rng, groups, kv_slots, rows):
    gna = random_gna(rng, text=(0, 0, 1, 9, 300))
    search = shapes.search_shapes(gna, kv_slots, groups, rows, 0.25, 3.0)
    assert search.costs.shape == (len(search.queries), len(search.keys))
    for _ in range(5):
        index = rng.randrange(search.costs.size)
        assert search.costs.flat[index] == pytest.approx(cost(gna, search.tiles(index), 0.25, 3.0))


@pytest.mark.parametrize("kv_slots", [16, 48, 96])
@pytest.mark.parametrize("layout", [(5,), (300,), (4, 9), (3, 1, 200), (2, 5, 7), (40, 40, 40)], ids=str)
def test_key_shapes_are_all_that_cannot_grow(layout, kv_slots):
    gna = GNA(layout, 1)
    limits = [min(dim[0], 256) for dim in padded_dims(gna)]
    fitting = set(all_boxes([min(limit, kv_slots) for limit in limits], kv_slots))
    grown = {
        box: [tuple(s + (a == axis) for a, s in enumerate(box)) for axis in range(3) if box[axis] < limits[axis]]
        for box in fitting
    }
    assert set(key_shapes(gna, kv_slots)) == {box for box in fitting if not fitting & set(grown[box])}


def test_key_boxes_of_text_are_never_small():
    assert all(math.prod(box) > 96 for box in key_shapes(GNA((3, 3), 3, text_last=512), 128))
    assert key_shapes(GNA(1, 1, text_last=512), 128) == ((1, 1, 128),)


@given(st.randoms(use_true_random=False), st.integers(1, 4), st.sampled_from([64, 128]))
def test_choices_fit(rng, groups, rows):
    gna = random_gna(rng)
    tiles = choose(gna, 128, groups, rows)
    lengths = [-(-dim[0] // dim[3]) for dim in padded_dims(gna)]
    assert (tiles.groups, tiles.rows) == (groups, rows)
    assert all(side <= length for side, length in zip(tiles.box, lengths, strict=True))
    assert groups == 1 or lengths[tiles.split] > 1 or max(lengths) == 1


def efficiency(gna: GNA, tiles: KernelTiles) -> float:
    """Kept pairs out of all that the kernel computes."""
    return gna.kept_pairs() / (count(gna, tiles).boxes * tiles.kv_slots * tiles.rows * tiles.groups)


@pytest.mark.parametrize(
    ("gna", "kv_slots", "least"),
    [
        (GNA((256, 256), 80), 128, 0.81),
        (GNA((256, 256), 80, 16), 128, 1),
        (GNA((256, 256), 80, 16), 160, 1),
        (HUNYUAN, 128, 0.65),
        (HUNYUAN, 160, 0.66),
        (GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)), 128, 1),
        (GNA((16, 44, 80), (16, 32, 48)), 128, 0.95),
        (GNA((16, 44, 80), (16, 32, 48), (1, 16, 16)), 128, 1),
        (GNA(32768, 2048), 128, 0.94),
        (GNA(32768, 2048, 256), 128, 1),
        (GNA(32768, -1), 128, 1),
    ],
    ids=lambda x: gna_id(x) or str(x),
)
def test_little_is_wasted(gna, kv_slots, least):
    tiles = choose(gna, kv_slots)
    assert least <= efficiency(gna, tiles) <= 1
    if least == 1:
        assert count(gna, tiles).masked == 0


@pytest.mark.parametrize(
    ("gna", "least"),
    [
        (GNA((256, 256), 80), 0.76),
        (GNA((256, 256), 80, 16), 1),
        (HUNYUAN, 0.58),
        (GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)), 0.93),  # pairs are 4 frames long, of 30
        (GNA((16, 44, 80), (16, 32, 48), (1, 16, 16)), 1),
        (GNA(32768, 2048), 0.89),
        (GNA(32768, 2048, 256), 1),
    ],
    ids=lambda x: gna_id(x) or str(x),
)
def test_little_is_wasted_by_pairs_of_tiles_of_128(gna, least):
    tiles = choose(gna, 128, 2, 128)
    assert least <= efficiency(gna, tiles) <= 1
    if max(gna.stride) > 1:
        assert count(gna, tiles).masked == 0


def test_a_window_of_seven_gets_boxes_of_seven():
    assert choose(GNA.blocked((56, 56), 7), 128).box == (1, 7, 7)


def test_heads_share_one_choice():
    wide, narrow = GNA((32, 32), 24, 8), GNA((32, 32), 5)
    tiles = choose((wide, narrow, narrow), 64)
    least = shapes.search_shapes((wide, narrow, narrow), 64, 2, 64).costs.min()
    assert cost((wide, narrow, narrow), tiles) == pytest.approx(least)
    assert cost((wide, narrow, narrow), tiles) == pytest.approx(cost(wide, tiles) + 2 * cost(narrow, tiles))
    for other in (choose(wide, 64), choose(narrow, 64)):
        assert cost((wide, narrow, narrow), tiles) <= cost((wide, narrow, narrow), other)
    assert choose((wide,), 64) == choose(wide, 64)


@pytest.mark.parametrize("other", [GNA((32, 33), 5), GNA((32, 32), 5, dilation=2), GNA((32, 32), 5, text_last=1)])
def test_heads_must_agree(other):
    with pytest.raises(ValueError, match="2 different layouts"):
        choose((GNA((32, 32), 5), other))


def test_no_heads_and_impossible_slots():
    with pytest.raises(ValueError, match="0 different layouts"):
        choose(())
    with pytest.raises(ValueError, match="kv_slots=100"):
        choose(GNA(64, 8), 100)
    with pytest.raises(ValueError, match="groups=5"):
        choose(GNA(64, 8), 128, 5)


def test_candidates():
    found = candidates(HUNYUAN, per_slots=2, limit=7)
    assert len(found) == 7
    assert len({(tiles.kv_slots, tiles.kv_tile) for tiles, _ in found}) == 7
    assert [c for _, c in found] == sorted(c for _, c in found)
    for tiles, estimate in found:
        assert estimate == pytest.approx(cost(HUNYUAN, tiles))
    assert candidates(GNA((256, 256), 80, 16), slots=(96, 128, 144))[0].tiles.kv_slots == 128
    best = [choose(HUNYUAN, slots) for slots in shapes.SLOTS]
    assert found[0].tiles == min(best, key=lambda tiles: cost(HUNYUAN, tiles))
    assert candidates(GNA(100, 7), per_slots=3, slots=(64, 128)) == candidates(GNA(100, 7), slots=(64, 128))


def fastest(function, *arguments) -> float:
    """Least of three times, in seconds, nothing cached."""
    times = []
    for _ in range(3):
        for cached in (choose, query_shapes, key_shapes):
            cached.cache_clear()
        begin = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - begin)
    return min(times)


def test_choosing_takes_no_time():
    """About 15, 25 and 25 ms on one core; the limits leave room for a busy machine."""
    assert fastest(choose, HUNYUAN, 160) < 0.2
    assert fastest(choose, HUNYUAN, 128, 2, 128) < 0.2
    assert fastest(choose, GNA((121, 360, 368), 24), 128) < 0.3
    assert fastest(choose, GNA((4096, 4096), 128, 7), 128) < 0.3


def test_random_seeds_give_the_same_choice():
    """Caches and dictionaries must not decide between equals."""
    gna = random_gna(random.Random(3), 3)
    first = choose(gna)
    choose.cache_clear()
    assert choose(gna) == first


def test_warpgroups_skip_boxes_where_that_saves_time():
    def chosen(gna: GNA, head_dim: int = 128) -> tuple[Config, bool]:
        config, tiles = estimated(Request((gna,), head_dim, float16=False, device=0))
        return config, tiles.skips

    for gna in (GNA(32768, 2048, 256), GNA(32768, 2048), GNA(32768, 2048, causal=True)):
        assert chosen(gna) == (Config(128, 64, consumers=3, key_stages=3), True)
        assert chosen(gna, 64) == (Config(64, 128, consumers=3, key_stages=3), True)
    assert not chosen(GNA.dense(32768))[1]
    assert not chosen(GNA((64, 64), 32, 16))[1]
