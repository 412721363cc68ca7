"""Verdicts of self-tests without a GPU: kept, damaged, out of date, found out by many processes at once, and obeyed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gna_flex import kernels, ops
from gna_flex.cli import info as info_verb
from gna_flex.cli import main
from gna_flex.cuda import forward, jit
from gna_flex.selftest import identity as identities
from gna_flex.selftest import verdict
from gna_flex.selftest.supervisor import FAILED, PASSED, UNABLE, Outcome

B200 = {
    "gna-flex": "0.1.0",
    "torch": "2.11.0+cu130",
    "route": "blackwell",
    "device": "cuda",
    "gpu": "NVIDIA B200",
    "capability": "10.0",
    "driver": "580.82.07",
    "nvrtc": "13.0",
    "kernel": "0123",
}
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with a B200, an empty cache, and a process that knows nothing yet. Changes of it are seen."""
    facts = dict(B200)
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GNA_FLEX_SELFTEST", raising=False)
    monkeypatch.setattr(verdict, "_known", {})
    monkeypatch.setattr(verdict, "identity", lambda route, device: dict(facts))
    return facts


class Fake:
    """Stands for the process with the problems; counts how often it runs."""

    def __init__(self, status: str = PASSED, reason: str = "", identity: dict[str, str] | None = None) -> None:
        self.outcome, self.runs = Outcome(status, reason, 1.0, identity or B200), 0

    def __call__(self, kernel: str, device: torch.device) -> Outcome:
        self.runs += 1
        return replace(self.outcome)


def find_out(tester: Callable[..., Outcome], mode: str = "", **options: float) -> str:
    return verdict.find_out("blackwell", DEVICE, mode, tester, **options)


def never(kernel: str, device: torch.device) -> Outcome:
    raise AssertionError("nothing was to be tested")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


BAD = Fake(FAILED, "1 of 48 problems failed")


# Kept


def test_a_kernel_that_passed_is_tested_once(caplog: pytest.LogCaptureFixture) -> None:
    tester = Fake()
    assert find_out(tester) == ""
    assert find_out(never) == ""
    assert tester.runs == 1
    (said,) = warnings_in(caplog)
    assert "tested before its first use" in said


def test_a_kernel_that_failed_is_not_tested_again_but_told_of(caplog: pytest.LogCaptureFixture) -> None:
    assert "its self-test failed on this machine: 1 of 48" in find_out(BAD)
    _, said = warnings_in(caplog)
    for words in ("blackwell kernel is not used", "take another route", "1 of 48 problems failed", "gna-flex selftest"):
        assert words in said
    caplog.clear()
    assert "1 of 48" in find_out(never)
    assert len(warnings_in(caplog)) == 1


def test_what_could_not_be_tested_is_tested_next_time(caplog: pytest.LogCaptureFixture) -> None:
    tester = Fake(UNABLE, "too little memory")
    assert find_out(tester) == "its self-test could not run on this machine: too little memory"
    assert "could not be tested: too little memory" in warnings_in(caplog)[-1]
    assert find_out(Fake()) == ""


