import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gna_flex import GNA
from gna_flex.predict import COPY_EFFICIENCY, COSTS, DEVICES, predict
from gna_flex.presets import preset

RECORD = json.loads((Path(__file__).parent / "gpu/records/flex_routes_h200.json").read_text())
CASES = RECORD["cases"]
TILINGS = {"flex": "flat", "flex-tiles": "static"}
TILES = {
    "hunyuan-video": (2, 8, 8),
    "hunyuan-video-sliding": (8, 4, 4),
    "flux-4k": (8, 16),
    "flux-4k-sliding": (8, 16),
    "flux-4k-text": (8, 16),
    "cosmos": (2, 4, 16),
    "cosmos-sliding": (16, 2, 4),
    "cosmos-predict2-95": (2, 4, 16),
    "lm-32k-bidirectional": (128,),
}
"""What the recorded commit chose."""
HUNYUAN = GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))


def predicted(case: dict, route: str):
    return predict(
        preset(case["preset"]).gna,
        q_tile=TILES[case["preset"]] if route == "flex-tiles" else 128,
        tiling=TILINGS[route],
        route=route,
        heads=case["heads"],
        batch=case["batch"],
        head_dim=case["head_dim"],
        dtype=case["dtype"],
        backward=case["pass"] == "backward",
    )


@pytest.mark.parametrize("case", CASES, ids=[f"{case['preset']}-{case['pass']}" for case in CASES])
def test_prediction_is_as_near_as_stated(case):
    for route in TILINGS:
        result = predicted(case, route)
        assert result.measured
        assert result.milliseconds == pytest.approx(case["milliseconds"][route], rel=result.error)
    dense_error = COSTS["dense", "h200", case["pass"]].error
    assert result.dense_ms == pytest.approx(case["milliseconds"]["dense"], rel=dense_error)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_stated_errors_are_not_larger_than_needed(direction):
    cases = [case for case in CASES if case["pass"] == direction]
    for route in TILINGS:
        ratios = [predicted(case, route).milliseconds / case["milliseconds"][route] for case in cases]
        largest = max(abs(ratio - 1) for ratio in ratios)
        assert largest > COSTS[route, "h200", direction].error - 0.02


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_constants_are_the_least_squares_fit(direction):
    rows, targets = [], []
    for case in CASES:
        if case["pass"] != direction:
            continue
        for route in TILINGS:
            cost, result, measured = (
                COSTS[route, "h200", direction],
                predicted(case, route),
                case["milliseconds"][route],
            )
            # A partial tile does the work of a full one and evaluates the mask.
            partial = result.partial_ms / cost.partial
            rows.append(
                [
                    result.full_ms / cost.full / measured,
                    partial / measured * (route == "flex"),
                    partial / measured * (route == "flex-tiles"),
                    result.overhead_ms / cost.query_tile / measured,
                ]
            )
            targets.append(1 - result.permutation_ms / measured)
    fit = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    flex, tiles = (COSTS[route, "h200", direction] for route in TILINGS)
    assert (flex.full, flex.query_tile) == (tiles.full, tiles.query_tile)
    assert [flex.full, flex.partial, tiles.partial, tiles.query_tile] == pytest.approx(fit.tolist(), rel=0.01)


def test_dense_constant_is_the_mean_of_the_record():
    for direction in ("forward", "backward"):
        logs = [
            math.log(predicted(case, "flex").dense_ms / case["milliseconds"]["dense"])
            for case in CASES
            if case["pass"] == direction
        ]
        assert abs(sum(logs) / len(logs)) < 0.01


def test_copy_efficiency_is_that_of_the_record():
    case = next(case for case in CASES if (case["preset"], case["pass"]) == ("lm-32k-bidirectional", "forward"))
    extra = case["milliseconds"]["flex-tiles"] - case["milliseconds"]["flex"]
    moved = 8 * 32768 * 128 * 2 * case["heads"]
    assert moved / (extra * 1e-3) / DEVICES["h200"].bandwidth == pytest.approx(COPY_EFFICIENCY, rel=0.05)


def test_parts_add_up_and_follow_the_call():
    one, many = predict(HUNYUAN, heads=8), predict(HUNYUAN, heads=8, batch=3)
    assert one.milliseconds == one.full_ms + one.partial_ms + one.overhead_ms + one.permutation_ms
    assert many.milliseconds == pytest.approx(3 * one.milliseconds)
    assert many.speedup == pytest.approx(one.speedup)
    assert one.partial_ms == 0
    assert predict(HUNYUAN, tiling="flat").permutation_ms == 0
    assert predict(HUNYUAN, backward=True).milliseconds > 2 * predict(HUNYUAN).milliseconds


def test_tile_order_pays_where_it_was_measured_to_pay():
    assert predict(HUNYUAN).milliseconds < predict(HUNYUAN, tiling="flat").milliseconds / 3


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"device": "h100"}, "no measurement on h100"),
        ({"tiling": "anchored"}, "anchored"),
        ({"head_dim": 64}, "head dim 64 scaled from 128"),
        ({"dtype": torch.float16}, "float16"),
        ({"q_tile": (4, 8, 8), "kv_tile": (2, 8, 8)}, "256 x 128"),
    ],
)
def test_estimates_are_labelled(options, note):
    result = predict(HUNYUAN, **options)
    assert not result.measured
    assert result.error is None
    assert note in "; ".join(result.notes)
    assert json.loads(json.dumps(result.to_json()))["measured"] is False
    assert "estimate" in str(result)


def test_small_calls_are_labelled():
    assert "fill the device" in predict(GNA((16, 16), 4), heads=1).notes[0]


def test_devices_scale_by_their_peaks():
    h200, h100, b200 = (predict(HUNYUAN, device=device) for device in ("h200", "h100", "b200"))
    assert h100.full_ms == pytest.approx(h200.full_ms)
    assert h100.permutation_ms == pytest.approx(h200.permutation_ms * 4.8 / 3.35)
    assert b200.dense_ms == pytest.approx(h200.dense_ms * 989 / 2250)


def test_output():
    result = predict(HUNYUAN)
    numbers = json.loads(json.dumps(result.to_json()))
    assert (numbers["route"], numbers["device"], numbers["measured"]) == ("flex-tiles", "h200", True)
    assert numbers["milliseconds"] == result.milliseconds
    assert "constants measured in this setting" in str(result)
    assert max(map(len, str(result).splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "h300"}, "device='h300'.*a100, h100, h200, b200"),
        ({"route": "natten"}, "route='natten'.*flex, flex-tiles"),
        ({"route": "flex"}, "route='flex' does not run tiling='static'.*flat"),
        ({"tiling": "round"}, "tiling='round'"),
        ({"dtype": "float32"}, "dtype='float32'.*bfloat16, float16"),
        ({"heads": 0}, "heads=0"),
        ({"kv_tile": 4}, "kv_tile=4.*needs a q_tile"),
        ({"q_tile": 0}, "q_tile=0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        predict(HUNYUAN, **options)
