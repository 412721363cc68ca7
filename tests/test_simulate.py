import itertools
import json
import math
import random
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pytest
from helpers import dense_mask, random_gna, random_tile
from hypothesis import given
from hypothesis import strategies as st

from gna_flex import GNA
from gna_flex.blocks import ROWS_AT_ONCE, Relation, RowMajorRelation
from gna_flex.counts import lists_by_rows
from gna_flex.intervals import key_interval
from gna_flex.simulate import TILINGS, dimension_counts, end_to_end, simulate
from gna_flex.tiling import TileCounts, tile_counts

PUBLISHED = json.loads((Path(__file__).parent / "data/published_simulator.json").read_text())
ROWS = [(case, row) for case in PUBLISHED["cases"] for row in case["rows"]]
HUNYUAN = ((30, 48, 80), (18, 24, 24))
FLUX = ((256, 256), 80)
COSMOS = ((16, 44, 80), (16, 32, 48))


def natural_counts(relation: Relation) -> TileCounts:
    """Full, partial and all blocks of a relation, counted."""
    full = partial = 0
    for _, lists in lists_by_rows(relation):
        full += int(lists.full_counts.sum())
        partial += int(lists.partial_counts.sum())
    return TileCounts(full=full, partial=partial, total=relation.rows * relation.columns)