CHANGES = {
    "driver": "590.10",
    "gpu": "NVIDIA B300",
    "capability": "10.3",
    "torch": "2.13.0+cu130",
    "nvrtc": "13.1",
    "gna-flex": "0.2.0",
    "kernel": "4567",
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_machine_is_tested_anew(what: str, machine: dict[str, str]) -> None:
    find_out(BAD)
    machine[what] = CHANGES[what]
    tester = Fake(identity=dict(machine))
    assert find_out(tester) == ""
    assert tester.runs == 1
    machine[what] = B200[what]
    assert "1 of 48" in find_out(never), "and the old verdict is still there"


def test_a_test_of_something_else_is_no_verdict() -> None:
    other = Fake(identity=B200 | {"gna-flex": "0.0.1", "gpu": "NVIDIA H100"})
    assert find_out(other).endswith("it tested something else (gna-flex, gpu)")
    assert find_out(Fake()) == ""


def test_verdicts_are_private_files(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        find_out(Fake())
    finally:
        os.umask(old)
    (path,) = (tmp_path / "cache").glob("selftest-blackwell-*.json")
    assert path == verdict.path_of(B200)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert (path.parent / "selftest.lock").stat().st_mode & 0o777 == 0o600


def kept(**changes: object) -> bytes:
    facts = {"status": PASSED, "reason": "", "when": "2026-01-01", "identity": B200}
    return json.dumps(facts | changes).encode()


DAMAGED = {
    "empty": b"",
    "cut": kept()[:-9],
    "not text": b"\xff\xfe",
    "another kind": b"[1]",
    "a number": b"7",
    "deep": b"[" * 100_000,
    "nothing in it": b"{}",
    "more in it": kept(trust=True),
    "of another machine": kept(identity=B200 | {"driver": "1"}),
    "no such status": kept(status="fine"),
    "not tested": kept(status=UNABLE),
    "no words": kept(reason=3),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_verdicts_are_ignored_and_replaced(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    find_out(Fake())
    path = verdict.path_of(B200)
    path.write_bytes(DAMAGED[damage])
    assert "1 of 48" in find_out(BAD), "and nothing is trusted"
    assert any(str(path) in said for said in warnings_in(caplog))
    assert "1 of 48" in find_out(never)


@pytest.mark.parametrize("stranger", ["file", "folder", "link"])
def test_verdicts_of_others_are_ignored(stranger: str, tmp_path: Path) -> None:
    find_out(Fake())
    path = verdict.path_of(B200)
    if stranger == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        (path if stranger == "file" else path.parent).chmod(0o777)
    assert "1 of 48" in find_out(BAD)


def test_without_a_folder_every_process_tests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        tester = Fake()
        assert find_out(tester) == ""
        assert tester.runs == 1
    assert any("GNA_FLEX_CACHE_DIR" in said for said in warnings_in(caplog))


# Modes


def test_trust_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "identity", None)
    assert find_out(never, "trust") == ""


def test_off_takes_what_is_known_only() -> None:
    assert find_out(never, "off") == "it was not tested on this machine, and GNA_FLEX_SELFTEST=off"
    find_out(Fake())
    assert find_out(never, "off") == ""


def test_again_tests_anew() -> None:
    find_out(BAD)
    tester = Fake()
    assert find_out(tester, "again") == ""
    assert tester.runs == 1
    assert find_out(never) == ""


def test_unknown_modes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNA_FLEX_SELFTEST", "yes")
    with pytest.raises(ValueError, match="GNA_FLEX_SELFTEST='yes': known are off, trust, again"):
        verdict.obstacle("blackwell", 0)


def test_a_process_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(verdict, "find_out", lambda *arguments: asked.append(arguments) or "no")
    assert [kernels.untested("blackwell", 0) for _ in range(3)] == ["no"] * 3
    assert asked == [("blackwell", torch.device("cuda", 0), "")]
    assert kernels.untested("blackwell", 1) == "no"
    monkeypatch.setenv("GNA_FLEX_SELFTEST", "trust")
    assert kernels.untested("blackwell", 1) == "no"
    assert [(device.index, mode) for _, device, mode in asked] == [(0, ""), (1, ""), (1, "trust")]


def test_whatever_goes_wrong_means_another_route(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(route: str, device: torch.device) -> dict[str, str]:
        raise FileNotFoundError("no folder csrc")

    monkeypatch.setattr(verdict, "identity", broken)
    for _ in range(2):
        assert "could not run on this machine: FileNotFoundError: no folder csrc" in verdict.obstacle("blackwell", 0)
    assert len(warnings_in(caplog)) == 1


def test_programs_that_were_exported_elsewhere_obey_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their route was chosen on another machine."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(kernels, "untested", lambda kernel, device: f"its self-test failed on {device}")
    with pytest.raises(RuntimeError, match="the blackwell kernel is not used: its self-test failed on 3"):
        ops._plan((8, 8), (3, 3), (1, 1), (1, 1), (False, False), 0, 0, 64, torch.bfloat16, 3)


def test_threads_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    tester = Fake()

    def find(kernel: str, device: torch.device, mode: str) -> str:
        time.sleep(0.1)
        return verdict_find(kernel, device, mode, tester)

    verdict_find = verdict.find_out
    monkeypatch.setattr(verdict, "find_out", find)
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(verdict.obstacle("blackwell", 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [""] * 8
    assert tester.runs == 1


def test_a_fork_in_the_middle_of_a_test_does_not_lock_the_child() -> None:
    def hold() -> None:
        with verdict._lock:
            held.set()
            release.wait(10)

    held, release = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    child = multiprocessing.get_context("fork").Process(target=_ask)
    child.start()
    child.join(10)
    release.set()
    thread.join()
    assert child.exitcode == 0


def _ask() -> None:
    verdict._known["blackwell", 0, ""] = ""
    sys.exit(0 if verdict.obstacle("blackwell", 0) == "" else 1)


# Several processes

RANK = """
import sys, time, torch
from gna_flex.selftest import verdict
from gna_flex.selftest.supervisor import Outcome
facts, log, seconds, patience = {facts!r}, {log!r}, {seconds}, {patience}
verdict.identity = lambda route, device: dict(facts)

def tester(kernel, device):
    with open(log, "a") as file:
        file.write("tested\\n")
    time.sleep(seconds)
    return Outcome("passed", "", seconds, facts)

print(repr(verdict.find_out("blackwell", torch.device("cuda", 0), {mode!r}, tester, patience)))
"""


def ranks(tmp_path: Path, number: int, **changes: object) -> list[subprocess.Popen[str]]:
    facts = {"facts": B200, "log": str(tmp_path / "log"), "seconds": 1.0, "patience": 60.0, "mode": ""}
    code = RANK.format(**facts | changes)
    words = [sys.executable, "-c", code]
    root = Path(verdict.__file__).parents[2]
    environment = os.environ | {"GNA_FLEX_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(root)}
    return [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(number)
    ]


def answers_of(processes: list[subprocess.Popen[str]]) -> list[str]:
    return [process.communicate(timeout=60)[0].strip() for process in processes]


@pytest.mark.parametrize("mode", ["", pytest.param("again", marks=pytest.mark.slow)])
def test_of_many_processes_one_tests_and_the_others_wait(tmp_path: Path, mode: str) -> None:
    # As long as processes need to start at different times.
    assert answers_of(ranks(tmp_path, 3, mode=mode, seconds=8.0 if mode else 1.0)) == ["''"] * 3
    assert (tmp_path / "log").read_text() == "tested\n"


def test_whoever_waits_too_long_takes_another_route(tmp_path: Path) -> None:
    with verdict.only_one(1.0) as mine:
        assert mine
        (answer,) = answers_of(ranks(tmp_path, 1, patience=0.3))
    assert answer == "'its self-test could not run on this machine: another process has been testing it for too long'"
    assert not (tmp_path / "log").exists()


def test_a_process_that_dies_while_it_tests_holds_nobody_up(tmp_path: Path) -> None:
    (process,) = ranks(tmp_path, 1, seconds=60.0)
    for _ in range(600):
        if (tmp_path / "log").exists():
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    begin = time.monotonic()
    assert find_out(Fake(), patience=30.0) == ""
    assert time.monotonic() - begin < 5


def test_a_forked_process_does_not_keep_the_lock() -> None:
    """It has the locked file open as well."""
    with verdict.only_one(1.0):
        child = os.fork()
        if child == 0:
            time.sleep(5)
            os._exit(0)
    try:
        with verdict.only_one(1.0) as mine:
            assert mine
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


# What a verdict holds for


def test_identity_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    monkeypatch.setattr(identities.driver, "driver_version", lambda: "580.82.07")
    monkeypatch.setattr(jit, "nvrtc_version", lambda: "13.0")
    facts = identities.identity("blackwell", DEVICE)
    assert facts.keys() >= B200.keys()
    assert {name: facts[name] for name in ("gpu", "capability", "driver", "nvrtc")} == {
        name: B200[name] for name in ("gpu", "capability", "driver", "nvrtc")
    }
    assert facts["kernel"] != identities.identity("hopper", DEVICE)["kernel"]
    assert all(isinstance(value, str) for value in facts.values())
    assert "kernel" not in identities.identity("flex", DEVICE)


def test_a_changed_source_is_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identities.digest("blackwell")
    config = forward.KERNELS["blackwell"]
    monkeypatch.setattr(config, "source", classmethod(lambda cls: "// another one"))
    assert identities.digest("blackwell") != before


# The command and info


def test_the_command_keeps_its_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gna_flex.cli import selftest

    outcome = Outcome(FAILED, "2 of 48 problems failed", 9.0, B200)
    monkeypatch.setattr("gna_flex.selftest.supervisor.supervise", lambda *arguments, **options: outcome)
    monkeypatch.setattr("gna_flex.selftest.identity.identity", lambda route, device: dict(B200))
    assert selftest.tested("blackwell", DEVICE) == outcome
    assert "2 of 48" in find_out(never)


def test_info_tells_of_verdicts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"status": PASSED, "reason": "", "when": "2026-01-01T00:00:00+00:00"}
    monkeypatch.setattr(info_verb, "_selftest", lambda device: facts)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["selftest"] == facts
    assert main(["info"]) == 0
    assert "self-test: passed (2026-01-01T00:00:00+00:00)" in capsys.readouterr().out
