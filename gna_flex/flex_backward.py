"""FlexAttention's backward by itself: gradients from the output and log-sum-exp of any forward.

torch runs it only after its own forward. Here the backward operator is traced and compiled once for each mask and each
set of sizes, on the token order that is predicted to be faster.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gna_flex.kernels import lasting
from gna_flex.mask import GNABlockMask, gna_mask
from gna_flex.neighborhood import GNA
from gna_flex.plan import MaskPlan
from gna_flex.torch_private import compile_graph, flex_attention_backward_hop, trace_graph

Compiled = Callable[..., Sequence[Tensor]]
OPTIONS = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}
"""What torch's front end hands to the operator."""

_lock = threading.Lock()


def flex_backward(
    gnas: tuple[GNA, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    text_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query ``[B, H, S, D]``, key and value ``[B, Hkv, S, D]``.

    ``lse`` is the log-sum-exp ``[B, H, S]`` (natural logarithm), and ``grad_lse`` its gradient, if it has one; ``gnas``
    is one GNA, or one per query head; ``text_valid`` are the lengths of text ``[B, 2]`` that the forward had.
    """
    plan, parts, permute, unpermute = _order(gnas, query.device, text_valid)
    # The operator has the log-sum-exp in base 2.
    wide = [permute(x, -2) for x in (query, key, value, out, grad_out)]
    grad_base2 = torch.zeros_like(lse) if grad_lse is None else grad_lse * math.log(2)
    stats = [permute(x, -1).contiguous() for x in (lse * math.log2(math.e), grad_base2)]
    query_, key_, value_, out_, grad_ = (x.contiguous() for x in wide)
    lengths = [] if text_valid is None else [text_valid.contiguous()]
    arguments = (query_, key_, value_, out_, stats[0], grad_, stats[1], *lengths)
    signature = tuple((x.shape, x.dtype) for x in arguments)
    with _lock:
        function = _compiled(plan, query.device, signature, scale)(arguments, parts)
    tables = [x for x in parts if isinstance(x, Tensor)]
    grads = function(*arguments, *tables)
    dq, dk, dv = (unpermute(x, -2) for x in grads)
    return dq, dk, dv


@functools.lru_cache(maxsize=64)
def _mask(gnas: tuple[GNA, ...], device: torch.device, lengths: bool) -> GNABlockMask:
    """The mask; with ``lengths`` those of its text can be given without building tables."""

    def build() -> GNABlockMask:
        mask = gna_mask(gnas if len(gnas) > 1 else gnas[0], device=device)
        if lengths:
            mask.counting(torch.zeros(1, 2, dtype=torch.int32, device=device))
        return mask

    return lasting(build)


def _order(
    gnas: tuple[GNA, ...], device: torch.device, text_valid: Tensor | None
) -> tuple[MaskPlan, tuple[Any, ...], Any, Any]:
    """The plan in the better order; its block mask as the operator takes it; permutations to and from that order."""
    mask = _mask(gnas, device, text_valid is not None)
    if text_valid is not None:
        mask = mask.counting(text_valid)
    if mask.tiles_pay():
        tiles = mask.tiles
        return mask.plan.in_tiles()[1], tiles.parts, tiles.permute, tiles.unpermute
    return mask.plan, tuple(mask.plain.as_tuple()), _same, _same


def _same(x: Tensor, dim: int) -> Tensor:
    return x


@functools.lru_cache(maxsize=256)
def _compiled(plan: MaskPlan, device: torch.device, signature: Any, scale: float) -> Callable[..., Compiled]:
    """A function that compiles the backward at its first call, from then on returning what it compiled."""
    found: list[Compiled] = []

    def get(arguments: Sequence[Tensor], parts: tuple[Any, ...]) -> Compiled:
        if not found:
            found.append(_compile(plan, arguments, parts, scale))
        return found[0]

    return get


def _compile(plan: MaskPlan, arguments: Sequence[Tensor], parts: tuple[Any, ...], scale: float) -> Compiled:
    places = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, *lengths: Tensor) -> Tensor:
        return plan.mask_mod(*lengths)(b, h, q_idx, kv_idx)

    def backward(*inputs: Tensor) -> tuple[Tensor, ...]:
        query, key, value, out, lse, grad_out, grad_lse, *lengths = inputs[: len(arguments)]
        block_mask = [*parts[:-1], mask_mod]
        for place, table in zip(places, inputs[len(arguments) :], strict=True):
            block_mask[place] = table
        call = (query, key, value, out, lse, grad_out, grad_lse, _score, _score_gradient, tuple(block_mask))
        # What a mask_mod captures has to be an input, or this batch's lengths would be those of all.
        return tuple(flex_attention_backward_hop(*call, scale, OPTIONS, (), tuple(lengths))[:3])

    inputs = [*arguments, *(parts[place] for place in places)]
    function: Compiled = compile_graph(trace_graph(backward)(*inputs), inputs)
    return function


def _score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score


def _score_gradient(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, grad: Tensor) -> list[Any]:
    """Gradients of the score and, none, of the four indices; a list, as torch's lowering wants it."""
    return [grad, None, None, None, None]
