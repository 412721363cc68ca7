"""``gna-flex bench compile``: what recognising masks adds to the time that Inductor takes."""

import json
import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from gna_flex import GNA, bench
from gna_flex.cli import main

pytestmark = pytest.mark.usefixtures("fresh_compiler", "no_reports")


class SameProcess:
    """Stands for the processes that measure."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __enter__(self) -> "SameProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of what measures, which takes longer from run to run, and with our backend."""
    calls: list[Any] = []

    def time_compile(name: str, *rest: Any) -> tuple[float, float]:
        calls.append((name, *rest))
        return (len(calls) * 100.0, 2.0) if name == "gna_flex" else (1000.0, 0.0)

    monkeypatch.setattr(bench, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(bench, "_time_compile", time_compile)
    return calls


ARGUMENTS = ["bench", "compile", "8x8", "--window", "3", "--layers", "5"]


def test_in_turns_and_medians(measured, capsys):
    assert main([*ARGUMENTS, "--device", "cpu", "--json"]) == 0
    assert measured == [("inductor", GNA((8, 8), 3), 5, "cpu"), ("gna_flex", GNA((8, 8), 3), 5, "cpu")] * 3
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["baseline"], numbers["settings"]) == ("inductor", {"device": "cpu", "layers": 5})
    times = {timing["name"]: timing["milliseconds"] for timing in numbers["timings"]}
    assert times == {"inductor": 1000.0, "gna_flex": 400.0, "recognising": 2.0}


def test_as_a_table_without_a_gpu(measured, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert main([*ARGUMENTS, "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "recognising: 0.2% of Inductor's time" in out
    assert "device cpu, repeats 1, layers 5" in out


def test_masks_that_are_not_recognised_are_an_error(measured, monkeypatch, capsys):
    def fails(*arguments: Any) -> tuple[float, float]:
        raise AssertionError("recognised as []")

    monkeypatch.setattr(bench, "_time_compile", fails)
    assert main([*ARGUMENTS, "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "gna-flex bench: recognised as []\n"


@pytest.mark.slow
def test_recognising_takes_less_than_a_twentieth(monkeypatch):
    """Both are of one run, which a busy machine slows down alike."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "to be put back")
    total, recognising = bench._time_compile("gna_flex", GNA((4, 8, 8), 3, (1, 2, 2)), 1, "cpu")
    assert math.isfinite(total)
    assert 0 < recognising < 0.05 * total
