"""Which route a call takes, and why: a pure function of a few facts."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import torch

from gna_flex import kernels
from gna_flex.kernels import FLOAT8

ROUTES = (*kernels.KERNELS, "flex-tiles", "flex", "reference")
"""Routes in order of preference: CUDA kernels, compiled FlexAttention in tile order and in the given one, reference."""

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_MAX_HEAD_DIM = {"hopper": 256, "blackwell": 128}
FLOAT8_KERNELS = ("blackwell",)
"""Kernels that take float8_e4m3fn, outside of compiled graphs."""
FLOAT8_HEAD_DIMS = (64, 128)
"""Head dims that they take it with: their rows are 64 or 128 bytes."""

BACKWARD_MAX_HEAD_DIM = {"hopper": 128, "blackwell": 0}
"""Up to which head dim a kernel has a backward of its own; two accumulators of more columns leave no registers."""

FLEX_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLEX_DEVICES = ("cuda", "xpu")
FLEX_MIN_HEAD_DIM = 16
CPU_FLEX_PAIRS = 1 << 30
"""On a CPU, compiling pays above about this many (query, key) pairs over batch and heads."""
REFERENCE_PAIRS = 1 << 36
"""Beyond this many pairs the reference is refused: it would run for hours."""


class Facts(NamedTuple):
    """What the choice depends on.

    ``pairs`` is batch x heads x queries x keys. ``has_tiles`` and ``tiles_pay`` say whether the mask has a tile order
    and whether it is predicted to be faster. ``wants_stats``: log-sum-exp or maximum is returned. ``backend`` is the
    ``BACKEND`` of FlexAttention's kernel options. ``has_compiler``: a C++ compiler is there, which the CPU needs.
    ``cpu_fault``: what the function of that name says.

    For CUDA kernels: ``capability`` of the device, ``missing``: why kernels cannot be compiled or launched here at all
    (a missing package, or what went wrong before), ``foreign``: what the call has that kernels know nothing of, and
    ``untested``: why a kernel that we never ran is not trusted on this machine.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    pairs: int
    needs_grad: bool
    wants_stats: bool
    compiling: bool
    has_tiles: bool
    tiles_pay: bool
    backend: str = "AUTO"
    has_compiler: bool = True
    cpu_fault: str = ""
    capability: tuple[int, int] | None = None
    missing: str = ""
    foreign: str = ""
    untested: str = ""


def facts_on(device: torch.device, dtype: torch.dtype, head_dim: int, pairs: int) -> Facts:
    """Facts of an eager call in inference on a device, with a mask for which tile order pays.

    >>> obstacle_to("hopper", facts_on(torch.device("cpu"), torch.bfloat16, 128, 1 << 20))
    'it needs an NVIDIA Hopper GPU, and the tensors are on cpu'
    """
    return Facts(
        device=device.type,
        dtype=dtype,
        head_dim=head_dim,
        pairs=pairs,
        needs_grad=False,
        wants_stats=False,
        compiling=False,
        has_tiles=True,
        tiles_pay=True,
        has_compiler=cpp_compiler() is not None,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        missing=kernels.missing(),
    )


class Route(NamedTuple):
    """The chosen route, why, and why not each route that is preferred to it."""

    name: str
    reason: str
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.reason}", *(f"  not {name}: {reason}" for name, reason in self.rejected)]
        return "\n".join(lines)


def choose_route(facts: Facts) -> Route:
    """The first route that can take the call and pays, or the forced one.

    Raises:
        RuntimeError: if the forced route, or every route, cannot take the call; the message says why.
    """
    # Dynamo traces through the cache, but warns.
    choose = _choose.__wrapped__ if torch.compiler.is_compiling() else _choose
    return choose(facts, _forced)


