"""The mask rule of one dimension, written once.

A dimension of length ``L`` with dilation ``d`` splits into ``d`` independent dilation groups: token ``x`` is
position ``x // d`` of group ``x % d``. Inside a group every query ``i`` sees one interval of key positions
``[lo, hi)``, and ``lo`` and ``hi`` never decrease with ``i`` (Generalized Neighborhood Attention, section 3).
Everything else in this package (masks, block lists, tile counts, pictures) follows from these functions.

Every argument may be a Python int, a NumPy array, a torch tensor or a SymPy expression, freely mixed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy
import torch

Value = Any
"""An int, a NumPy array, a torch tensor or a SymPy expression."""


def minimum(a: Value, b: Value) -> Value:
    """Elementwise smaller of two values of any supported kind."""
    if isinstance(a, torch.Tensor):
        return torch.minimum(a, b) if isinstance(b, torch.Tensor) else a.clamp(max=b)
    if isinstance(b, torch.Tensor):
        return b.clamp(max=a)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.minimum(a, b)
    if isinstance(a, sympy.Basic) or isinstance(b, sympy.Basic):
        return sympy.Min(a, b)
    return min(a, b)


def maximum(a: Value, b: Value) -> Value:
    """Elementwise larger of two values of any supported kind."""
    if isinstance(a, torch.Tensor):
        return torch.maximum(a, b) if isinstance(b, torch.Tensor) else a.clamp(min=b)
    if isinstance(b, torch.Tensor):
        return b.clamp(min=a)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.maximum(a, b)
    if isinstance(a, sympy.Basic) or isinstance(b, sympy.Basic):
        return sympy.Max(a, b)
    return max(a, b)


def select(condition: Value, a: Value, b: Value) -> Value:
    """``a`` where the condition holds, else ``b``."""
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, a, b)
    if isinstance(condition, np.ndarray):
        return np.where(condition, a, b)
    if isinstance(condition, sympy.Basic):
        return sympy.Piecewise((a, condition), (b, True))
    return a if condition else b


def equal(a: Value, b: Value) -> Value:
    """Whether two values are equal; for SymPy the equation, not a comparison of the expressions."""
    if isinstance(a, sympy.Basic) or isinstance(b, sympy.Basic):
        return sympy.Eq(a, b)
    return a == b


def ceil_div(a: Value, b: Value) -> Value:
    """``a / b`` rounded up."""
    return -(-a // b)


def group_length(length: Value, dilation: Value, group: Value) -> Value:
    """Number of tokens in one dilation group: the first ``length % dilation`` groups are one longer."""
    return (length - group + dilation - 1) // dilation


def leader(i: Value, length: Value, stride: Value, causal: bool) -> Value:
    """Position of the query whose window the whole stride group of query ``i`` shares."""
    if isinstance(stride, int) and stride == 1:
        return i
    offset = stride - 1 if causal else stride // 2
    return minimum(i // stride * stride + offset, length - 1)


def key_interval(i: Value, length: Value, window: Value, stride: Value, causal: bool) -> tuple[Value, Value]:
    """Keys ``[lo, hi)`` that query ``i`` attends to, as positions in its dilation group of ``length`` tokens.

    Not causal: always exactly ``window`` keys, shifted inside at the edges. Causal: ends at the query itself.

    >>> key_interval(4, 10, 4, 1, causal=False)
    (2, 6)
    >>> key_interval(4, 10, 4, 3, causal=True)
    (2, 5)
    """
    lead = leader(i, length, stride, causal)
    if causal:
        return maximum(lead - window + 1, 0), i + 1
    lo = minimum(maximum(lead - window // 2, 0), length - window)
    return lo, lo + window


def query_interval(j: Value, length: Value, window: Value, stride: Value, causal: bool) -> tuple[Value, Value]:
    """Queries ``[lo, hi)`` that attend to key ``j``: the inverse of :func:`key_interval`, which backward needs.

    It is one interval and never empty, because both ends of :func:`key_interval` are monotone.

    >>> query_interval(4, 10, 4, 1, causal=False)
    (3, 7)
    """
    if causal:
        return j, select(j + window < length, (j + window) // stride * stride, length)
    # Leaders sit at stride // 2 in their group: the first group whose leader reaches j, and the last one.
    first = ceil_div(j - window + 1 + window // 2 - stride // 2, stride) * stride
    last = ((j + window // 2 - stride // 2) // stride + 1) * stride
    return select(j < window, 0, maximum(first, 0)), select(j < length - window, minimum(last, length), length)


def sees(i: Value, j: Value, length: Value, window: Value, stride: Value, causal: bool) -> Value:
    """Whether query position ``i`` sees key position ``j`` of the same dilation group of ``length`` tokens."""
    lo, hi = key_interval(i, length, window, stride, causal)
    return (lo <= j) & (j < hi)


def attends(q: Value, k: Value, length: Value, window: Value, stride: Value, dilation: Value, causal: bool) -> Value:
    """Whether the query at coordinate ``q`` attends to the key at coordinate ``k`` in one dimension.

    >>> [k for k in range(10) if attends(4, k, 10, 3, 1, 3, causal=False)]
    [1, 4, 7]
    """
    if isinstance(dilation, int) and dilation == 1:
        return sees(q, k, length, window, stride, causal)
    size = group_length(length, dilation, q % dilation)
    return equal(q % dilation, k % dilation) & sees(q // dilation, k // dilation, size, window, stride, causal)
