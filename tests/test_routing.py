"""The choice of a route: a pure function, a context manager, an environment variable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gna_flex
from gna_flex import GNA, backend, explain, flex_attention, gna_mask, routing
from gna_flex.routing import (
    CPU_FLEX_PAIRS,
    REFERENCE_PAIRS,
    ROUTES,
    Facts,
    Route,
    choose_route,
    cpp_compiler,
    obstacle_to,
)

GPU = Facts(
    device="cuda",
    dtype=torch.bfloat16,
    head_dim=64,
    pairs=1 << 34,
    needs_grad=True,
    wants_stats=True,
    compiling=False,
    has_tiles=True,
    tiles_pay=True,
)
CPU = GPU._replace(device="cpu", pairs=CPU_FLEX_PAIRS, needs_grad=False, wants_stats=False)

TABLE = {
    # facts: (route, words of the reason against each route that is preferred to it)
    "gpu": (GPU, "flex-tiles", {}),
    "gpu-compiling": (GPU._replace(compiling=True), "flex-tiles", {}),
    "xpu": (GPU._replace(device="xpu"), "flex-tiles", {}),
    "gpu-tiles-do-not-pay": (GPU._replace(tiles_pay=False), "flex", {"flex-tiles": "predicted to be as fast"}),
    "gpu-no-tiles": (GPU._replace(has_tiles=False, tiles_pay=False), "flex", {"flex-tiles": "no tile order"}),
    "gpu-backend": (GPU._replace(backend="TRITON"), "flex", {"flex-tiles": "BACKEND=TRITON"}),
    "gpu-small-head": (
        GPU._replace(head_dim=8),
        "reference",
        {"flex-tiles": "at least 16, not 8", "flex": "at least 16, not 8"},
    ),
    "gpu-double": (
        GPU._replace(dtype=torch.float64),
        "reference",
        {"flex-tiles": "no kernel for torch.float64", "flex": "no kernel for torch.float64"},
    ),
    "cpu-large": (CPU, "flex-tiles", {}),
    "cpu-large-no-tiles": (CPU._replace(has_tiles=False), "flex", {"flex-tiles": "no tile order"}),
    "cpu-small": (
        CPU._replace(pairs=CPU_FLEX_PAIRS - 1),
        "reference",
        {"flex-tiles": "pays only above", "flex": "pays only above"},
    ),
    "cpu-training": (CPU._replace(needs_grad=True), "reference", {"flex-tiles": "no backward", "flex": "no backward"}),
    "cpu-statistics": (
        CPU._replace(wants_stats=True),
        "reference",
        {"flex-tiles": "no statistics", "flex": "no statistics"},
    ),
    "cpu-compiling": (
        CPU._replace(compiling=True),
        "reference",
        {"flex-tiles": "compiled CPU", "flex": "compiled CPU"},
    ),
    "cpu-double": (CPU._replace(dtype=torch.float64), "reference", {"flex-tiles": "float64", "flex": "float64"}),
    "other-device": (
        CPU._replace(device="mps"),
        "reference",
        {"flex-tiles": "not used on mps", "flex": "not used on mps"},
    ),
}


@pytest.mark.parametrize(("facts", "name", "against"), TABLE.values(), ids=TABLE)
def test_route_and_reasons(facts, name, against):
    route = choose_route(facts)
    assert route.name == name
    assert route.reason
    assert [rejected for rejected, _ in route.rejected] == list(ROUTES[: ROUTES.index(name)])
    for rejected, reason in route.rejected:
        assert against[rejected] in reason
    assert str(route).startswith(f"{name}: {route.reason}")
    assert all(f"not {rejected}: {reason}" in str(route) for rejected, reason in route.rejected)


@pytest.mark.parametrize("name", ROUTES)
def test_forced_route_is_taken_where_it_can_be(name):
    facts = CPU._replace(pairs=10, tiles_pay=False)
    with backend(name):
        assert choose_route(facts) == Route(name, "forced", ())


@pytest.mark.parametrize(
    ("name", "facts", "words"),
    [
        ("flex", CPU._replace(needs_grad=True), "no backward on the CPU"),
        ("flex", CPU._replace(wants_stats=True), "no statistics on the CPU"),
        ("flex-tiles", GPU._replace(has_tiles=False), "no tile order"),
        ("flex-tiles", GPU._replace(backend="FLASH"), "BACKEND=FLASH"),
        ("flex", GPU._replace(dtype=torch.float64), "no kernel for torch.float64"),
        ("flex", GPU._replace(head_dim=15), "at least 16, not 15"),
        ("reference", GPU._replace(pairs=REFERENCE_PAIRS + 1), "every pair"),
        ("reference", GPU._replace(backend="TRITON"), "BACKEND=TRITON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_forced_route_says_why_it_cannot(name, facts, words):
    with backend(name), pytest.raises(RuntimeError, match=words) as caught:
        choose_route(facts)
    assert f"{name}: " in str(caught.value)
    assert obstacle_to(name, facts) in str(caught.value)
    assert all(f"{other}: " not in str(caught.value) for other in ROUTES if other != name)


def test_no_route_at_all_names_every_reason():
    with pytest.raises(RuntimeError, match="no route") as caught:
        choose_route(GPU._replace(dtype=torch.float64, pairs=REFERENCE_PAIRS + 1))
    assert all(f"{name}: " in str(caught.value) for name in ROUTES)


def test_backend_restores_what_was_there():
    facts = CPU._replace(pairs=10)
    assert choose_route(facts).reason != "forced"
    with backend("flex"):
        with backend("flex-tiles"):
            assert choose_route(facts).name == "flex-tiles"
            with backend(None):
                assert choose_route(facts).name == "reference"
                assert choose_route(facts).reason != "forced"
        assert choose_route(facts).name == "flex"
        with pytest.raises(ZeroDivisionError), backend("reference"):
            raise ZeroDivisionError
        assert choose_route(facts).name == "flex"
    assert choose_route(facts).reason != "forced"


@pytest.mark.parametrize("name", ["triton", "", "FLEX"])
def test_unknown_backend_is_refused(name):
    with (
        pytest.raises(ValueError, match=f"{name!r} is not a route; routes are flex-tiles, flex, reference"),
        backend(name),
    ):
        pass
    assert routing._forced is None


def test_attention_obeys_the_forced_route():
    mask = gna_mask(GNA((4, 4), 3), device="cpu")
    q = torch.randn(1, 1, 16, 8, requires_grad=True)
    with backend("flex"), pytest.raises(RuntimeError, match="no backward on the CPU"):
        flex_attention(q, q, q, block_mask=mask)
    with backend("flex"), pytest.raises(RuntimeError, match="no statistics on the CPU"):
        flex_attention(q.detach(), q.detach(), q.detach(), block_mask=mask, return_lse=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"return_lse": True}, "no statistics"), ({"kernel_options": {"BACKEND": "TRITON"}}, "BACKEND=TRITON")],
    ids=["statistics", "backend"],
)
def test_explain_tells_what_a_call_would_do(options, words):
    mask = gna_mask(GNA((4, 4), 3), device="cpu")
    q = torch.randn(1, 1, 16, 8)
    with backend("flex-tiles"):
        assert explain(q, q, q, mask) == Route("flex-tiles", "forced", ())
        with pytest.raises(RuntimeError, match=words):
            explain(q, q, q, mask, **options)
    route = explain(q, q, q, mask)
    assert route.name == "reference"
    assert [name for name, _ in route.rejected] == ["flex-tiles", "flex"]


def run_with_backend(value: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import torch; from gna_flex import *; q = torch.zeros(1, 1, 16, 8);"
        "print(explain(q, q, q, gna_mask(GNA(16, 3), device='cpu')))"
    )
    root = Path(gna_flex.__file__).parents[1]
    environment = os.environ | {"GNA_FLEX_BACKEND": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)


@pytest.mark.parametrize(("value", "shown"), [("flex", "flex: forced"), ("", "reference: plain attention")])
def test_environment_variable(value, shown):
    result = run_with_backend(value)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(shown)


def test_unknown_environment_variable_is_refused():
    result = run_with_backend("bogus")
    assert result.returncode != 0
    for words in ("ValueError", "bogus", "GNA_FLEX_BACKEND", *ROUTES):
        assert words in result.stderr


def test_unprofitable_route_is_better_than_none():
    """BACKEND rules out the reference and tiles; compiling for a small call is slow but right."""
    route = choose_route(CPU._replace(pairs=10, backend="TRITON"))
    assert route.name == "flex"
    assert [name for name, _ in route.rejected] == ["flex-tiles"]


def test_no_compiler_means_the_reference_on_a_cpu():
    route = choose_route(CPU._replace(pairs=CPU_FLEX_PAIRS * 2, has_compiler=False))
    assert route.name == "reference"
    assert "C++ compiler" in dict(route.rejected)["flex"]


def test_finds_a_compiler_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cpp_compiler.cache_clear()
    assert not cpp_compiler()
    (tmp_path / "g++").touch(mode=0o755)
    cpp_compiler.cache_clear()
    assert cpp_compiler()
    cpp_compiler.cache_clear()
