"""Masks that are made where they are asked for, and kept: the last ones of eager calls, those of compiled functions."""

from __future__ import annotations

import functools
import operator
import types
from typing import Any

import torch

from gna_flex.kernels import lasting
from gna_flex.mask import DEFAULT_BLOCK, GNABlockMask
from gna_flex.neighborhood import GNA
from gna_flex.plan import MaskPlan

MASKS_KEPT = 64
"""Masks of eager calls that are kept for the next call, the least recently used dropped."""

masks_of_graphs = types.SimpleNamespace()
"""Masks that compiled functions use, each under the name from :func:`keep_for_graphs`."""


@functools.lru_cache(maxsize=MASKS_KEPT)
def kept_mask(gna: GNA, device: torch.device) -> GNABlockMask:
    """``gna_mask`` of a GNA, which must not be called while torch compiles.

    In a thread of its own tensors are neither those of inference mode nor of a CUDA graph, in which the first call may
    be, but which the next need not.
    """
    plan = MaskPlan((gna,), None, None, DEFAULT_BLOCK, DEFAULT_BLOCK)
    return lasting(lambda: GNABlockMask(plan, device))


@functools.cache
def keep_for_graphs(gna: GNA, device: torch.device) -> str:
    """Keeps a mask as long as the process lives, as compiled functions may; where they find it.

    A graph takes the name as a constant from a function that is decorated with
    ``torch.compiler.assume_constant_result``, and then the mask from :data:`masks_of_graphs`.
    """
    mask = kept_mask(gna, device)
    setattr(masks_of_graphs, mask.handle, mask)
    return mask.handle


def fixed(value: Any) -> Any:
    """Numbers for good: a graph with dynamic sizes has symbols for them, but the mask depends on their values."""
    if isinstance(value, tuple | list):
        return tuple([fixed(x) for x in value])
    return operator.index(value) if isinstance(value, int) and not isinstance(value, bool) else value
