"""``prove()``: whether a neighborhood is perfectly block-sparse in given tiles, with the reasons."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from gna_flex.neighborhood import GNA
from gna_flex.symbolic.conditions import Verdict, conjunction, decide
from gna_flex.symbolic.domain import explore
from gna_flex.symbolic.lemmas import TILINGS, Case, Condition, Tiling, cases, group_lengths, moves
from gna_flex.symbolic.neighborhood import Number, Numbers, SymbolicGNA, numbers
from gna_flex.symbolic.proof import Argument, Branch, Dimension, Group, Proof, Refutation, Step

Dim = tuple[Number, Number, Number, Number, bool]
"""Length, window, stride, dilation and causality of one dimension."""


def prove(
    gna: GNA | SymbolicGNA, q_tile: Numbers, kv_tile: Numbers | None = None, tiling: Tiling = "static"
) -> Proof | Refutation:
    """Proves or refutes that no visited tile needs a mask (GNA paper, section 3.2), exactly and in closed form.

    Numbers give a proof or a refutation. With symbols the answer may also be a proof with conditions: perfectly
    block-sparse if and only if they hold. Text tokens do not matter: their blocks are always full.

    Args:
        gna: the neighborhood; a :class:`SymbolicGNA` to use SymPy expressions.
        q_tile: tokens of a query tile per dimension (inside a dilation group), or one number for all; may be symbols.
        kv_tile: tokens of a key tile; by default as the query tile.
        tiling: "static": key tiles lie on a grid from token 0 on. "anchored": those of a query tile start where its
            window starts.

    Raises:
        ValueError: if a tile does not fit the layout, or the tiling is neither.

    >>> result = prove(GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)), (4, 8, 8), (2, 8, 8))
    >>> result.perfect
    True
    >>> result = prove(GNA(256, window=80), 16)
    >>> result.perfect, str(result.remedies[0])
    (False, 'stride 16 instead of 1')
    >>> n, s = sympy.symbols("n s", integer=True, positive=True)
    >>> prove(SymbolicGNA(128 * n + 64, window=64, stride=64), 64, 32).perfect
    True
    >>> prove(SymbolicGNA(128 * n + 256, window=64, stride=16 * s), 16, 16).conditions
    (Eq(Mod(s, 2), 0),)
    """
    q_tiles = tile_numbers("q_tile", q_tile, gna)
    kv_tiles = q_tiles if kv_tile is None else tile_numbers("kv_tile", kv_tile, gna)
    check_tiling(tiling)
    dimensions = tuple(
        _dimension(axis, dim, tq, tk, tiling)
        for axis, (dim, tq, tk) in enumerate(zip(gna.dims(), q_tiles, kv_tiles, strict=True))
    )
    question = Argument(gna, q_tiles, kv_tiles, tiling, dimensions)
    verdict = conjunction(dimension.verdict for dimension in dimensions)
    symbols = symbols_of(dimensions)
    if not symbols:
        return Proof(*question.parts) if verdict is True else Refutation(*question.parts)
    return _with_symbols(question, verdict, symbols)


def _with_symbols(question: Argument, verdict: Verdict, symbols: tuple[sympy.Symbol, ...]) -> Proof | Refutation:
    """The answer where symbols remain: exact over few legal values, else what the derivation left."""
    found = explore(question.dimensions, symbols, question.tiling)
    if not found.legal and found.all_values:
        rule = "1 <= stride <= window and window * dilation <= layout, tiles at least 1"
        raise ValueError(f"{question.gna}: no value of {', '.join(map(str, symbols))} is legal; {rule}")
    if (verdict is True and found.fails) or (verdict is False and found.holds):
        wrong = (found.fails or found.holds)[0]
        raise RuntimeError(
            f"{question.question}: SymPy derived {verdict}, but {wrong} says otherwise; please report this"
        )
    if verdict is True or (found.all_values and not found.fails):
        return Proof(*question.parts, checked=0 if verdict is True else found.legal)
    if verdict is False or (found.all_values and not found.holds):
        return Refutation(*question.parts, substitution=found.fails[0] if found.fails else None)
    return Proof(
        *question.parts,
        conditions=tuple(sorted(sympy.And.make_args(verdict), key=str)),
        holds_for=found.holds[0] if found.holds else None,
        fails_for=found.fails[0] if found.fails else None,
        values=tuple(found.holds) if found.all_values else None,
        checked=found.legal if found.all_values else 0,
    )


def symbols_of(dimensions: Sequence[Dimension]) -> tuple[sympy.Symbol, ...]:
    """The symbols of all dimensions, by name."""
    values = [x for d in dimensions for x in (d.length, d.window, d.stride, d.dilation, d.q_tile, d.kv_tile)]
    symbols = sorted({symbol for x in values if not isinstance(x, int) for symbol in x.free_symbols}, key=str)
    names = [symbol.name for symbol in symbols]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two different symbols are called {twice}: declare it once, and use that one everywhere")
    return tuple(symbols)


def tile_numbers(name: str, tile: Numbers, gna: GNA | SymbolicGNA) -> tuple[Number, ...]:
    """A checked tile side per dimension."""
    sides = numbers(name, tile, gna.ndim)
    if any((side >= 1) in (False, sympy.false) for side in sides):
        raise ValueError(f"{name}={tile!r} for layout {gna.layout}: every side must be at least 1")
    return sides


def check_tiling(tiling: str) -> None:
    """Refuses unknown tilings."""
    if tiling not in TILINGS:
        raise ValueError(f"tiling={tiling!r}: must be one of {', '.join(map(repr, TILINGS))}")


def _dimension(axis: int, dim: Dim, tq: Number, tk: Number, tiling: Tiling) -> Dimension:
    length, _, _, dilation, _ = dim
    groups = tuple(_group(size, dim, tq, tk, tiling) for size in group_lengths(length, dilation))
    return Dimension(axis, *dim, tq, tk, groups)


def _group(size: Number, dim: Dim, tq: Number, tk: Number, tiling: Tiling) -> Group:
    length, window, stride, dilation, causal = dim
    found = cases(size, window, stride, causal, tq, tk, tiling)
    if all(isinstance(x, int) for x in (size, window, stride, tq, tk)):
        case = next(case for case in found if all(guard.holds for guard in case.guards))
        return Group(size, _starts(size, window, stride, causal), (_numeric(case),))
    at = moves(size, window, stride)
    facts = tuple(
        sympy.expand(fact)
        for fact in (
            size - window,
            window - stride,
            length - window * dilation,
            at.first_start - 1,
            stride - at.first_start,
            at.offset,
        )
        if not isinstance(fact, int)
    )
    branches = []
    for case in found:
        guards = _steps(case.guards, facts)
        if all(guard.verdict is not False for guard in guards):
            branches.append(Branch(case.lemma, guards, _steps(case.conditions, facts)))
    return Group(size, "", tuple(branches))


def _numeric(case: Case) -> Branch:
    return Branch(
        case.lemma,
        tuple(Step(guard, True) for guard in case.guards),
        tuple(Step(condition, bool(condition.holds)) for condition in case.conditions),
    )


def _steps(conditions: Sequence[Condition], facts: tuple[sympy.Expr, ...]) -> tuple[Step, ...]:
    return tuple(Step(condition, decide(condition, facts)) for condition in conditions)


def _starts(length: int, window: int, stride: int, causal: bool) -> str:
    """Where windows start, in words: the lemma *moves* with numbers."""
    if causal or length == window:
        return ""
    at = moves(length, window, stride)
    last = [at.slack]
    inner = [start for start in (at.first_start, at.first_start + stride) if start < at.slack]
    dots = ["..."] if at.first_start + 2 * stride < at.slack else []
    shown = ", ".join(map(str, [0, *inner, *dots, *last]))
    return f"Windows start at {shown}; the first move is at query {at.first_move}."
