"""What ``gna_mask`` takes and refuses, and which masks have a tile order that pays."""

import inspect

import pytest

from gna_flex import GNA, TileOrder, gna_mask


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        pytest.param({"gna": (6, 8)}, TypeError, r"gna=\(6, 8\): gna_mask takes a GNA", id="not-a-gna"),
        pytest.param({"gna": []}, TypeError, r"gna=\(\): gna_mask takes a GNA", id="no-gna"),
        pytest.param({"gna": [GNA(8, 3), GNA(9, 3)]}, ValueError, "same layout", id="layouts-differ"),
        pytest.param({"gna": [GNA(8, 3), GNA(8, 3, text_last=1)]}, ValueError, "same text", id="texts-differ"),
        pytest.param({"gna": [GNA(8, 3)] * 3, "H": 2}, ValueError, "H=2, but gna has 3 heads", id="heads"),
        pytest.param(
            {"gna": [GNA(8, 3), GNA(8, 3, dilation=2)], "order": 4},
            ValueError,
            "different dilations",
            id="dilations-differ",
        ),
        pytest.param({"order": "column-major"}, ValueError, "order='column-major'", id="unknown-order"),
        pytest.param({"order": ((2, 2), (2, 2), (2, 2))}, ValueError, "pair of tiles", id="three-tiles"),
        pytest.param({"order": (2, 2, 2)}, ValueError, r"tile=\(2, 2, 2\) has 3 values", id="tile-of-other-rank"),
        pytest.param({"order": (0, 2)}, ValueError, r"tile=\(0, 2\)", id="empty-tile"),
        pytest.param(
            {"order": (2, 4), "q_block": 16}, ValueError, r"q_block=16, but a tile \(2, 4\) has 8", id="tile-size"
        ),
        pytest.param(
            {"order": (2, 4), "kv_block": 4}, ValueError, r"kv_block=4, but a tile \(2, 4\) has 8", id="kv-tile-size"
        ),
        pytest.param(
            {"order": "tiles", "q_block": 48}, ValueError, "block=48 must be a power of two", id="no-power-of-two"
        ),
        pytest.param({"q_block": 0}, ValueError, "q_block=0: a block needs at least 1 token", id="empty-block"),
        pytest.param({"kv_block": -1}, ValueError, "kv_block=-1: a block needs at least 1 token", id="negative-block"),
        pytest.param({"q_block": 16.5}, (TypeError, ValueError), r"q_block.*16\.5", id="fractional-block"),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        gna_mask(**({"gna": GNA((6, 8), 3), "device": "cpu"} | arguments))


def test_tiles_order_takes_the_chosen_tile():
    ours = gna_mask(GNA.blocked((32, 32), 8), order="tiles", q_block=64, device="cpu")
    assert ours.plan.q_order == ours.plan.kv_order == TileOrder(ours.gna, (8, 8))
    assert ours.BLOCK_SIZE == (64, 64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gna": GNA((8, 8), 3)}, True),
        ({"gna": GNA((8, 8), 3), "order": (2, 4)}, False),
        ({"gna": [GNA(8, 3), GNA(8, 3, dilation=2)]}, False),
        ({"gna": [GNA(8, 3), GNA(8, 5)]}, True),
    ],
    ids=["natural", "already-tiled", "dilations-differ", "windows-differ"],
)
def test_has_tiles(options, expected):
    ours = gna_mask(**options, device="cpu")
    assert ours.has_tiles() is expected
    assert expected or not ours.tiles_pay()


def test_tiles_pay_on_video_and_not_on_text():
    assert gna_mask(GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)), device="cpu").tiles_pay()
    assert not gna_mask(GNA.sliding_window(8192, 1024, causal=True), device="cpu").tiles_pay()


def test_gna_mask_takes_options_by_name_only():
    parameters = list(inspect.signature(gna_mask).parameters.values())
    assert parameters[0].name == "gna"
    assert {p.kind for p in parameters[1:]} == {inspect.Parameter.KEYWORD_ONLY}


def test_refuses_lists_that_no_memory_holds():
    with pytest.raises(ValueError, match=r"layout 121x360x368.*1\.6e\+10 entries or more"):
        gna_mask(GNA.dense((121, 360, 368)), device="cpu")
