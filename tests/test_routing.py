"""The choice of a route: a pure function, a context manager, an environment variable."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

import gna_flex
from gna_flex import GNA, backend, explain, flex_attention, gna_mask, kernels, routing
from gna_flex.flex import foreign_to_kernels, route_of
from gna_flex.routing import (
    CPU_FLEX_PAIRS,
    KERNEL_DTYPES,
    REFERENCE_PAIRS,
    ROUTES,
    Facts,
    Route,
    choose_route,
    cpp_compiler,
    cpu_fault,
    obstacle_to,
    with_verdict,
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
    capability=(8, 0),
)
HOPPER = GPU._replace(capability=(9, 0), needs_grad=False)
BLACKWELL = HOPPER._replace(capability=(10, 0))
CPU = GPU._replace(device="cpu", capability=None, pairs=CPU_FLEX_PAIRS, needs_grad=False, wants_stats=False)

TABLE = {
    # facts: (route, words of the reason against each route that is preferred to it)
    "hopper": (HOPPER, "hopper", {}),
    "hopper-compiling": (HOPPER._replace(compiling=True), "hopper", {}),
    "hopper-no-tiles": (HOPPER._replace(has_tiles=False, tiles_pay=False), "hopper", {}),
    "hopper-training": (HOPPER._replace(needs_grad=True), "hopper", {}),
    "blackwell": (BLACKWELL, "blackwell", {"hopper": "this GPU has 10.0"}),
    "blackwell-b300": (BLACKWELL._replace(capability=(10, 3)), "blackwell", {"hopper": "this GPU has 10.3"}),
    "blackwell-training": (BLACKWELL._replace(needs_grad=True), "blackwell", {"hopper": "this GPU has 10.0"}),
    "blackwell-untested": (
        BLACKWELL._replace(untested="its self-test failed"),
        "flex-tiles",
        {"hopper": "this GPU has 10.0", "blackwell": "its self-test failed"},
    ),
    "hopper-small-head": (
        HOPPER._replace(head_dim=12),
        "reference",
        {
            "hopper": "multiples of 8 up to 256, not 12",
            "blackwell": "this GPU has 9.0",
            "flex-tiles": "at least 16",
            "flex": "at least 16",
        },
    ),
    "gpu": (GPU, "flex-tiles", {}),
    "gpu-compiling": (GPU._replace(compiling=True), "flex-tiles", {}),
    "xpu": (GPU._replace(device="xpu", capability=None), "flex-tiles", {}),
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
    elsewhere = "this GPU has 8.0" if facts.device == "cuda" else f"the tensors are on {facts.device}"
    for rejected, reason in route.rejected:
        assert (dict.fromkeys(kernels.KERNELS, elsewhere) | against)[rejected] in reason
    assert str(route).startswith(f"{name}: {route.reason}")
    assert all(f"not {rejected}: {reason}" in str(route) for rejected, reason in route.rejected)


@pytest.mark.parametrize("name", ROUTES)
def test_forced_route_is_taken_where_it_can_be(name):
    on_gpu = {"hopper": HOPPER, "blackwell": BLACKWELL}
    facts = on_gpu.get(name, CPU._replace(pairs=10, tiles_pay=False))
    with backend(name):
        assert choose_route(facts) == Route(name, "forced", ())


@pytest.mark.parametrize(
    ("name", "facts", "words"),
    [
        ("blackwell", BLACKWELL._replace(needs_grad=True, head_dim=8), "head dim of at least 16"),
        ("hopper", CPU, "needs an NVIDIA Hopper GPU, and the tensors are on cpu"),
        ("blackwell", CPU, "needs an NVIDIA data-center Blackwell GPU, and the tensors are on cpu"),
        ("blackwell", HOPPER, "compute capability 10, and this GPU has 9.0"),
        ("blackwell", BLACKWELL._replace(untested="its self-test hung"), "its self-test hung"),
        ("flex", CPU._replace(needs_grad=True), "no backward on the CPU"),
        ("flex", CPU._replace(wants_stats=True), "no statistics on the CPU"),
        ("flex-tiles", CPU._replace(cpu_fault="memory that nobody wrote"), "memory that nobody wrote"),
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
        pytest.raises(ValueError, match=f"{name!r} is not a route; routes are hopper, blackwell, flex-tiles, "),
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
    assert [name for name, _ in route.rejected] == ["hopper", "blackwell", "flex-tiles", "flex"]


AGAINST_KERNELS = {
    # why a kernel cannot take a call: (what is different, words)
    "another-device": ({"device": "xpu", "capability": None}, "GPU, and the tensors are on xpu"),
    "newest": ({"capability": (12, 1)}, "and this GPU has 12.1, for which there is no kernel"),
    "embedded": ({"capability": (11, 0)}, "and this GPU has 11.0, for which there is no kernel"),
    "amd": ({"capability": (9, 4)}, "and this GPU has 9.4"),
    "older": ({"capability": (8, 9)}, "and this GPU has 8.9"),
    "missing-package": ({"missing": "it needs cuda-bindings"}, "it needs cuda-bindings"),
    "failed-before": ({"missing": "a kernel failed before: out of registers"}, "failed before: out of registers"),
    "backend": ({"backend": "TRITON"}, "kernel_options ask for BACKEND=TRITON"),
    "float32": ({"dtype": torch.float32}, "float16 and bfloat16, not in torch.float32"),
    "float64": ({"dtype": torch.float64}, "float16 and bfloat16, not in torch.float64"),
    "odd-head": ({"head_dim": 100}, "multiples of 8 up to {most}, not 100"),
    "large-head": ({"head_dim": 264}, "multiples of 8 up to {most}, not 264"),
    "foreign": ({"foreign": "it takes no score_mod"}, "it takes no score_mod"),
}
ON_GPU = {"hopper": (HOPPER, 256), "blackwell": (BLACKWELL, 128)}


def test_routes_say_whose_backward_they_have():
    training = HOPPER._replace(needs_grad=True)
    assert "backward" not in choose_route(training).reason
    assert "backward is FlexAttention's" in choose_route(training._replace(head_dim=192)).reason
    assert "backward" not in choose_route(HOPPER._replace(head_dim=192)).reason
    assert "backward is FlexAttention's" in choose_route(BLACKWELL._replace(needs_grad=True)).reason
    assert choose_route(training._replace(head_dim=8)).name == "hopper"
    assert choose_route(BLACKWELL._replace(needs_grad=True, head_dim=8)).name == "reference"


@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize(("change", "words"), AGAINST_KERNELS.values(), ids=AGAINST_KERNELS)
def test_obstacles_to_kernels(change, words, kernel):
    facts, most = ON_GPU[kernel]
    words = words.format(most=most)
    route = choose_route(facts._replace(**change))
    assert route.name not in kernels.KERNELS
    assert words in dict(route.rejected)[kernel]
    with backend(kernel), pytest.raises(RuntimeError, match="cannot take this call") as caught:
        choose_route(facts._replace(**change))
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("kernel", "head_dim"), [(k, d) for k, (_, most) in ON_GPU.items() for d in (8, 32, 72, most)])
def test_what_kernels_take(dtype, kernel, head_dim):
    facts = ON_GPU[kernel][0]._replace(dtype=dtype, head_dim=head_dim)
    route = choose_route(facts)
    assert route.name == kernel
    assert route.reason.startswith(f"the CUDA kernel for {kernel.title()}, on the tokens as given")
    assert choose_route(facts._replace(pairs=REFERENCE_PAIRS * 2, wants_stats=False)).name == kernel


def test_each_kernel_is_for_gpus_of_its_own():
    for capability, name in (
        ((9, 0), "hopper"),
        ((10, 0), "blackwell"),
        ((10, 3), "blackwell"),
        ((10, 9), "blackwell"),
    ):
        facts = HOPPER._replace(capability=capability)
        assert [kernel for kernel in kernels.KERNELS if not obstacle_to(kernel, facts)] == [name]
        assert kernels.kernel_for(capability) == name


class Verdict:
    """Stands for the self-test; counts how often it is asked for."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, kernel, device):
        self.asked.append((kernel, device))
        return self.answer


