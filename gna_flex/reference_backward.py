"""The backward of plain attention, from its output and log-sum-exp as kernels have it."""

from __future__ import annotations

import torch
from torch import Tensor

from gna_flex.mask_mod import MaskMod
from gna_flex.reference import CHUNK


def reference_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    mask_mod: MaskMod,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of :func:`gna_flex.reference_attention`, from its results and their gradients.

    Shapes are those of the forward; gradients are float32 (float64 for float64). Without ``grad_lse`` nothing depends
    on the log-sum-exp.
    """
    work, groups = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    keys, values = (x.to(work).repeat_interleave(groups, 1) for x in (key, value))
    queries, out, lse, grad_out = (x.to(work) for x in (query, out, lse, grad_out))
    delta = (grad_out * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(work)
    device, (batch, heads, q_len, _), kv_len = query.device, query.shape, key.shape[2]
    b, h = torch.arange(batch, device=device)[:, None, None, None], torch.arange(heads, device=device)[:, None, None]
    grad_queries, grad_keys, grad_values = [], torch.zeros_like(keys), torch.zeros_like(values)
    for rows in torch.arange(q_len, device=device).split(max(1, CHUNK // (heads * kv_len))):
        keep = mask_mod(b, h, rows[:, None], torch.arange(kv_len, device=device))
        scores = queries[:, :, rows] @ keys.mT * scale
        # Hidden scores may exceed the log-sum-exp of the others, which is minus infinity if there are none.
        weights = (scores - lse[:, :, rows, None]).masked_fill(~keep, -torch.inf).exp()
        grad_scores = weights * (grad_out[:, :, rows] @ values.mT - delta[:, :, rows, None]) * scale
        grad_queries.append(grad_scores @ keys)
        grad_keys += grad_scores.mT @ queries[:, :, rows]
        grad_values += weights.mT @ grad_out[:, :, rows]
    of_groups = (x.unflatten(1, (key.shape[1], groups)).sum(2) for x in (grad_keys, grad_values))
    return torch.cat(grad_queries, 2), *of_groups
