"""The self-test without a GPU: processes that pass, fail, crash, hang or lie, what is made of them, and the command."""

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gna_flex import GNA, cli, kernels
from gna_flex.cli import main
from gna_flex.cuda.forward import can_map
from gna_flex.kernels import FLOAT8
from gna_flex.routing import FLOAT8_HEAD_DIMS, FLOAT8_KERNELS, KERNEL_MAX_HEAD_DIM
from gna_flex.selftest import worker
from gna_flex.selftest.identity import identity
from gna_flex.selftest.problems import PROBLEMS, Problem, compare, expected
from gna_flex.selftest.report import scrubbed, write_report
from gna_flex.selftest.supervisor import (
    FAILED,
    MARK,
    PASSED,
    SUPERVISOR,
    UNABLE,
    Outcome,
    Transcript,
    command,
    end_with_supervisor,
    environment,
    supervise,
)

CPU = torch.device("cpu")

# What a process says


def line(event: str, **facts: object) -> str:
    return MARK + json.dumps({"event": event, **facts}) + "\n"


BEGIN = line("begin", identity={"gpu": "A"}, steps=2)
FIRST = line("start", variant="bounded waits", problem="one")
RIGHT = line("result", variant="bounded waits", problem="one", reason="", seconds=0.1, error=1e-3, share=0.5)
WRONG = line("result", variant="", problem="two", reason="its result is wrong", seconds=0.1, error=None, share=None)
SECOND = line("result", variant="", problem="two", reason="", seconds=0.1, error=1e-3, share=0.5)
END = line("end")
ALL = [BEGIN, FIRST, RIGHT, SECOND, END]

SAID = {
    # (lines, exit status, why it was stopped, last error): (status, words of the reason)
    "passed": ((ALL, 0, "", ""), (PASSED, "")),
    "wrong": (([BEGIN, RIGHT, WRONG, END], 0, "", ""), (FAILED, "1 of 2 problems failed, first 'two': its result")),
    "wrong and crashed": (([BEGIN, WRONG], -11, "", ""), (FAILED, "first 'two': its result is wrong")),
    "crashed": (([BEGIN, FIRST], -signal.SIGSEGV, "", ""), (FAILED, "ended by SIGSEGV in 'one' (bounded waits)")),
    "crashed before": (([], -signal.SIGSEGV, "", ""), (UNABLE, "ended by SIGSEGV")),
    "killed by somebody": (([BEGIN, FIRST], -signal.SIGKILL, "", ""), (UNABLE, "ended by SIGKILL")),
    "interrupted": (([BEGIN, FIRST], -signal.SIGINT, "", ""), (UNABLE, "ended by SIGINT")),
    "hung": (([BEGIN, FIRST], 0, "nothing happened for 120 s", ""), (FAILED, "nothing happened for 120 s in 'one'")),
    "hung before": (([], 0, "it took too long", ""), (UNABLE, "it took too long")),
    "an error": (([BEGIN, FIRST, RIGHT], 1, "", "RuntimeError"), (FAILED, "1 of 2 problems were run: RuntimeError")),
    "could not begin": (([], 1, "", "No module named torch"), (UNABLE, "it could not begin: No module named torch")),
    "no memory": (([BEGIN, line("unable", reason="too little memory")], 0, "", ""), (UNABLE, "too little memory")),
    "left problems out": (([BEGIN, RIGHT, END], 0, "", ""), (FAILED, "ended early, 1 of 2 problems")),
    "ended without a word": ((ALL[:-1], 0, "", ""), (FAILED, "ended early, 2 of 2 problems")),
    "a status in spite of all": ((ALL, 3, "", ""), (FAILED, "ended early, 2 of 2 problems were run: exit status 3")),
    "nothing": (([], 0, "", ""), (UNABLE, "it could not begin: exit status 0")),
    "chatter in between": ((["hello\n", MARK + "{broken\n", *ALL, MARK + "[1]\n"], 0, "", ""), (PASSED, "")),
    "more after the end": (([*ALL, SECOND], 0, "", ""), (FAILED, "ended early, 3 of 2")),
    "a result without its problem": (([BEGIN, line("result", reason=""), END], 0, "", ""), (FAILED, "1 of 2 problems")),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_made_of_what_a_process_says(case: str) -> None:
    (lines, code, hangs, errors), (status, words) = SAID[case]
    transcript = Transcript()
    for each in lines:
        transcript.feed(each)
    outcome = transcript.outcome(code, hangs, errors, 1.26)
    assert outcome.status == status
    assert words in outcome.reason
    assert bool(outcome.reason) == (status != PASSED)
    assert outcome.seconds == 1.3


# Real processes, but for the GPU


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "worker.py"
    path.write_text(f"import os, signal, subprocess, sys, time\nALL = {ALL!r}\nsay = sys.stdout.write\n{text}")
    return [sys.executable, str(path)]


def test_a_process_that_passes(tmp_path: Path) -> None:
    heard: list[str] = []
    words = script(tmp_path, "print('a banner')\n[say(x) for x in ALL]")
    outcome = supervise(words, listener=lambda event: heard.append(event["event"]))
    assert (outcome.status, outcome.reason, outcome.identity) == (PASSED, "", {"gpu": "A"})
    assert [result["problem"] for result in outcome.results] == ["one", "two"]
    assert heard == ["begin", "start", "result", "result", "end"]


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("[say(x) for x in ALL[:2]]; sys.stdout.flush(); os.kill(os.getpid(), 11)", FAILED, "SIGSEGV in 'one'"),
        ("[say(x) for x in ALL[:2]]; sys.stdout.flush(); os.abort()", FAILED, "SIGABRT in 'one'"),
        ("[say(x) for x in ALL[:3]]; raise RuntimeError('launch failed')", FAILED, "RuntimeError: launch failed"),
        ("raise ImportError('no torch')", UNABLE, "ImportError: no torch"),
    ],
    ids=["signal", "abort", "error", "import"],
)
def test_a_process_that_does_not(tmp_path: Path, text: str, status: str, words: str) -> None:
    outcome = supervise(script(tmp_path, text))
    assert outcome.status == status
    assert words in outcome.reason


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


