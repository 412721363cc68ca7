"""``GNA``: the frozen description of a generalized neighborhood attention mask, and its validation."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np

from gna_flex.intervals import group_length, key_interval

Ints = int | Iterable[int]
Bools = bool | Iterable[bool]


@dataclass(frozen=True)
class GNA:
    """Local attention on a 1-D, 2-D or 3-D grid of tokens (Generalized Neighborhood Attention, section 3).

    Every argument but the last three is one value for all dimensions or one value per dimension.

    Args:
        layout: grid size in tokens, slowest dimension first, such as ``(T, H, W)``.
        window: keys that a query sees in a dimension, ``1 <= window`` and ``window * dilation <= layout``;
            ``-1`` means the whole dimension.
        stride: queries that share one window, ``1 <= stride <= window``; 1 is a sliding window,
            ``stride == window`` is blocked attention.
        dilation: step between the keys of a window, in tokens.
        causal: whether a query sees only keys at its own coordinate or before it, in that dimension.
        text_first: tokens stored before the grid. Text tokens attend to everything and everything attends to them.
        text_last: tokens stored after the grid.
        clamp: shrink a window (and its stride and dilation) that is larger than the grid instead of refusing it.

    Raises:
        ValueError: if a value is outside its range; the message names argument, value, layout and rule.
        TypeError: if a value is of the wrong kind.

    >>> GNA((30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8), text_last=256).tokens
    115456
    """

    layout: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    text_first: int
    text_last: int
    clamp: InitVar[bool] = False

    def __init__(
        self,
        layout: Ints,
        window: Ints,
        stride: Ints = 1,
        dilation: Ints = 1,
        causal: Bools = False,
        text_first: int = 0,
        text_last: int = 0,
        clamp: bool = False,
    ) -> None:
        sizes = per_dim("layout", layout, None, as_int)
        if not 1 <= len(sizes) <= 3:
            raise ValueError(f"layout={layout!r} has {len(sizes)} dimensions; GNA layouts have 1, 2 or 3")
        windows = per_dim("window", window, sizes, as_int)
        strides = per_dim("stride", stride, sizes, as_int)
        dilations = per_dim("dilation", dilation, sizes, as_int)
        dims = [
            _normalise_dim(axis, sizes, w, s, d, clamp)
            for axis, (w, s, d) in enumerate(zip(windows, strides, dilations, strict=True))
        ]
        values = {
            "layout": sizes,
            "window": tuple(w for w, _, _ in dims),
            "stride": tuple(s for _, s, _ in dims),
            "dilation": tuple(d for _, _, d in dims),
            "causal": per_dim("causal", causal, sizes, _as_bool),
            "text_first": _as_count("text_first", text_first, sizes),
            "text_last": _as_count("text_last", text_last, sizes),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def sliding_window(cls, layout: Ints, window: Ints, *, causal: Bools = False, **options: Any) -> GNA:
        """Stride 1: every query has its own window. 1-D and causal it is the sliding window of language models.

        >>> GNA.sliding_window(32768, 2048, causal=True).stride
        (1,)
        """
        return cls(layout, window, causal=causal, **options)

    @classmethod
    def blocked(cls, layout: Ints, block: Ints, **options: Any) -> GNA:
        """Window attention: the grid is cut into blocks that attend only to themselves.

        A ragged last block attends to the last ``block`` tokens of its dimension.

        >>> GNA.blocked((64, 64), 8).stride
        (8, 8)
        """
        return cls(layout, block, stride=block, **options)

    @classmethod
    def halo(cls, layout: Ints, block: Ints, halo: Ints, **options: Any) -> GNA:
        """HaloNet attention: each block of queries sees itself and ``halo`` more tokens on every side.

        >>> GNA.halo((64, 64), block=8, halo=3).window
        (14, 14)
        """
        sizes = per_dim("layout", layout, None, as_int)
        blocks = per_dim("block", block, sizes, as_int)
        halos = per_dim("halo", halo, sizes, as_int)
        return cls(sizes, tuple(b + 2 * h for b, h in zip(blocks, halos, strict=True)), stride=blocks, **options)

    @classmethod
    def dense(cls, layout: Ints, **options: Any) -> GNA:
        """Every token attends to every token.

        >>> GNA.dense((4, 6)).window
        (4, 6)
        """
        return cls(layout, -1, **options)

    @property
    def ndim(self) -> int:
        """Dimensions of the grid: 1, 2 or 3."""
        return len(self.layout)

    @property
    def grid_tokens(self) -> int:
        """Tokens of the grid, ``N``."""
        return math.prod(self.layout)

    @property
    def tokens(self) -> int:
        """All tokens, grid and text, ``S``: the sequence length of query, key and value."""
        return self.text_first + self.grid_tokens + self.text_last

    @property
    def is_dense(self) -> bool:
        """Whether no pair is masked."""
        return self.window == self.layout and not any(self.causal)

    def kept_pairs(self) -> int:
        """Number of (query, key) pairs kept by the mask, out of ``tokens ** 2``. Costs ``sum(layout)``."""
        grid = math.prod(_kept_pairs(*dim) for dim in self.dims())
        text = self.text_first + self.text_last
        return grid + text * (self.tokens + self.grid_tokens)

    def dims(self) -> Iterable[tuple[int, int, int, int, bool]]:
        """Per dimension ``(length, window, stride, dilation, causal)``, slowest dimension first."""
        return zip(self.layout, self.window, self.stride, self.dilation, self.causal, strict=True)

    def __str__(self) -> str:
        def show(values: tuple[Any, ...]) -> str:
            return "x".join(str(v) for v in values)

        parts = [f"layout {show(self.layout)}", f"window {show(self.window)}"]
        if set(self.stride) != {1}:
            parts.append(f"stride {show(self.stride)}")
        if set(self.dilation) != {1}:
            parts.append(f"dilation {show(self.dilation)}")
        if any(self.causal):
            parts.append("causal " + "/".join("yes" if c else "no" for c in self.causal))
        if self.text_first:
            parts.append(f"{self.text_first} text tokens first")
        if self.text_last:
            parts.append(f"{self.text_last} text tokens last")
        return ", ".join(parts)


@functools.lru_cache(maxsize=1024)
def _kept_pairs(length: int, window: int, stride: int, dilation: int, causal: bool) -> int:
    """Pairs kept in one dimension."""
    x = np.arange(length)
    lo, hi = key_interval(x // dilation, group_length(length, dilation, x % dilation), window, stride, causal)
    return int(np.sum(hi - lo))


def _normalise_dim(
    axis: int, layout: tuple[int, ...], window: int, stride: int, dilation: int, clamp: bool
) -> tuple[int, int, int]:
    """Checked ``(window, stride, dilation)`` of one dimension."""
    length = layout[axis]

    def refuse(name: str, value: int, rule: str) -> ValueError:
        return ValueError(f"{name}={value} in dimension {axis} of layout {layout}: {rule}")

    if length < 1:
        raise refuse("layout", length, "every dimension needs at least 1 token")
    if dilation < 1:
        raise refuse("dilation", dilation, "dilation must be at least 1")
    if stride < 1:
        raise refuse("stride", stride, "stride must be at least 1")
    if window < 1 and window != -1:
        raise refuse("window", window, "window must be at least 1, or -1 for the whole dimension")
    if stride > window != -1:
        raise refuse("stride", stride, f"stride must not exceed the window {window}, or keys are lost between windows")
    if clamp:
        dilation = min(dilation, length)
        window = min(window, length // dilation)
    if window == -1:
        if length % dilation:
            raise refuse("window", window, f"the whole dimension needs dilation={dilation} to divide {length}")
        window = length // dilation
    if window * dilation > length:
        raise refuse(
            "window",
            window,
            f"window * dilation = {window} * {dilation} = {window * dilation} must not exceed {length} "
            "(clamp=True shrinks the window to the grid)",
        )
    if stride > window and not clamp:
        raise refuse("stride", stride, f"stride must not exceed the window {window}, the whole dimension")
    return window, min(stride, window), dilation


def per_dim(
    name: str, value: Any, layout: tuple[int, ...] | None, convert: Callable[[str, Any], Any]
) -> tuple[Any, ...]:
    """One value per dimension of the layout (``None``: this is the layout); a single value is repeated."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        values = tuple(convert(name, v) for v in value)
        if layout is not None and len(values) != len(layout):
            raise ValueError(
                f"{name}={value!r} has {len(values)} values, but layout {layout} has {len(layout)} dimensions: "
                "give one value, or one per dimension"
            )
        return values
    return (convert(name, value),) * (1 if layout is None else len(layout))


def as_int(name: str, value: Any) -> int:
    """An integer of any kind (not a bool) as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} takes integers, one or one per dimension, but got {value!r}")
    return operator.index(value)


def _as_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} takes True or False, one or one per dimension, but got {value!r}")
    return bool(value)


def _as_count(name: str, value: Any, layout: tuple[int, ...]) -> int:
    count = as_int(name, value)
    if count < 0:
        raise ValueError(f"{name}={count} for layout {layout}: the number of text tokens must not be negative")
    return count