@pytest.mark.parametrize(("answer", "name"), [("", "blackwell"), ("its self-test failed", "flex-tiles")])
def test_a_kernel_that_never_ran_is_taken_only_after_its_self_test(monkeypatch, answer, name):
    verdict = Verdict(answer)
    monkeypatch.setattr(kernels, "untested", verdict)
    route = choose_route(with_verdict(BLACKWELL, 3))
    assert route.name == name
    assert verdict.asked == [("blackwell", 3)]
    assert answer == "" or dict(route.rejected)["blackwell"] == answer
    with backend("blackwell"):
        if answer:
            with pytest.raises(RuntimeError, match=answer):
                choose_route(with_verdict(BLACKWELL, 3))
        else:
            assert choose_route(with_verdict(BLACKWELL, 3)).name == "blackwell"


@pytest.mark.parametrize(
    "facts",
    [
        *(HOPPER, CPU, GPU),
        BLACKWELL._replace(dtype=torch.float32),
        BLACKWELL._replace(head_dim=192),
        BLACKWELL._replace(missing="no NVRTC"),
        BLACKWELL._replace(foreign="it takes no score_mod"),
    ],
)
def test_no_self_test_where_no_route_depends_on_it(monkeypatch, facts):
    verdict = Verdict("")
    monkeypatch.setattr(kernels, "untested", verdict)
    assert with_verdict(facts, 0) == facts
    with backend("flex"):
        assert with_verdict(BLACKWELL, 0) == BLACKWELL
    assert not verdict.asked


