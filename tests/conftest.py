"""Fixtures of all tests: GPU tests only with a GPU, oracle tests only with natten, torch quiet and fresh."""

import functools
import gc
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch._dynamo.testing import CompileCounterWithBackend

from gna_flex import flex
from gna_flex.dynamo import report, rewrite
from gna_flex.routing import Route

collect_ignore = ["data"]
"""Recorded data, and programs of others that need packages which are not always there."""

settings.register_profile("gna_flex", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("gna_flex")


def pytest_configure() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": "" if torch.cuda.is_available() else "no CUDA device",
        "oracle": "" if importlib.util.find_spec("natten") else "natten is not installed",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quiet_torch() -> Iterator[None]:
    """Without torch's advice to compile, which it gives even where the call has been taken over."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled function from any other test, and none left behind."""

    def forget() -> None:
        torch._dynamo.reset()
        flex._compiled.clear()

    forget()
    yield
    forget()


@pytest.fixture
def no_reports() -> Iterator[None]:
    """No compiled graph from any other test in ``compile_report()``."""
    report._reports.clear()
    yield
    report._reports.clear()


@pytest.fixture
def route(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Any]:
    """A route that CPU tensors do not take by themselves; the operators have CPU kernels. What is asked is kept."""
    name = getattr(request, "param", "hopper")
    seen: list[Any] = []

    def route_of(query: Any, key: Any, mask: Any, **options: Any) -> Route:
        seen.append((query, key, mask, options))
        return Route(name, "for a test", ())

    monkeypatch.setattr(rewrite, "route_of", route_of)
    return seen


@pytest.fixture
def counting_compiler(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> CompileCounterWithBackend:
    """``torch.compile`` without code generation, counting its graphs."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


@pytest.fixture
def kernel_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache of compiled kernels for all tests and all test processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", str(folder / "kernels"))
