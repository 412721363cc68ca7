"""Every private name of torch that this package relies on. ``tests/test_torch_private.py`` fails when one changes.

Checked with torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._higher_order_ops.flex_attention import flex_attention as _hop
from torch._higher_order_ops.flex_attention import flex_attention_backward as _backward_hop
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import flex_attention as _flex_module

__all__ = [
    "BLOCK_TABLES",
    "HOP_ARGUMENTS",
    "FakeTensor",
    "compile_graph",
    "flex_attention_backward_hop",
    "flex_attention_hop",
    "is_identity",
    "sliced_mask_mod",
    "trace_graph",
]

BLOCK_TABLES = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)
"""Tensors of a BlockMask, in the order of its constructor."""

flex_attention_hop: Any = _hop
"""The FlexAttention operator that torch's front end calls, in eager mode and in graphs."""

flex_attention_backward_hop: Any = _backward_hop
"""Its backward: query, key, value, output, log-sum-exp (base 2), gradients of the last two, then as the forward."""

compile_graph: Any = torch._inductor.compile
"""A traced graph and example inputs to a compiled function of inputs of the same sizes and strides."""

HOP_ARGUMENTS = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options")
"""Leading arguments of ``flex_attention_hop``. It returns output, log-sum-exp and maximum, both in base 2."""

trace_graph = functools.partial(make_fx, tracing_mode="fake", _allow_non_fake_inputs=True)
"""The ATen operators of a function as a graph, without running it; real tensors that it captures stay as they are."""

_identity = _flex_module._identity
sliced_mask_mod = getattr(_flex_module, "_sliced_mask_mod_error", None)
"""mask_mod of a sliced BlockMask, which torch refuses to run."""


def is_identity(score_mod: Any) -> bool:
    """Whether torch's front end was called without a score_mod."""
    return score_mod is None or score_mod is _identity
