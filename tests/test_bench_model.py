"""Whole models measured: tiny versions on the CPU, and what happens if a result is wrong."""

import dataclasses
import json
import math
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers

import gna_flex
from gna_flex import bench_models, cli, routing
from gna_flex.bench_models import BASELINE, EAGER, FULL, Check, Measured, Row, bench_model
from gna_flex.integrations import processors
from gna_flex.models import MODELS, block_lists, blocks_of, build, make_inputs, model

TINY = {name: known.smaller() for name, known in MODELS.items()}
COMPILED = ("hunyuan-video", "wan-14b", "dinov3")
"""Whose blocks are compiled in these tests: two kinds of blocks, one, and another library."""
PARAMETERS = {"hunyuan-video": 12.8, "flux-4k": 11.9, "cosmos-7b": 7.2, "wan-14b": 14.3}
"""Parameters of the published models, in billions."""


def measure(name: str, **options) -> Measured:
    return bench_model(TINY[name], device="cpu", compiler="eager", repeats=1, **options)


@pytest.fixture
def uncompiled(monkeypatch):
    """Blocks stay as they are: quick, for tests of everything else."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_model(name, fresh_compiler, request):
    if name not in COMPILED:
        request.getfixturevalue("uncompiled")
    counters.clear()
    stages = []
    result = measure(name, progress=stages.append)
    small = TINY[name]
    settings = [setting.name for setting in small.settings]
    assert [row.name for row in result.rows] == [EAGER, BASELINE, FULL, *settings]
    assert [row.gna for row in result.rows[3:]] == [small.gna(setting) for setting in small.settings]
    assert all(row.attention > 0 and 0 < row.milliseconds < math.inf and row.samples == 1 for row in result.rows)
    assert len(result.checks) == 2 * len(settings) + 1
    for check in result.checks:
        assert check.error <= check.budget(torch.bfloat16) < check.effect
    assert result.checks[-1].noise > 0
    # One graph for every kind of block and way to run it, two where the strides of a block's input differ; no breaks.
    assert not counters["graph_break"]
    kinds, compiled = len(small.blocks), 1 + len(settings)
    if name in COMPILED:
        assert kinds * compiled <= counters["stats"]["unique_graphs"] <= (2 * kinds - 1) * compiled
    for stage in ("building", f"{settings[0]}, compiling", f"{BASELINE}, first forward", "attention alone"):
        assert stage in stages


def run_json(capsys, *arguments: str) -> tuple[int, dict]:
    tiny = ("--tiny", "--device", "cpu", "--compiler", "eager", "--repeats", "1", "--json")
    code = cli.main(["bench", "model", *arguments, *tiny])
    return code, json.loads(capsys.readouterr().out)


def test_json_is_complete(capsys, uncompiled):
    code, found = run_json(capsys, "cosmos-7b")
    assert code == 0
    assert found["failed"] == {}
    assert found["diffusers"] == diffusers.__version__
    assert found["torch"] == torch.__version__
    assert found["command"] == "gna-flex bench model cosmos-7b --tiny"
    (case,) = found["cases"]
    assert case["class"] == "diffusers.CosmosTransformer3DModel"
    assert (case["layers"], case["heads"], case["head_dim"], case["layout"]) == (2, 2, 32, [4, 8, 8])
    assert case["generation"] == {"steps": 35, "dense_steps": 12}
    dense, ours = case["rows"][1], case["rows"][-1]
    assert dense["name"] == case["baseline"]
    assert dense["speedup"] == 1
    assert (dense["generation"], dense["peak_mib"]) == (None, None)
    assert ours["gna"]["window"] == [2, 4, 4]
    assert ours["sparsity"] == 0.875
    step = dense["milliseconds"] / ours["milliseconds"]
    assert ours["speedup"] == pytest.approx(step)
    assert ours["generation"] == pytest.approx(35 / (12 + 23 / step))
    assert all(check["error"] <= check["budget"] < check["effect"] for check in case["checks"])


def test_the_table(capsys, monkeypatch, uncompiled):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["bench", "model", "wan-14b", "--tiny", "--device", "cpu", "--repeats", "1"]) == 0
    text = capsys.readouterr().out
    for part in ("WanTransformer3DModel", "4x8x8 tokens", FULL, "87.5%", "1.00x", "checked: strided, compiled"):
        assert part in text


def faulty(fault: str):
    """flex_attention of the processors, wrong in one situation."""
    true = gna_flex.flex_attention

    def attend(q, k, v, block_mask):
        gna = block_mask.plan.gnas[0]
        wrong = {
            "kernel": routing.forced() != "reference" and gna.layout != TINY["wan-14b"].layout,
            "compiled": torch.compiler.is_compiling(),
            "full window": gna.window == gna.layout == TINY["wan-14b"].layout,
            "not finite": True,
        }[fault]
        out = true(q, k, v, block_mask=block_mask)
        return out * (math.nan if fault == "not finite" else 1.2) if wrong else out

    return attend


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kernel", "sliding, half the grid, two blocks of each kind: the reference's output: error"),
        ("compiled", "sliding, compiled, two blocks of each kind: the output without compiling: error"),
        ("full window", "full window, whole model: dense attention's output: error"),
        ("not finite", "reference: the output is not finite"),
    ],
)
def test_a_wrong_result_is_exit_code_1(monkeypatch, capsys, fresh_compiler, fault, message):
    """The models after it are measured all the same."""
    monkeypatch.setattr(processors, "flex_attention", faulty(fault))
    code = cli.main(
        ["bench", "model", "wan-14b", "dinov3", "--tiny", "--device", "cpu", "--compiler", "eager", "--json"]
    )
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert code == 1
    assert found["failed"]["wan-14b"].startswith(message)
    assert f"gna-flex bench: wan-14b: {message}" in err
    assert [case["model"] for case in found["cases"]] == ["dinov3"]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (Check("a", 0.016, 0.01, 1.0), r"a: error 1.60e-02, budget 1.50e-02"),
        (Check("a", math.nan, 0.01, 1.0), r"a: error nan"),
        (Check("a", 0.01, math.nan, 1.0), r"a: error"),
        (Check("a", 0.01, 0.01, 0.012), r"windows change 1.20e-02 only"),
        (Check("a", 0.003, 0.0, 1.0), r"budget 1.95e-03"),
    ],
)
def test_checks_that_fail(check, message):
    with pytest.raises(AssertionError, match=message):
        bench_models._passed(check, torch.bfloat16)


def test_checks_that_pass():
    check = Check("a", 0.014, 0.01, 0.02)
    assert bench_models._passed(check, torch.bfloat16) is check


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0])
def test_outputs_that_are_none(value):
    with pytest.raises(AssertionError, match="constant" if value == 2 else "not finite"):
        bench_models.sane("a", torch.full((4, 4), value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wan"], r"model='wan' is not known; did you mean wan-14b\? models are hunyuan-video"),
        ([], "give names of models: hunyuan-video"),
        (["wan-14b", "--window", "3"], "names of models only"),
        (["wan-14b", "--preset", "cosmos"], "names of models only"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    assert cli.main(["bench", "model", *arguments, "--device", "cpu"]) == 2
    assert cli.main(["bench", "model", *arguments, "--tiny", "--device", "cpu"]) == 2
    assert message.replace("\\", "") in capsys.readouterr().err


def test_a_library_that_is_missing(monkeypatch, capsys):
    missing = dataclasses.replace(MODELS["wan-14b"], library="no_such_library")
    monkeypatch.setitem(MODELS, "wan-14b", missing)
    assert cli.main(["bench", "model", "wan-14b", "--tiny", "--device", "cpu"]) == 2
    assert "no_such_library" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_weights(name):
    """Nothing is left as memory was found, and a second build is the same."""
    first, second = (build(TINY[name], "cpu", torch.bfloat16) for _ in range(2))
    for (path, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), path
        assert a.dtype == torch.bfloat16
        assert a.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


@torch.no_grad()
def test_twins_share_weights_and_nothing_else():
    small = TINY["wan-14b"]
    core = build(small, "cpu", torch.float32)
    inputs = make_inputs(small, core, "cpu", torch.float32)
    dense = bench_models.run(core, inputs)
    way = bench_models._applied(small, core, (2, 4, 4))
    assert all(a is b for a, b in zip(core.parameters(), way.parameters(), strict=True))
    assert bench_models.distance(bench_models.run(way, inputs), dense) > 1e-2
    assert torch.equal(bench_models.run(core, inputs), dense)


@torch.no_grad()
def test_shallow_models(monkeypatch):
    monkeypatch.setattr(bench_models, "DEPTH", 1)
    small = TINY["flux-4k"]
    core = build(small, "cpu", torch.float32)
    blocks, inputs = list(blocks_of(core, small)), make_inputs(small, core, "cpu", torch.float32)
    whole = bench_models.run(core, inputs)
    with bench_models.shallow(small, core):
        assert [len(part) for part in block_lists(core, small)] == [1, 1]
        assert bench_models.distance(bench_models.run(core, inputs), whole) > 1e-2
    assert all(a is b for a, b in zip(blocks_of(core, small), blocks, strict=True))
    assert torch.equal(bench_models.run(core, inputs), whole)


@torch.no_grad()
def test_dense_attention_without_a_mask():
    """Of HunyuanVideo, where nothing is padded: the same output, and no mask arrives."""
    small = TINY["hunyuan-video"]
    plain, unmasked = (build(dataclasses.replace(small, masked=m), "cpu", torch.float32) for m in (False, True))
    inputs = make_inputs(small, plain, "cpu", torch.float32)
    masks = {False: [], True: []}
    for core, found in ((plain, masks[False]), (unmasked, masks[True])):
        for block in blocks_of(core, small):
            block.attn.register_forward_pre_hook(
                lambda module, args, kwargs, found=found: found.append(kwargs["attention_mask"]), with_kwargs=True
            )
    assert bench_models.distance(bench_models.run(unmasked, inputs), bench_models.run(plain, inputs)) < 1e-6
    assert masks[True] == [None] * 4
    assert all(bool(mask.all()) for mask in masks[False])


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_their_published_sizes(name):
    known = MODELS[name]
    with torch.device("meta"):
        core = getattr(diffusers, known.class_name)(**known.config)
    assert round(sum(p.numel() for p in core.parameters()) / 1e9, 1) == PARAMETERS[name]
    assert {type(block).__name__ for block in blocks_of(core, known)} == set(known.blocks)


def test_settings_of_the_models():
    def kept(name: str, setting: int) -> float:
        gna = model(name).gna(model(name).settings[setting])
        return gna.kept_pairs() / gna.tokens**2

    assert [round(kept("hunyuan-video", i), 3) for i in range(3)] == [0.091] * 3
    assert round(kept("flux-4k", 1), 3) == 0.112
    assert [round(kept("cosmos-7b", i), 3) for i in range(3)] == [0.109, 0.109, 0.436]
    for known in MODELS.values():
        halved = known.halved()
        assert all(halved.gna(s).kept_pairs() < halved.gna(s).tokens ** 2 for s in halved.settings)


def test_the_stride_of_hunyuan_video_is_the_fastest():
    """By the estimate that the kernel's shapes are chosen with; strides of 1 in time move windows frame by frame."""
    from gna_flex.cuda.shapes import choose, cost

    hunyuan = model("hunyuan-video")
    sliding, paper, fastest = (cost(gna, choose(gna)) for gna in map(hunyuan.gna, hunyuan.settings))
    assert fastest < 0.98 * paper
    assert paper < 0.7 * sliding


