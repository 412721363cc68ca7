"""NATTEN's operations and modules on top of gna_flex: a program for NATTEN 0.21 changes one import."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gna_flex.attention import flex_attention
from gna_flex.kept import fixed, keep_for_graphs, kept_mask, masks_of_graphs
from gna_flex.mask import GNABlockMask
from gna_flex.neighborhood import GNA, Bools, Ints, as_int
from gna_flex.torch_private import constant_result

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D", "na1d", "na2d", "na3d"]

log = logging.getLogger("gna_flex")

TUNING = {
    "attention_kwargs": None,
    "backend": None,
    "q_tile_shape": None,
    "kv_tile_shape": None,
    "backward_q_tile_shape": None,
    "backward_kv_tile_shape": None,
    "backward_kv_splits": None,
    "backward_use_pt_reduction": False,
    "run_persistent_kernel": True,
    "kernel_schedule": None,
    "torch_compile": False,
}
"""Arguments about NATTEN's own kernels, with their defaults. They are accepted and have no effect."""
UNTUNED = tuple(TUNING.values())


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Ints | None = None,
    kv_tile_shape: Ints | None = None,
    backward_q_tile_shape: Ints | None = None,
    backward_kv_tile_shape: Ints | None = None,
    backward_kv_splits: Ints | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Neighborhood attention on sequences: :func:`na2d` of tensors ``[B, X, H, D]``.

    >>> q = torch.randn(1, 64, 4, 16)
    >>> na1d(q, q, q, kernel_size=9, dilation=2, is_causal=True).shape
    torch.Size([1, 64, 4, 16])
    """
    return _attend(
        1,
        (query, key, value),
        (kernel_size, stride, dilation, is_causal),
        scale,
        (additional_keys, additional_values),
        (
            attention_kwargs,
            backend,
            q_tile_shape,
            kv_tile_shape,
            backward_q_tile_shape,
            backward_kv_tile_shape,
            backward_kv_splits,
            backward_use_pt_reduction,
            run_persistent_kernel,
            kernel_schedule,
            torch_compile,
        ),
        return_lse,
    )


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Ints | None = None,
    kv_tile_shape: Ints | None = None,
    backward_q_tile_shape: Ints | None = None,
    backward_kv_tile_shape: Ints | None = None,
    backward_kv_splits: Ints | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Neighborhood attention on images, with the arguments of NATTEN's operation of this name.

    A mask is made at the first call with its sizes; the last 64 are kept. Compiled functions make theirs while they are
    compiled, without a graph break; each layout, and each number of additional keys, compiles anew.

    Args:
        query: ``[B, X, Y, H, D]``, contiguous or not.
        key: ``[B, X, Y, Hkv, D]``, ``H`` a multiple of ``Hkv``.
        value: ``[B, X, Y, Hkv, Dv]``.
        kernel_size: the window of :class:`gna_flex.GNA`; 1, and -1 for a whole dimension, are allowed.
        stride: queries that share a window, as in ``GNA``.
        dilation: step between the keys of a window, likewise.
        is_causal: no keys after the query, likewise.
        scale: factor of the scores, ``D ** -0.5`` by default; 0.0 means 0.0, where NATTEN takes its default.
        additional_keys: ``[B, L, Hkv, D]``, keys that every query sees besides its window.
        additional_values: ``[B, L, Hkv, Dv]``, their values.
        attention_kwargs: has no effect, like all arguments after it but the last: routes are chosen as in
            :func:`gna_flex.flex_attention`. A line for the logger ``gna_flex``, level debug, names those given.
        backend: see ``attention_kwargs``.
        q_tile_shape: see ``attention_kwargs``.
        kv_tile_shape: see ``attention_kwargs``.
        backward_q_tile_shape: see ``attention_kwargs``.
        backward_kv_tile_shape: see ``attention_kwargs``.
        backward_kv_splits: see ``attention_kwargs``.
        backward_use_pt_reduction: see ``attention_kwargs``.
        run_persistent_kernel: see ``attention_kwargs``.
        kernel_schedule: see ``attention_kwargs``.
        torch_compile: see ``attention_kwargs``.
        return_lse: also return the log-sum-exp of the scores, natural logarithm, differentiable like the output.

    Returns:
        ``[B, X, Y, H, Dv]``, contiguous, in the type of ``query``; with ``return_lse`` a pair of it and
        ``[B, X, Y, H]`` in float32 (float64 for float64).

    Raises:
        ValueError: if a value is outside its range, or if shapes, types or devices do not fit each other.
        TypeError: if a size is no integer or ``is_causal`` no bool.

    >>> q, k, v = torch.randn(3, 1, 12, 16, 4, 32).unbind()
    >>> na2d(q, k, v, kernel_size=(5, 7), stride=(1, 2)).shape
    torch.Size([1, 12, 16, 4, 32])
    """
    return _attend(
        2,
        (query, key, value),
        (kernel_size, stride, dilation, is_causal),
        scale,
        (additional_keys, additional_values),
        (
            attention_kwargs,
            backend,
            q_tile_shape,
            kv_tile_shape,
            backward_q_tile_shape,
            backward_kv_tile_shape,
            backward_kv_splits,
            backward_use_pt_reduction,
            run_persistent_kernel,
            kernel_schedule,
            torch_compile,
        ),
        return_lse,
    )


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Ints | None = None,
    kv_tile_shape: Ints | None = None,
    backward_q_tile_shape: Ints | None = None,
    backward_kv_tile_shape: Ints | None = None,
    backward_kv_splits: Ints | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Neighborhood attention on videos and volumes: :func:`na2d` of tensors ``[B, X, Y, Z, H, D]``.

    >>> q, text = torch.randn(1, 4, 6, 8, 2, 16), torch.randn(1, 7, 2, 16)
    >>> na3d(q, q, q, kernel_size=(3, 3, 5), additional_keys=text, additional_values=text).shape
    torch.Size([1, 4, 6, 8, 2, 16])
    """
    return _attend(
        3,
        (query, key, value),
        (kernel_size, stride, dilation, is_causal),
        scale,
        (additional_keys, additional_values),
        (
            attention_kwargs,
            backend,
            q_tile_shape,
            kv_tile_shape,
            backward_q_tile_shape,
            backward_kv_tile_shape,
            backward_kv_splits,
            backward_use_pt_reduction,
            run_persistent_kernel,
            kernel_schedule,
            torch_compile,
        ),
        return_lse,
    )


def _attend(
    ndim: int,
    qkv: tuple[Tensor, Tensor, Tensor],
    neighborhood: tuple[Any, ...],
    scale: float | None,
    additional: tuple[Tensor | None, Tensor | None],
    tuning: tuple[Any, ...],
    return_lse: bool,
) -> Any:
    """Attention of heads-last tensors, which ``flex_attention`` takes as transposed views."""
    compiling = torch.compiler.is_compiling()
    if tuning != UNTUNED and not compiling:
        _say_ignored(tuple(name for name, given in zip(TUNING, tuning, strict=True) if given != TUNING[name]))
    _check(ndim, qkv, additional)
    layout = qkv[0].shape[1:-2]
    query, key, value = (x.flatten(1, ndim) for x in qkv)
    tokens, extra = query.shape[1], 0
    more_keys, more_values = additional
    if more_keys is not None and more_values is not None:
        # Additional keys are text of the mask, its queries padding. They cost as many pairs as the keys themselves; two
        # attentions merged by their log-sum-exps would pass over all outputs again and round half precision twice.
        extra = more_keys.shape[1]
        query = nn.functional.pad(query, (0, 0, 0, 0, 0, extra))
        key, value = torch.cat([key, more_keys], 1), torch.cat([value, more_values], 1)
    mask = (_mask_in_graph if compiling else _mask_of)(layout, neighborhood, extra, query.device)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    gqa = q.shape[1] != k.shape[1]
    out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa, return_lse=return_lse)
    results = [x[:, :, :tokens].transpose(1, 2).unflatten(1, layout) for x in (out if return_lse else (out,))]
    # The kernels write in the order of the query, so that this copies little; callers may rely on it for views.
    results = [x.contiguous() for x in results]
    return tuple(results) if return_lse else results[0]


def _check(ndim: int, qkv: tuple[Tensor, Tensor, Tensor], additional: tuple[Tensor | None, Tensor | None]) -> None:
    """Refuses tensors that do not fit, in terms of the caller's shapes."""
    query, key, value = qkv
    q, k, v = query.shape, key.shape, value.shape
    shapes = f"query {tuple(q)}, key {tuple(k)}, value {tuple(v)}"
    if {len(q), len(k), len(v)} != {ndim + 3}:
        axes = ", ".join("XYZ"[:ndim])
        raise ValueError(f"na{ndim}d takes tensors [batch, {axes}, heads, head dim], but got {shapes}")
    if not q[:-2] == k[:-2] == v[:-2]:
        raise ValueError(f"query, key and value must have one batch size and layout, but got {shapes}")
    if q[-1] != k[-1]:
        raise ValueError(f"query and key must have the same head dim, but got {shapes}")
    if k[-2] != v[-2] or not k[-2] or q[-2] % k[-2]:
        raise ValueError(f"heads of key and value must be equal and divide the heads of query, but got {shapes}")
    tensors = {"key": key, "value": value}
    more_keys, more_values = additional
    if more_keys is not None and more_values is not None:
        tensors |= {"additional_keys": more_keys, "additional_values": more_values}
        a, b = more_keys.shape, more_values.shape
        if not (len(a) == len(b) == 4 and a[:2] == b[:2] and a[0] == q[0] and a[2:] == k[-2:] and b[2:] == v[-2:]):
            raise ValueError(
                "additional_keys and additional_values must be [batch, tokens, heads, head dim], with one number of "
                "tokens, and batch, heads and head dims of key and value, but got "
                f"additional_keys {tuple(a)}, additional_values {tuple(b)}, {shapes}"
            )
    elif more_keys is not None or more_values is not None:
        raise ValueError("give both additional_keys and additional_values, or neither")
    for name, tensor in tensors.items():
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"all tensors must share type and device, but query is {query.dtype} on {query.device} "
                f"and {name} {tensor.dtype} on {tensor.device}"
            )


