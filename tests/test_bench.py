import json
import math

import pytest
import torch

from gna_flex import GNA, bench
from gna_flex.bench import Timing, bench_attention, bench_mask, speedups
from gna_flex.cli import main

NAN = float("nan")


def ok(capsys, *argv):
    assert main(list(argv)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.slow
@pytest.mark.parametrize("order", ["row-major", "tiles"])
def test_mask_against_create_block_mask(capsys, order):
    numbers = json.loads(
        ok(capsys, "bench", "mask", "20x36", "--window", "7", "--order", order, "--repeats", "2", "--json")
    )
    assert numbers["what"] == "mask"
    assert numbers["gna"]["window"] == [7, 7]
    assert numbers["settings"] == {"device": "cpu", "repeats": 2, "order": order}
    assert numbers["environment"]["torch"] == torch.__version__
    ours, theirs = numbers["timings"]
    assert (ours["name"], theirs["name"]) == ("gna_mask", "create_block_mask")
    assert min(ours["milliseconds"], theirs["milliseconds"]) > 0
    assert ours["speedup"] == pytest.approx(theirs["milliseconds"] / ours["milliseconds"])
    assert theirs["speedup"] == 1


def test_what_cannot_run_is_not_run(capsys, monkeypatch):
    monkeypatch.setattr(bench, "CREATE_BLOCK_MASK_PAIRS", 0)
    out = ok(capsys, "bench", "mask", "8x8", "--window", "3", "--repeats", "1")
    assert "not run" in out
    assert "MiB" in out
    numbers = json.loads(ok(capsys, "bench", "mask", "8x8", "--window", "3", "--repeats", "1", "--json"))
    theirs = numbers["timings"][1]
    assert theirs["milliseconds"] is theirs["peak_mib"] is theirs["speedup"] is None


def test_tile_order_is_not_compared_where_memory_would_run_out(monkeypatch):
    gna = GNA((30, 48, 80), (18, 24, 24))
    monkeypatch.setattr(bench, "_available_bytes", lambda: 8 * 2.0**30)
    assert "GiB" in bench._obstacle(gna, "tiles")
    assert bench._obstacle(gna, "row-major") == ""
    monkeypatch.undo()
    assert 1 << 20 < bench._available_bytes() < 1 << 50


class DisagreeingPool:
    """Stands for the processes that measure: the two ways count different blocks."""

    def __init__(self, processes):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def apply(self, function, arguments):
        return 1.0, 1.0, (len(arguments[0]), 0)


def test_masks_that_disagree_raise(capsys, monkeypatch):
    context = type("Context", (), {"Pool": DisagreeingPool})
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda method: context)
    with pytest.raises(AssertionError, match="gna_mask and create_block_mask disagree"):
        bench_mask(GNA((8, 8), 3))
    assert main(["bench", "mask", "8x8", "--window", "3"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gna-flex bench: layout 8x8, window 3x3: gna_mask and create_block_mask disagree")


def test_memory_is_the_peak_not_what_is_left():
    before = bench._forget_peak()
    big = torch.ones(64 << 20, dtype=torch.uint8)
    del big
    assert 60 < bench._peak_mib() - before < 80
    assert bench._peak_mib() - bench._forget_peak() > -1


def fake_routes(monkeypatch, error=0.0):
    """Routes without compiling: the reference, plus an error."""
    eager = bench.eager_attention

    def routed(route, q, k, v, mask):
        with bench.backend("reference"):
            return eager(q, k, v, mask)[0] + error

    monkeypatch.setattr(bench, "_routed", routed)


SMALL = ["8x8", "--window", "3", "--heads", "2", "--head-dim", "16", "--device", "cpu", "--repeats", "1"]


def test_attention(capsys, monkeypatch):
    fake_routes(monkeypatch)
    out = ok(capsys, "bench", "attention", *SMALL)
    for word in ("dense", "flex-tiles", "vs dense", "bfloat16"):
        assert word in out
    assert "memory" not in out
    numbers = json.loads(ok(capsys, "bench", "attention", *SMALL, "--dtype", "float32", "--batch", "2", "--json"))
    assert numbers["settings"] == {
        "device": "cpu",
        "repeats": 1,
        "batch": 2,
        "heads": 2,
        "head_dim": 16,
        "dtype": "float32",
        "backward": False,
    }
    assert numbers["baseline"] == "dense"
    assert [timing["name"] for timing in numbers["timings"]] == ["dense", "flex", "flex-tiles"]
    assert all(timing["milliseconds"] > 0 for timing in numbers["timings"])


def test_heads_of_a_preset(capsys, monkeypatch):
    seen = {}

    def measure(gna, **options):
        seen.update(options)
        return [Timing("dense", 2.0, NAN), Timing("flex", 1.0, NAN)]

    monkeypatch.setattr(bench, "bench_attention", measure)
    out = ok(capsys, "bench", "attention", "--preset", "ltx-2.5-decoder-3", "--device", "cpu")
    assert (seen["heads"], seen["head_dim"]) == (8, 64)
    assert "2.00x" in out


def test_attention_that_is_wrong_raises(capsys, monkeypatch):
    fake_routes(monkeypatch, error=1.0)
    with pytest.raises(AssertionError, match="flex: error"):
        bench_attention(GNA((8, 8), 3), heads=1, head_dim=16, device="cpu", repeats=1)
    assert main(["bench", "attention", *SMALL]) == 1
    assert "against the reference" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_routes_on_the_cpu():
    gna = GNA((16, 16), 5)
    timings = bench_attention(gna, heads=2, head_dim=32, dtype=torch.float32, device="cpu", repeats=2)
    assert [timing.name for timing in timings] == ["dense", "flex", "flex-tiles"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "mask"], "give a layout"),
        (["bench", "mask", "8x8", "--window", "9"], "window"),
        (["bench", "mask", "8x8", "--device", "warp9"], "device=warp9"),
        (["bench", "attention", *SMALL, "--backward"], "no backward on the CPU"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(capsys, argv, message):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gna-flex bench: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_attention_without_a_gpu_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert main(["bench", "attention", "8x8", "--window", "3"]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["bench"], ["bench", "masks", "8x8"], ["bench", "mask", "8x8", "--repeats", "0"]])
def test_unknown_words_show_the_usage(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: gna-flex" in capsys.readouterr().err


def test_list_presets(capsys):
    assert "hunyuan-video" in ok(capsys, "bench", "mask", "--list-presets")


def test_speedups_of_what_did_not_run():
    ours, theirs = speedups("mask", [Timing("gna_mask", 1.0, 1.0), Timing("create_block_mask", NAN, NAN)])
    assert math.isnan(ours)
    assert math.isnan(theirs)
