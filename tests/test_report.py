import io
import json
import random

import pytest
import torch
from helpers import random_gna
from rich.console import Console

from gna_flex import GNA, backend, explain, gna_mask
from gna_flex.presets import preset
from gna_flex.report import report


def test_hunyuan_is_perfectly_block_sparse():
    result = report(preset("hunyuan-video").gna)
    tiles, natural = result.tiles, result.natural
    assert (tiles.q_tile, tiles.rows, tiles.visited, tiles.full, tiles.partial) == (
        (2, 8, 8),
        900,
        81 * 900,
        81 * 900,
        0,
    )
    assert tiles.total == tiles.dense == 900 * 900
    assert tiles.maskless
    assert result.perfect
    assert tiles.speedup == pytest.approx(11.11, abs=0.01)
    assert tiles.skipped == pytest.approx(0.91)
    assert (natural.visited, natural.full) == (270 * 900, 0)
    assert result.flop_speedup == pytest.approx(11.11, abs=0.01)
    assert "3.33x fewer blocks than natural order" in result.verdict
    assert "perfectly block-sparse" in result.verdict


@pytest.mark.parametrize(
    ("name", "visited", "partial"),
    [("flux-4k", 25600, 0), ("cosmos", 84480, 0), ("hunyuan-video-129f", 101284, 40960), ("lm-32k", 4216, 496)],
)
def test_tile_counts_of_models(name, visited, partial):
    tiles = report(preset(name).gna).tiles
    assert (tiles.visited, tiles.partial) == (visited, partial)


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_the_mask(seed):
    gna = random_gna(random.Random(seed))
    result = report(gna, natural=True)
    mask = gna_mask(gna, device="cpu")
    assert (result.natural.full, result.natural.partial, result.natural.total) == mask.counts
    tiled = gna_mask(gna, order=result.tiles.q_tile, device="cpu")
    assert (result.tiles.full, result.tiles.partial, result.tiles.total) == tiled.counts
    assert result.kept_pairs <= result.natural.visited_pairs


def test_padding_does_not_count_as_skipped():
    # 37 is no multiple of a tile: 256 blocks with padding, 121 of dense attention.
    tiles = report(GNA((37, 37), 15, text_first=5)).tiles
    assert (tiles.total, tiles.dense) == (256, 121)
    assert tiles.speedup == 121 / tiles.visited < 1
    assert tiles.skipped < 0


def test_given_tiles_may_differ():
    tiles = report(GNA((16, 32), 8, 8), q_tile=(8, 16), kv_tile=(8, 8)).tiles
    assert (tiles.q_block, tiles.kv_block, tiles.rows, tiles.total) == (128, 64, 4, 4 * 8)
    # A query tile of 8 x 16 sees two windows of 8 x 8, each half of the queries one of them.
    assert (tiles.visited, tiles.partial) == (8, 8)
    assert report(GNA((16, 32), 8, 8), q_tile=8).perfect


def test_many_tokens_are_cheap_and_natural_order_is_left_out_if_long():
    small_window = report(preset("ltx-2.5-decoder-5-1080p").gna)
    assert small_window.tiles.visited == 7493800
    assert small_window.natural.rows == 123420
    large_window = report(GNA((121, 360, 368), (61, 101, 101)))
    assert large_window.natural is None
    assert "left out" in str(large_window)
    assert "than dense attention" in large_window.verdict


def test_one_gna_per_head():
    sliding, dense = GNA((16, 32), 5), GNA.dense((16, 32))
    both = report([sliding, sliding, dense])
    single = report(sliding, q_tile=both.tiles.q_tile)
    assert both.kept_pairs == 2 * sliding.kept_pairs() + 512**2
    assert both.natural.visited == 2 * single.natural.visited + 16
    assert both.tiles.visited == 2 * single.tiles.visited + 16
    assert "(2 heads)" in str(both)


def test_heads_with_different_dilations_have_no_tile_order():
    result = report([GNA((16, 32), 5), GNA((16, 32), 5, dilation=2)])
    assert result.tiles is None
    assert "no tile order" in result.verdict
    assert result.natural.visited > 0
    assert "natural order" in str(result)


def test_dense_has_nothing_to_skip():
    result = report(GNA.dense((16, 32)))
    assert result.flop_speedup == 1
    assert "dense attention" in result.verdict


def test_json_round_trip():
    numbers = json.loads(json.dumps(report(preset("flux-4k").gna).to_json()))
    assert numbers["flop_speedup"] == pytest.approx(10.24)
    assert numbers["tiles"]["visited_per_row"] == 50
    assert numbers["gna"]["stride"] == [16, 16]
    assert numbers["perfectly_block_sparse"] is True


def test_table_fits_80_columns():
    for name in ("hunyuan-video", "hunyuan-video-129f", "ltx-2.5-decoder-5-1080p"):
        console = Console(width=80, color_system=None, record=True, file=io.StringIO())
        console.print(report(preset(name).gna))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text


@pytest.mark.parametrize(
    ("gnas", "options", "message"),
    [
        (GNA((8, 8), 3), {"kv_tile": 4}, "needs a q_tile"),
        ([GNA((8, 8), 3), GNA((8, 9), 3)], {}, "same layout"),
        ([], {}, "at least one"),
        (GNA((8, 8), 3), {"q_tile": (2, 2, 2)}, "2 dimensions"),
    ],
)
def test_errors(gnas, options, message):
    with pytest.raises(ValueError, match=message):
        report(gnas, **options)


def test_the_report_of_a_mask_has_the_route_of_a_call():
    mask = gna_mask(GNA((16, 16), 5), device="cpu")
    result = mask.report()
    assert result.route == mask.route() == explain(*torch.zeros(3, 1, 1, 256, 128, dtype=torch.bfloat16), mask)
    assert result.to_json()["route"]["name"] == "reference"
    assert "route of a call, reference" in str(result)
    assert "not hopper: it needs an NVIDIA Hopper GPU" in str(result)
    assert report(GNA((16, 16), 5)).route is None
    with backend("hopper"):
        assert mask.report().route is None
        with pytest.raises(RuntimeError, match="forced route"):
            mask.route()