HANGS = (
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}')\n"
    "[say(x) for x in ALL[:2]]; sys.stdout.flush()\n"
)


def gone(path: Path) -> bool:
    """Whether the processes named in a file end within some seconds."""
    pids = [int(word) for word in path.read_text().split()]
    for _ in range(100):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("text", "limits", "words"),
    [
        ("time.sleep(600)", {"stall": 0.7}, "nothing happened for 1 s in 'one' (bounded waits)"),
        ("while True: time.sleep(0.1); print(ALL[1], end='', flush=True)", {"limit": 1.5}, "it took too long in 'one'"),
        ("while True: print('chatter', flush=True); time.sleep(0.01)", {"stall": 0.7}, "nothing happened"),
    ],
    ids=["silent", "for ever", "chatter"],
)
def test_a_process_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, text: str, limits: dict[str, float], words: str
) -> None:
    begin = time.monotonic()
    outcome = supervise([*script(tmp_path, HANGS + text), str(tmp_path / "pids")], **limits)
    assert outcome.status == FAILED
    assert words in outcome.reason
    assert time.monotonic() - begin < 10
    assert gone(tmp_path / "pids")


def test_what_a_process_left_behind_does_not_hold_us_up(tmp_path: Path) -> None:
    """It has the output open."""
    begin = time.monotonic()
    outcome = supervise([*script(tmp_path, HANGS + "[say(x) for x in ALL[2:]]"), str(tmp_path / "pids")])
    assert outcome.status == PASSED
    assert time.monotonic() - begin < 10
    assert gone(tmp_path / "pids")


