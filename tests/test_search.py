import itertools
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import random_gna
from hypothesis import given, settings
from hypothesis import strategies as st

from gna_flex import GNA, search, sweep
from gna_flex.predict import predict
from gna_flex.search import search as find
from gna_flex.search import windows_for
from gna_flex.simulate import simulate
from gna_flex.sweep import prune_strides, sweep_strides, tile_pairs

PUBLISHED = json.loads((Path(__file__).parent / "data/published_simulator.json").read_text())
HUNYUAN = GNA((30, 48, 80), (18, 24, 24))
SMALL = {"layout": (6, 9), "q_tokens": (8,), "kv_tokens": (4, 8), "limit": 10_000, "heads": 2}


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: case["model"])
def test_pruning_leaves_the_published_strides(case):
    gna, pairs = GNA(case["layout"], case["window"]), ((tuple(case["q_tile"]), tuple(case["kv_tile"])),)
    (counts,) = sweep_strides(gna, pairs)
    strides = np.array(list(itertools.product(*(range(1, w + 1) for w in gna.window))))
    kept = strides[prune_strides(strides, counts.visited_max.ravel())].tolist()
    assert sorted(kept) == sorted(row["stride"] for row in case["rows"])


@given(
    strides=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=20, unique=True),
    data=st.data(),
)
def test_pruning_follows_its_rule(strides, data):
    costs = [[data.draw(st.integers(1, 5)) for _ in range(3)] for _ in strides]
    kept = prune_strides(strides, np.array(costs))
    for column in range(3):
        for i, stride in enumerate(strides):
            key = (math.prod(stride), costs[i][column], stride)
            rivals = (
                (math.prod(other), costs[j][column], other)
                for j, other in enumerate(strides)
                if j != i and math.prod(other) <= key[0] and costs[j][column] <= key[1]
            )
            # Something as good or better is in the way, unless the two are equal and this one comes first.
            assert kept[i, column] == all(rival[:2] == key[:2] and rival > key for rival in rivals)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_sweep_equals_simulate(seed):
    rng = random.Random(seed)
    gna = random_gna(rng)
    tiling = rng.choice(["static", "anchored"])
    pairs = tile_pairs(gna, rng.choice([1, 4, 8]), rng.choice([2, 4]))
    for counts in rng.sample(list(sweep_strides(gna, pairs, tiling)), min(2, len(pairs))):
        stride = tuple(rng.randint(1, w) for w in gna.window)
        exact = GNA(gna.layout, gna.window, stride, gna.dilation, gna.causal, gna.text_first, gna.text_last)
        expected = simulate(exact, counts.q_tile, counts.kv_tile, tiling)
        at = tuple(s - 1 for s in stride)
        numbers = (counts.visited_max[at], counts.visited[at], counts.full[at])
        assert numbers == (expected.visited_max, expected.visited, expected.full)


def test_all_strides_and_tiles_of_hunyuan_take_about_a_second():
    pairs = tile_pairs(HUNYUAN, (256, 128), 128)
    sweep._side_table.cache_clear()
    rng, total = random.Random(0), 0
    begin = time.process_time()
    for counts in sweep_strides(HUNYUAN, pairs):
        total += counts.visited.size
        if rng.random() < 0.02:
            stride = tuple(rng.randint(1, w) for w in HUNYUAN.window)
            exact = simulate(GNA(HUNYUAN.layout, HUNYUAN.window, stride), counts.q_tile, counts.kv_tile)
            at = tuple(s - 1 for s in stride)
            assert (counts.visited_max[at], counts.visited[at], counts.full[at]) == (
                exact.visited_max,
                exact.visited,
                exact.full,
            )
    assert total == 10_368 * len(pairs)
    # 0.2 s on one core of an AMD EPYC; the bound leaves room for slow and busy machines.
    assert time.process_time() - begin < 5


def test_a_sweep_in_pieces_is_the_same(monkeypatch):
    gna, pairs = GNA((20, 30), (9, 14), dilation=(1, 2)), (((2, 4), (4, 2)),)
    (whole,) = sweep_strides(gna, pairs)
    monkeypatch.setattr(sweep, "AT_ONCE", 20)
    sweep._side_table.cache_clear()
    (pieces,) = sweep_strides(gna, pairs)
    sweep._side_table.cache_clear()
    assert all(np.array_equal(a, b) for a, b in zip(whole[2:], pieces[2:], strict=True))


