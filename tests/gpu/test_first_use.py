"""The self-test on a GPU: of the Hopper kernel, as if that had never run; what hangs, and what happens in graphs."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gna_flex import GNA, explain, flex_attention, gna_mask, kernels
from gna_flex.cli import main
from gna_flex.selftest import verdict
from gna_flex.selftest.identity import identity
from gna_flex.selftest.supervisor import FAILED, MARK, PASSED, Outcome, supervise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

GPU = torch.device("cuda", 0)
SMALL = GNA((24, 40), (9, 12), text_last=30)


@pytest.fixture
def untried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the Hopper kernel had never run, on a machine without verdicts."""
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("GNA_FLEX_SELFTEST", raising=False)
    monkeypatch.setattr(kernels, "UNTRIED", ("hopper",))
    monkeypatch.setattr(verdict, "_known", {})
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def call() -> tuple[list[Tensor], object]:
    inputs = [torch.randn(2, 4, SMALL.tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    return inputs, gna_mask(SMALL, device="cuda")


def keep(status: str, reason: str = "") -> None:
    facts = identity("hopper", GPU)
    verdict.record(Outcome(status, reason, 1.0, facts), facts)


def test_the_first_call_tests_and_later_ones_do_not(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, mask = call()
    begin = time.monotonic()
    out = flex_attention(*inputs, block_mask=mask)
    print(f"self-test at first use: {time.monotonic() - begin:.0f} s")
    kept = verdict.read(identity("hopper", GPU))
    assert kept is not None
    assert (kept.status, kept.reason) == (PASSED, "")
    assert explain(*inputs, mask).name == "hopper"
    monkeypatch.setattr(verdict, "_known", {})
    monkeypatch.setattr(verdict, "supervise", None)
    assert explain(*inputs, mask).name == "hopper"
    assert torch.equal(flex_attention(*inputs, block_mask=mask), out)


@pytest.mark.parametrize(("status", "route"), [(PASSED, "hopper"), (FAILED, "flex")])
def test_compiled_code_and_graphs_obey_the_verdict(untried: None, status: str, route: str) -> None:
    keep(status, "" if status == PASSED else "1 of 48 problems failed")
    inputs, mask = call()
    compiled = torch.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), fullgraph=True)
    torch.cuda.synchronize()
    out = compiled(*inputs)
    chosen = explain(*inputs, mask)
    assert chosen.name.startswith(route)
    assert status == PASSED or "1 of 48 problems failed" in dict(chosen.rejected)["hopper"]
    with torch.no_grad():
        wanted = flex_attention(*inputs, block_mask=mask)
    assert (out.double() - wanted.double()).norm() / wanted.double().norm() < 4e-3
    assert torch.equal(out, wanted) or status == FAILED


def test_the_verdict_is_found_while_a_graph_is_captured(untried: None) -> None:
    inputs, mask = call()
    wanted = flex_attention(*inputs, block_mask=mask)  # compiles the kernel, and tests it
    verdict._known.clear()
    mask.launchers.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flex_attention(*inputs, block_mask=mask)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


def test_a_kernel_that_hangs_is_ended_and_the_gpu_is_well(tmp_path: Path) -> None:
    begin = MARK + json.dumps({"event": "begin", "identity": {}, "steps": 1})
    start = MARK + json.dumps({"event": "start", "variant": "", "problem": "for ever"})
    path = tmp_path / "hangs.py"
    path.write_text(
        "import torch\nfrom gna_flex.selftest.supervisor import end_with_supervisor\nend_with_supervisor()\n"
        f"print({begin!r})\ntorch.zeros(1, device='cuda')\nprint({start!r}, flush=True)\n"
        "[torch.cuda._sleep(1 << 40) for _ in range(1000)]\ntorch.cuda.synchronize()\n"
    )
    before = time.monotonic()
    outcome = supervise([sys.executable, str(path)], stall=30)
    assert (outcome.status, outcome.reason) == (FAILED, "nothing happened for 30 s in 'for ever'")
    assert time.monotonic() - before < 90
    x = torch.ones(1 << 20, device="cuda")
    assert x.sum().item() == 1 << 20


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "report.json"
    assert main(["selftest", "--route", "hopper", "--report", str(path)]) == 0, capsys.readouterr().out
    print(capsys.readouterr().out)
    (told,) = json.loads(path.read_text())["routes"]
    assert told["status"] == "passed"
    assert {result["variant"] for result in told["results"]} == {"bounded waits", "as shipped"}
    assert len(told["timings"]) == 3
