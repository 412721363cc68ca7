"""torch.library operators of the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gna_flex.flex import eager_attention, to_base_2
from gna_flex.mask import mask_of
from gna_flex.tiling import from_tiles, to_tiles
from gna_flex.torch_private import FakeTensor

_library = torch.library.Library("gna_flex", "DEF")

_GEOMETRY = "int[] layout, int[] tiles, int[] tile, int[] dilation, int[] text, int[] text_places"
_library.define(
    "eager_attention(Tensor query, Tensor key, Tensor value, str mask, float scale) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name in ("to_tiles", "from_tiles"):
    _library.define(f"{_name}(Tensor x, int dim, {_GEOMETRY}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """An eager call of torch's own flex_attention with a GNA mask; statistics in base 2, as its operator has them.

    torch traces the call even then, which is when the tensors are fake.
    """
    if isinstance(query, FakeTensor):
        stats = query.new_empty(query.shape[:-1], dtype=torch.float32)
        return query.new_empty(*query.shape[:-1], value.shape[-1]), stats, stats.clone()
    lse = query.device.type != "cpu"
    gqa = query.shape[1] != key.shape[1]
    out, lse_, top = eager_attention(query, key, value, mask_of(mask), scale=scale, enable_gqa=gqa, lse=lse, top=lse)
    empty = out.new_empty(0, dtype=torch.float32)
    return to_base_2(out, empty if lse_ is None else lse_, empty if top is None else top)


_library.impl("eager_attention", _eager_attention, "CompositeImplicitAutograd")


def _permutation(name: str, function: Callable[..., Tensor], inverse: str) -> None:
    """Registers a permutation of tokens: its kernel, its shape, and its inverse as its gradient."""

    def kernel(x: Tensor, dim: int, *geometry: list[int]) -> Tensor:
        wide = _wide(x, dim)
        out = function(wide, dim, *geometry).contiguous()
        out = out.clone() if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else out
        return out.view(x.dtype)

    def fake(x: Tensor, dim: int, *geometry: list[int]) -> Tensor:
        layout, tiles, tile, dilation, text, text_places = geometry
        if name == "to_tiles":
            tokens = sum(text_places) + math.prod(tiles) * math.prod(tile) * math.prod(dilation)
        else:
            tokens = sum(text) + math.prod(layout)
        dim = dim % x.ndim
        return x.new_empty(*x.shape[:dim], tokens, *x.shape[dim + 1 :])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[1:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return getattr(torch.ops.gna_flex, inverse)(grad, *ctx.arguments), *(None,) * len(ctx.arguments)

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gna_flex::{name}", fake, lib=_library)
    torch.library.register_autograd(f"gna_flex::{name}", backward, setup_context=setup, lib=_library)


def _wide(x: Tensor, dim: int) -> Tensor:
    """The same memory as elements of 16 bytes where that is possible: fewer elements to move."""
    per_element = 16 // x.element_size() if x.element_size() <= 16 else 0
    sizes = (*x.stride()[:-1], x.shape[-1], x.storage_offset())
    if dim % x.ndim == x.ndim - 1 or x.stride(-1) != 1 or not per_element or any(n % per_element for n in sizes):
        return x
    return x.view(torch.complex128)


_permutation("to_tiles", to_tiles, "from_tiles")
_permutation("from_tiles", from_tiles, "to_tiles")