def brute_force(windows, tiling: str, strides: str, **extra) -> list[tuple]:
    """Every setting as (time, stride product, window, stride, query tile, key tile), in order."""
    base = GNA(SMALL["layout"], 1, **extra)
    found = []
    for window in windows:
        for stride in itertools.product(*(range(1, w + 1) for w in window)):
            if strides == "powers" and any(s & (s - 1) for s in stride):
                continue
            gna = GNA(SMALL["layout"], window, stride, **extra)
            dims = zip(window, gna.dilation, gna.layout, gna.causal, stride, strict=True)
            if any(w * d == n and not c and s > 1 for w, d, n, c, s in dims):
                continue
            for q_tile, kv_tile in tile_pairs(base, 8, (4, 8)):
                time = predict(gna, q_tile=q_tile, kv_tile=kv_tile, tiling=tiling, heads=2).milliseconds
                found.append((time, math.prod(stride), window, stride, q_tile, kv_tile))
    return sorted(found)


def settings_of(candidates) -> list[tuple]:
    return [(c.milliseconds, c.stride_product, c.window, c.stride, c.q_tile, c.kv_tile) for c in candidates]


CASES = [
    ({"window": (4, 5)}, {}),
    ({"window": (6, 5), "tiling": "anchored"}, {"causal": (True, False), "text_first": 3, "text_last": 9}),
    ({"window": (3, 3), "strides": "all"}, {"dilation": (2, 3)}),
    ({"sparsity": 0.6}, {"causal": (False, True)}),
    ({"speedup": 3, "strides": "all"}, {}),
]


@pytest.mark.parametrize("at_once", [1 << 20, 64])
@pytest.mark.parametrize(("options", "extra"), CASES)
def test_ranking_is_that_of_brute_force(options, extra, at_once, monkeypatch):
    monkeypatch.setattr(search, "AT_ONCE", at_once)
    tiling, strides = options.get("tiling", "static"), options.get("strides", "powers")
    sparsity = options.get("sparsity", 1 - 1 / options.get("speedup", 1))
    windows = [options["window"]] if "window" in options else windows_for(GNA(SMALL["layout"], 1, **extra), sparsity)
    expected = brute_force(windows, tiling, strides, **extra)
    every = find(**SMALL, **options, **extra, tiles="all")
    assert settings_of(every.candidates) == expected
    assert (every.evaluated, every.windows) == (len(expected), len(windows))
    best = {}
    for setting in expected:
        best.setdefault(setting[2:4], setting)
    ranked = find(**SMALL, **options, **extra)
    assert settings_of(ranked.candidates) == list(best.values())
    assert settings_of(find(**{**SMALL, "limit": 3}, **options, **extra).candidates) == list(best.values())[:3]
    # The front: none in it is beaten or equalled, and everything else is.
    front = settings_of(every.pareto)
    for setting in expected:
        rivals = [other for other in expected if other[0] <= setting[0] and other[1] <= setting[1] and other != setting]
        first_of_equals = all(other[:2] == setting[:2] and other > setting for other in rivals)
        assert (setting in front) == first_of_equals
    assert front == sorted(front, key=lambda setting: setting[1])
    assert ranked.pareto == every.pareto


@pytest.mark.parametrize("at_once", [1 << 20, 64])
def test_pruned_search(at_once, monkeypatch):
    monkeypatch.setattr(search, "AT_ONCE", at_once)
    expected = brute_force([(4, 5)], "static", "all")
    kept = []
    for pair in sorted({setting[4:] for setting in expected}):
        column = [setting for setting in expected if setting[4:] == pair]
        mask = prune_strides([setting[3] for setting in column], [setting[0] for setting in column])
        kept += [setting for setting, keep in zip(column, mask, strict=True) if keep]
    result = find(**SMALL, window=(4, 5), strides="all", prune=True, tiles="all")
    assert settings_of(result.candidates) == sorted(kept)
    assert result.evaluated == len(kept)
    assert result.pareto == find(**SMALL, window=(4, 5), strides="all").pareto


def test_candidates_have_the_numbers_of_simulate_and_predict():
    extra = {"text_last": 5, "causal": (True, False)}
    result = find(**{**SMALL, "limit": 5}, window=(4, 5), **extra)
    for c in (*result.candidates, *result.pareto):
        gna = GNA(SMALL["layout"], c.window, c.stride, **extra)
        counts = simulate(gna, c.q_tile, c.kv_tile)
        assert (c.visited_max, c.visited_mean, c.full, c.partial, c.perfect) == (
            counts.visited_max,
            counts.visited_mean,
            counts.full,
            counts.partial,
            counts.perfect,
        )
        forecast = predict(gna, q_tile=c.q_tile, kv_tile=c.kv_tile, heads=2)
        assert (c.milliseconds, c.speedup, c.measured) == (forecast.milliseconds, forecast.speedup, forecast.measured)
        assert c.sparsity == pytest.approx(1 - gna.kept_pairs() / gna.tokens**2)


