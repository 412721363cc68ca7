"""Which CUDA kernels there are, whether they can be compiled and launched here, and what outlives a call."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from gna_flex.torch_private import constant_result

log = logging.getLogger("gna_flex")

T = TypeVar("T")

KERNELS = ("hopper", "blackwell")
"""Routes that are kernels of ours."""
UNTRIED = ("blackwell",)
"""Kernels that we could run on no GPU: calls take them only where their self-test passed on the machine."""
FLOAT8 = torch.float8_e4m3fn
"""The type of 8 bits that inputs may have. It has no arithmetic: all is computed in float32."""

_failure: str = ""
_package: str | None = None
_generation: int = 0


def output_type(dtype: torch.dtype) -> torch.dtype:
    """The type of the output for inputs of a type: the same, but bfloat16 for float8_e4m3fn."""
    return torch.bfloat16 if dtype == FLOAT8 else dtype


def kernel_for(capability: tuple[int, int] | None) -> str:
    """The kernel, and the route, for GPUs of a compute capability; empty if there is none.

    >>> kernel_for((9, 0)), kernel_for((10, 3)), kernel_for((12, 0))
    ('hopper', 'blackwell', '')
    """
    if capability is None:
        return ""
    return "hopper" if capability == (9, 0) else "blackwell" if capability[0] == 10 else ""


@constant_result
def untested(kernel: str, device: int) -> str:
    """Why a kernel of :data:`UNTRIED` is not used on a GPU; empty if its self-test passed. Runs it where that is open.

    While a function is compiled this runs, too, and its answer becomes a part of the graph.
    """
    from gna_flex.selftest.verdict import obstacle

    return obstacle(kernel, device)


def missing() -> str:
    """Why no kernel can be compiled or launched in this process; empty if nothing is known against it.

    Two global values, so that compiled functions can ask as well, once a mask has been made.
    """
    global _package
    if _package is None:
        _package = _missing_package()
    return _failure or _package


def generation() -> int:
    """A number that changes whenever calls may have to take another kernel, or another route, than before."""
    return _generation


def changed() -> None:
    """Has every call look for its kernel anew."""
    global _generation
    _generation += 1


def give_up(error: Exception) -> None:
    """Remembers that a kernel failed to build or launch, and says so once: calls take another route from now on."""
    global _failure
    if not _failure:
        log.warning("a CUDA kernel failed, and calls take another route from now on: %s", error)
    changed()
    _failure = f"a kernel failed before: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def try_again() -> None:
    """Forgets a failure."""
    global _failure
    _failure = ""
    changed()


def lasting(make: Callable[[], T]) -> T:
    """What ``make`` returns, made in a thread of its own, so that its tensors may outlive the call.

    While a thread warms up or records a CUDA graph (``torch.compile(mode="reduce-overhead")``) torch takes all memory
    that this thread asks for from the graph's own, which later graphs overwrite.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _missing_package() -> str:
    # find_spec imports the parent package, which must not be there either.
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "compiling it needs cuda-bindings and nvidia-cuda-nvrtc: pip install gna-flex[cuda]"
    return ""
