"""Tuning without a GPU: which shapes are tried, how a race is decided, the cache under damage and races, first use."""

import json
import logging
import multiprocessing
import os
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import gna_flex
from gna_flex import GNA, gna_mask, kernels
from gna_flex.cli import main
from gna_flex.cuda import jit, tune
from gna_flex.cuda.blackwell import BlackwellConfig
from gna_flex.cuda.forward import Request, estimated
from gna_flex.cuda.kernel import Config
from gna_flex.cuda.tables import KernelTiles
from gna_flex.routing import facts_on

GPU = "NVIDIA H200"
REQUEST = Request((GNA((24, 40), (9, 12), text_last=30),), 128, float16=False, device=0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no wish to measure."""
    path = tmp_path / "cache"
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", str(path))
    monkeypatch.delenv("GNA_FLEX_AUTOTUNE", raising=False)
    return path


def tuning_of(request: Request, choice: int = -1) -> tune.Tuning:
    """As if this one of the candidates had been fastest."""
    found = tune.candidates(request)
    measured = [tune.Measurement(*one, 2.0) for one in found]
    measured[choice] = replace(measured[choice], milliseconds=1.0)
    best = tune.best_of(measured)
    return tune.Tuning(request.gnas, 4, request.head_dim, 1, "bfloat16", GPU, tuple(measured), best, measured[0])


class Tuner:
    """Counts what it is asked to measure."""

    def __init__(self, choice: int = -1) -> None:
        self.asked: list[Request] = []
        self.choice = choice

    def __call__(self, request: Request) -> tune.Tuning:
        self.asked.append(request)
        return tuning_of(request, self.choice)


def never(request: Request) -> tune.Tuning:
    raise AssertionError("nothing was to be measured")


def shapes_for(request: Request, tuner=never, capturing: bool = False) -> tune.Shapes:
    return tune.shapes_for(request, GPU, tuner, lambda: capturing)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


# The cache


def entry() -> Path:
    return tune.entry_path(REQUEST, GPU)


def stored(choice: int = -1) -> tune.Measurement:
    chosen = tuning_of(REQUEST, choice).chosen
    tune.write(entry(), chosen)
    return chosen


@pytest.mark.parametrize("choice", range(4))
def test_round_trip(choice, folder, caplog):
    assert tune.read(entry(), REQUEST) is None
    chosen = stored(choice)
    assert tune.read(entry(), REQUEST) == (chosen.config, chosen.tiles)
    assert shapes_for(REQUEST) == (chosen.config, chosen.tiles)
    assert [path.name for path in folder.iterdir()] == [entry().name]
    assert tune.tuned_entries() == 1
    assert not warnings_in(caplog)


def test_folder_and_file_are_private(folder):
    old = os.umask(0)
    try:
        stored()
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert entry().stat().st_mode & 0o777 == 0o600


def changed(**changes: object) -> str:
    """An entry that is right but for some fields of its configuration and tiles."""
    facts = {"name": entry().name, **asdict(tuning_of(REQUEST).chosen)}
    for name, value in changes.items():
        part = next((facts[p] for p in ("config", "tiles") if name in facts[p]), facts)
        part[name] = value
    return json.dumps(facts)


DAMAGED = {
    "empty": lambda: "",
    "cut": lambda: changed()[:-20],
    "not text": lambda: "\udcff\udcfe",
    "another kind": lambda: "[1, 2]",
    "a number": lambda: "7",
    "deep": lambda: "[" * 100_000,
    "nothing in it": lambda: "{}",
    "of another request": lambda: changed(name="tuned-0.json"),
    "unknown field": lambda: changed(power=9),
    "no such keys": lambda: changed(keys=208),
    "keys that do not fit the tiles": lambda: changed(kv_slots=16, kv_tile=[1, 4, 4]),
    "tiles of another kernel": lambda: changed(rows=128),
    "another head dim": lambda: changed(head_dim=64),
    "more stages than memory": lambda: changed(query_stages=9),
    "debugging": lambda: changed(bounded_waits=1),
    "too many queries": lambda: changed(box=[1, 65, 1]),
    "too many keys": lambda: changed(kv_tile=[1, 300, 1]),
    "no side": lambda: changed(kv_tile=[1, 0, 8]),
    "two sides": lambda: changed(kv_tile=[8, 8]),
    "text": lambda: changed(box="888"),
    "fractions": lambda: changed(box=[1.0, 8.0, 8.0]),
    "no such dimension": lambda: changed(split=3),
    "other warpgroups": lambda: changed(groups=3),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_entries_that_are_not_right_are_ignored_and_replaced(damage, folder, caplog, monkeypatch):
    stored()
    # "unknown field" is one of the configuration.
    text = DAMAGED[damage]()
    if damage == "unknown field":
        facts = json.loads(text)
        facts["config"]["power"] = facts.pop("power")
        text = json.dumps(facts)
    entry().write_bytes(text.encode(errors="surrogateescape"))
    assert shapes_for(REQUEST) == estimated(REQUEST)
    (warning,) = warnings_in(caplog)
    assert str(entry()) in warning
    monkeypatch.setenv("GNA_FLEX_AUTOTUNE", "1")
    chosen = tuning_of(REQUEST).chosen
    assert shapes_for(REQUEST, Tuner()) == (chosen.config, chosen.tiles)
    assert shapes_for(REQUEST) == (chosen.config, chosen.tiles)


@pytest.mark.parametrize("stranger", ["file", "folder", "link"])
def test_entries_of_others_are_ignored(stranger, folder, caplog):
    stored()
    if stranger == "link":
        entry().rename(folder / "elsewhere")
        entry().symlink_to(folder / "elsewhere")
    else:
        (entry() if stranger == "file" else folder).chmod(0o777)
    assert shapes_for(REQUEST) == estimated(REQUEST)
    assert len(warnings_in(caplog)) == 1


def test_a_folder_that_cannot_be_written_is_a_warning(folder, caplog, monkeypatch):
    folder.write_text("a file")
    monkeypatch.setenv("GNA_FLEX_AUTOTUNE", "1")
    assert shapes_for(REQUEST, Tuner()) != estimated(REQUEST)
    assert "GNA_FLEX_CACHE_DIR" in warnings_in(caplog)[-1]
    assert tune.tuned_entries() == 0


CHANGES = {
    "window": {"gnas": (GNA((24, 40), (9, 13), text_last=30),)},
    "causal": {"gnas": (GNA((24, 40), (9, 12), causal=True, text_last=30),)},
    "text": {"gnas": (GNA((24, 40), (9, 12), text_first=30),)},
    "heads": {"gnas": (*REQUEST.gnas, GNA((24, 40), 1, text_last=30))},
    "head dim": {"head_dim": 120},
    "type": {"float16": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_request_has_another_entry(change):
    assert tune.entry_path(replace(REQUEST, **CHANGES[change]), GPU) != entry()


def test_another_kernel_has_other_entries():
    request = replace(REQUEST, capability=(10, 0))
    path = tune.entry_path(request, GPU)
    assert path != entry()
    found = tune.candidates(request)
    assert all(isinstance(config, BlackwellConfig) and tiles.rows == 128 for config, tiles in found)
    tune.write(path, tune.Measurement(*found[-1], 1.0))
    assert tune.read(path, request) == found[-1]
    assert tune.read(path, REQUEST) is None


def test_the_order_of_heads_counts_but_not_their_number():
    one, other = REQUEST.gnas[0], GNA((24, 40), 1, text_last=30)
    paths = {tune.entry_path(replace(REQUEST, gnas=gnas), GPU) for gnas in ((one,), (one, one))}
    assert paths == {entry()}
    paths = {tune.entry_path(replace(REQUEST, gnas=gnas), GPU) for gnas in ((one, other, one), (one, one, other))}
    assert len(paths) == 2


def test_another_gpu_version_or_kernel_has_another_entry(monkeypatch, tmp_path):
    before = entry()
    assert tune.entry_path(REQUEST, "NVIDIA H100") != before
    with monkeypatch.context() as patch:
        patch.setattr(gna_flex, "__version__", "9.9")
        assert entry() != before
    assert entry() == before
    (tmp_path / "csrc" / "hopper").mkdir(parents=True)
    (tmp_path / "csrc" / "hopper" / "forward.cu").write_text("// another kernel")
    monkeypatch.setattr(jit, "source_folder", lambda: tmp_path / "csrc")
    tune.source_digest.cache_clear()
    try:
        assert entry() != before
    finally:
        tune.source_digest.cache_clear()


def write_often(folder: str, choice: int) -> None:
    os.environ["GNA_FLEX_CACHE_DIR"] = folder
    chosen = tuning_of(REQUEST, choice).chosen
    for _ in range(50):
        tune.write(entry(), chosen)


def test_two_processes_write_and_one_reads(folder, caplog):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(str(folder), choice)) for choice in (1, 2)]
    for writer in writers:
        writer.start()
    possible = {(one.config, one.tiles) for one in (tuning_of(REQUEST, choice).chosen for choice in (1, 2))}
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(tune.read(entry(), REQUEST))
        time.sleep(1e-3)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen - {None} <= possible
    assert tune.read(entry(), REQUEST) in possible
    assert [path.name for path in folder.iterdir()] == [entry().name]
    assert not warnings_in(caplog)


# First use


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_measured_by_default(value, monkeypatch, folder):
    if value is not None:
        monkeypatch.setenv("GNA_FLEX_AUTOTUNE", value)
    assert shapes_for(REQUEST) == estimated(REQUEST)
    assert not folder.exists()


def test_first_use_measures_once(monkeypatch, caplog):
    monkeypatch.setenv("GNA_FLEX_AUTOTUNE", "1")
    tuner = Tuner()
    chosen = tuning_of(REQUEST).chosen
    assert [shapes_for(REQUEST, tuner) for _ in range(3)] == [(chosen.config, chosen.tiles)] * 3
    assert tuner.asked == [REQUEST]
    monkeypatch.delenv("GNA_FLEX_AUTOTUNE")
    assert shapes_for(REQUEST) == (chosen.config, chosen.tiles)
    assert not warnings_in(caplog)


def test_a_default_that_wins_is_not_measured_again(monkeypatch):
    monkeypatch.setenv("GNA_FLEX_AUTOTUNE", "1")
    tuner = Tuner(choice=0)
    assert [shapes_for(REQUEST, tuner) for _ in range(2)] == [estimated(REQUEST)] * 2
    assert len(tuner.asked) == 1


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch, caplog, folder):
    monkeypatch.setenv("GNA_FLEX_AUTOTUNE", "1")
    caplog.set_level(logging.DEBUG, logger="gna_flex")
    assert shapes_for(REQUEST, capturing=True) == estimated(REQUEST)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert not folder.exists()
    stored()
    assert shapes_for(REQUEST, capturing=True) != estimated(REQUEST), "what was measured before is taken"


def test_too_little_memory_is_a_warning(monkeypatch, caplog, folder):
    def full(request):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("GNA_FLEX_AUTOTUNE", "1")
    assert shapes_for(REQUEST, full) == estimated(REQUEST)
    assert "out of memory" in warnings_in(caplog)[0]
    assert not folder.exists()


def test_an_interrupt_leaves_the_cache_as_it_was(monkeypatch, folder):
    def interrupted(request):
        raise KeyboardInterrupt

    monkeypatch.setenv("GNA_FLEX_AUTOTUNE", "1")
    with pytest.raises(KeyboardInterrupt):
        shapes_for(REQUEST, interrupted)
    assert not folder.exists()
    assert shapes_for(REQUEST, Tuner()) != estimated(REQUEST), "and the next one may measure"


# The function and the command


def test_table_and_json():
    result = tuning_of(REQUEST)
    shown = str(result)
    assert shown.count("\n") > len(result.measurements)
    assert f"batch 1, 4 heads of 128, bfloat16, on {GPU}" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("*  "))
    assert line.endswith("2.00x")
    assert "\x1b" not in shown
    numbers = json.loads(json.dumps(result.to_json()))
    assert numbers["default"] == numbers["measurements"][0]
    assert numbers["chosen"]["milliseconds"] == 1.0
    assert Config(**numbers["chosen"]["config"]) == result.chosen.config
    assert KernelTiles(**numbers["chosen"]["tiles"]).kv_slots == result.chosen.tiles.kv_slots
    several = replace(result, gnas=REQUEST.gnas * 2)
    assert "2 masks, the first layout 24x40" in str(several)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(RuntimeError, match="Blackwell GPU, and there is none"):
        gna_flex.tune(REQUEST.gnas[0], heads=4, head_dim=128)


def test_heads_have_to_fit_the_mask():
    mask = gna_mask([GNA((8, 8), 3), GNA((8, 8), 5)], device="cpu")
    for wrong in ({"heads": 3}, {"heads": 0}, {"heads": 2, "batch": 0}):
        with pytest.raises(ValueError, match=rf"^heads={wrong['heads']}"):
            gna_flex.tune(mask, head_dim=128, **wrong)
    with pytest.raises(TypeError, match="mask_or_gna"):
        gna_flex.tune((8, 8), heads=1, head_dim=128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 100}, "multiples of 8 up to 256, not 100"),
        ({"head_dim": 264}, "not 264"),
        ({"dtype": torch.float32}, r"not in torch\.float32"),
        ({"capability": (8, 0)}, r"this GPU has 8\.0"),
        ({"missing": "no compiler"}, "no compiler"),
        ({"foreign": "the mask has a further condition"}, "a further condition"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(change, message):
    facts = facts_on(torch.device("cpu"), torch.bfloat16, 128, 1 << 20)
    facts = facts._replace(device="cuda", capability=(9, 0), missing="")
    tune.require_kernel(facts)
    with pytest.raises(RuntimeError, match=message):
        tune.require_kernel(facts._replace(**change))


def test_masks_in_another_order_are_foreign():
    assert tune._gnas_of(gna_mask(GNA((8, 8), 3), device="cpu")) == ((GNA((8, 8), 3),), "")
    assert "natural order" in tune._gnas_of(gna_mask(GNA((8, 8), 3), order=(4, 4), device="cpu"))[1]


def test_masks_look_for_their_kernels_anew():
    before = kernels.generation()
    tune.forget_plans()
    assert kernels.generation() != before


def test_the_name_is_public_and_others_are_missed_as_usual():
    assert gna_flex.tune is tune.tune
    with pytest.raises(AttributeError, match="no attribute 'tuna'"):
        gna_flex.tuna  # noqa: B018


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("where", [[], ["--device", "cuda"], ["--json"]])
def test_command_without_a_gpu(capsys, where):
    assert main(["tune", "64x64", "--window", "16", *where]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gna-flex tune: ")
    assert captured.err.count("\n") == 1


def test_command(capsys, monkeypatch):
    asked = {}

    def fake(gna, progress, **options):
        asked.update(options)
        progress(1, 2)
        return tuning_of(replace(REQUEST, gnas=(gna,)))

    monkeypatch.setattr(tune, "tune", fake)
    assert main(["tune", "--preset", "flux-4k", "--dtype", "float16", "--batch", "3"]) == 0
    assert "key tile" in capsys.readouterr().out
    assert asked == {"heads": 24, "head_dim": 128, "batch": 3, "dtype": torch.float16, "device": None}
    assert main(["tune", "64x64", "--window", "16", "--heads", "5", "--head-dim", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gnas"][0]["layout"] == [64, 64]
    assert (asked["heads"], asked["head_dim"]) == (5, 64)


def test_info_counts_entries(capsys):
    stored()
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"] == 1
    assert main(["info"]) == 0
    assert re.search(r"tuned masks +1\n", re.sub(" +\n", "\n", capsys.readouterr().out))
