"""Plain attention under a mask: every other route is tested against this file."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gna_flex.kernels import output_type
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

    Grouped heads: ``H`` is a multiple of ``Hkv``. Fewer bits than 32 compute in float32. A query without keys gives 0.

    Returns:
        Output ``[B, H, S, Dv]`` of :func:`output_type`; log-sum-exp and maximum of its scores ``[B, H, S]``, natural
        logarithm, float32 (float64 for float64), ``-inf`` for a query that sees no key.
    """
    with torch.autocast(query.device.type, enabled=False):
        return _attention(query, key, value, mask_mod, score_mod, scale)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask_mod: MaskMod, score_mod: ScoreMod | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    work = torch.promote_types(output_type(query.dtype), torch.float32)
    batch, heads, q_len, dim = query.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    groups = heads // key.shape[1]
    keys, values = (x.to(work).repeat_interleave(groups, 1) for x in (key, value))
    device = query.device
    b, h = torch.arange(batch, device=device)[:, None, None, None], torch.arange(heads, device=device)[:, None, None]
    k = torch.arange(keys.shape[2], device=device)
    rows = max(1, CHUNK // (heads * keys.shape[2]))
    parts = []
    for start in range(0, q_len, rows):
        q = torch.arange(start, min(start + rows, q_len), device=device)
        scores = (query[:, :, start : start + rows].to(work) * scale) @ keys.transpose(-2, -1)
        if score_mod is not None:
            scores = _vectorised(score_mod)(scores, b.flatten(), h.flatten(), q, k).to(work)
        keep = mask_mod(b, h, q[:, None], k)
        empty = ~keep.any(-1, keepdim=True)
        scores = scores.masked_fill(~keep, -math.inf).masked_fill(empty, 0)
        lse, top = scores.logsumexp(-1, keepdim=True), scores.amax(-1, keepdim=True)
        out = ((scores - lse).exp() @ values).masked_fill(empty, 0).to(output_type(query.dtype))
        parts.append((out, *(x.masked_fill(empty, -math.inf).squeeze(-1) for x in (lse, top))))
    out, lse, top = (torch.cat(pieces, 2) for pieces in zip(*parts, strict=True))
    return out, lse, top


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
