"""``solve()``: which strides, windows or tiles make a neighborhood perfectly block-sparse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import sympy
from sympy.logic.boolalg import Boolean

from gna_flex.intervals import ceil_div
from gna_flex.neighborhood import GNA, Ints
from gna_flex.symbolic.lemmas import Tiling, perfect
from gna_flex.symbolic.neighborhood import SymbolicGNA
from gna_flex.symbolic.proof import LONG_CONDITION, Proof, Refutation, condition_text
from gna_flex.symbolic.prove import check_tiling, prove, tile_numbers

Unknown = Literal["stride", "window", "q_tile", "kv_tile"]
UNKNOWNS: tuple[Unknown, ...] = ("stride", "window", "q_tile", "kv_tile")


@dataclass(frozen=True)
class Solution:
    """All values of one argument that make a neighborhood perfectly block-sparse: any choice per dimension.

    Iterating gives every combination, a tuple per dimension each, in row-major order.

    Attributes:
        unknown: the argument that was solved for.
        gna, q_tile, kv_tile, tiling: the question; the unknown's own value in it does not matter.
        values: per dimension the values that do, ascending; tiles up to the length of the dimension (all longer ones
            are like that).
    """

    unknown: Unknown
    gna: GNA
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    tiling: Tiling
    values: tuple[tuple[int, ...], ...]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*self.values)

    def __len__(self) -> int:
        return math.prod(map(len, self.values))

    def __contains__(self, value: object) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) == len(self.values)
            and all(v in choices for v, choices in zip(value, self.values, strict=True))
        )

    @property
    def smallest(self) -> tuple[int, ...] | None:
        """The smallest value in every dimension: for strides, the one nearest to a true sliding window."""
        return tuple(choices[0] for choices in self.values) if len(self) else None

    @property
    def largest(self) -> tuple[int, ...] | None:
        """The largest value in every dimension."""
        return tuple(choices[-1] for choices in self.values) if len(self) else None

    @property
    def condition(self) -> Boolean:
        """The condition on symbols ``stride0``, ``stride1``, ... (or ``window0``, ...), exact for legal values."""
        symbols = sympy.symbols([f"{self.unknown}{axis}" for axis in range(self.gna.ndim)], integer=True, positive=True)
        answer = self.prove(tuple(symbols))
        if isinstance(answer, Refutation):
            return sympy.false
        return sympy.And(*answer.conditions)

    def prove(self, value: Any) -> Proof | Refutation:
        """:func:`prove` with a value (or symbols) in place of the unknown."""
        tiles = {"q_tile": self.q_tile, "kv_tile": self.kv_tile}
        if self.unknown in tiles:
            tiles[self.unknown] = value
            return prove(self.gna, tiles["q_tile"], tiles["kv_tile"], self.tiling)
        changed: GNA | SymbolicGNA
        if all(isinstance(v, int) for v in value):
            changed = replace(self.gna, **{self.unknown: value})
        else:
            gna = self.gna
            parts = {"window": gna.window, "stride": gna.stride, self.unknown: value}
            changed = SymbolicGNA(gna.layout, dilation=gna.dilation, causal=gna.causal, **parts)
        return prove(changed, self.q_tile, self.kv_tile, self.tiling)

    def to_json(self) -> dict[str, Any]:
        """All values per dimension and the condition, as JSON takes them."""
        return {
            "unknown": self.unknown,
            "tiling": self.tiling,
            "values": [list(choices) for choices in self.values],
            "combinations": len(self),
            "smallest": self.smallest and list(self.smallest),
            "largest": self.largest and list(self.largest),
            "condition": str(self.condition),
        }

    def __str__(self) -> str:
        names = {"q_tile": "query tile", "kv_tile": "key tile"}
        lines = [f"{names.get(self.unknown, self.unknown)}s for which {self.gna} is perfectly block-sparse:"]
        for axis, choices in enumerate(self.values):
            shown = ", ".join(map(str, choices[:12])) + (", ..." if len(choices) > 12 else "")
            lines.append(f"  dimension {axis}: {shown or 'none'}")
        text = condition_text(self.condition)
        return "\n".join([*lines, f"  if and only if {text}"] if len(text) <= LONG_CONDITION else lines)


def solve(
    gna: GNA, q_tile: Ints, kv_tile: Ints | None = None, *, unknown: Unknown = "stride", tiling: Tiling = "static"
) -> Solution:
    """All strides, windows, query tiles or key tiles that make a neighborhood perfectly block-sparse.

    Args:
        gna: the neighborhood; its own value of the unknown is ignored (but strides stay below windows).
        q_tile: tokens of a query tile per dimension; ignored if it is the unknown.
        kv_tile: tokens of a key tile, by default as the query tile; ignored if it is the unknown.
        unknown: "stride", "window", "q_tile" or "kv_tile".
        tiling: "static" or "anchored", as in :func:`prove`.

    Raises:
        ValueError: if an argument is out of range.

    >>> solution = solve(GNA((30, 48, 80), (18, 24, 24)), (4, 8, 8), (2, 8, 8))
    >>> solution.smallest, len(solution)
    ((16, 8, 8), 4)
    >>> solve(GNA(32768, 2048), 128, unknown="stride").smallest
    (256,)
    """
    q_tiles = tile_numbers("q_tile", q_tile, gna)
    kv_tiles = q_tiles if kv_tile is None else tile_numbers("kv_tile", kv_tile, gna)
    check_tiling(tiling)
    if unknown not in UNKNOWNS:
        raise ValueError(f"unknown={unknown!r}: must be one of {', '.join(map(repr, UNKNOWNS))}")
    values = tuple(
        solve_dimension(unknown, *dim, tq, tk, tiling)
        for dim, tq, tk in zip(gna.dims(), q_tiles, kv_tiles, strict=True)
    )
    return Solution(unknown, gna, q_tiles, kv_tiles, tiling, values)


def solve_dimension(
    unknown: Unknown,
    length: int,
    window: int,
    stride: int,
    dilation: int,
    causal: bool,
    q_tile: int,
    kv_tile: int,
    tiling: Tiling,
) -> tuple[int, ...]:
    """The values of one dimension.

    >>> solve_dimension("stride", 48, 24, 1, 1, False, 8, 8, "static")
    (8, 24)
    """
    ranges = {
        "stride": (1, window),
        "window": (stride, length // dilation),
        "q_tile": (1, ceil_div(length, dilation)),
        "kv_tile": (1, ceil_div(length, dilation)),
    }
    first, last = ranges[unknown]
    tried = np.arange(first, last + 1)
    numbers: dict[str, Any] = {"window": window, "stride": stride, "q_tile": q_tile, "kv_tile": kv_tile}
    numbers[unknown] = tried
    good = perfect(
        length, numbers["window"], numbers["stride"], dilation, causal, numbers["q_tile"], numbers["kv_tile"], tiling
    )
    return tuple(tried[np.broadcast_to(good, tried.shape)].tolist())
