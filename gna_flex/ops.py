"""torch.library operators of the package."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks
from torch.utils.flop_counter import register_flop_formula

from gna_flex import kernels
from gna_flex.flex import eager_attention, to_base_2
from gna_flex.kernels import output_type
from gna_flex.mask import mask_of
from gna_flex.mask_mod import MaskMod, counted_text, mask_mod
from gna_flex.neighborhood import GNA
from gna_flex.reference import reference_attention
from gna_flex.reference_backward import reference_backward
from gna_flex.routing import backward_obstacle, forced
from gna_flex.tiling import from_tiles, to_tiles
from gna_flex.torch_private import FakeTensor
from gna_flex.transforms import mapped, no_second_derivative

if TYPE_CHECKING:
    from gna_flex.cuda.forward import Plan

_library = torch.library.Library("gna_flex", "DEF")

_GEOMETRY = "int[] layout, int[] tiles, int[] tile, int[] dilation, int[] text, int[] text_places"
_library.define(
    "eager_attention(Tensor query, Tensor key, Tensor value, str mask, float scale, bool maximum) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name in ("to_tiles", "from_tiles"):
    _library.define(f"{_name}(Tensor x, int dim, {_GEOMETRY}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: str, scale: float, maximum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """An eager call of torch's own flex_attention with a GNA mask; statistics in base 2, as its operator has them.

    torch traces the call even then, which is when the tensors are fake.
    """
    if isinstance(query, FakeTensor):
        stats = query.new_empty(query.shape[:-1], dtype=torch.float32)
        out = query.new_empty(*query.shape[:-1], value.shape[-1], dtype=output_type(query.dtype))
        return out, stats, stats.clone()
    lse = query.device.type != "cpu"
    gqa = query.shape[1] != key.shape[1]
    top = lse and maximum
    out, lse_, top_ = eager_attention(query, key, value, mask_of(mask), scale=scale, enable_gqa=gqa, lse=lse, top=top)
    empty = out.new_empty(0, dtype=torch.float32)
    return to_base_2(out, empty if lse_ is None else lse_, empty if top_ is None else top_)


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


_library.define(
    "attention(Tensor query, Tensor key, Tensor value, int[] layout, int[] window, int[] stride, int[] dilation, "
    "bool[] causal, int text_first, int text_last, float scale, Tensor? text_valid=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _split(query: Any, rest: tuple[Any, ...]) -> tuple[list[Any], float, Tensor | None]:
    """The numbers of the masks, the scale, and the text tokens that count, which torch leaves out if there are none.

    Raises:
        ValueError: if these are not an int32 tensor ``[B, 2]`` on the device of the query.
    """
    *numbers, scale, text_valid = (*rest, None)[:9]
    if text_valid is not None:
        found, wanted = tuple(text_valid.shape), (query.shape[0], 2)
        if found != wanted or text_valid.dtype != torch.int32 or text_valid.device != query.device:
            raise ValueError(
                f"text_valid must be int32 {wanted} on {query.device}, but is {text_valid.dtype} {found} on "
                f"{text_valid.device}"
            )
    return numbers, scale, text_valid


def _mask_mod(numbers: Any, text_valid: Tensor | None) -> MaskMod:
    """The mask_mod for the numbers of an operator, and for the text tokens that count."""
    gnas = _masks(numbers)
    near = mask_mod(gnas)
    return near if text_valid is None else and_masks(near, counted_text(gnas[0], None, text_valid))


def _masks(numbers: Any) -> tuple[GNA, ...]:
    """One GNA, or one per head, from the numbers of an operator: five lists, text before and after."""
    *lists, text_first, text_last = numbers
    return _gnas(*map(tuple, lists), text_first, text_last)


@functools.lru_cache(maxsize=1024)
def _gnas(
    layout: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    text_first: int,
    text_last: int,
) -> tuple[GNA, ...]:
    """One GNA, or one per head, from lists that hold the values of all heads in a row."""
    n = len(layout)

    def of_head(h: int) -> GNA:
        w, s, d, c = (values[h : h + n] for values in (window, stride, dilation, causal))
        return GNA(layout, w, s, d, c, text_first, text_last)  # type: ignore[arg-type]

    return tuple(of_head(h) for h in range(0, len(window), n))


def _attention_cuda(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Attention by the hand-written kernel; log-sum-exp in float32, natural logarithm."""
    (*lists, text_first, text_last), scale, text_valid = _split(query, rest)
    shape = (query.shape[-1], query.dtype, query.device.index)
    plan = _plan(*map(tuple, lists), text_first, text_last, *shape)
    return plan.run(query, key, value, scale, None if text_valid is None else text_valid.contiguous())


@functools.lru_cache(maxsize=256)
def _plan(*arguments: Any) -> Plan:
    """The plan of a call to the kernel, found by the numbers that operators take.

    Raises:
        RuntimeError: if the kernel is not trusted on the device, where routing did not ask: in exported programs.
    """
    from gna_flex.cuda.forward import plan, request_on

    *numbers, head_dim, dtype, device = arguments
    request = request_on(device, _gnas(*numbers), head_dim, dtype)
    name = kernels.kernel_for(request.capability)
    if name in kernels.UNTRIED and (why := kernels.untested(name, device)):
        raise RuntimeError(f"the {name} kernel is not used: {why}")
    return plan(request)


