"""Our backward kernel in the interpreter: all passes, launched by the package's own host code, but for the driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gna_flex import GNA
from gna_flex.cuda import backward
from gna_flex.cuda.backward import BackwardConfig, Pass
from gna_flex.cuda.sums import Ring, Sums
from gna_flex.cuda.tables import KernelTiles, Transposed
from ptx.launch import HostPlan, kernel, launch, ptx
from ptx.machine import Machine
from ptx.parse import parse


class HostPass(HostPlan, Pass):
    """A pass whose tables are in CPU memory, and whose kernel is not compiled for a GPU."""


def run(
    gnas: Sequence[GNA],
    tensors: Sequence[Tensor],
    statistics: Tensor,
    config: BackwardConfig,
    tiles: KernelTiles,
    seed: int = 0,
    *,
    blocks: int = 1,
    scale: float,
    text_valid: Tensor | None = None,
    ring: Ring | None = None,
    change: Callable[[str], str] | None = None,
    **rules: Any,
) -> tuple[Tensor, ...]:
    """Results of one pass, given ``rows1, rows2, inner1, inner2``: of queries, of keys and values, or of all three.

    ``ring``: how a fused pass keeps sums. ``change`` edits the PTX before; ``rules`` are options of the machine.

    Raises:
        PtxError: a fault of the kernel.
        AssertionError: its counters are not zero afterwards, as the next launch needs them.
    """
    rows = tensors[0]
    gnas = tuple(Transposed.of(gna) for gna in gnas) if config.rows_are_keys else tuple(gnas)
    plan = HostPass(gnas, config, tiles, rows.shape[-1], rows.dtype == torch.float16)
    first = torch.full_like(rows, torch.nan)
    second = torch.full_like(rows, torch.nan)
    results = (first, second) if config.rows_are_keys else (first,)
    arrays = dict(zip(backward.OPERANDS, tensors, strict=True)) | {"statistics": statistics}
    arrays |= {f"result {i}": result for i, result in enumerate(results)}
    sums = None
    if plan.config.fused:
        of_queries = torch.full_like(tensors[2], torch.nan)
        ring = ring or plan.ring(of_queries, rows)
        sums = Sums.zeros(ring, of_queries, plan.config.head_dim, plan.params.items_per_head)
        meetings = zip(("of slices", "of counters"), plan.meetings(ring.slice_rows)[1], strict=True)
        arrays |= {"sums": sums.sums, "of queries": of_queries, **dict(meetings)}
    launch(
        plan,
        lambda counters: plan.pass_arguments(tensors, results, statistics, counters, scale, text_valid, sums),
        arrays,
        Machine(parse(change(ptx(plan.config))) if change else kernel(plan.config), seed, **rules),
        blocks=blocks,
        text_valid=text_valid,
    )
    return results if sums is None else (of_queries, *results)