@functools.cache
def _say_ignored(names: tuple[str, ...]) -> None:
    """Says once which arguments have no effect."""
    log.debug("arguments about NATTEN's kernels have no effect here: %s", ", ".join(names))


def _mask_of(layout: tuple[int, ...], neighborhood: tuple[Any, ...], extra: int, device: torch.device) -> GNABlockMask:
    """The mask of an eager call."""
    return kept_mask(_gna(layout, *(tuple(x) if isinstance(x, Iterable) else x for x in neighborhood), extra), device)


def _mask_in_graph(
    layout: tuple[int, ...], neighborhood: tuple[Any, ...], extra: int, device: torch.device
) -> GNABlockMask:
    """The mask of a call that is compiled: made at once, and found in a global place by the graph."""
    name = _name_in_graphs(fixed(layout), fixed(neighborhood), fixed(extra), device)
    mask: GNABlockMask = getattr(masks_of_graphs, name)
    return mask


@constant_result
def _name_in_graphs(layout: tuple[int, ...], neighborhood: tuple[Any, ...], extra: int, device: torch.device) -> str:
    """Where a graph finds its mask. It is called while torch compiles, and its answer becomes part of the graph."""
    return keep_for_graphs(_gna(layout, *neighborhood, extra), device)


@functools.lru_cache(maxsize=1024, typed=True)
def _gna(layout: Ints, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any, extra: int) -> GNA:
    """The GNA of NATTEN's arguments, where ``None`` is the default; errors call them by NATTEN's names."""
    stride, dilation = (1 if x is None else x for x in (stride, dilation))
    try:
        return GNA(layout, kernel_size, stride, dilation, False if is_causal is None else is_causal, text_last=extra)
    except (TypeError, ValueError) as error:
        message = str(error).replace(" (clamp=True shrinks the window to the grid)", "")
        message = re.sub(r"\bwindow\b", "kernel_size", re.sub(r"\bcausal\b", "is_causal", message))
        raise type(error)(message) from None


