"""Attention measured: every route that can take a call, dense attention and NATTEN, in turns, in one run.

Results are checked before anything is timed. Times are medians.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gna_flex import kernels
from gna_flex.bench import Timing
from gna_flex.flex import eager_attention, route_of
from gna_flex.mask import GNABlockMask, gna_mask
from gna_flex.neighborhood import GNA
from gna_flex.reference import reference_attention
from gna_flex.routing import ROUTES, backend
from gna_flex.words import by_x

DENSE_FLOPS = 2e16
"""Dense attention with more arithmetic than this, half a minute on an H200, is not run."""
WAYS = ("dense", *(name for name in ROUTES if name != "reference"), "natten")
"""Ways to compute attention that are measured."""
DETERMINISTIC = "hopper-deterministic"
"""One more in a backward: the Hopper kernel's under ``torch.use_deterministic_algorithms``."""
WARM_UP = 2
SAMPLE = 100.0
"""Milliseconds that one sample lasts at least on a GPU, after as much that is not timed: short calls are repeated.

A GPU at its power limit lowers its clocks with a delay: in samples of 20 ms a quick kernel seemed 12 % faster.
"""
SLOW = 2000.0
"""What takes longer than this many milliseconds is timed once, after one sample to warm up."""
TUNING_REPEATS = 3


