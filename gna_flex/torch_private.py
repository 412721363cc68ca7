"""Every private name of torch that this package relies on. ``tests/test_torch_private.py`` fails when one changes.

Checked with torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._guards import CompileContext
from torch._higher_order_ops.flex_attention import flex_attention as _hop
from torch._higher_order_ops.flex_attention import flex_attention_backward as _backward_hop
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import has_static_value, is_concrete_int
from torch.nn.attention import flex_attention as _flex_module

__all__ = [
    "BLOCK_TABLES",
    "HOP_ARGUMENTS",
    "FakeTensor",
    "compile_graph",
    "constant_result",
    "current_stream",
    "example_input",
    "flex_attention_backward_hop",
    "flex_attention_hop",
    "has_static_value",
    "inductor",
    "is_identity",
    "keeps_assertions",
    "known_int",
    "likely_int",
    "not_compiling",
    "pre_grad_pass",
    "sliced_mask_mod",
    "trace_graph",
    "transforming",
    "undisturbed",
    "variants_left",
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

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which takes a second when it is first used: it imports Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


flex_attention_hop: Any = _hop
"""The FlexAttention operator that torch's front end calls, in eager mode and in graphs."""

flex_attention_backward_hop: Any = _backward_hop
"""Its backward: query, key, value, output, log-sum-exp (base 2), gradients of the last two, then as the forward."""

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


def compile_graph(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A traced graph and example inputs to a compiled function of inputs of the same sizes and strides."""
    compiled: Callable[..., Any] = torch._inductor.compile(graph, list(inputs))
    return compiled


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


def example_input(placeholder: FxNode) -> Any:
    """What an input of a graph that Dynamo made is at the first call; ``None`` where Dynamo does not say."""
    return getattr(placeholder.meta.get("grapharg"), "example", None)


def known_int(number: Any) -> int | None:
    """A size of a fake tensor that is a fixed number; ``None`` for a symbol. Makes no assumption about symbols."""
    is_number = isinstance(number, int | torch.SymInt) and not isinstance(number, bool)
    return int(number) if is_number and is_concrete_int(number) else None


def likely_int(number: Any) -> int | None:
    """A number, or what a symbol stands for at the first call; ``None`` for anything else. Assumes nothing, either."""
    if isinstance(number, torch.SymInt):
        return number.node.hint if number.node.has_hint() else None
    return number if isinstance(number, int) else None


@contextlib.contextmanager
def not_compiling() -> Iterator[None]:
    """``torch.compiler.is_compiling()`` is false: backends compute with real tensors, while torch says it compiles."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def variants_left() -> int:
    """How often torch may compile the function again that it is compiling now, before it runs it uncompiled."""
    compilation = CompileContext.current_compile_id()
    number = getattr(compilation, "frame_compile_id", None)
    return 0 if number is None else torch._dynamo.config.recompile_limit - number - 1


def keeps_assertions() -> bool:
    """Whether Inductor compiles ``torch._assert_async`` for a GPU: a setting of its own, and not for AMD's."""
    return bool(torch._inductor.config.assert_indirect_indexing) and torch.version.hip is None


def inductor(mode: str | None, options: dict[str, Any] | None) -> Callable[..., Any]:
    """What ``torch.compile(mode=mode, options=options)`` hands graphs to."""
    return torch._TorchCompileInductorWrapper(mode, options, None)


@contextlib.contextmanager
def pre_grad_pass(run: Callable[[GraphModule], None]) -> Iterator[None]:
    """Inductor calls ``run`` on every graph before it derives gradients, after passes that were there before.

    Before it looks into its cache, too: what ``run`` does may depend on more than the graph.
    """
    from torch._inductor import config

    earlier = config.pre_grad_custom_pass
    earlier = earlier if isinstance(earlier, list | tuple) else [earlier] if earlier is not None else []

    def run_all(graph: torch.fx.Graph) -> None:
        for one in earlier:
            one(graph)
        if graph.owning_module is not None:
            run(graph.owning_module)

    changes: dict[str, Any] = {"pre_grad_custom_pass": run_all}
    if hasattr(config, "pre_grad_pass_timing"):  # always early in torch 2.11
        changes["pre_grad_pass_timing"] = "early"
    with config.patch(changes):
        yield
