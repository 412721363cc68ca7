import json
import math
import sys

import pytest
import torch

from gna_flex import GNA, bench, compare, flex_attention, gna_mask, reference_attention
from gna_flex.bench import Timing, bench_mask, of_ideal, speedups
from gna_flex.cli import main
from gna_flex.compare import Contender, bench_attention

NAN = float("nan")


def ok(capsys, *argv):
    assert main(list(argv)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


class PoolOfThisProcess:
    """Stands for the processes that measure, which take seconds to begin."""

    def __init__(self, processes):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def apply(self, function, arguments):
        return function(*arguments)


def measure_in(monkeypatch, pool):
    context = type("Context", (), {"Pool": pool})
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda method: context)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["row-major", "tiles"])
def test_mask_against_create_block_mask(capsys, monkeypatch, order, request):
    if order == "row-major":  # without generated code
        measure_in(monkeypatch, PoolOfThisProcess)
        request.getfixturevalue("counting_compiler")
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
    measure_in(monkeypatch, PoolOfThisProcess)
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


class DisagreeingPool(PoolOfThisProcess):
    """The two ways count different blocks."""

    def apply(self, function, arguments):
        return 1.0, 1.0, (len(arguments[0]), 0)


def test_masks_that_disagree_raise(capsys, monkeypatch):
    measure_in(monkeypatch, DisagreeingPool)
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
    eager = compare.eager_attention

    def routed(route, q, k, v, mask):
        with compare.backend("reference"):
            return eager(q, k, v, mask)[0] + error

    monkeypatch.setattr(compare, "_routed", routed)


SMALL = ["8x8", "--window", "3", "--heads", "2", "--head-dim", "16", "--device", "cpu", "--repeats", "1"]


def test_attention(capsys, monkeypatch):
    fake_routes(monkeypatch)
    out = ok(capsys, "bench", "attention", *SMALL)
    for word in (
        "dense",
        "flex-tiles",
        "vs dense",
        "of ideal",
        "tiles",
        "bfloat16",
        "hopper: not run, it needs an NVIDIA",
    ):
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
    pairs = 64**2 / GNA((8, 8), 3).kept_pairs()
    assert numbers["flop_speedup"] == pytest.approx(pairs)
    by_name = {timing["name"]: timing for timing in numbers["timings"]}
    assert list(by_name) == ["dense", "hopper", "blackwell", "flex-tiles", "flex", "natten"]
    for name in ("dense", "flex-tiles", "flex"):
        assert by_name[name]["milliseconds"] > 0
    for name in ("hopper", "blackwell", "natten"):
        assert by_name[name]["milliseconds"] is by_name[name]["speedup"] is by_name[name]["of_ideal"] is None
        assert by_name[name]["note"].startswith("not run, ")
    assert by_name["dense"]["of_ideal"] is None
    assert by_name["flex"]["of_ideal"] == pytest.approx(by_name["flex"]["speedup"] / pairs)
    assert by_name["flex"]["tiles"] == "128 | 128"
    assert "x" in by_name["flex-tiles"]["tiles"]


def test_only_some_ways(capsys, monkeypatch):
    fake_routes(monkeypatch)
    numbers = json.loads(ok(capsys, "bench", "attention", *SMALL, "--ways", "flex", "--json"))
    assert [timing["name"] for timing in numbers["timings"]] == ["dense", "flex"]
    assert numbers["settings"]["ways"] == ["flex"]


def test_heads_of_a_preset(capsys, monkeypatch):
    seen = {}

    def measure(gna, **options):
        seen.update(options)
        return [Timing("dense", 2.0, NAN), Timing("flex", 1.0, NAN)]

    monkeypatch.setattr(compare, "bench_attention", measure)
    out = ok(capsys, "bench", "attention", "--preset", "ltx-2.5-decoder-3", "--device", "cpu")
    assert (seen["heads"], seen["head_dim"]) == (8, 64)
    assert "2.00x" in out


def test_attention_that_is_wrong_raises(capsys, monkeypatch):
    fake_routes(monkeypatch, error=1.0)
    with pytest.raises(AssertionError, match="flex-tiles: error"):
        bench_attention(GNA((8, 8), 3), heads=1, head_dim=16, device="cpu", repeats=1)
    assert main(["bench", "attention", *SMALL]) == 1
    assert "against the reference" in capsys.readouterr().err


