"""The process that runs the problems, and may crash or hang: ``python -m gna_flex.selftest.worker ROUTE DEVICE``.

Every line that it writes for the process that started it is an event as JSON; see :mod:`gna_flex.selftest.supervisor`.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gna_flex import kernels
from gna_flex.attention import flex_attention
from gna_flex.cuda.blackwell import POLYNOMIAL_ERROR
from gna_flex.cuda.forward import Plan, plan, request_on
from gna_flex.kernels import FLOAT8, output_type
from gna_flex.mask import gna_mask
from gna_flex.neighborhood import GNA
from gna_flex.routing import FLOAT8_KERNELS, KERNEL_MAX_HEAD_DIM, backend
from gna_flex.selftest.identity import identity
from gna_flex.selftest.problems import PROBLEMS, Expected, Problem, compare, expected
from gna_flex.selftest.supervisor import MARK, end_with_supervisor

POLLS = 1 << 18
"""Polls after which a kernel that is compiled to give up traps: at least some milliseconds."""
SHIPPED, BOUNDED = "as shipped", "bounded waits"
REPEATS = 3
"""Calls whose results must be equal, bit by bit."""
LAST_RESORT = 900
"""Seconds after which the process ends itself, should nobody else do so."""

Result = tuple[Tensor, Tensor | None]
Call = Callable[[], Result]
"""A call of attention on the device: output, and log-sum-exp where the route has it."""


def main(route: str, device_name: str, timing: bool = False) -> None:
    """Runs the problems of a route, and says what comes out."""
    end_with_supervisor()
    if hasattr(signal, "alarm"):
        signal.alarm(LAST_RESORT)
    device = torch.device(device_name)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.zeros(1, device=device).add_(1).cpu()
        problems = problems_of(route)
        # Kernels that give up come first: one that waits for ever may take the GPU with it.
        variants = (BOUNDED, SHIPPED) if route in kernels.KERNELS else ("",)
        say("begin", identity=identity(route, device), steps=len(variants) * len(problems))
        if route in kernels.KERNELS:
            compile_ahead(problems, device)
        for variant, problem in itertools.product(variants, problems):
            check(route, problem, variant, device)
        if timing:
            for name, milliseconds, dense in timings(route, device):
                say("timing", name=name, milliseconds=milliseconds, dense=dense)
        say("end")
    except torch.OutOfMemoryError as error:
        say("unable", reason=f"too little memory: {first_line(error)}")


def say(event: str, **facts: Any) -> None:
    """One event, on standard output."""
    print(MARK + json.dumps({"event": event, **facts}), flush=True)


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def problems_of(route: str) -> list[Problem]:
    """The problems that a route is tried on: all for kernels, some of them where each call is compiled."""
    if route in kernels.KERNELS:
        known = [problem for problem in PROBLEMS if problem.head_dim <= KERNEL_MAX_HEAD_DIM[route]]
        return [problem for problem in known if problem.type != FLOAT8 or route in FLOAT8_KERNELS]
    return [p for p in PROBLEMS if p.small and (route == "reference" or p.head_dim >= 16)]


def compile_ahead(problems: list[Problem], device: torch.device) -> None:
    """Compiles what the problems need, several at a time; what fails is told of later, where it is used."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for future in [pool.submit(plans, problem, device.index or 0) for problem in problems]:
            future.exception()
            say("compiled")


@functools.cache
def plans(problem: Problem, device: int) -> tuple[Plan, Plan]:
    """The plan of a problem on a GPU, and one that differs only in that its kernel gives up waiting."""
    shipped = plan(request_on(device, problem.gnas, problem.head_dim, problem.type))
    config = replace(shipped.config, bounded_waits=POLLS)
    return shipped, Plan(replace(shipped.request, config=config, tiles=shipped.tiles))


