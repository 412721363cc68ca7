"""torch.library operators of the package."""

from __future__ import annotations

import torch
from torch import Tensor

from gna_flex.flex import eager_attention, to_base_2
from gna_flex.mask import mask_of
from gna_flex.torch_private import FakeTensor

_library = torch.library.Library("gna_flex", "DEF")
_library.define(
    "eager_attention(Tensor query, Tensor key, Tensor value, str mask, float scale) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
