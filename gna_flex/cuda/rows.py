"""The small kernel before the backward: statistics of the queries."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from gna_flex.cuda import driver, jit
from gna_flex.cuda.forward import small
from gna_flex.torch_private import current_stream

THREADS = 256
"""Threads of a CTA."""
STATISTICS_ROWS = 16
"""Rows of which a CTA computes statistics."""

_Strides = ctypes.c_longlong * 3


class StatisticsParams(ctypes.Structure):
    """``Statistics`` of ``csrc/hopper/statistics.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "grad", "lse", "grad_lse", "to")),
        ("out_strides", _Strides),
        ("grad_strides", _Strides),
        *((name, ctypes.c_int) for name in ("rows", "heads", "tokens", "head_dim")),
        ("scale", ctypes.c_float),
    )


@functools.cache
def kernel(float16: bool) -> driver.Kernel:
    """``gna_statistics`` of ``csrc/hopper/statistics.cu``, for one type of 16 bits."""
    source = (jit.source_folder() / "hopper" / "statistics.cu").read_text(encoding="utf-8")
    code = jit.compile(
        source, arch="sm_90a", defines={"FLOAT16": int(float16)}, name="hopper_statistics.cu", include={}
    )
    return driver.Kernel(code.code, "gna_statistics", 0)


def statistics(out: Tensor, grad: Tensor, lse: Tensor, grad_lse: Tensor | None, scale: float) -> Tensor:
    """Log-sum-exp in base 2, and delta, of all queries: float32 ``[B, H, S, 2]``.

    Delta is ``scale * (sum(grad * out) - grad_lse)``. ``out`` and ``grad`` are ``[B, H, S, D]``, with columns side by
    side and rows at multiples of 16 bytes.
    """
    to = torch.empty(*lse.shape, 2, dtype=torch.float32, device=lse.device)
    lse, grad_lse = lse.contiguous(), grad_lse if grad_lse is None else grad_lse.contiguous()
    strides = [_Strides(*x.stride()[:3]) for x in (out, grad)]
    batch, heads, tokens, head_dim = out.shape
    pointers = (out.data_ptr(), grad.data_ptr(), lse.data_ptr(), grad_lse.data_ptr() if grad_lse is not None else None)
    rows = small("queries", batch * heads * tokens)
    params = StatisticsParams(*pointers, to.data_ptr(), *strides, rows, heads, tokens, head_dim, scale)
    grid, index = (-(-rows // STATISTICS_ROWS), 1, 1), out.device.index
    run = kernel(out.dtype == torch.float16)
    driver.launch(run, grid, (THREADS, 1, 1), 0, current_stream(index), driver.Arguments(params), index)
    return to
