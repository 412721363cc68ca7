"""Every private name of torch that this package relies on. ``tests/test_torch_private.py`` fails when one changes.

Checked with torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as _hop
from torch._higher_order_ops.flex_attention import flex_attention_backward as _backward_hop
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import flex_attention as _flex_module

__all__ = [
    "BLOCK_TABLES",
    "HOP_ARGUMENTS",
    "FakeTensor",
    "compile_graph",
    "current_stream",
    "flex_attention_backward_hop",
    "flex_attention_hop",
    "is_identity",
    "sliced_mask_mod",
    "trace_graph",
    "transforming",
    "undisturbed",
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


def current_stream(device: int) -> int:
    """The current stream of a CUDA device as the driver knows it: without the object around it, 1 us."""
    return torch._C._cuda_getCurrentRawStream(device)


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_Key: Any = torch._C.DispatchKey
_key_set: Any = torch._C.DispatchKeySet
_PLAIN = _key_set(_Key.CUDA).add(_Key.AutocastCUDA)
_PLAIN_TENSORS = (_PLAIN.add(_Key.ADInplaceOrView).add(_Key.AutogradCUDA), _PLAIN)
"""Dispatch keys of an ordinary CUDA tensor, and of one made in inference mode."""
_PLAIN_MODES = (_key_set(_Key.BackendSelect).add(_Key.ADInplaceOrView), _key_set(_Key.BackendSelect))
"""Keys that are on everywhere, and in inference mode."""


def undisturbed(*tensors: Tensor) -> bool:
    """Whether an operator without gradients, called with these CUDA tensors, would reach its kernel and nothing else.

    No autocast, function transform, tracing, dispatch or function mode, fake or wrapped tensor, lazy negation, or
    forward-mode gradient: the dispatcher would hand the call to whatever of these there is.
    """
    return (
        torch._C._dispatch_tls_local_include_set() in _PLAIN_MODES
        and torch._C._dispatch_tls_local_exclude_set().has(_Key.AutocastCUDA)
        and all(type(x) in _PLAIN_TYPES and torch._C._dispatch_keys(x) in _PLAIN_TENSORS for x in tensors)
        and not torch._C._is_torch_function_mode_enabled()
        and forward_ad._current_level < 0
    )


def transforming() -> bool:
    """Whether a function transform of ``torch.func``, or forward-mode differentiation, is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
