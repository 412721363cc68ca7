"""Repeated eager calls: straight to the kernel, past checks, routing and the dispatcher, a third of the overhead.

A call that went the whole way once is remembered under everything that the way there depends on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gna_flex import kernels
from gna_flex.routing import forced
from gna_flex.torch_private import undisturbed

if TYPE_CHECKING:
    from gna_flex.cuda.forward import Launcher
    from gna_flex.mask import GNABlockMask

Inputs = tuple[Tensor, Tensor, Tensor]
REMEMBERED = 64
"""Kinds of calls that a mask remembers; with more it starts anew."""


def recall(mask: GNABlockMask, inputs: Inputs, scale: float | None, enable_gqa: bool) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp of a call like one that :func:`remember` was told of; ``None`` if there was none.

    The caller sees to it that no gradient is wanted.
    """
    launcher: Launcher | None = mask.launchers.get(_signature(inputs, scale, enable_gqa))
    if launcher is None or not undisturbed(*inputs):
        return None
    try:
        return launcher(*inputs, inputs[0].shape[-1] ** -0.5 if scale is None else scale, mask.valid_text)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # The whole way knows what to do: report it, or take another route.
        mask.launchers.clear()
        return None


def remember(mask: GNABlockMask, inputs: Inputs, scale: float | None, enable_gqa: bool) -> None:
    """Notes that a CUDA kernel took a call without gradients."""
    if not undisturbed(*inputs):
        return
    from gna_flex.cuda.forward import plan_for

    if len(mask.launchers) >= REMEMBERED:
        mask.launchers.clear()
    mask.launchers[_signature(inputs, scale, enable_gqa)] = plan_for(mask.plan.gnas, inputs[0]).launcher(*inputs)


def _signature(inputs: Inputs, scale: float | None, enable_gqa: bool) -> tuple[Any, ...]:
    """Everything that checks and routing of a call look at, but for gradients and what is no plain tensor."""
    q, k, v = inputs
    return (
        *(q.shape, q.stride(), q.dtype, q.device),
        *(k.shape, k.stride(), k.dtype, k.device),
        *(v.shape, v.stride(), v.dtype, v.device),
        *(scale, enable_gqa, forced(), kernels.generation()),
    )