def rounded(value: float, digits: int) -> float:
    """Half-up, as the paper rounds."""
    return float(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


@pytest.mark.parametrize(("case", "row"), ROWS, ids=[f"{case['model']}-{row['stride']}" for case, row in ROWS])
def test_published_tables(case, row):
    result = simulate(GNA(case["layout"], case["window"], row["stride"]), case["q_tile"], case["kv_tile"])
    assert result.visited_max == row["visited"]
    assert rounded(result.speedup, 2) == row["sim"]
    assert rounded(result.flop_speedup, 2) == case["flop_speedup"]
    assert result.perfect == (row is case["rows"][-1])
    factors = [rounded(rounded(speedup, 2), 1) for speedup in (result.flop_speedup, result.speedup)]
    for name, dense_steps in (("e2e", 0), ("e2e_dense", case["dense_steps"])):
        share = PUBLISHED["attention_share"][case["model"]]
        model = [rounded(end_to_end(factor, share, case["steps"], dense_steps), 2) for factor in factors]
        assert model == row[name]


@pytest.mark.parametrize(
    ("stride", "speedup"),
    [
        ((1, 1, 1), 3.60),
        ((2, 1, 1), 4.00),
        ((1, 1, 8), 6.00),
        ((2, 1, 8), 6.67),
        ((1, 8, 8), 10.0),
        ((2, 8, 8), 11.11),
    ],
)
def test_small_query_tiles_need_smaller_strides(stride, speedup):
    result = simulate(GNA(*HUNYUAN, stride), (2, 8, 8))
    assert rounded(result.speedup, 2) == speedup
    assert result.perfect == (stride == (2, 8, 8))


@pytest.mark.parametrize(
    ("gna", "q_tile", "kv_tile", "tiling", "speedup", "mean"),
    [
        (GNA(*FLUX), (16, 16), (16, 8), "anchored", 7.11, 7.83),
        (GNA(*HUNYUAN), (4, 8, 8), (2, 8, 8), "anchored", 5.11, 6.62),
        (GNA(*FLUX), 256, 128, "flat", 3.20, 3.20),
        (GNA(*FLUX, 16), (16, 16), (16, 8), "flat", 3.20, 3.20),
        (GNA(*HUNYUAN, (16, 8, 8)), 256, 128, "flat", 2.50, 3.26),
    ],
)
def test_other_tilings(gna, q_tile, kv_tile, tiling, speedup, mean):
    result = simulate(gna, q_tile, kv_tile, tiling)
    assert (rounded(result.speedup, 2), rounded(result.mean_speedup, 2)) == (speedup, mean)


@pytest.mark.parametrize(
    ("gna", "tile", "static", "anchored"),
    [
        (GNA(*HUNYUAN), (2, 8, 8), 148_896, 117_876),
        (GNA(*FLUX), (8, 16), 34_884, 31_464),
        (GNA(*COSMOS), (2, 8, 8), 114_688, 106_496),
        (GNA(*COSMOS), (16, 2, 4), 88_784, 88_784),
    ],
)
def test_tiles_visited_per_head(gna, tile, static, anchored):
    assert [simulate(gna, tile, tiling=tiling).visited for tiling in ("static", "anchored")] == [static, anchored]


def tiles_by_hand(gna: GNA, tile: tuple[int, ...]) -> list[list[int]]:
    """Existing tokens of every query or static key tile, by plain loops: text, grid, text."""
    block = math.prod(tile)
    tokens: dict[tuple[int, ...], list[int]] = {}
    for token, x in enumerate(itertools.product(*map(range, gna.layout))):
        group = tuple(c % d for c, d in zip(x, gna.dilation, strict=True))
        place = tuple(c // d // t for c, d, t in zip(x, gna.dilation, tile, strict=True))
        tokens.setdefault(group + place, []).append(token + gna.text_first)
    return [*text_by_hand(0, gna.text_first, block), *tokens.values(), *last_text_by_hand(gna, block)]


def text_by_hand(first: int, count: int, block: int) -> list[list[int]]:
    return [list(range(first + begin, first + min(begin + block, count))) for begin in range(0, count, block)]


def last_text_by_hand(gna: GNA, block: int) -> list[list[int]]:
    return text_by_hand(gna.text_first + gna.grid_tokens, gna.text_last, block)


def anchored_by_hand(gna: GNA, keep: np.ndarray, q_tokens: list[int], tile: tuple[int, ...]) -> list[list[int]]:
    """Key tiles of one query tile of the grid, on a grid that starts at the first key of its first query."""
    first_token, last_token = gna.text_first, gna.text_first + gna.grid_tokens
    window = [k for k in range(first_token, last_token) if keep[min(q_tokens), k]]
    corner = np.unravel_index(window[0] - first_token, gna.layout)
    tokens: dict[tuple[int, ...], list[int]] = {}
    for token, x in enumerate(itertools.product(*map(range, gna.layout))):
        steps = [(c - o) // d for c, o, d in zip(x, corner, gna.dilation, strict=True)]
        same_group = all((c - o) % d == 0 for c, o, d in zip(x, corner, gna.dilation, strict=True))
        if same_group and min(steps) >= 0:
            place = tuple(int(s) // t for s, t in zip(steps, tile, strict=True))
            tokens.setdefault(place, []).append(token + first_token)
    block = math.prod(tile)
    return [*text_by_hand(0, gna.text_first, block), *tokens.values(), *last_text_by_hand(gna, block)]


def count_by_hand(gna: GNA, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], tiling: str) -> dict:
    """What ``simulate`` counts, from the dense mask."""
    keep = dense_mask(gna)
    q_block, kv_block = math.prod(q_tile), math.prod(kv_tile)
    flat = tiling == "flat"
    q_tiles = text_by_hand(0, gna.tokens, q_block) if flat else tiles_by_hand(gna, q_tile)
    static = text_by_hand(0, gna.tokens, kv_block) if flat else tiles_by_hand(gna, kv_tile)
    grid = range(gna.text_first, gna.text_first + gna.grid_tokens)
    visited, without_text, full, ragged = [], [], 0, 0
    for queries in q_tiles:
        of_grid = all(q in grid for q in queries)
        anchored = tiling == "anchored" and of_grid
        kv_tiles = anchored_by_hand(gna, keep, queries, kv_tile) if anchored else static
        kept = [keep[np.ix_(queries, keys)] for keys in kv_tiles]
        visited.append(sum(bool(pairs.any()) for pairs in kept))
        without_text += [visited[-1]] if of_grid else []
        full += sum(bool(pairs.all()) for pairs in kept)
        ragged += sum(bool(pairs.all()) and len(keys) < kv_block for pairs, keys in zip(kept, kv_tiles, strict=True))
    return {
        "query_tiles": len(q_tiles),
        "visited": sum(visited),
        "visited_max": max(without_text or visited),
        "full": full,
        "ragged": ragged,
        "histogram": tuple(sorted(Counter(visited).items())),
    }


def assert_counted_right(gna: GNA, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], tiling: str) -> None:
    result = simulate(gna, q_tile, kv_tile, tiling)
    assert {
        name: getattr(result, name) for name in ("query_tiles", "visited", "visited_max", "full", "ragged", "histogram")
    } == count_by_hand(gna, q_tile, kv_tile, tiling)
    assert result.partial == result.visited - result.full
    assert result.perfect == (result.full == result.visited)


@pytest.mark.parametrize("tiling", TILINGS)
@given(seed=st.integers(0, 2**32), large=st.booleans())
def test_counts_are_those_of_the_dense_mask(tiling, seed, large):
    rng = random.Random(seed)
    gna = random_gna(rng)
    # Tiles that may be larger than the grid, and odd ones.
    q_tile, kv_tile = (
        tuple(rng.randint(1, 9) for _ in gna.layout) if large else random_tile(rng, gna.ndim) for _ in range(2)
    )
    assert_counted_right(gna, q_tile, kv_tile, tiling)


@pytest.mark.parametrize("tiling", TILINGS)
def test_one_tile_larger_than_everything(tiling):
    assert_counted_right(GNA((5, 7), (3, 4), text_last=3), (64, 64), (64, 64), tiling)
    result = simulate(GNA.dense((5, 7)), (8, 8), tiling=tiling)
    assert (result.visited, result.full, result.ragged, result.perfect) == (1, 1, 1, True)


def test_flat_tiles_are_given_as_boxes_or_as_tokens():
    gna = GNA((12, 12), 5, 3, text_first=3)
    boxes, numbers = simulate(gna, (4, 4), (2, 4), "flat"), simulate(gna, 16, 8, "flat")
    assert (boxes.visited, boxes.full, boxes.histogram) == (numbers.visited, numbers.full, numbers.histogram)
    assert (boxes.q_tile, numbers.q_tile, numbers.kv_tile) == ((4, 4), (16,), (8,))


def test_counts_of_one_dimension_cannot_be_changed():
    counts = dimension_counts(16, 8, 1, 1, False, 4, 4)
    with pytest.raises(ValueError, match="read-only"):
        counts.visited[0] = 1


@given(seed=st.integers(0, 2**32))
def test_whole_tiles_are_the_full_blocks_of_block_lists(seed):
    rng = random.Random(seed)
    gna = random_gna(rng)
    q_tile, kv_tile = random_tile(rng, gna.ndim), random_tile(rng, gna.ndim)
    static, counts = simulate(gna, q_tile, kv_tile), tile_counts(gna, q_tile, kv_tile)
    assert (static.whole, static.visited) == (counts.full, counts.visited)
    q_block, kv_block = rng.randint(1, 40), rng.randint(1, 40)
    flat, counts = (
        simulate(gna, q_block, kv_block, "flat"),
        natural_counts(RowMajorRelation(gna, q_block, kv_block, key_interval)),
    )
    assert (flat.whole, flat.visited) == (counts.full, counts.visited)


@pytest.mark.parametrize("gna", [GNA(100_000, 700, 3, text_last=7), GNA((300, 333), (9, 30), 2, dilation=(2, 1))])
def test_many_flat_tiles(gna):
    flat, counts = simulate(gna, 16, 32, "flat"), natural_counts(RowMajorRelation(gna, 16, 32, key_interval))
    assert flat.query_tiles > 2 * ROWS_AT_ONCE
    assert (flat.whole, flat.visited) == (counts.full, counts.visited)
    assert sum(visited * count for visited, count in flat.histogram) == flat.visited


def test_text_queries_are_not_the_worst_query_tile():
    gna = GNA((16, 16), 4, 4, text_last=5)
    result = simulate(gna, 4)
    assert (result.visited_max, result.dense, result.histogram) == (2, 17, ((2, 16), (17, 1)))


def test_many_tokens_cost_nothing():
    result = simulate(GNA((1000, 1000, 1000), (99, 99, 99), (3, 3, 3)), (4, 8, 8))
    assert result.query_tiles == 250 * 125 * 125
    assert sum(count for _, count in result.histogram) == result.query_tiles
    assert sum(visited * count for visited, count in result.histogram) == result.visited


def test_json_round_trip():
    numbers = json.loads(json.dumps(simulate(GNA(*HUNYUAN, (16, 8, 8)), (4, 8, 8), (2, 8, 8)).to_json()))
    assert (numbers["visited_max"], numbers["partial"], numbers["tiling"]) == (81, 0, "static")
    assert numbers["speedup"] == pytest.approx(11.11, abs=0.01)
    assert numbers["gna"]["stride"] == [16, 8, 8]
    assert numbers["perfectly_block_sparse"] is True


def test_table_fits_80_columns():
    for gna in (GNA(*HUNYUAN), GNA(*HUNYUAN, (2, 8, 8)), GNA((33, 45, 80), (18, 24, 24), text_last=256)):
        text = str(simulate(gna, (2, 8, 8)))
        assert max(map(len, text.splitlines()[1:])) <= 80
        assert "…" not in text
    assert "perfectly block-sparse" in str(simulate(GNA(*HUNYUAN, (2, 8, 8)), (2, 8, 8)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"q_tile": (2, 2, 2)}, ValueError, "q_tile.*2 dimensions"),
        ({"q_tile": 4, "kv_tile": (0, 4)}, ValueError, "kv_tile.*at least 1 token"),
        ({"q_tile": 0, "tiling": "flat"}, ValueError, "q_tile=0 for layout"),
        ({"q_tile": 4, "tiling": "round"}, ValueError, "tiling='round'.*static, anchored, flat"),
        ({"q_tile": 2.5}, TypeError, "q_tile takes integers"),
        ({"q_tile": 2.5, "tiling": "flat"}, TypeError, "q_tile takes integers"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        simulate(GNA((8, 8), 3), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5, 10), "speedup=0"),
        ((float("nan"), 0.5, 10), "speedup=nan"),
        ((2, 1.5, 10), "share=1.5"),
        ((2, 0.5, 0), "steps=0"),
        ((2, 0.5, 10, 11), "dense_steps=11"),
    ],
)
def test_end_to_end_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        end_to_end(*arguments)


def test_end_to_end_limits():
    assert end_to_end(5, 0, 10) == 1
    assert end_to_end(5, 1, 10) == pytest.approx(5)
    assert end_to_end(5, 1, 10, dense_steps=10) == 1
