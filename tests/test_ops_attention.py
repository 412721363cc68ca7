"""The operator of the CUDA kernel, on the CPU: what it computes, counts and declares; and what happens if it fails."""

import importlib.util
import logging
import threading

import pytest
import torch
from helpers import assert_within_budget, dense_attention, dense_mask, exact_attention
from torch.utils.flop_counter import FlopCounterMode

import gna_flex
from gna_flex import GNA, flex, gna_mask, kernels
from gna_flex.reference import reference_attention
from gna_flex.routing import ROUTES, Route

NEAR = GNA((6, 10), window=(3, 5), stride=(2, 1), causal=(True, False))
CASES = {
    # GNA or GNAs, query heads, key heads
    "one": (GNA((8, 8), 3), 2, 2),
    "causal": (NEAR, 2, 2),
    "dilated": (GNA((9, 8), 3, dilation=(2, 1)), 2, 2),
    "line": (GNA(50, 7, 3), 1, 1),
    "cube": (GNA((3, 4, 5), (2, 3, 3)), 2, 2),
    "text": (GNA((5, 6), 3, text_first=4, text_last=3), 2, 2),
    "per-head": ([GNA((8, 8), 3), GNA((8, 8), 7, 2), GNA((8, 8), 3)], 3, 3),
    "grouped": (NEAR, 6, 2),
    "grouped-per-head": ([GNA((8, 8), w) for w in (3, 4, 5, 6)], 4, 2),
}
cases = pytest.mark.parametrize(("gnas", "heads", "key_heads"), CASES.values(), ids=CASES)


def tensors(gnas, heads, key_heads, dtype=torch.float32, head_dim=16, batch=2):
    tokens = (gnas[0] if isinstance(gnas, list) else gnas).tokens
    q = torch.randn(batch, heads, tokens, head_dim, dtype=dtype)
    k, v = torch.randn(2, batch, key_heads, tokens, head_dim, dtype=dtype).unbind()
    return q, k, v


def run(q, k, v, gnas, scale=0.25):
    return torch.ops.gna_flex.attention(q, k, v, *gna_mask(gnas, device="cpu").lists, scale)


def keep_of(gnas, heads):
    """Booleans [heads, S, S]."""
    each = gnas if isinstance(gnas, list) else [gnas] * heads
    return torch.stack([torch.from_numpy(dense_mask(gna).copy()) for gna in each])


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_dense_attention_under_the_mask(gnas, heads, key_heads, dtype):
    q, k, v = tensors(gnas, heads, key_heads, dtype)
    out, lse = run(q, k, v, gnas)
    keep = keep_of(gnas, heads)
    exact, plain = exact_attention(q, k, v, keep, scale=0.25), dense_attention(q, k, v, keep, scale=0.25)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_within_budget("out", out, exact.out, plain.out)
    assert_within_budget("lse", lse, exact.lse, plain.lse.float())


@cases
def test_equals_the_reference(gnas, heads, key_heads):
    q, k, v = tensors(gnas, heads, key_heads)
    out, lse = run(q, k, v, gnas)
    exact = reference_attention(q, k, v, gna_mask(gnas, device="cpu").mask_mod, scale=0.25)
    torch.testing.assert_close((out, lse), exact[:2])


def test_the_call_of_the_route_has_the_usual_scale():
    gna = GNA((8, 8), 3)
    q, k, v = tensors(gna, 2, 2)
    mask = gna_mask(gna, device="cpu")
    exact = reference_attention(q, k, v, mask.mask_mod)
    torch.testing.assert_close(flex.kernel_attention(q, k, v, mask, None), exact[:2])
    exact = reference_attention(q, k, v, mask.mask_mod, scale=0.7)
    torch.testing.assert_close(flex.kernel_attention(q, k, v, mask, 0.7), exact[:2])


def test_output_lies_in_memory_as_the_queries_do():
    gna = GNA((8, 8), 3)
    q, k, v = (torch.randn(2, gna.tokens, 3, 16).transpose(1, 2) for _ in range(3))
    out, lse = run(q, k, v, gna)
    assert out.stride() == q.stride()
    assert lse.is_contiguous()


@cases
def test_declares_what_it_does(gnas, heads, key_heads):
    q, k, v = tensors(gnas, heads, key_heads)
    arguments = (q, k, v, *gna_mask(gnas, device="cpu").lists, 0.25)
    torch.library.opcheck(torch.ops.gna_flex.attention.default, arguments)


@cases
def test_flops_are_those_of_the_kept_pairs(gnas, heads, key_heads):
    q, k, v = tensors(gnas, heads, key_heads)
    with FlopCounterMode(display=False) as counter:
        run(q, k, v, gnas)
    pairs = int(keep_of(gnas, heads).sum())
    # A multiplication and an addition for each element, in two products, in each of two batch entries.
    assert counter.get_flop_counts()["Global"][torch.ops.gna_flex.attention] == 4 * 2 * 16 * pairs


@cases
def test_lists_hold_every_gna(gnas, heads, key_heads):
    from gna_flex.ops import _gnas

    *lists, text_first, text_last = gna_mask(gnas, device="cpu").lists
    made = _gnas(*map(tuple, lists), text_first, text_last)
    assert made == tuple(gnas if isinstance(gnas, list) else [gnas])