def test_hunyuan():
    result = find(HUNYUAN.layout, window=HUNYUAN.window)
    best = result.candidates[0]
    assert (best.stride, best.q_tile, best.perfect, best.measured) == ((2, 8, 8), (2, 8, 8), True, True)
    assert result.evaluated == 5 * 5 * 5 * len(tile_pairs(HUNYUAN))
    assert [c.stride_product for c in result.pareto] == sorted({c.stride_product for c in result.pareto})
    assert result.pareto[0].stride == (1, 1, 1)
    assert result.pareto[-1] == best


def test_given_strides():
    result = find(HUNYUAN.layout, window=HUNYUAN.window, strides=[(16, 8, 8), 1])
    assert {c.stride for c in result.candidates} == {(16, 8, 8), (1, 1, 1)}
    assert result.evaluated == 2 * len(tile_pairs(HUNYUAN))


def test_strides_that_no_window_takes_are_left_out():
    result = find((64, 64), sparsity=0.9, strides=[8, 20])
    assert {c.stride for c in result.candidates} == {(8, 8), (20, 20)}
    assert all(w >= s for c in result.candidates for w, s in zip(c.window, c.stride, strict=True))
    with pytest.raises(ValueError, match=r"strides=\[64\].*none fits"):
        find((64, 64), sparsity=0.9, strides=[64])


@pytest.mark.parametrize("gna", [HUNYUAN, GNA((256, 256), 1), GNA(32768, 1, causal=True), GNA((21, 45, 80), 1, 1, 2)])
@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.99])
def test_windows_keep_the_wanted_share(gna, sparsity):
    windows = windows_for(gna, sparsity)
    assert windows == sorted(set(windows))
    for window in windows:
        exact = GNA(gna.layout, window, 1, gna.dilation, gna.causal)
        assert exact.kept_pairs() / gna.tokens**2 == pytest.approx(1 - sparsity, rel=0.05 if len(windows) > 1 else 0.1)


def test_windows_of_tiny_grids_are_proportional():
    assert windows_for(GNA((3, 3), 1), 0.5) == [(2, 2)]
    assert windows_for(GNA((8, 8), 1), 0) == [(8, 8)]


def test_progress_and_interruption():
    seen = []
    result = find((64, 64), sparsity=0.9, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, result.windows) for done in range(1, result.windows + 1)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find((64, 64), sparsity=0.9, progress=stop)


def test_output(capsys):
    result = find(HUNYUAN.layout, window=HUNYUAN.window, limit=3, device="b200")
    numbers = json.loads(json.dumps(result.to_json()))
    assert len(numbers["candidates"]) == 3
    assert numbers["candidates"][0]["stride"] == [2, 8, 8]
    assert numbers["call"]["device"] == "b200"
    assert numbers["candidates"][0]["measured"] is False
    text = str(result)
    assert "an estimate" in text
    # Rows of the front are marked, whether or not they are among the fastest.
    assert sum(line.startswith("*  ") for line in text.splitlines()) == len(result.pareto)
    assert max(map(len, text.splitlines())) <= 100
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"window": 3, "sparsity": 0.5}, "exactly one"),
        ({"sparsity": 1.5}, "sparsity=1.5 for layout"),
        ({"speedup": 0.5}, "speedup=0.5"),
        ({"window": 3, "tiling": "flat"}, "tiling='flat'.*cannot be searched"),
        ({"window": 3, "tiling": "round"}, "tiling='round'"),
        ({"window": 3, "strides": "some"}, "strides='some'"),
        ({"window": 3, "strides": [4]}, r"strides=\[4\].*not exceed"),
        ({"window": 3, "q_tokens": 100}, "100 must be a power of two"),
        ({"window": 3, "limit": 0}, "limit=0"),
        ({"window": 3, "tiles": "some"}, "tiles='some'"),
        ({"window": 3, "device": "h300"}, "device='h300'"),
        ({"window": 30}, "window=30"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        find((8, 8), **options)


def test_too_many_strides_are_refused():
    with pytest.raises(ValueError, match="more than 4,194,304"):
        find((300, 300, 300), window=200, strides="all")