def test_compiled_routes_on_the_cpu(counting_compiler):
    gna = GNA((16, 16), 5)
    timings = bench_attention(gna, heads=2, head_dim=32, dtype=torch.float32, device="cpu", repeats=2)
    assert [timing.name for timing in timings if timing.milliseconds > 0] == ["dense", "flex-tiles", "flex"]


def test_every_head_counts_in_the_check():
    gna = GNA((8, 8), 3)
    q, k, v = torch.randn(3, 2, 3, 64, 16).unbind()
    mask = gna_mask(gna, device="cpu")
    out = reference_attention(q, k, v, mask.mask_mod)[0]
    compare.check_rows("ours", out, q, k, v, mask)
    for head in ((0, 0), (1, 2)):
        wrong = out.clone()
        wrong[head] += 1
        with pytest.raises(AssertionError, match="ours: error"):
            compare.check_rows("ours", wrong, q, k, v, mask)


def test_rounds_differ_in_order(monkeypatch):
    order, calls = [], []
    monkeypatch.setattr(compare, "time_one", lambda run, *rest: order.append(run()) or calls.append(rest[-1]) or 7.0)
    ways = [Contender("a", lambda: "a"), Contender("b", lambda: "b"), Contender("c", note="cannot")]
    times = compare.in_turns(ways, False, "cpu", 20)
    rounds = ["".join(pair) for pair in zip(order[::2], order[1::2], strict=True)]
    assert set(rounds) == {"ab", "ba"}
    assert len(rounds) == 22
    assert calls == [1, 1] + [15] * 42, "100 ms are fifteen calls of 7"
    assert times == {"a": 7.0, "b": 7.0}


def test_dense_attention_that_would_take_for_ever_is_not_run(monkeypatch):
    monkeypatch.setattr(compare, "DENSE_FLOPS", 0)
    way = compare.dense(*torch.zeros(3, 1, 1, 8, 8).unbind())
    assert way.run is None
    assert "operations" in way.note
    timings = [Timing("dense", NAN, NAN, way.note), Timing("flex", 1.0, NAN)]
    assert math.isnan(speedups("attention", timings)[1])
    assert math.isnan(of_ideal("attention", GNA((8, 8), 3), timings)[1])


class FakeNatten:
    """Stands for the package: dense attention under the mask, on tensors [B, *layout, H, D]."""

    HAS_LIBNATTEN = True
    __version__ = "1.2.3"
    refused = ((4, 4), (2, 2))

    def __init__(self, gna, wrong=0.0):
        self.gna, self.wrong, self.calls = gna, wrong, []

    def na2d(self, query, key, value, **options):
        self.calls.append(options)
        if options.get("q_tile_shape") == self.refused[0]:
            raise ValueError("tile shapes")
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))
        out = reference_attention(q, k, v, gna_mask(self.gna, device="cpu").mask_mod)[0]
        return out.transpose(1, 2).reshape(query.shape) + self.wrong

    def get_configs_for_cutlass_hopper_fna(self, *tensors):
        return [(self.refused, 1), (((8, 2), (2, 8)), 2)]


@pytest.fixture
def natten(monkeypatch):
    package = FakeNatten(GNA((6, 8), 3))
    monkeypatch.setitem(sys.modules, "natten", package)
    monkeypatch.setitem(sys.modules, "natten.backends", package)
    monkeypatch.setattr(compare, "_natten_obstacle", lambda gna, q: "")
    return package


def test_natten_runs_in_its_own_layout_with_its_best_tiles(natten):
    gna = natten.gna
    q, k, v = torch.randn(3, 2, 3, 48, 16).unbind()
    way = compare.natten(q, k, v, gna, backward=False)
    assert [x.shape for x in way.inputs] == [(2, 6, 8, 3, 16)] * 3
    assert way.tiles == "8x2 | 2x8"
    assert way.note == "NATTEN 1.2.3, the best of 2 tiles"
    compare.check_rows("natten", way.to_natural(way.run()), q, k, v, gna_mask(gna, device="cpu"))
    assert natten.calls[-1] == {
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "dilation": (1, 1),
        "is_causal": (False, False),
        "backend": "hopper-fna",
        "q_tile_shape": (8, 2),
        "kv_tile_shape": (2, 8),
        "kernel_schedule": 2,
    }
    compare.natten(q, k, v, gna, backward=True).run()
    assert "q_tile_shape" not in natten.calls[-1]