def check(route: str, problem: Problem, variant: str, device: torch.device) -> None:
    """Runs one problem; whatever goes wrong is said."""
    say("start", variant=variant, problem=problem.name)
    begin = time.perf_counter()
    try:
        wanted = wanted_of(route, problem)
        call = call_of(route, problem, variant, device)
        results = [poisoned(problem, call, device) for _ in range(REPEATS)]
        found = compare(*results[0], wanted)
        same = all(equal(result, results[0]) for result in results)
        reason = "" if found.passed else "its result is wrong"
        reason = reason or ("" if same else "repeated calls differ")
        numbers = {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        numbers, reason = {}, f"{type(error).__name__}: {first_line(error)}"
    seconds = time.perf_counter() - begin
    say("result", variant=variant, problem=problem.name, reason=reason, seconds=round(seconds, 3), **numbers)
    if device.type == "cuda" and reason:
        torch.cuda.synchronize(device)  # after a trap this fails, and so would everything that follows


@functools.cache
def wanted_of(route: str, problem: Problem) -> Expected:
    """What a problem should give, as exactly as a route can be."""
    return expected(problem, route.startswith("flex"), POLYNOMIAL_ERROR if route == "blackwell" else 0.0)


def poisoned(problem: Problem, call: Call, device: torch.device) -> Result:
    """The result of a call that finds NaN in the memory which it is given."""
    sizes = (problem.batch, problem.heads, problem.gnas[0].tokens)
    dtype = output_type(problem.type)
    spoiled = [torch.full((*sizes, problem.head_dim), math.nan, device=device, dtype=dtype) for _ in range(2)]
    spoiled += [torch.full(sizes, math.nan, device=device, dtype=torch.float32) for _ in range(2)]
    del spoiled
    out, lse = call()
    return out.cpu(), None if lse is None else lse.cpu()


def equal(one: Result, other: Result) -> bool:
    """Whether two results are the same bits; NaN is equal to NaN here."""
    pairs = zip(one, other, strict=True)
    return all((x is None and y is None) or torch.equal(bits(x), bits(y)) for x, y in pairs if x is not y)


def bits(x: Tensor | None) -> Tensor:
    """The bytes of a tensor."""
    assert x is not None
    return x.contiguous().view(torch.uint8)


def call_of(route: str, problem: Problem, variant: str, device: torch.device) -> Call:
    """A problem as a call of a route."""
    query, key, value = (x.to(device) for x in problem.tensors())
    mask = problem.mask(device)
    if variant == BOUNDED:
        _, bounded = plans(problem, device.index or 0)
        valid = None if mask.valid_text is None else mask.valid_text.contiguous()
        return functools.partial(bounded.run, query, key, value, problem.factor, valid)
    has_lse = device.type != "cpu" or route == "reference"

    def call() -> Result:
        with backend(route):
            result = flex_attention(
                query, key, value, block_mask=mask, scale=problem.scale, enable_gqa=True, return_lse=has_lse
            )
        return result if has_lse else (result, None)

    return call


# A few times, beside dense attention


def timings(route: str, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """What is measured, milliseconds of the route, and milliseconds of torch's dense attention on the same tensors."""
    side, heads = (128, 8) if device.type == "cuda" else (24, 2)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, heads, side * side, 128, device=device, dtype=dtype) for _ in range(3))
    dense = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    for gna in (GNA((side, side), -1), GNA((side, side), side // 4), GNA((side, side), side // 4, side // 8)):
        with backend(route):
            call = functools.partial(flex_attention, q, k, v, block_mask=gna_mask(gna, device=device))
            mine, others = in_turns((call, dense), device)
        yield f"{gna}, {heads} heads of 128", mine, others


def in_turns(calls: tuple[Callable[[], object], ...], device: torch.device, rounds: int = 7) -> list[float]:
    """Median milliseconds of each call, one after the other, after one that is not timed."""
    times: list[list[float]] = [[] for _ in calls]
    for number, (place, call) in itertools.product(range(rounds + 1), enumerate(calls)):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            times[place].append(1e3 * (time.perf_counter() - begin))
    return [round(statistics.median(values), 4) for values in times]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--timing" in sys.argv[3:])