@functools.lru_cache(maxsize=4096)
def _choose(facts: Facts, forced: str | None) -> Route:
    if forced is not None and forced not in ROUTES:
        raise ValueError(f"GNA_FLEX_BACKEND={forced!r} is not a route; routes are {', '.join(ROUTES)}")
    if forced is not None:
        obstacle = obstacle_to(forced, facts)
        if obstacle:
            raise RuntimeError(f"the forced route cannot take this call:\n  {forced}: {obstacle}")
        return Route(forced, "forced", ())
    rejected: tuple[tuple[str, str], ...] = ()
    possible: str | None = None
    for name in ROUTES:
        obstacle = obstacle_to(name, facts)
        objection = obstacle or unprofitable(name, facts)
        if not objection:
            return Route(name, _reason(name, facts), rejected)
        if not obstacle and possible is None:
            possible = name
        rejected = (*rejected, (name, objection))
    if possible is not None:
        preferred = ROUTES[: ROUTES.index(possible)]
        others = tuple([(name, objection) for name, objection in rejected if name in preferred])
        return Route(possible, "the first route that can take the call", others)
    reasons = "\n".join([f"  {name}: {objection}" for name, objection in rejected])
    raise RuntimeError(f"gna_flex.flex_attention has no route for this call:\n{reasons}")


_REASONS = {
    "hopper": "the CUDA kernel for Hopper, on the tokens as given",
    "blackwell": "the CUDA kernel for Blackwell, on the tokens as given; its self-test passed on this machine",
    "flex-tiles": "compiled FlexAttention in tile order is predicted to be fastest",
    "flex": "compiled FlexAttention in the order of the tokens as given",
    "reference": "plain attention with the whole mask",
}


_WRITTEN_FOR = {"hopper": ("Hopper", "9.0"), "blackwell": ("data-center Blackwell", "10")}
"""GPUs of the kernels, by name and by compute capability."""
_NO_KERNEL = {11: ", for which there is no kernel", 12: ", for which there is no kernel"}
"""What more there is to say of other newer GPUs, by major compute capability."""


def obstacle_to(name: str, facts: Facts) -> str:
    """Why a route cannot take a call; empty if it can."""
    if name in kernels.KERNELS:
        return _kernel_obstacle(name, facts)
    if name == "reference":
        if facts.backend != "AUTO":
            return f"kernel_options ask for BACKEND={facts.backend}"
        if facts.pairs > REFERENCE_PAIRS:
            return f"it computes every pair of query and key, and there are more than {REFERENCE_PAIRS:.0e}"
        return ""
    if facts.dtype not in FLEX_DTYPES:
        return f"FlexAttention has no kernel for {facts.dtype}"
    if facts.device in FLEX_DEVICES:
        if facts.head_dim < FLEX_MIN_HEAD_DIM:
            return f"FlexAttention needs a head dim of at least {FLEX_MIN_HEAD_DIM}, not {facts.head_dim}"
    elif facts.device == "cpu":
        # torch's CPU kernel: no backward, no statistics, and it cannot be fused with what follows it in a graph.
        if facts.needs_grad:
            return "FlexAttention has no backward on the CPU (with a score_mod, call it under torch.no_grad())"
        if facts.wants_stats:
            return "FlexAttention returns no statistics on the CPU"
        if not facts.has_compiler:
            return "FlexAttention needs a C++ compiler on the CPU, and none was found"
        if facts.cpu_fault:
            return facts.cpu_fault
        if facts.compiling:
            return "FlexAttention inside a compiled CPU graph fails when a pointwise operation follows"
    else:
        return f"FlexAttention is not used on {facts.device}"
    if name == "flex-tiles":
        if facts.backend != "AUTO":
            return f"kernel_options ask for BACKEND={facts.backend} on the tokens as given"
        if not facts.has_tiles:
            return "the mask has no tile order (its tokens are in tile order already, or its heads differ in dilation)"
    return ""


def _kernel_obstacle(name: str, facts: Facts) -> str:
    """Why a CUDA kernel cannot take a call; empty if it can."""
    gpus, capability = _WRITTEN_FOR[name]
    most = KERNEL_MAX_HEAD_DIM[name]
    if facts.device != "cuda" or facts.capability is None:
        return f"it needs an NVIDIA {gpus} GPU, and the tensors are on {facts.device}"
    if kernels.kernel_for(facts.capability) != name:
        major, minor = facts.capability
        more = _NO_KERNEL.get(major, "")
        return f"it is written for compute capability {capability}, and this GPU has {major}.{minor}{more}"
    if facts.missing:
        return facts.missing
    if facts.backend != "AUTO":
        return f"kernel_options ask for BACKEND={facts.backend}"
    if facts.dtype == FLOAT8 and name in FLOAT8_KERNELS:
        if facts.compiling:
            return "inside a compiled graph it computes in float16 and bfloat16 only"
        if facts.head_dim not in FLOAT8_HEAD_DIMS:
            return f"with {FLOAT8} it takes head dims 64 and 128, not {facts.head_dim}"
    elif facts.dtype not in KERNEL_DTYPES:
        return f"it computes in float16 and bfloat16, not in {facts.dtype}"
    if facts.head_dim % 8 or facts.head_dim > most:
        return f"it takes head dims that are multiples of 8 up to {most}, not {facts.head_dim}"
    if facts.foreign:
        return facts.foreign
    if facts.needs_grad and facts.head_dim < FLEX_MIN_HEAD_DIM and backward_obstacle(name, facts.head_dim):
        return f"its backward is FlexAttention's, which needs a head dim of at least {FLEX_MIN_HEAD_DIM}"
    return facts.untested