def test_an_interrupt_ends_the_process(tmp_path: Path) -> None:
    def interrupted(event: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise([*script(tmp_path, HANGS + "time.sleep(600)"), str(tmp_path / "pids")], listener=interrupted)
    assert gone(tmp_path / "pids")


STUCK = """
import ctypes
from gna_flex.selftest import worker

def stuck(route):
    print(os.getpid(), file=open(sys.argv[1], "w"), flush=True)
    ctypes.PyDLL(None).sleep(600)  # holding Python's lock

worker.problems_of = stuck
worker.main("reference", "cpu")
"""


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")


@linux
def test_a_process_ends_with_its_supervisor(tmp_path: Path) -> None:
    """Which cannot end it when it is killed itself."""
    words, pids = [*script(tmp_path, STUCK), str(tmp_path / "pids")], tmp_path / "pids"
    supervisor = os.fork()
    if supervisor == 0:
        threading.Thread(target=supervise, args=[words]).start()
        time.sleep(600)
    try:
        deadline = time.monotonic() + 60
        while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(int(pids.read_text()))
    finally:
        os.kill(supervisor, signal.SIGKILL)
        os.waitpid(supervisor, 0)
    assert gone(pids)


@linux
def test_a_process_that_nobody_supervises_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that was started by hand, nor what a supervised process starts, ends with its parent."""
    for supervisor in ("", str(os.getppid() + 1)):
        monkeypatch.setenv(SUPERVISOR, supervisor)
        end_with_supervisor()
        number = ctypes.c_int(-1)
        assert ctypes.CDLL(None).prctl(2, ctypes.byref(number)) == 0, "PR_GET_PDEATHSIG"
        assert number.value == 0


def test_a_process_that_cannot_be_started() -> None:
    outcome = supervise(["/nowhere/python"])
    assert outcome.status == UNABLE
    assert "/nowhere/python" in outcome.reason


def test_the_process_has_this_package_and_no_forced_route(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GNA_FLEX_BACKEND", "flex")
    monkeypatch.setenv("GNA_FLEX_SELFTEST", "again")
    monkeypatch.setenv("GNA_FLEX_AUTOTUNE", "1")
    code = (
        "import gna_flex, os, json; from gna_flex.routing import forced;"
        "modes = [os.environ['GNA_FLEX_' + name] for name in ('SELFTEST', 'AUTOTUNE')];"
        "print(json.dumps([gna_flex.__file__, forced(), *modes]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == [str(Path(cli.__file__).parents[1] / "__init__.py"), None, "trust", "0"]


def test_the_process_finds_relative_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("here", "", "/there")))
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", "cache")
    found = environment()
    assert found["PYTHONPATH"].split(os.pathsep)[1:] == [str(tmp_path / "here"), "/there"]
    assert found["GNA_FLEX_CACHE_DIR"] == str(tmp_path / "cache")


# The problems


def test_problems_have_names_of_their_own() -> None:
    assert len({problem.name for problem in PROBLEMS}) == len(PROBLEMS)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_problems_use_everything_that_a_kernel_can_do(kernel: str) -> None:
    problems = worker.problems_of(kernel)
    most = KERNEL_MAX_HEAD_DIM[kernel]
    assert max(problem.head_dim for problem in problems) == most
    in_8_bits = [p for p in problems if p.type == FLOAT8]
    assert {p.dtype for p in problems if p not in in_8_bits} == {"float16", "bfloat16"}
    assert {p.head_dim for p in in_8_bits} == {*FLOAT8_HEAD_DIMS * (kernel in FLOAT8_KERNELS)}
    gnas = [gna for problem in problems for gna in problem.gnas]
    assert {gna.ndim for gna in gnas} == {1, 2, 3}
    assert any(max(gna.stride) > 1 for gna in gnas)
    assert any(all(gna.causal) for gna in gnas)
    assert any(any(gna.causal) and not all(gna.causal) for gna in gnas)
    assert any(n % d for gna in gnas for n, d in zip(gna.layout, gna.dilation, strict=True)), "groups of two lengths"
    assert any(gna.text_first > 256 and gna.text_last for gna in gnas), "more text than one item holds"
    assert any(max(gna.dilation) > 1 and gna.text_last for gna in gnas)
    for feature in ("batch", "heads", "key_heads"):
        assert max(getattr(problem, feature) for problem in problems) > 1
    assert any(p.key_heads and p.key_heads < p.heads for p in problems)
    assert any(len(p.gnas) > 1 for p in problems)
    assert {p.heads_last for p in problems} == {"", "qkv", "v"}
    assert any(p.apart for p in problems)
    assert any(p.valid for p in problems)
    assert {p.scale for p in problems} == {None, 0.0, 1.0}
    assert any(p.head_dim not in (32, 64, 96, 128, 192, 256) for p in problems), "padded"


def test_operands_lie_as_they_are_meant_to() -> None:
    by_name = {problem.name: problem.tensors() for problem in PROBLEMS}
    q, k, v = by_name["values that lie otherwise than keys"]
    assert k.is_contiguous()
    assert v.transpose(1, 2).is_contiguous()
    q, k, v = by_name["keys that have to be copied"]
    assert [can_map(x) for x in (q, k, v)] == [True, False, True]
    assert all(x.stride(-1) == 1 for tensors in by_name.values() for x in tensors)


SMALL = Problem("small", (GNA((8, 9), (3, 4), text_first=5),), 16, "float16", heads=2, key_heads=1)


def test_log_sum_exps_may_be_as_wrong_as_exponentials() -> None:
    plain, by_polynomial = expected(SMALL), expected(SMALL, exponential_error=1e-4)
    assert torch.allclose(by_polynomial.lse_budget - plain.lse_budget, torch.full_like(plain.lse, 1e-4), rtol=1e-6)
    off = plain.lse.float() + 9e-5
    assert not compare(plain.out.half(), off, plain).passed
    assert compare(plain.out.half(), off, by_polynomial).passed
    assert worker.wanted_of("blackwell", SMALL).lse_budget.equal(by_polynomial.lse_budget)
    assert worker.wanted_of("hopper", SMALL).lse_budget.equal(plain.lse_budget)


@pytest.mark.parametrize("rounds_queries", [False, True])
def test_what_is_right_passes_and_what_is_nearly_right_does_not(rounds_queries: bool) -> None:
    wanted = expected(SMALL, rounds_queries)
    out, lse = wanted.out.half(), wanted.lse.float()
    assert compare(out, lse, wanted).passed
    assert compare(out, None, wanted).passed
    wrong = out.clone()
    wrong[0, 1, 7, 3] += 0.02
    assert not compare(wrong, lse, wanted).passed
    assert not compare(out, lse + 0.01, wanted).passed
    for place in (0, 1):
        spoiled = [out.clone(), lse.clone()]
        spoiled[place].view(-1)[5] = math.nan
        found = compare(spoiled[0], spoiled[1], wanted)
        assert not found.passed
        assert math.inf in found
    shifted = out.roll(1, dims=2)
    assert compare(shifted, lse, wanted).share > 10


def said(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    lines = capsys.readouterr().out.splitlines()
    assert all(each.startswith(MARK) for each in lines)
    return [json.loads(each[len(MARK) :]) for each in lines]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("right", ""),
        ("wrong", "its result is wrong"),
        ("not written", "its result is wrong"),
        ("unsteady", "repeated calls differ"),
        ("error", "RuntimeError: launch failed"),
    ],
)
def test_one_problem(
    result: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = expected(SMALL)
    calls: list[int] = []

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        out, lse = wanted.out.half(), wanted.lse.float()
        if result == "wrong":
            out[0, 0, 0] += 1
        if result == "not written":
            out[0, 0, 0] = math.nan
        if result == "unsteady":
            lse = lse + 1e-7 * len(calls)
        if result == "error":
            raise RuntimeError("launch failed\nand more")
        return out, lse

    monkeypatch.setattr(worker, "call_of", lambda *arguments: call)
    worker.check("hopper", SMALL, "as shipped", CPU)
    start, event = said(capsys)
    assert (start["event"], event["event"], event["problem"], event["reason"]) == ("start", "result", "small", reason)
    assert len(calls) == (1 if result == "error" else worker.REPEATS)
    assert (event.get("error", 0) is None) == (result == "not written")


def test_too_little_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def call_of(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "call_of", call_of)
    monkeypatch.setattr(worker, "LAST_RESORT", 0)
    worker.main("reference", "cpu")
    assert said(capsys)[-1] == {"event": "unable", "reason": "too little memory: CUDA out of memory"}


# Reports and the command


def test_reports_name_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-box-7")
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    facts = {"reason": ["/home/alice/x y/forward.cu(3) on gpu-box-7: C:\\Users\\alice\\k.cu, alice's", 3, None]}
    text = scrubbed(facts)["reason"][0]
    for private in ("alice", "home", "Users", "gpu-box-7"):
        assert private not in text
    assert "forward.cu(3)" in text
    assert scrubbed({"gpu": "NVIDIA B200", "torch": "2.11.0+cu130", "error": 1e-3}) == {
        "gpu": "NVIDIA B200",
        "torch": "2.11.0+cu130",
        "error": 1e-3,
    }
    write_report(tmp_path / "r.json", facts)
    assert json.loads((tmp_path / "r.json").read_text()) == scrubbed(facts)


@pytest.mark.parametrize("route", ["reference", pytest.param("flex", marks=pytest.mark.slow)])
def test_the_command(
    route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["selftest", "--route", route, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"{route} on " in out
    assert "passed" in out
    facts = json.loads((tmp_path / cli.selftest.REPORT).read_text())
    (told,) = facts["routes"]
    assert told["status"] == "passed"
    assert told["versions"] == identity(route, CPU)
    assert [r["problem"] for r in told["results"]] == [p.name for p in worker.problems_of(route)]
    assert all(0 <= r["share"] <= 1 and r["problem"] in out for r in told["results"])
    assert all(t["milliseconds"] > 0 and t["dense"] > 0 for t in told["timings"])
    assert len(told["timings"]) == 3
    assert str(tmp_path) not in json.dumps(facts)


def outcomes(monkeypatch: pytest.MonkeyPatch, **by_route: Outcome) -> None:
    monkeypatch.setattr(cli.selftest, "routes_on", lambda device, wanted: list(by_route))
    monkeypatch.setattr(cli.selftest, "tested", lambda route, device: by_route[route])


def test_the_command_tells_of_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = Outcome(FAILED, "1 of 2 problems failed", 3.0, {"gpu": "B200"}, (json.loads(WRONG[len(MARK) :]),))
    outcomes(monkeypatch, blackwell=bad, reference=Outcome(PASSED, "", 1.0, {}))
    assert main(["selftest", "--report", str(tmp_path / "r.json")]) == 1
    out = capsys.readouterr().out
    assert "blackwell on B200: failed" in out
    assert "1 of 2 problems failed" in out
    assert [r["status"] for r in json.loads((tmp_path / "r.json").read_text())["routes"]] == ["failed", "passed"]
    assert main(["selftest", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["routes"][0]["results"][0]["error"] is None


def test_json_writes_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes(monkeypatch, reference=Outcome(PASSED, "", 1.0, {}))
    assert main(["selftest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gna_flex_selftest"] == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--route", "hopper", "--device", "cpu"], "hopper cannot be tested: it needs an NVIDIA Hopper GPU"),
        (["--device", "warp9"], "device=warp9"),
    ],
)
def test_what_the_command_cannot_do(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"gna-flex selftest: {message}")
    assert captured.err.count("\n") == 1


def test_all_routes_of_a_machine_are_tested_by_default() -> None:
    assert cli.selftest.routes_on(CPU, None) == ["flex-tiles", "flex", "reference"]


def test_programs_without_python_start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(RuntimeError, match="cannot start Python"):
        command("blackwell", "cuda:0")


def test_the_processes_of_routes() -> None:
    assert command("blackwell", "cuda:1")[-2:] == ["blackwell", "cuda:1"]
    assert command("blackwell", "cuda:1", timing=True)[-1] == "--timing"
