import json
import subprocess
import sys

import pytest

import gna_flex
from gna_flex import cli
from gna_flex.cli import main
from gna_flex.cli.arguments import sizes
from gna_flex.cuda import jit


def ok(capsys, *argv):
    assert main(list(argv)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize(
    "spelling", [["30x48x80"], ["30,48,80"], ["30", "48", "80"], ["30,", "48,", "80"], ["30x48", "80"]]
)
def test_sizes(spelling):
    assert sizes(spelling, "layout") == (30, 48, 80)


@pytest.mark.parametrize("word", ["", "x", "3x", "3.5", "a", "3;4", "3--4"])
def test_wrong_sizes(word):
    with pytest.raises(ValueError, match=r"^window="):
        sizes([word], "window")


@pytest.mark.parametrize("layout", [["30x48x80"], ["30", "48", "80"]])
def test_report(capsys, layout):
    numbers = json.loads(
        ok(capsys, "report", *layout, "--window", "18,24,24", "--stride", "16", "8", "8", "--q-tile", "2x8x8", "--json")
    )
    assert numbers["tiles"]["visited"] == 81 * 900
    assert numbers["best_tile"] is False


def test_report_table(capsys):
    out = ok(capsys, "report", "--preset", "hunyuan-video")
    assert "72,900" in out
    assert "11.11x" in out
    assert "perfectly block-sparse" in out


@pytest.mark.parametrize("spelling", [["-1,4,16"], ["-1x4x16"], ["-1", "4", "16"]])
def test_negative_window_is_the_whole_dimension(capsys, spelling):
    numbers = json.loads(ok(capsys, "report", "24,44,80", "--window", *spelling, "--dilation", "1,11,5", "--json"))
    assert numbers["gna"]["window"] == [24, 4, 16]
    assert numbers["flop_speedup"] == pytest.approx(55)


@pytest.mark.parametrize(
    ("flags", "causal"), [([], [True, True]), (["1", "0"], [True, False]), (["0"], [False, False])]
)
def test_causal_and_text(capsys, flags, causal):
    argv = ["report", "8x8", "--window", "3", "--causal", *flags, "--text-first", "5", "--text-last", "2", "--json"]
    gna = json.loads(ok(capsys, *argv))["gna"]
    assert gna["causal"] == causal
    assert (gna["text_first"], gna["text_last"]) == (5, 2)


def test_no_natural(capsys):
    assert json.loads(ok(capsys, "report", "64x64", "--window", "9", "--no-natural", "--json"))["natural"] is None


def test_list_presets(capsys):
    assert "cosmos-predict2-98" in ok(capsys, "report", "--list-presets")
    assert json.loads(ok(capsys, "report", "--list-presets", "--json"))["flux-4k"]["heads"] == 24


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report", "8x8", "--window", "3", "--stride", "4"], "stride"),
        (["report", "8x8", "--window", "9"], "window"),
        (["report", "1x2x3x4"], "4 dimensions"),
        (["report"], "give a layout"),
        (["report", "8x8", "--window", "three"], "window=three"),
        (["report", "8x8", "--causal", "2"], "causal"),
        (["report", "8x8", "--kv-tile", "4"], "q_tile"),
        (["report", "--preset", "hunyan"], "did you mean hunyuan-video"),
        (["report", "8x8", "--preset", "cosmos"], "leave out layout"),
        (["viz", "8x8", "--query", "8", "0"], "outside"),
        (["viz", "8x8", "--png", "/nowhere/at/all.png"], "all.png"),
        (["demo", "--device", "warp9"], "device=warp9"),
        (["demo", "--image", "/nowhere/at/all.png"], "all.png"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(capsys, argv, message):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"gna-flex {argv[0]}: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_interrupt(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.info, "info", interrupted)
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("GNA_FLEX_BACKEND", "flex")
    facts = json.loads(ok(capsys, "info", "--json"))
    assert facts["versions"]["gna-flex"] == gna_flex.__version__
    assert facts["environment"]["GNA_FLEX_BACKEND"]["value"] == "flex"
    cpu = facts["devices"][0]["routes"]
    assert cpu["reference"] == {"inference": "", "training": ""}
    assert cpu["flex"]["inference"] == ""
    assert "backward" in cpu["flex"]["training"]
    out = ok(capsys, "info")
    assert "flex-tiles" in out
    assert "GNA_FLEX_BACKEND=flex" in out
    assert "Hopper" in cpu["hopper"]["inference"]


def test_info_of_kernels(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", str(tmp_path))
    facts = json.loads(ok(capsys, "info", "--json"))
    assert facts["environment"]["GNA_FLEX_CACHE_DIR"]["value"] == str(tmp_path)
    assert facts["kernels"] | {"nvrtc": "", "missing": ""} == {
        "missing": "",
        "nvrtc": "",
        "cache": str(tmp_path),
        "cached": [],
    }
    options = ("-std=c++17", "-DHEAD_DIM=128", "-DTEXT=0")
    entries = [jit.Entry(f"{i}.cu", "sm_90a", options, 1 << 20, float(i), tmp_path / str(i)) for i in range(10)]
    monkeypatch.setattr(jit, "cached_kernels", lambda: entries)
    cached = json.loads(ok(capsys, "info", "--json"))["kernels"]["cached"]
    assert len(cached) == 10
    assert cached[3] == {
        "name": "3.cu",
        "arch": "sm_90a",
        "macros": {"HEAD_DIM": "128", "TEXT": "0"},
        "bytes": 1 << 20,
        "age": 3.0,
    }
    out = ok(capsys, "info")
    for words in ("10 kernels, 10.0 MiB", "7.cu sm_90a: HEAD_DIM=128 TEXT=0", "and 2 older ones"):
        assert words in out
    assert "8.cu" not in out


def test_info_without_a_cuda_compiler(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    assert json.loads(ok(capsys, "info", "--json"))["kernels"]["nvrtc"] is None
    assert "pip install gna-flex[cuda]" in ok(capsys, "info").replace("\n", " ")


def test_viz(capsys, tmp_path):
    assert "◆ query" in ok(capsys, "viz", "8x12", "--window", "3", "--query", "2,3")
    numbers = json.loads(ok(capsys, "viz", "8x12", "--window", "3", "--query", "2", "3", "--json"))
    assert numbers["keys"] == [{"start": 1, "stop": 4, "step": 1}, {"start": 2, "stop": 5, "step": 1}]
    pytest.importorskip("matplotlib")
    path = tmp_path / "mask.png"
    assert str(path.name) in ok(capsys, "viz", "8x12", "--window", "3", "--png", str(path)).replace("\n", "")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_demo(capsys, tmp_path):
    io = pytest.importorskip("skimage.io")
    numpy = pytest.importorskip("numpy")
    picture = tmp_path / "picture.png"
    io.imsave(picture, numpy.arange(64 * 64 * 3, dtype="uint8").reshape(64, 64, 3), check_contrast=False)
    numbers = json.loads(ok(capsys, "demo", "--image", str(picture), "--window", "5", "--device", "cpu", "--json"))
    assert numbers["passed"] is True
    assert numbers["image"] == [64, 64]
    assert numbers["route"]["name"] == "reference"
    assert numbers["model"]["tiles"]["visited"] == 72900


def test_demo_outside_of_its_budget_is_exit_code_1(capsys, monkeypatch):
    from gna_flex import demo

    monkeypatch.setattr(demo, "BUDGET", 0.0)
    monkeypatch.setattr(demo, "load_image", lambda path: __import__("numpy").random.rand(64, 64, 3))
    assert main(["demo", "--image", "any", "--window", "3", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "gna_flex", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gna-flex {gna_flex.__version__}\n"


def test_import_is_light():
    code = "import sys, gna_flex; print([m for m in ('matplotlib', 'skimage', 'gna_flex.cli') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