def test_slow_ways_are_timed_less(monkeypatch):
    settled = []

    def time_one(run, device, calls=1, *, settle):
        settled.append(settle)
        return 20_000.0 if not settle else 5.0

    monkeypatch.setattr(bench_models, "time_one", time_one)
    first = {EAGER: 20_000.0, BASELINE: 20_000.0, "a": 5000.0, "quick": 5.0}
    times = bench_models._in_turns(dict.fromkeys(first), first, {}, "cpu", 3, lambda stage: None)
    assert {name: len(found) for name, found in times.items()} == {EAGER: 1, BASELINE: 2, "a": 2, "quick": 3}
    assert times["quick"] == [5.0] * 3
    assert sorted(settled) == [False, False, True, True, True]


def test_speedup_of_a_generation():
    flux = TINY["flux-4k"]
    dense, ours = (
        Row(name, time, 1, math.nan, 1.0, gna)
        for name, time, gna in ((BASELINE, 100.0, None), ("a", 25.0, flux.gna(flux.settings[0])))
    )
    result = Measured(flux, (dense, ours), (), 1, 1, 1, 1, {})
    assert result.speedup(ours) == 4
    assert result.generation(ours) == pytest.approx(28 / (9 + 19 / 4))
    assert math.isnan(result.generation(dense))