# Kernels that cannot be used, or fail


@pytest.fixture
def fresh_kernels(monkeypatch):
    """As in a process in which no kernel has failed, with all packages."""
    monkeypatch.setattr(kernels, "_package", "")
    kernels.try_again()
    yield
    kernels.try_again()


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "gna_flex" and r.levelno >= logging.WARNING]


def test_a_failure_is_remembered_until_told_otherwise(fresh_kernels, caplog):
    assert kernels.missing() == ""
    kernels.give_up(RuntimeError("out of registers\nand more lines"))
    assert kernels.missing() == "a kernel failed before: out of registers"
    kernels.give_up(ValueError())
    assert kernels.missing() == "a kernel failed before: ValueError"
    (said,) = warnings_in(caplog)
    assert "out of registers" in said
    kernels.try_again()
    assert kernels.missing() == ""


@pytest.mark.parametrize("absent", ["cuda", "cuda.bindings"])
def test_a_missing_package_is_named(monkeypatch, absent):
    find = importlib.util.find_spec
    here = {"cuda": object(), "cuda.bindings": object()} | {absent: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: here[name] if name in here else find(name))
    monkeypatch.setattr(kernels, "_package", None)
    assert "pip install gna-flex[cuda]" in kernels.missing()
    assert kernels._package == kernels.missing()


@pytest.fixture
def kernel_route(monkeypatch, fresh_kernels):
    """Calls on the CPU take the kernel's route until it fails."""
    choose = flex.route_of

    def route_of(*arguments, **options):
        if kernels.missing():
            return choose(*arguments, **options)
        return Route("hopper", "for a test", ())

    monkeypatch.setattr(flex, "route_of", route_of)


def attend(q, k, v, mask, **options):
    return gna_flex.flex_attention(q, k, v, block_mask=mask, **options)


def test_the_route_gives_output_and_statistics(kernel_route, caplog):
    gna = GNA((8, 8), 3)
    q, k, v = tensors(gna, 2, 2)
    mask = gna_mask(gna, device="cpu")
    exact = reference_attention(q, k, v, mask.mask_mod)
    torch.testing.assert_close(attend(q, k, v, mask), exact[0])
    torch.testing.assert_close(attend(q, k, v, mask, return_lse=True), exact[:2])
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    "error", [RuntimeError("launch failed"), ImportError("no NVRTC")], ids=lambda e: type(e).__name__
)
def test_a_kernel_that_fails_gives_way_once(kernel_route, monkeypatch, caplog, error):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise error

    monkeypatch.setattr(flex, "kernel_attention", fail)
    gna = GNA((8, 8), 3, text_first=2)
    q, k, v = tensors(gna, 4, 2)
    mask = gna_mask(gna, device="cpu")
    exact = reference_attention(q, k, v, mask.mask_mod)
    for _ in range(3):
        out, lse = attend(q, k, v, mask, enable_gqa=True, return_lse=True)
        torch.testing.assert_close((out, lse), exact[:2])
    assert len(calls) == 1
    (said,) = warnings_in(caplog)
    assert str(error) in said
    kernels.try_again()
    attend(q, k, v, mask, enable_gqa=True)
    assert len(calls) == 2


def test_a_forced_kernel_that_fails_raises(kernel_route, monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(flex, "kernel_attention", fail)
    gna = GNA((8, 8), 3)
    q, k, v = tensors(gna, 1, 1)
    with gna_flex.backend(ROUTES[0]), pytest.raises(RuntimeError, match="launch failed"):
        attend(q, k, v, gna_mask(gna, device="cpu"))
    assert kernels.missing() == ""
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    "error", [TypeError("a mistake"), torch.OutOfMemoryError("no memory")], ids=["mistake", "memory"]
)
def test_other_errors_are_not_hidden(kernel_route, monkeypatch, error):
    """Mistakes in programs, and memory that may be there next time."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr(flex, "kernel_attention", fail)
    gna = GNA((8, 8), 3)
    q, k, v = tensors(gna, 1, 1)
    with pytest.raises(type(error), match=str(error)):
        attend(q, k, v, gna_mask(gna, device="cpu"))
    assert kernels.missing() == ""


def test_compiled_functions_hear_of_a_failure(fresh_kernels, fresh_compiler):
    seen = []

    def why(x):
        seen.append(kernels.missing())
        return x + 1

    compiled = torch.compile(why, backend="eager", fullgraph=True)
    compiled(torch.zeros(2))
    kernels.give_up(RuntimeError("broken"))
    compiled(torch.zeros(2))
    assert seen == ["", "a kernel failed before: broken"]


def test_what_lasts_is_made_in_another_thread():
    """torch takes memory from CUDA graphs by thread."""
    assert kernels.lasting(threading.get_ident) != threading.get_ident()
    with torch.inference_mode():
        assert not kernels.lasting(lambda: torch.zeros(2)).is_inference()
    with pytest.raises(ValueError, match="said"):
        kernels.lasting(lambda: int("said"))
