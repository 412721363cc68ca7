"""Plain attention under a mask: every other route is tested against this file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gna_flex.mask_mod import MaskMod

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

CHUNK = 1 << 26
"""Scores held at a time per batch entry: queries come in chunks."""


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_mod: MaskMod,
    *,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of ``[B, H, S, D]`` queries to ``[B, Hkv, Skv, D]`` keys where ``mask_mod`` holds.

    Grouped heads: ``H`` is a multiple of ``Hkv``. Half precision computes in float32. A query that sees no key gives 0.

    Returns:
        Output ``[B, H, S, Dv]`` in the type of ``query``; log-sum-exp and maximum of its scores ``[B, H, S]``, natural
        logarithm, float32 (float64 for float64), ``-inf`` for a query that sees no key.
    """
    with torch.autocast(query.device.type, enabled=False):
        return _attention(query, key, value, mask_mod, score_mod, scale)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask_mod: MaskMod, score_mod: ScoreMod | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _per_query_head(query, key, value)
    parts = []
    for _, scores in _masked_scores(query, keys, mask_mod, score_mod, scale):
        empty = scores.isneginf().all(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0)
        lse, top = scores.logsumexp(-1, keepdim=True), scores.amax(-1, keepdim=True)
        out = ((scores - lse).exp() @ values).masked_fill(empty, 0).to(query.dtype)
        parts.append((out, *(x.masked_fill(empty, -math.inf).squeeze(-1) for x in (lse, top))))
    out, lse, top = (torch.cat(pieces, 2) for pieces in zip(*parts, strict=True))
    return out, lse, top


def reference_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    mask_mod: MaskMod,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of :func:`reference_attention`, from its results and their gradients.

    Weights come from the log-sum-exp, as in the kernels. Gradients are float32 (float64 for float64).
    """
    keys, values = _per_query_head(query, key, value)
    out, lse, grad_out, grad_lse = (x.to(keys.dtype) for x in (out, lse, grad_out, grad_lse))
    delta = ((grad_out * out).sum(-1) - grad_lse)[..., None]
    finite = lse.masked_fill(lse.isneginf(), 0)  # a query that sees no key has no weights
    grad_query, grad_keys, grad_values = [], torch.zeros_like(keys), torch.zeros_like(values)
    for rows, scores in _masked_scores(query, keys, mask_mod, None, scale):
        weights = (scores - finite[:, :, rows, None]).exp()
        grad_scores = weights * (grad_out[:, :, rows] @ values.mT - delta[:, :, rows]) * scale
        grad_query.append(grad_scores @ keys)
        grad_keys += grad_scores.mT @ query[:, :, rows].to(keys.dtype)
        grad_values += weights.mT @ grad_out[:, :, rows]
    of_groups = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (grad_keys, grad_values))
    return torch.cat(grad_query, 2), *of_groups


def _per_query_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of every query head, in the type that scores are computed in."""
    work, groups = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    return key.to(work).repeat_interleave(groups, 1), value.to(work).repeat_interleave(groups, 1)


def _masked_scores(
    query: Tensor, keys: Tensor, mask_mod: MaskMod, score_mod: ScoreMod | None, scale: float | None
) -> Iterator[tuple[slice, Tensor]]:
    """Scores ``[B, H, rows, Skv]`` of some queries after others, minus infinity where the mask does not hold."""
    batch, heads, q_len, dim = query.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    device = query.device
    b, h = torch.arange(batch, device=device)[:, None, None, None], torch.arange(heads, device=device)[:, None, None]
    k = torch.arange(keys.shape[2], device=device)
    rows = max(1, CHUNK // (heads * keys.shape[2]))
    for start in range(0, q_len, rows):
        chosen = slice(start, min(start + rows, q_len))
        q = torch.arange(start, chosen.stop, device=device)
        scores = (query[:, :, chosen].to(keys.dtype) * scale) @ keys.transpose(-2, -1)
        if score_mod is not None:
            scores = _vectorised(score_mod)(scores, b.flatten(), h.flatten(), q, k).to(keys.dtype)
        yield chosen, scores.masked_fill(~mask_mod(b, h, q[:, None], k), -math.inf)


def _vectorised(score_mod: ScoreMod) -> ScoreMod:
    """A score_mod over scalars, applied to scores ``[B, H, Q, K]`` with one index vector per dimension."""
    for axes in [
        (0, None, None, None, 0),
        (0, None, None, 0, None),
        (0, None, 0, None, None),
        (0, 0, None, None, None),
    ]:
        score_mod = torch.vmap(score_mod, in_dims=axes)
    return score_mod