def _attention_cpu(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The reference, where there is no kernel."""
    numbers, scale, text_valid = _split(query, rest)
    out, lse, _ = reference_attention(query, key, value, _mask_mod(numbers, text_valid), scale=scale)
    return torch.empty_like(query, dtype=out.dtype).copy_(out), lse.float()


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _split(query, rest)
    out = torch.empty_like(query, dtype=output_type(query.dtype))
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


_library.impl("attention", _attention_cuda, "CUDA")
_library.impl("attention", _attention_cpu, "CPU")
torch.library.register_fake("gna_flex::attention", _attention_fake, lib=_library)


_library.define(
    "attention_backward(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, "
    "Tensor? grad_lse, int[] layout, int[] window, int[] stride, int[] dilation, bool[] causal, int text_first, "
    "int text_last, float scale, Tensor? text_valid=None) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _backward_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the hand-written kernel, or by FlexAttention's backward, which needs no forward of its own."""
    from gna_flex.flex_backward import flex_backward

    query, *tensors = arguments[:7]
    numbers, scale, text_valid = _split(query, arguments[7:])
    call = (_masks(numbers), query, *tensors, scale, None if text_valid is None else text_valid.contiguous())
    name = kernels.kernel_for(torch.cuda.get_device_capability(query.device))
    if name and not kernels.missing() and not backward_obstacle(name, query.shape[-1]):
        from gna_flex.cuda.backward import backward

        try:
            return _like(backward(*call), arguments)
        except (RuntimeError, ImportError) as error:
            if isinstance(error, torch.OutOfMemoryError) or forced() or torch.cuda.is_current_stream_capturing():
                raise
            kernels.give_up(error)
    return _like(flex_backward(*call), arguments)


def _backward_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's backward."""
    query, key, value, out, lse, grad_out, grad_lse, *rest = arguments
    numbers, scale, text_valid = _split(query, tuple(rest))
    mod = _mask_mod(numbers, text_valid)
    return _like(reference_backward(query, key, value, out, lse, grad_out, grad_lse, mod, scale), arguments)


def _like(grads: Any, tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the strides of query, key and value, which they often have already."""

    def like(x: Tensor, grad: Tensor) -> Tensor:
        strides = torch.empty_like(x, device="meta").stride()
        done = grad.stride() == strides and grad.dtype == x.dtype
        return grad if done else torch.empty_like(x).copy_(grad)

    dq, dk, dv = (like(x, grad) for x, grad in zip(tensors, grads, strict=False))
    return dq, dk, dv


def _backward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *rest, text_valid = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *output, text_valid)
    ctx.rest = rest
    ctx.set_materialize_grads(False)  # few use the log-sum-exp: no zeros for it, and no kernel that writes them


def _attention_gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, text_valid = ctx.saved_tensors
    grad_out = torch.zeros_like(tensors[3]) if grad_out is None else grad_out
    grads = torch.ops.gna_flex.attention_backward(*tensors, grad_out, grad_lse, *ctx.rest, text_valid)
    return *grads, *(None,) * len(ctx.rest), None


_library.impl("attention_backward", _backward_cuda, "CUDA")
_library.impl("attention_backward", _backward_cpu, "CPU")
torch.library.register_fake("gna_flex::attention_backward", _backward_fake, lib=_library)
torch.library.register_autograd("gna_flex::attention", _attention_gradients, setup_context=_save, lib=_library)


def _vmap(operator: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        # The dispatcher leaves arguments out that have their default.
        missing = len(operator.default._schema.arguments) - len(inputs)
        return mapped(operator, info.batch_size, (*in_dims, *(None,) * missing), (*inputs, *(None,) * missing))

    return rule


torch.library.register_autograd("gna_flex::attention_backward", no_second_derivative, lib=_library)
for _operator in (torch.ops.gna_flex.attention, torch.ops.gna_flex.attention_backward):
    torch.library.register_vmap(_operator.default, _vmap(_operator), lib=_library)


@register_flop_formula(torch.ops.gna_flex.attention)
def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **kwargs: Any) -> int:
    """Multiplications and additions of the kept pairs: two products of ``D`` for each."""
    gnas = _masks(rest[:7])
    batch, heads, _, head_dim = query
    pairs = sum(gna.kept_pairs() for gna in gnas) * (heads if len(gnas) == 1 else 1)
    return int(4 * batch * pairs * head_dim)


@register_flop_formula(torch.ops.gna_flex.attention_backward)
def _backward_flops(
    query: Any, key: Any, value: Any, out: Any, lse: Any, do: Any, dl: Any, *rest: Any, **_: Any
) -> int:
    """Five products of ``D`` for each kept pair, where the forward has two."""
    return _attention_flops(query, key, value, *rest) * 5 // 2