def backward_obstacle(name: str, head_dim: int) -> str:
    """Why the backward of a kernel's calls is FlexAttention's; empty if the kernel has its own.

    >>> backward_obstacle("hopper", 128), backward_obstacle("hopper", 192)
    ('', 'there is a kernel for head dims up to 128, not for 192')
    """
    most = BACKWARD_MAX_HEAD_DIM[name]
    if not most:
        return "there is no kernel for it yet"
    return f"there is a kernel for head dims up to {most}, not for {head_dim}" if head_dim > most else ""


def _reason(name: str, facts: Facts) -> str:
    if name in kernels.KERNELS and facts.needs_grad and (obstacle := backward_obstacle(name, facts.head_dim)):
        return f"{_REASONS[name]}; the backward is FlexAttention's: {obstacle}"
    return _REASONS[name]


def with_verdict(facts: Facts, device: int | None) -> Facts:
    """Facts with ``untested`` filled in, if the route depends on it: a self-test may run, in a process of its own."""
    name = kernels.kernel_for(facts.capability)
    if name not in kernels.UNTRIED or device is None or _forced not in (None, name) or obstacle_to(name, facts):
        return facts
    return facts._replace(untested=kernels.untested(name, device))


def cpu_fault(head_dim: int, keys: int, kv_block: int) -> str:
    """Why torch's compiled FlexAttention could be wrong on this CPU; empty if nothing is known against it.

    Without AVX-512, products of scores read memory that nobody wrote: seen with torch 2.13 on an AMD EPYC, at head
    dims 8 and 16 with 8, 24, 40, ... keys in a block; not with other numbers up to 149, nor at head dims 4, 12, 20
    and from 24 on. No head dim below 24 is trusted with such numbers.

    >>> cpu_fault(32, 40, 128), cpu_fault(16, 44, 128)
    ('', '')
    """
    safe = head_dim >= 24 or 8 not in (keys % 16, kv_block % 16)
    if safe or torch.backends.cpu.get_cpu_capability() == "AVX512":
        return ""
    where = f"on CPUs without AVX-512 at head dim {head_dim}, {keys} keys in blocks of {kv_block}"
    return f"FlexAttention computes with memory that nobody wrote, {where}"


@functools.lru_cache(maxsize=1)
def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile can find, ``CXX`` or one of the usual names; ``None`` without one."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def unprofitable(name: str, facts: Facts) -> str:
    """Why a route that can take a call is not worth it; empty if it is."""
    if name == "reference":
        return ""
    if facts.device == "cpu" and facts.pairs < CPU_FLEX_PAIRS:
        return f"compiling for the CPU pays only above {CPU_FLEX_PAIRS:.0e} pairs of query and key"
    if name == "flex-tiles" and not facts.tiles_pay:
        return "the tokens as given are predicted to be as fast"
    return ""


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Forces a route (one of :data:`ROUTES`) inside a ``with`` block; ``None`` chooses automatically.

    The environment variable ``GNA_FLEX_BACKEND``, read at import, does the same for a whole process.

    >>> with backend("reference"):
    ...     pass
    """
    global _forced
    if name is not None and name not in ROUTES:
        raise ValueError(f"backend={name!r} is not a route; routes are {', '.join(ROUTES)}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def forced() -> str | None:
    """The route that is forced; ``None`` if the choice is free."""
    return _forced


_forced: str | None = os.environ.get("GNA_FLEX_BACKEND") or None
