"""The lemmas of perfect block-sparsity: each stated once, in words, in LaTeX and as code.

A (GNA, query tile, key tile) is *perfectly block-sparse* when every key tile that a query tile visits is wanted by all
of its queries: every pair of tokens in it is kept, so no tile needs a mask (Generalized Neighborhood Attention, section
3.2). Places of a tile outside of the grid hold no tokens and do not count.

The functions take Python ints, NumPy arrays or SymPy expressions, freely mixed, as :mod:`gna_flex.intervals` does.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import sympy

from gna_flex.intervals import ceil_div, equal

Value = Any
"""An int, a NumPy array or a SymPy expression."""
Tiling = Literal["static", "anchored"]
TILINGS: tuple[Tiling, ...] = ("static", "anchored")


@dataclass(frozen=True)
class Lemma:
    """A rule that proofs cite: a name, and what it says in words and in LaTeX."""

    name: str
    statement: str
    latex: str


LEMMAS = {
    lemma.name: lemma
    for lemma in (
        Lemma(
            "product",
            "A tile pair is visited when it is in every dimension, and full when it is in every dimension; every query "
            "sees at least one key. So a mask is perfectly block-sparse if and only if each dimension is.",
            r"\text{perfect} \iff \forall a:\ \text{perfect}_a",
        ),
        Lemma(
            "groups",
            "Dilation d splits a dimension of length L into d independent problems of length floor(L/d) or ceil(L/d); "
            "tiles lie inside one of them.",
            r"L_g \in \{\lfloor L/d \rfloor, \lceil L/d \rceil\}",
        ),
        Lemma(
            "shared",
            "If a tile pair is always full or skipped, all queries of a tile see the same keys: where two of them "
            "differ, some key tile is wanted by one and not by the other.",
            r"\text{perfect} \Rightarrow \forall i, i' \text{ in a query tile}:\ [lo_i, hi_i) = [lo_{i'}, hi_{i'})",
        ),
        Lemma(
            "starts",
            "Not causal, the window of query i starts at clamp(s*(i div s) - offset, 0, L - w) with "
            "offset = w div 2 - s div 2; the clamp of the leader never matters.",
            r"lo_i = \mathrm{clamp}(s \lfloor i/s \rfloor - o,\ 0,\ L - w),\quad"
            r" o = \lfloor w/2 \rfloor - \lfloor s/2 \rfloor",
        ),
        Lemma(
            "moves",
            "For w < L the start is 0 up to query m = offset + f, f = s - offset mod s, where it first moves, to "
            "min(f, L - w). It moves again every s queries by s, until it is L - w.",
            r"f = s - (o \bmod s),\ m = o + f:\quad lo_m = \min(f, L - w),\ lo_{m+s} = \min(f + s, L - w),\ \dots",
        ),
        Lemma(
            "dense",
            "w = L: every query sees the whole dimension, and so does every tile.",
            r"w = L \Rightarrow \text{perfect}",
        ),
        Lemma(
            "one move",
            "0 < L - w <= f: windows start at 0 or at L - w only. Perfect if and only if the key tile divides w (and, "
            "static, L) and the query tile divides m.",
            r"0 < L - w \le f:\quad \text{perfect} \iff T_K \mid w,\ T_K \mid L \text{ (static)},\ T_Q \mid m",
        ),
        Lemma(
            "two moves",
            "f < L - w <= f + s: windows start at 0, f or L - w. Perfect if and only if the key tile divides w, L and "
            "f, and the query tile divides s.",
            r"f < L - w \le f + s:\quad \text{perfect} \iff T_K \mid w,\ T_K \mid L,\ T_K \mid f,\ T_Q \mid s",
        ),
        Lemma(
            "many moves",
            "L - w > f + s: windows start at 0, f, f + s, ..., L - w. Perfect if and only if the key tile divides w, "
            "L, s and offset, and the query tile divides s.",
            r"L - w > f + s:\quad \text{perfect} \iff T_K \mid w,\ T_K \mid L,\ T_K \mid s,\ T_K \mid o,\ T_Q \mid s",
        ),
        Lemma(
            "anchored moves",
            "Key tiles start where the window starts, L - w > f: perfect if and only if the key tile divides w and "
            "the query tile divides s.",
            r"L - w > f:\quad \text{perfect} \iff T_K \mid w,\ T_Q \mid s",
        ),
        Lemma(
            "single",
            "A dilation group of one token sees itself: there is one tile and it is full.",
            r"L_g = 1 \Rightarrow \text{perfect}",
        ),
        Lemma(
            "causal",
            "A causal window ends at the query itself, so queries 0 and 1 differ, and query 0 sees one key: perfect if "
            "and only if both tiles are one token long.",
            r"L_g > 1:\quad \text{perfect} \iff T_Q = 1,\ T_K = 1",
        ),
        Lemma(
            "text",
            "Text tokens see everything and everything sees them, in blocks of their own: these blocks are full.",
            r"\text{text} \Rightarrow \text{full}",
        ),
    )
}


@dataclass(frozen=True)
class Condition:
    """A relation between two named values that a proof checks, such as *key tile 8 divides window 24*."""

    relation: Literal["divides", "equals", "at most", "more than"]
    left: Value
    right: Value
    left_name: str
    right_name: str

    @property
    def holds(self) -> Value:
        """The relation: a bool for ints, an array of bools for arrays, a SymPy Boolean for expressions."""
        if self.relation == "divides":
            return equal(self.right % self.left, 0)
        if self.relation == "equals":
            return equal(self.left, self.right)
        return self.left <= self.right if self.relation == "at most" else self.left > self.right

    def __str__(self) -> str:
        return self.text(True)

    def text(self, verdict: bool | None = True) -> str:
        """In words; denied if ``verdict`` is false."""
        verbs = {"divides": "does not divide", "equals": "is not", "at most": "is not at most", "more than": "is not >"}
        own = {"divides": "divides", "equals": "is", "at most": "is at most", "more than": "is more than"}
        verb = (verbs if verdict is False else own)[self.relation]
        return f"{_named(self.left_name, self.left)} {verb} {_named(self.right_name, self.right)}"

    def latex(self, verdict: bool | None = True) -> str:
        """In LaTeX; denied if ``verdict`` is false."""
        signs = {"divides": r"\mid", "equals": "=", "at most": r"\le", "more than": ">"}
        denied = {"divides": r"\nmid", "equals": r"\ne", "at most": r"\not\le", "more than": r"\not>"}
        sign = (denied if verdict is False else signs)[self.relation]
        left, right = (
            _latex(name, value) for name, value in ((self.left_name, self.left), (self.right_name, self.right))
        )
        return f"{left} {sign} {right}"


class Case(NamedTuple):
    """A case of a dimension: where it applies, and what it then comes down to. Cases exclude each other."""

    lemma: str
    guards: tuple[Condition, ...]
    conditions: tuple[Condition, ...]


class Moves(NamedTuple):
    """Where the windows of a dilation group start; not causal. Lemmas *starts* and *moves*.

    Attributes:
        slack: room for windows to move, ``L - w``.
        offset: how far the start lies before the stride group, ``w // 2 - s // 2``.
        first_start: start of the first window that does not touch the left edge (if the slack allows), ``1 .. s``.
        first_move: the first query that sees it, a multiple of ``s``.
    """

    slack: Value
    offset: Value
    first_start: Value
    first_move: Value


def moves(length: Value, window: Value, stride: Value) -> Moves:
    """Where windows start.

    >>> moves(48, 24, 8)
    Moves(slack=24, offset=8, first_start=8, first_move=16)
    """
    offset = window // 2 - stride // 2
    first_start = stride - offset % stride
    return Moves(length - window, offset, first_start, offset + first_start)


def group_lengths(length: Value, dilation: Value) -> tuple[Value, ...]:
    """The lengths that dilation groups have: the longer one first, each once where that is known.

    >>> group_lengths(10, 3), group_lengths(9, 3)
    ((4, 3), (3,))
    """
    longer, shorter = ceil_div(length, dilation), length // dilation
    same = isinstance(longer, int | sympy.Basic) and longer == shorter
    return (longer,) if same else (longer, shorter)


def cases(
    length: Value, window: Value, stride: Value, causal: bool, q_tile: Value, kv_tile: Value, tiling: Tiling
) -> tuple[Case, ...]:
    """The cases of one dilation group of ``length`` tokens: exactly one applies.

    >>> [case.lemma for case in cases(48, 24, 8, False, 8, 8, "static") if all(guard.holds for guard in case.guards)]
    ['many moves']
    """
    size, keys, group = ("length", length), ("window", window), ("stride", stride)
    tile_q, tile_k = ("query tile", q_tile), ("key tile", kv_tile)
    one = ("", 1)
    if causal:
        ones = (_condition("equals", tile_q, one), _condition("equals", tile_k, one))
        return (
            Case("single", (_condition("at most", size, one),), ()),
            Case("causal", (_condition("more than", size, one),), ones),
        )
    at = moves(length, window, stride)
    slack, first = ("slack", at.slack), ("first start", at.first_start)
    second, turn, offset = ("second start", at.first_start + stride), ("first move", at.first_move), at.offset
    moving, far = _condition("more than", slack, ("", 0)), _condition("more than", slack, first)
    once = (moving, _condition("at most", slack, first))
    turns, strides = _condition("divides", tile_q, turn), _condition("divides", tile_q, group)
    whole = _condition("divides", tile_k, keys)
    dense = Case("dense", (_condition("equals", keys, size),), ())
    if tiling == "anchored":
        return dense, Case("one move", once, (whole, turns)), Case("anchored moves", (far,), (whole, strides))
    grid = (whole, _condition("divides", tile_k, size))
    start, steps = _condition("divides", tile_k, first), _condition("divides", tile_k, group)
    return (
        dense,
        Case("one move", once, (*grid, turns)),
        Case("two moves", (far, _condition("at most", slack, second)), (*grid, start, strides)),
        Case(
            "many moves",
            (_condition("more than", slack, second),),
            (*grid, steps, _condition("divides", tile_k, ("offset", offset)), strides),
        ),
    )


def perfect(
    length: Value,
    window: Value,
    stride: Value,
    dilation: Value,
    causal: bool,
    q_tile: Value,
    kv_tile: Value,
    tiling: Tiling,
) -> Value:
    """Whether one dimension is perfectly block-sparse, exactly, at a cost that does not depend on its length.

    >>> perfect(48, 24, 8, 1, False, 8, 8, "static"), perfect(48, 24, 4, 1, False, 8, 8, "static")
    (True, False)
    """
    result: Value = True
    for size in group_lengths(length, dilation):
        found = [
            functools.reduce(operator.and_, (c.holds for c in (*case.guards, *case.conditions)))
            for case in cases(size, window, stride, causal, q_tile, kv_tile, tiling)
        ]
        result = result & functools.reduce(operator.or_, found)
    return result


def _condition(relation: Any, left: tuple[str, Value], right: tuple[str, Value]) -> Condition:
    return Condition(relation, left[1], right[1], left[0], right[0])


_SYMBOLS = {
    "length": "L",
    "window": "w",
    "stride": "s",
    "query tile": "T_Q",
    "key tile": "T_K",
    "slack": "L - w",
    "offset": "o",
    "first start": "f",
    "second start": "f + s",
    "first move": "m",
}


def _named(name: str, value: Value) -> str:
    return f"{name} {value}" if name else str(value)


def _latex(name: str, value: Value) -> str:
    text = sympy.latex(value)
    return text if not name or text == _SYMBOLS[name] else rf"\underbrace{{{text}}}_{{{_SYMBOLS[name]}}}"