def test_natten_that_refuses_every_shape_is_not_run(natten, monkeypatch):
    monkeypatch.setattr(natten, "get_configs_for_cutlass_hopper_fna", lambda *tensors: [(natten.refused, 1)])
    q, k, v = torch.randn(3, 1, 1, 48, 16).unbind()
    way = compare.natten(q, k, v, natten.gna, backward=False)
    assert way.run is None
    assert "do not take this call" in way.note


def test_natten_that_is_wrong_raises(natten, monkeypatch):
    fake_routes(monkeypatch)
    natten.wrong = 1.0
    with pytest.raises(AssertionError, match="natten: error"):
        bench_attention(natten.gna, heads=1, head_dim=16, dtype=torch.float32, device="cpu", repeats=1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "mask"], "give a layout"),
        (["bench", "mask", "8x8", "--window", "9"], "window"),
        (["bench", "mask", "8x8", "--device", "warp9"], "device=warp9"),
        (["bench", "attention", *SMALL, "--backward"], "no backward on the CPU"),
        (["bench", "attention", *SMALL, "--ways", "flex", "nattem"], "ways=nattem: known are dense, hopper"),
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


def test_slow_ways_are_timed_once(monkeypatch):
    calls = []
    ways = [compare.Contender("slow", lambda: calls.append("slow")), compare.Contender("quick", lambda: None)]
    monkeypatch.setattr(compare, "SLOW", -1.0)
    times = compare.in_turns(ways, backward=False, device="cpu", repeats=5)
    assert calls == ["slow", "slow"]
    assert min(times.values()) > 0


def test_backwards_are_timed_once_clocks_have_settled(monkeypatch):
    """Of six backwards, each after a forward, the first three take 9 ms here and do not count."""
    x = torch.ones(4, requires_grad=True)
    backwards = []
    x.register_hook(lambda grad: backwards.append(grad))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(backwards)

        def elapsed_time(self, end):
            assert end.at == self.at + 1, "one backward, and no forward, between two events"
            return 9.0 if self.at < 3 else 2.0 + self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert compare.time_backward(Contender("way", lambda: 2 * x, (x,)), 3) == 6.0
    assert len(backwards) == 6


@pytest.mark.parametrize("wrong", ["", "mask", "scale", "order"])
def test_gradients_are_checked_before_they_are_timed(wrong):
    """The budget of a plain run in 16 bits lets right gradients pass, and no others."""
    gna = GNA((6, 8), (3, 5))
    mask, other = gna_mask(gna, device="cpu"), gna_mask(GNA((6, 8), (3, 4)), device="cpu")
    q, k, v = torch.randn(3, 1, 2, 48, 16).to(torch.bfloat16).unbind()
    inputs = tuple(x.clone().requires_grad_() for x in ((q, v, k) if wrong == "order" else (q, k, v)))

    def run():
        asked = other if wrong == "mask" else mask
        scale = 0.3 if wrong == "scale" else None
        return flex_attention(*inputs, block_mask=asked, scale=scale)

    way = compare.Contender("ours", run, inputs)
    if not wrong:
        compare.check_gradients(way, q, k, v, mask)
    else:
        with pytest.raises(AssertionError, match="gradient of"):
            compare.check_gradients(way, q, k, v, mask)


def test_a_way_is_deterministic_while_its_gradients_are_computed_and_no_longer():
    seen, x = [], torch.randn(3, requires_grad=True)
    hook = x.register_hook(lambda grad: seen.append(torch.are_deterministic_algorithms_enabled()))
    for name in ("hopper", compare.DETERMINISTIC):
        compare.Contender(name, inputs=(x,)).gradients(2 * x, torch.ones(3))
    hook.remove()
    assert seen == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