class Contender(NamedTuple):
    """One way to compute attention.

    ``run`` returns the output, and ``to_natural`` brings that to ``[B, H, S, D]``; ``inputs`` are what a backward
    reaches. ``note`` says how it is done; without a ``run`` it says why it cannot be done.
    """

    name: str
    run: Callable[[], Tensor] | None = None
    inputs: tuple[Tensor, ...] = ()
    note: str = ""
    tiles: str = ""
    to_natural: Callable[[Tensor], Tensor] = lambda out: out

    def gradients(self, out: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the inputs, given an output and its gradient."""
        if self.name != DETERMINISTIC:
            return torch.autograd.grad(out, self.inputs, grad)
        settings: Any = torch.utils.deterministic
        before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
        settings.fill_uninitialized_memory = False  # which would be timed, too
        torch.use_deterministic_algorithms(True)
        try:
            return torch.autograd.grad(out, self.inputs, grad)
        finally:
            torch.use_deterministic_algorithms(before[0])
            settings.fill_uninitialized_memory = before[1]


def bench_attention(
    gna: GNA,
    *,
    heads: int = 24,
    head_dim: int = 128,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    backward: bool = False,
    repeats: int = 20,
    ways: tuple[str, ...] = (),
) -> list[Timing]:
    """Ways to compute attention under one GNA, by default :data:`WAYS` (and :data:`DETERMINISTIC` in a backward).

    Dense attention without a mask is the baseline.

    Raises:
        AssertionError: if a result differs from the reference.
        ValueError: if a backward is asked for on a CPU, where FlexAttention has none, or a way is unknown.
    """
    if backward and torch.device(device).type == "cpu":
        raise ValueError("backward=True, but FlexAttention has no backward on the CPU: measure it on a GPU")
    known = (*WAYS, DETERMINISTIC) if backward else WAYS
    ways = ways or known
    unknown = [name for name in ways if name not in known]
    if unknown:
        raise ValueError(f"ways={' '.join(unknown)}: known are {', '.join(known)}")
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, heads, gna.tokens, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(3))
    mask = gna_mask(gna, device=device)
    make: dict[str, Callable[[], Contender]] = {
        name: functools.partial(routed, name, q, k, v, mask, backward) for name in ROUTES if name != "reference"
    }
    make[DETERMINISTIC] = lambda: make["hopper"]()._replace(name=DETERMINISTIC)
    make |= {"dense": lambda: dense(q, k, v), "natten": lambda: natten(q, k, v, gna, backward)}
    all_ = [make[name]() for name in ("dense", *(name for name in ways if name != "dense"))]
    for way in all_:
        if way.run is not None and way.name != "dense":
            check_rows(way.name, way.to_natural(way.run()), q, k, v, mask)
    # Tile shapes of a kernel are known once it ran.
    tiles = {way.name: way.tiles or tiles_of(way.name, q, mask) for way in all_ if way.run is not None}
    for x in (x for way in all_ for x in way.inputs if backward):
        x.requires_grad_()
    for way in all_:
        if backward and way.run is not None and way.name != "dense":
            check_gradients(way, q, k, v, mask)
    times = in_turns(all_, backward, device, repeats)
    return [
        Timing(way.name, times[way.name], memory_added(way, backward, device), way.note, tiles[way.name])
        if way.run is not None
        else Timing(way.name, math.nan, math.nan, f"not run, {way.note}")
        for way in all_
    ]


def in_turns(ways: list[Contender], backward: bool, device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each. Every round has another order: what ran before shifts a time by up to 7 %."""
    running = [(way, way.run) for way in ways if way.run is not None]
    times: dict[str, list[float]] = {way.name: [] for way, _ in running}
    shuffled = random.Random(0)
    for _ in range(WARM_UP + repeats):
        for way, run in shuffled.sample(running, len(running)):
            known = times[way.name]
            last = known[-1] if known else SAMPLE
            if len(known) < 2 or last < SLOW:
                calls = math.ceil(SAMPLE / last)
                known.append(time_backward(way, calls) if backward else time_one(run, device, calls))
    return {name: statistics.median(values[min(WARM_UP, len(values) - 1) :]) for name, values in times.items()}


def memory_added(way: Contender, backward: bool, device: str) -> float:
    """Most MiB on the GPU beyond what was there before a call, its result included; NaN on a CPU."""
    if way.run is None or torch.device(device).type != "cuda":
        return math.nan
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = way.run()
    if backward:
        way.gradients(out, torch.ones_like(out))
    del out
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def dense(q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """Dense attention by torch, without a mask: by cuDNN where that can."""
    flops = 4.0 * q.shape[0] * q.shape[1] * q.shape[2] ** 2 * q.shape[3]
    if flops > DENSE_FLOPS:
        return Contender("dense", note=f"it would take {flops:.0e} operations")
    attend = torch.nn.functional.scaled_dot_product_attention
    if not _cudnn_can(q):
        return Contender("dense", lambda: attend(q, k, v), (q, k, v), "the backend that torch chooses")

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend(q, k, v)

    return Contender("dense", run, (q, k, v), "cuDNN")


def _cudnn_can(q: Tensor) -> bool:
    """Whether cuDNN takes tensors like this one, tried on a small part."""
    if q.device.type != "cuda":
        return False
    part = q[:1, :1, :256].contiguous()
    with contextlib.suppress(RuntimeError), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(part, part, part)
        return True
    return False


def routed(route: str, q: Tensor, k: Tensor, v: Tensor, mask: GNABlockMask, backward: bool) -> Contender:
    """One route of this package."""
    try:
        with backend(route):
            route_of(q, k, mask, needs_grad=backward, value=v)
    except RuntimeError as error:
        return Contender(route, note=str(error).splitlines()[-1].partition(": ")[2])
    return Contender(route, lambda: _routed(route, q, k, v, mask), (q, k, v))


def _routed(route: str, q: Tensor, k: Tensor, v: Tensor, mask: GNABlockMask) -> Tensor:
    with backend(route):
        return eager_attention(q, k, v, mask)[0]


def tiles_of(name: str, q: Tensor, mask: GNABlockMask) -> str:
    """Shapes of query and key tiles that a route computes with; empty where they are unknown."""
    if name == "flex":
        return f"{mask.plan.q_block} | {mask.plan.kv_block}"
    if name == "flex-tiles":
        order = mask.tiles.order
        return f"{by_x(order.tile)} | {by_x(order.tile)}"
    return _kernel_tiles(q, mask) if name in kernels.KERNELS else ""


def _kernel_tiles(q: Tensor, mask: GNABlockMask) -> str:
    from gna_flex.cuda import forward

    plan = forward.plan_for(mask.plan.gnas, q)
    return " | ".join(plan.tiles.sides(mask.plan.gnas[0].ndim))


def natten(q: Tensor, k: Tensor, v: Tensor, gna: GNA, backward: bool) -> Contender:
    """NATTEN's kernels for Hopper, on tensors in its own layout; in a forward with the fastest of its tile shapes."""
    obstacle = _natten_obstacle(gna, q)
    if obstacle:
        return Contender("natten", note=obstacle)
    inputs = tuple(x.transpose(1, 2).unflatten(1, gna.layout).contiguous() for x in (q, k, v))
    module: Any = importlib.import_module("natten")
    attend = functools.partial(
        getattr(module, f"na{gna.ndim}d"),
        *inputs,
        kernel_size=gna.window,
        stride=gna.stride,
        dilation=gna.dilation,
        is_causal=gna.causal,
        backend="hopper-fna",
    )
    choices = importlib.import_module("natten.backends").get_configs_for_cutlass_hopper_fna(*inputs)
    timed = [] if backward else [(_natten_time(attend, choice, q.device), choice) for choice in choices]
    best = min(timed, key=lambda entry: entry[0], default=(math.inf, None))
    if not choices or (timed and best[0] == math.inf):
        return Contender("natten", note="NATTEN's kernels for Hopper do not take this call")
    tiles = "" if best[1] is None else " | ".join(by_x(shape) for shape in best[1][0])
    note = f"NATTEN {module.__version__}, " + ("its own tiles" if backward else f"the best of {len(choices)} tiles")
    return Contender("natten", _natten_run(attend, best[1]), inputs, note, tiles, _from_natten)


def _natten_obstacle(gna: GNA, q: Tensor) -> str:
    """Why NATTEN is not measured; empty if it can be."""
    if importlib.util.find_spec("natten") is None:
        return "NATTEN is not installed"
    if q.device.type != "cuda" or not importlib.import_module("natten").HAS_LIBNATTEN:
        return "NATTEN's kernels are for CUDA, and need a build with them"
    if gna.text_first or gna.text_last:
        return "NATTEN has text tokens in another form"
    return "NATTEN takes windows of at least 2" if min(gna.window) < 2 else ""


def _natten_run(attend: Callable[..., Tensor], choice: Any) -> Callable[[], Tensor]:
    """The call with ``((query tile, key tile), schedule)``, or as NATTEN has it."""
    if choice is None:
        return attend
    (q_tile, kv_tile), schedule = choice
    return functools.partial(attend, q_tile_shape=q_tile, kv_tile_shape=kv_tile, kernel_schedule=schedule)


def _from_natten(out: Tensor) -> Tensor:
    """``[B, H, S, D]`` of ``[B, *layout, H, D]``."""
    return out.flatten(1, -3).transpose(1, 2)


def _natten_time(attend: Callable[..., Tensor], choice: Any, device: torch.device) -> float:
    """Milliseconds with a choice of tiles; infinite if NATTEN refuses it."""
    run = _natten_run(attend, choice)
    try:
        return min(time_one(run, str(device)) for _ in range(TUNING_REPEATS))
    except (ValueError, RuntimeError):
        return math.inf


def time_one(run: Callable[[], Any], device: str, calls: int = 1, settle: bool = True) -> float:
    """Milliseconds of one call, over several calls on a GPU.

    Without ``settle`` nothing runs before what is timed: for calls that last so long that it does not matter.
    """
    if torch.device(device).type != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    if settle:
        # Clocks and power settle to what this way of computing asks for, and launches run ahead of the GPU.
        for _ in range(calls):
            run()
    return _between_events(run, calls)


def time_backward(way: Contender, calls: int = 1) -> float:
    """Milliseconds of one backward on a GPU, over several, after as many that are not timed; each has its forward."""
    assert way.run is not None
    grad, times = torch.randn_like(way.run()), []
    for _ in range(2 * calls):
        out = way.run()
        times.append(_events(functools.partial(way.gradients, out, grad)))
    torch.cuda.synchronize()
    return sum(float(start.elapsed_time(stop)) for start, stop in times[calls:]) / calls


def _between_events(run: Callable[[], Any], calls: int) -> float:
    start, stop = _events(run, calls)
    stop.synchronize()
    return float(start.elapsed_time(stop)) / calls


def _events(run: Callable[[], Any], calls: int = 1) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events before and after the calls."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    return start, stop


def check_rows(name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: GNABlockMask, rows: int = 64) -> None:
    """Compares random queries of the first and the last head with the reference in float64.

    The budget is what rounding to the type may lose.
    """
    picked = torch.randint(q.shape[2], (rows,), device=q.device)
    for one in {(0, 0), (q.shape[0] - 1, q.shape[1] - 1)}:
        query, key, value = (x[one][None, None].double() for x in (q[:, :, picked], k, v))
        exact = reference_attention(query, key, value, lambda b, h, i, j: mask.mask_mod(b, h, picked[i], j))[0]
        error = (out[one][picked].double() - exact[0, 0]).abs().max().item()
        budget = 4 * torch.finfo(q.dtype).eps * v.abs().max().item()
        if not error <= budget:
            raise AssertionError(f"{name}: error {error:.2e} against the reference, budget {budget:.2e}")


def check_gradients(way: Contender, q: Tensor, k: Tensor, v: Tensor, mask: GNABlockMask, rows: int = 64) -> None:
    """Compares gradients of a way with float64, for a gradient of the output that is zero but at some random queries.

    So all gradients of keys and values come from these queries, in the first and the last head. The budget is twice
    what a plain run loses whose weights, their gradients and results are rounded to the type, and one rounding.
    """
    assert way.run is not None
    picked = torch.randint(q.shape[2], (rows,), device=q.device).unique()
    natural = way.to_natural(way.run())
    grad = torch.zeros_like(natural)
    some = {(0, 0), (q.shape[0] - 1, q.shape[1] - 1)}
    for one in some:
        grad[one][picked] = torch.randn(len(picked), q.shape[-1], dtype=q.dtype, device=q.device)
    found = [way.to_natural(x) for x in way.gradients(natural, grad)]
    idx = torch.arange(k.shape[2], device=q.device)
    for b, h in some:
        batch, head = torch.tensor(b, device=q.device), torch.tensor(h, device=q.device)
        keep = mask.mask_mod(batch, head, picked[:, None], idx)
        parts = q[b, h][picked], k[b, h], v[b, h], grad[b, h][picked]
        exact, plain = (gradients(*parts, keep, rounded) for rounded in (False, True))
        results = found[0][b, h][picked], found[1][b, h], found[2][b, h]
        for name, result, of_exact, of_plain in zip(("query", "key", "value"), results, exact, plain, strict=True):
            budget = 2 * (of_plain.double() - of_exact).abs().max() + torch.finfo(q.dtype).eps * of_exact.abs().max()
            error = (result.double() - of_exact).abs().max()
            if not error <= budget:
                raise AssertionError(f"{way.name}: gradient of {name}: error {error:.2e}, budget {budget:.2e}")


def gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, keep: Tensor, rounded: bool) -> tuple[Tensor, ...]:
    """Gradients of ``[S, D]`` query, key and value: in float64, or in float32 and rounded as a plain run in 16 bits."""
    dtype, work = q.dtype, torch.float32 if rounded else torch.float64

    def cut(x: Tensor) -> Tensor:
        return x.to(dtype).to(work) if rounded else x

    q, k, v, grad = (x.to(work) for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    weights = (q @ k.mT * scale).masked_fill(~keep, -torch.inf).softmax(-1)
    delta = ((weights @ v).to(dtype).to(work) * grad).sum(-1, keepdim=True)
    of_scores = cut(weights * (grad @ v.mT - delta) * scale)
    return cut(of_scores @ k), cut(of_scores.mT @ q), cut(cut(weights).mT @ grad)