def test_graphs_ask_for_the_self_test_while_they_are_compiled(fresh_compiler):
    asked = []

    @torch.compiler.assume_constant_result
    def untested(kernel, device):
        subprocess.run([sys.executable, "-c", ""], check=True)
        asked.append((kernel, device))
        return ""

    def call(x):
        facts = with_verdict(BLACKWELL._replace(compiling=True), x.dim())
        return x + 1 if choose_route(facts).name == "blackwell" else x - 1

    with mock.patch.object(kernels, "untested", untested):
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        for _ in range(3):
            assert compiled(torch.zeros(2)).tolist() == [1, 1]
    assert asked == [("blackwell", 1)]


def doubled(score, b, h, q_idx, kv_idx):
    return 2 * score


GNA_8X8 = GNA((8, 8), 3)
FOREIGN = {
    # (GNA or GNAs, options of gna_mask, options of the call, words; none if the kernel knows all of it)
    "plain": (GNA_8X8, {}, {}, ""),
    "text": (GNA((8, 8), 3, text_first=5, text_last=2), {}, {}, ""),
    "per-head": ([GNA_8X8, GNA((8, 8), 5)], {}, {}, ""),
    "scale": (GNA_8X8, {}, {"scale": 0.0}, ""),
    "negative-scale": (GNA_8X8, {}, {"scale": -0.5}, "no negative scale (-0.5)"),
    "score-mod": (GNA_8X8, {}, {"score_mod": doubled}, "no score_mod"),
    "maximum": (GNA_8X8, {}, {"wants_maximum": True}, "no maximum"),
    "and-mask": (GNA_8X8, {"and_mask": lambda b, h, q, k: q >= k}, {}, "a further condition (and_mask)"),
    "tile-order": (GNA_8X8, {"order": (4, 4)}, {}, "tokens in natural order, and the mask is for another one"),
    "dilations": ([GNA_8X8, GNA((8, 8), 3, dilation=2)], {}, {}, "the heads differ in dilation"),
    "value-head-dim": (GNA_8X8, {}, {"value": torch.zeros(1, 2, 64, 32)}, "not 32 and 64"),
}


@pytest.mark.parametrize(("gna", "options", "call", "words"), FOREIGN.values(), ids=FOREIGN)
def test_what_kernels_know_nothing_of(gna, options, call, words):
    mask = gna_mask(gna, device="cpu", **options)
    query = torch.zeros(1, 2, 64, 64)
    said = foreign_to_kernels(
        query,
        call.get("value", query),
        mask,
        call.get("score_mod"),
        call.get("wants_maximum", False),
        call.get("scale"),
    )
    assert words in said
    assert bool(said) == bool(words)


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
    assert [name for name, _ in route.rejected] == ["hopper", "blackwell", "flex-tiles"]


def test_no_compiler_means_the_reference_on_a_cpu():
    route = choose_route(CPU._replace(pairs=CPU_FLEX_PAIRS * 2, has_compiler=False))
    assert route.name == "reference"
    assert "C++ compiler" in dict(route.rejected)["flex"]


@pytest.mark.parametrize(
    ("capability", "head_dim", "keys", "kv_block", "fault"),
    [
        ("AVX2", 16, 40, 128, True),
        ("AVX2", 8, 64, 24, True),
        ("AVX2", 24, 40, 128, False),
        ("AVX2", 16, 44, 128, False),
        ("AVX512", 16, 40, 128, False),
    ],
)
def test_what_compiled_attention_gets_wrong_on_some_cpus(monkeypatch, capability, head_dim, keys, kv_block, fault):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert bool(cpu_fault(head_dim, keys, kv_block)) == fault
    q, k = torch.zeros(1, 1, 8, head_dim), torch.zeros(1, 1, keys, head_dim)
    mask = gna_mask(GNA(keys, 3), kv_block=kv_block)
    with backend("flex"):
        if fault:
            with pytest.raises(RuntimeError, match=f"nobody wrote, .* at head dim {head_dim}, {keys} keys"):
                route_of(q, k, mask, needs_grad=False)
        else:
            assert route_of(q, k, mask, needs_grad=False).name == "flex"


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "keys"), [(16, (4, 12, 16, 20, 100, 130)), (24, (8, 24, 40, 104, 120))])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_attention_is_right_elsewhere(head_dim, keys):
    """On this CPU, whatever it is: what :func:`cpu_fault` says nothing against, with memory full of other results."""
    compiled = torch.compile(torch_flex_attention, dynamic=True)
    for count in keys:
        assert not cpu_fault(head_dim, count, 128)
        q, k, v = torch.randn(3, 1, 2, count, head_dim).unbind()
        out = compiled(q, k, v, block_mask=create_block_mask(whole, None, None, count, count, device="cpu"))
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def whole(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Every pair."""
    return q_idx >= 0


def test_finds_a_compiler_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cpp_compiler.cache_clear()
    assert not cpp_compiler()
    (tmp_path / "g++").touch(mode=0o755)
    cpp_compiler.cache_clear()
    assert cpp_compiler()
    cpp_compiler.cache_clear()
