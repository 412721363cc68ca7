"""``SymbolicGNA``: a neighborhood whose numbers may be SymPy expressions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy

from gna_flex.neighborhood import GNA, as_int

Number = Any
"""An int, or a SymPy expression of integer value."""
Numbers = Number | Iterable[Number]


@dataclass(frozen=True)
class SymbolicGNA:
    """A GNA in which layout, window, stride and dilation may be SymPy expressions of integer symbols.

    Every argument but the layout is one value for all dimensions or one per dimension. Values are taken to be legal,
    ``1 <= stride <= window`` and ``window * dilation <= layout``: symbols stand for the values that are.

    Args:
        layout: grid size in tokens per dimension.
        window, stride, dilation: as in :class:`gna_flex.GNA`; ``-1`` for a window is the whole dimension.
        causal: plain bools.

    Raises:
        ValueError: if a value can never be legal, or a symbol is not declared integer and positive or not negative.

    >>> n = sympy.Symbol("n", integer=True, positive=True)
    >>> str(SymbolicGNA((8 * n, 64), window=8, stride=8))
    'layout 8*nx64, window 8x8, stride 8x8'
    """

    layout: tuple[Number, ...]
    window: tuple[Number, ...]
    stride: tuple[Number, ...]
    dilation: tuple[Number, ...]
    causal: tuple[bool, ...]
    text_first: int = 0
    text_last: int = 0

    def __init__(
        self, layout: Numbers, window: Numbers, stride: Numbers = 1, dilation: Numbers = 1, causal: Any = False
    ) -> None:
        sizes = numbers("layout", layout, None)
        if not 1 <= len(sizes) <= 3:
            raise ValueError(f"layout={layout!r} has {len(sizes)} dimensions; GNA layouts have 1, 2 or 3")
        windows = numbers("window", window, len(sizes))
        dilations = numbers("dilation", dilation, len(sizes))
        values = {
            "layout": sizes,
            "window": tuple(n // d if w == -1 else w for n, w, d in zip(sizes, windows, dilations, strict=True)),
            "stride": numbers("stride", stride, len(sizes)),
            "dilation": dilations,
            "causal": tuple(bool(c) for c in (causal if isinstance(causal, Iterable) else [causal] * len(sizes))),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if len(self.causal) != self.ndim:
            raise ValueError(f"causal={causal!r} has {len(self.causal)} values for layout {sizes}")
        for length, w, s, d, _ in self.dims():
            for rule in (s >= 1, w >= s, d >= 1, w * d <= length):
                if rule == False:  # noqa: E712  (rules may be SymPy Booleans)
                    raise ValueError(
                        f"window={w}, stride={s}, dilation={d} for length {length}: no value of the symbols is legal; "
                        f"1 <= stride <= window and window * dilation <= length must be possible"
                    )

    @property
    def ndim(self) -> int:
        """Dimensions of the grid: 1, 2 or 3."""
        return len(self.layout)

    def dims(self) -> Iterable[tuple[Number, Number, Number, Number, bool]]:
        """Per dimension ``(length, window, stride, dilation, causal)``, slowest dimension first."""
        return zip(self.layout, self.window, self.stride, self.dilation, self.causal, strict=True)

    def subs(self, values: dict[sympy.Symbol, int]) -> GNA:
        """The GNA with numbers in place of all symbols.

        >>> n = sympy.Symbol("n", integer=True, positive=True)
        >>> SymbolicGNA(8 * n, window=n).subs({n: 4})
        GNA(layout=(32,), window=(4,), stride=(1,), dilation=(1,), causal=(False,), text_first=0, text_last=0)
        """
        layout, window, stride, dilation = (
            [substitute(x, values) for x in part] for part in (self.layout, self.window, self.stride, self.dilation)
        )
        return GNA(layout, window, stride, dilation, self.causal)

    def __str__(self) -> str:
        parts = [f"layout {_show(self.layout)}", f"window {_show(self.window)}"]
        parts += [f"stride {_show(self.stride)}"] if set(self.stride) != {1} else []
        parts += [f"dilation {_show(self.dilation)}"] if set(self.dilation) != {1} else []
        parts += ["causal " + "/".join("yes" if c else "no" for c in self.causal)] if any(self.causal) else []
        return ", ".join(parts)


def numbers(name: str, value: Numbers, ndim: int | None) -> tuple[Number, ...]:
    """One checked int or expression per dimension; SymPy integers become ints."""
    values = tuple(value) if isinstance(value, Iterable) else (value,) * (ndim or 1)
    if ndim is not None and len(values) != ndim:
        raise ValueError(f"{name}={value!r} has {len(values)} values; the layout has {ndim} dimensions")
    return tuple(_number(name, v) for v in values)


def substitute(value: Number, values: dict[sympy.Symbol, int]) -> int:
    """The number that an expression has for given values of its symbols."""
    return int(sympy.sympify(value).subs(values))


def _number(name: str, value: Number) -> Number:
    if not isinstance(value, sympy.Expr):
        return as_int(name, value)
    expression = sympy.expand(value)
    if expression.is_Integer:
        return int(expression)
    if not expression.is_integer:
        raise ValueError(f"{name}={value}: not known to be an integer; declare symbols integer=True")
    for symbol in expression.free_symbols:
        if not symbol.is_nonnegative:
            raise ValueError(f"{name}={value}: declare the symbol {symbol} positive=True (or nonnegative=True)")
        # SymPy 1.14 takes n / 3 for no integer and n / 6 for one if n is declared even.
        if symbol.is_even is not None or symbol.is_prime is not None or symbol.is_composite is not None:
            raise ValueError(
                f"{name}={value}: declare the symbol {symbol} integer only, and write 2*{symbol} if it is even"
            )
    return expression


def _show(values: tuple[Number, ...]) -> str:
    return "x".join(str(v) for v in values)
