"""``flex_attention``: the front door, with torch's signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from gna_flex import ops as ops
from gna_flex.direct import recall
from gna_flex.flex import autocast, eager_attention, reference, route_of, wants_grad
from gna_flex.kernels import FLOAT8
from gna_flex.mask import GNABlockMask
from gna_flex.reference import ScoreMod
from gna_flex.routing import Route


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """Attention, with the signature of ``torch.nn.attention.flex_attention.flex_attention``.

    With a mask from :func:`gna_flex.gna_mask` the call takes the fastest route that fits (see
    :func:`gna_flex.explain`), in eager and compiled code, forward and backward, on GPU and CPU. Any other call is
    torch's own.

    Args:
        query: ``[B, H, S, D]``; tokens in the order of the mask (natural row-major order by default).
        key: ``[B, Hkv, S, D]``, ``H`` a multiple of ``Hkv`` if ``enable_gqa``, else equal to it.
        value: ``[B, Hkv, S, Dv]``.
        score_mod: changes scores as in torch; indices are those of the tokens as given.
        block_mask: a GNA mask, any other BlockMask, or None.
        scale: factor of the scores, ``D ** -0.5`` by default; 0.0 means 0.0.
        enable_gqa: allow grouped heads.
        return_lse: also return the log-sum-exp of the scores ``[B, H, S]`` (natural logarithm).
        kernel_options: as in torch. A ``BACKEND`` other than AUTO keeps the tokens as given.
        return_aux: ``AuxRequest(lse=..., max_scores=...)``; also return these.

    Returns:
        ``[B, H, S, Dv]`` in the type of ``query``; with statistics a pair, as in torch.

    Query, key and value may all be float8_e4m3fn, without gradients: the output is bfloat16. ``scale`` then also
    undoes the scaling of query and key; that of the value is left to the caller.

    Raises:
        ValueError: if shapes, types, devices or heads do not fit each other or the mask, or a gradient of
            float8_e4m3fn is wanted.

    >>> from gna_flex import GNA, gna_mask
    >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    >>> flex_attention(q, k, v, block_mask=gna_mask(GNA((8, 8), window=3), device="cpu")).shape
    torch.Size([1, 2, 64, 16])
    >>> q8, k8, v8 = (x.mul(4).to(torch.float8_e4m3fn) for x in (q, k, v))
    >>> mask = gna_mask(GNA((8, 8), window=3), device="cpu")
    >>> (flex_attention(q8, k8, v8, block_mask=mask, scale=16**-0.5 / (4 * 4)) / 4).dtype
    torch.bfloat16
    """
    mask = block_mask if isinstance(block_mask, GNABlockMask) else None
    compiling = torch.compiler.is_compiling()
    plain = score_mod is None and kernel_options is None and return_aux is None and not compiling
    if plain and mask is not None and mask.launchers and not wants_grad(query, key, value):
        known = recall(mask, (query, key, value), scale, enable_gqa)
        if known is not None:
            return known if return_lse else known[0]
    if mask is not None:
        _check(query, key, value, mask, enable_gqa, return_lse, return_aux)
    aux: AuxRequest = return_aux or AuxRequest(lse=return_lse)
    if mask is None or (
        compiling and _compiled_route(query, key, value, mask, aux, kernel_options, score_mod, scale) != "reference"
    ):
        # In a graph a GNA mask takes the call over again, inside torch's operator.
        return torch_flex_attention(
            query,
            key,
            value,
            score_mod,
            block_mask,
            scale,
            enable_gqa,
            return_lse,
            kernel_options,
            return_aux=return_aux,  # type: ignore[arg-type]
        )
    lse: Tensor | None
    top: Tensor | None
    if compiling:
        out, lse, top = reference(*autocast(query, key, value), mask, score_mod, scale)
    else:
        out, lse, top = eager_attention(
            query,
            key,
            value,
            mask,
            score_mod=score_mod,
            scale=scale,
            enable_gqa=enable_gqa,
            lse=aux.lse,
            top=aux.max_scores,
            kernel_options=kernel_options,
        )
    if return_aux is not None:
        return out, AuxOutput(lse=lse if aux.lse else None, max_scores=top if aux.max_scores else None)
    return (out, lse) if return_lse else out


def explain(query: Tensor, key: Tensor, value: Tensor, block_mask: GNABlockMask, **options: Any) -> Route:
    """The route that an eager ``flex_attention(query, key, value, block_mask=block_mask, **options)`` takes, and why.

    >>> from gna_flex import GNA, gna_mask
    >>> q = torch.randn(1, 2, 64, 16)
    >>> explain(q, q, q, gna_mask(GNA((8, 8), window=3), device="cpu")).name
    'reference'
    """
    query, key, value = autocast(query, key, value)
    aux = options.get("return_aux") or AuxRequest(lse=options.get("return_lse", False))
    return route_of(
        query,
        key,
        block_mask,
        needs_grad=wants_grad(query, key, value),
        wants_stats=aux.lse or aux.max_scores,
        kernel_options=options.get("kernel_options"),
        value=value,
        score_mod=options.get("score_mod"),
        wants_maximum=aux.max_scores,
        scale=options.get("scale"),
    )


def _compiled_route(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: GNABlockMask,
    aux: AuxRequest,
    kernel_options: Any,
    score_mod: ScoreMod | None,
    scale: float | None,
) -> str:
    """The route of a call inside a graph."""
    return route_of(
        *autocast(query, key, value)[:2],
        mask,
        needs_grad=wants_grad(query, key, value),
        wants_stats=aux.lse or aux.max_scores,
        kernel_options=kernel_options,
        compiling=True,
        value=value,
        score_mod=score_mod,
        wants_maximum=aux.max_scores,
        scale=scale,
    ).name


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: GNABlockMask,
    enable_gqa: bool,
    return_lse: bool,
    return_aux: AuxRequest | None,
) -> None:
    """Refuses what no route can be right about."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(f"query, key and value must be [batch, heads, tokens, head dim], but got {shapes}")
    if query.dtype != key.dtype or query.dtype != value.dtype or not query.dtype.is_floating_point:
        raise ValueError(
            "query, key and value must share one floating-point type, "
            f"but got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if query.dtype.itemsize == 1 and query.dtype != FLOAT8:
        raise ValueError(f"of types with 8 bits only {FLOAT8} is possible, not {query.dtype}")
    if query.dtype == FLOAT8 and wants_grad(query, key, value):
        raise ValueError(f"{FLOAT8} has no gradient: call it under torch.no_grad(), or in bfloat16")
    if query.device != key.device or query.device != value.device or query.device != mask.device:
        raise ValueError(
            f"query, key, value and block_mask must be on one device, but are on {query.device}, {key.device}, "
            f"{value.device} and {mask.device} (block_mask.to(device) moves the mask)"
        )
    q_len, kv_len = mask.seq_lengths
    if query.shape[2] != q_len or key.shape[2] != kv_len or value.shape[2] != kv_len:
        raise ValueError(
            f"the mask has {q_len} queries and {kv_len} keys ({mask.plan.gnas[0]}), but got {shapes} "
            "as [batch, heads, tokens, head dim]"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same head dim, but got {shapes}")
    if key.shape[:2] != value.shape[:2] or query.shape[0] != key.shape[0]:
        raise ValueError(f"batch sizes, and heads of key and value, must be equal, but got {shapes}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        raise ValueError(
            f"query has {heads} heads and key {kv_heads}: grouped heads need enable_gqa=True and a multiple"
        )
    for name, size, wanted in (
        ("batch", query.shape[0], mask.plan.batch),
        ("heads", heads, mask.kv_num_blocks.shape[1]),
    ):
        if wanted not in (None, 1, size):
            raise ValueError(f"the mask was made for {wanted} {name}, but query has {size}")
    mask.check_batch(query.shape[0])
    if return_lse and return_aux is not None:
        raise ValueError("give return_lse or return_aux, not both")