class _NeighborhoodAttention(nn.Module):
    """Projections to query, key and value, neighborhood attention, and a projection of its output."""

    na_dim: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Ints,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Bools = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        gna = _smallest(self.na_dim, kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal)
        self.kernel_size = _each(self.na_dim, "kernel_size", kernel_size)
        self.stride, self.dilation, self.is_causal = gna.stride, gna.dilation, gna.causal
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the result are ``[B, *layout, embed_dim]``."""
        if x.dim() != self.na_dim + 2 or x.shape[-1] != self.embed_dim:
            axes = ", ".join("XYZ"[: self.na_dim])
            raise ValueError(f"x must be [batch, {axes}, embed_dim={self.embed_dim}], but is {tuple(x.shape)}")
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        attend = (na1d, na2d, na3d)[self.na_dim - 1]
        out = attend(query, key, value, self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale)
        projected: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return projected

    def extra_repr(self) -> str:
        """The numbers of the attention."""
        names = ("head_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _smallest(ndim: int, **neighborhood: Any) -> GNA:
    """The neighborhood on the smallest layout that it fits, which refuses what no layout would take."""
    kernel_size, stride, dilation, is_causal = (_each(ndim, name, value) for name, value in neighborhood.items())
    layout = tuple(max(k, 1) * max(d, 1) for k, d in zip(kernel_size, dilation, strict=True))
    try:
        return _gna(layout, kernel_size, stride, dilation, is_causal, 0)
    except ValueError as error:
        raise ValueError(str(error).replace(f" of layout {layout}", "")) from None


def _each(ndim: int, name: str, value: Any) -> tuple[Any, ...]:
    """One value per dimension."""
    default = {"stride": 1, "dilation": 1, "is_causal": False}.get(name)
    value = default if value is None else value
    values = tuple(value) if isinstance(value, Iterable) else (value,) * ndim
    if len(values) != ndim:
        raise ValueError(f"{name}={value!r} has {len(values)} values; give one, or one for each of {ndim} dimensions")
    return values if name == "is_causal" else tuple(as_int(name, x) for x in values)


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood self-attention of sequences ``[B, X, embed_dim]``: see :class:`NeighborhoodAttention2D`.

    >>> NeighborhoodAttention1D(embed_dim=64, num_heads=4, kernel_size=9)(torch.randn(1, 32, 64)).shape
    torch.Size([1, 32, 64])
    """

    na_dim = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood self-attention of images ``[B, X, Y, embed_dim]``, with projections; loads NATTEN's checkpoints.

    Args:
        embed_dim: channels of input and output, those of all heads together.
        num_heads: attention heads; they divide ``embed_dim``.
        kernel_size: as in :func:`na2d`, and so are the next three.
        stride: queries that share a window.
        dilation: step between the keys of a window.
        is_causal: no keys after the query.
        qkv_bias: whether the projection to query, key and value has a bias.
        qk_scale: factor of the scores, ``head_dim ** -0.5`` by default.
        proj_drop: dropout after the last projection.

    Raises:
        ValueError: if heads do not divide channels or a value is outside its range; at a call, if ``x`` has another
            shape or the window does not fit its layout.
        TypeError: if a size is no integer or ``is_causal`` no bool.

    >>> attention = NeighborhoodAttention2D(embed_dim=64, num_heads=4, kernel_size=(5, 7), dilation=(2, 1))
    >>> attention(torch.randn(1, 12, 16, 64)).shape
    torch.Size([1, 12, 16, 64])
    """

    na_dim = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Neighborhood self-attention of videos ``[B, X, Y, Z, embed_dim]``: see :class:`NeighborhoodAttention2D`.

    >>> attention = NeighborhoodAttention3D(64, 4, kernel_size=(2, 3, 5), is_causal=(True, False, False))
    >>> attention(torch.randn(1, 4, 6, 8, 64)).shape
    torch.Size([1, 4, 6, 8, 64])
    """

    na_dim = 3
