"""The kernel's operator under ``torch.func``: gradients inside of transforms, and ``vmap`` as a larger batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

Mapped = tuple[tuple[Tensor, ...], tuple[int, ...]]
"""Results of a mapped function, and where their mapped dimensions are."""


class TransformedAttention(Function):
    """The operator ``gna_flex::attention``, whose own registration of gradients no transform can look into."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp; inputs are those of the operator."""
        result: tuple[Tensor, Tensor] = torch.ops.gna_flex.attention(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Saves what the backward needs."""
        query, key, value, *ctx.numbers, text_valid = inputs
        ctx.save_for_backward(query, key, value, *output, text_valid)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        """Gradients of query, key and value."""
        *tensors, text_valid = ctx.saved_tensors
        grads = TransformedBackward.apply(*tensors, grad_out, grad_lse, *ctx.numbers, text_valid)
        return *grads, *(None,) * len(ctx.numbers), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Mapped:
        """One call with a larger batch."""
        return mapped(TransformedAttention.apply, info.batch_size, in_dims, inputs)


class TransformedBackward(Function):
    """The operator ``gna_flex::attention_backward``."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; inputs are those of the operator."""
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.gna_flex.attention_backward(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to save."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """There is none."""
        no_second_derivative()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Mapped:
        """One call with a larger batch."""
        return mapped(TransformedBackward.apply, info.batch_size, in_dims, inputs)


def no_second_derivative(*unused: Any) -> NoReturn:
    """Refuses what the operators cannot do.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "the CUDA kernel of gna_flex.flex_attention has first derivatives only; "
        'with gna_flex.backend("reference") there are all'
    )


def mapped(function: Callable[..., Any], size: int, dims: Sequence[int | None], inputs: Sequence[Any]) -> Mapped:
    """A function of tensors ``[B, ...]`` and other things, for tensors with one more dimension, which joins the batch.

    >>> mapped(lambda x, factor: (x * factor,), 3, (1, None), (torch.ones(2, 3, 5), 2))[0][0].shape
    torch.Size([3, 2, 5])
    """
    wide = list(inputs)
    for place, (x, dim) in enumerate(zip(inputs, dims, strict=True)):
        if isinstance(x, Tensor):
            wide[place] = (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
    outputs = tuple(x.unflatten(0, (size, -1)) for x in function(*wide))
    return outputs, (0,) * len(outputs)
