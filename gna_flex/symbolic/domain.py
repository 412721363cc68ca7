"""Values that the symbols of a question can have: all legal ones where they are few, else a sample."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy

from gna_flex.symbolic.evaluate import integers
from gna_flex.symbolic.lemmas import Tiling, perfect
from gna_flex.symbolic.proof import Dimension

MOST_VALUES = 1 << 18
"""Most combinations of values that are checked one by one."""
SAMPLES = 1 << 14
LARGEST = 512
"""Largest value that is sampled for a symbol."""


@dataclass(frozen=True)
class Explored:
    """Legal values of the symbols: some (or all, if ``all_values``) for which the mask is perfect, or is not."""

    holds: Sequence[dict[sympy.Symbol, int]]
    fails: Sequence[dict[sympy.Symbol, int]]
    legal: int
    all_values: bool


def explore(dimensions: Sequence[Dimension], symbols: tuple[sympy.Symbol, ...], tiling: Tiling) -> Explored:
    """Checks all legal values of the symbols if they are few, else a random sample, small ones first."""
    candidates = _all_values(dimensions, symbols)
    all_values = candidates is not None
    if candidates is None:
        candidates = _sample(symbols, _largest_number(dimensions))
    legal, good = np.ones(candidates.shape[1], bool), np.ones(candidates.shape[1], bool)
    for dimension in dimensions:
        length, window, stride, dilation, tq, tk = _evaluate(dimension, symbols, candidates)
        legal &= (stride >= 1) & (window >= stride) & (dilation >= 1) & (window * dilation <= length)
        legal &= (tq >= 1) & (tk >= 1)
        # Illegal values are replaced by some legal ones, so that nothing is divided by zero.
        length, window, stride, dilation, tq, tk = (
            np.where(legal, value, 1) for value in (length, window, stride, dilation, tq, tk)
        )
        good &= perfect(length, window, stride, dilation, dimension.causal, tq, tk, tiling)
    return Explored(
        holds=_assignments(symbols, candidates[:, legal & good], all_values),
        fails=_assignments(symbols, candidates[:, legal & ~good], all_values),
        legal=int(legal.sum()),
        all_values=all_values,
    )


def _values(dimension: Dimension) -> tuple[Any, ...]:
    d = dimension
    return d.length, d.window, d.stride, d.dilation, d.q_tile, d.kv_tile


def _evaluate(dimension: Dimension, symbols: tuple[sympy.Symbol, ...], candidates: np.ndarray) -> list[np.ndarray]:
    """The numbers of a dimension for each candidate, arrays of one size."""
    results = []
    for value in _values(dimension):
        result = integers(sympy.sympify(value), dict(zip(symbols, candidates, strict=True)))
        results.append(np.broadcast_to(np.asarray(result, np.int64), candidates.shape[1:]))
    return results


def _all_values(dimensions: Sequence[Dimension], symbols: tuple[sympy.Symbol, ...]) -> np.ndarray | None:
    """Every value that may be legal, ``[symbols, combinations]``; ``None`` if there are too many or no bound is known.

    With a numeric layout of length ``L``, windows, strides and dilations are at most ``L``, and tiles longer than ``L``
    are all alike. So where symbols occur as ``a * x + b`` only (``a >= 1``, ``b >= 0``), values up to ``L`` will do.
    """
    if any(sympy.sympify(d.length).free_symbols for d in dimensions):
        return None
    expressions = [sympy.sympify(value) for d in dimensions for value in _values(d)[1:]]
    if not all(_is_increasing(e) for e in expressions):
        return None
    # One more stands for all longer tiles.
    largest = max(d.length for d in dimensions) + 1
    if float(largest) ** len(symbols) > 100 * MOST_VALUES:
        return None
    allowed = [_allowed(symbol, range(largest + 1)) for symbol in symbols]
    if np.prod([float(len(values)) for values in allowed]) > MOST_VALUES:
        return None
    return np.array(list(itertools.product(*allowed)), dtype=np.int64).T.reshape(len(symbols), -1)


def _is_increasing(expression: sympy.Expr) -> bool:
    """Whether it is a number, or ``a * x + b`` of one symbol with ``a >= 1`` and ``b >= 0``."""
    if expression.is_number:
        return True
    if len(expression.free_symbols) != 1:
        return False
    (symbol,) = expression.free_symbols
    slope, rest = sympy.expand(expression).coeff(symbol, 1), sympy.expand(expression).coeff(symbol, 0)
    linear = sympy.expand(expression - slope * symbol - rest) == 0
    return bool(linear and slope.is_Integer and slope >= 1 and rest.is_Integer and rest >= 0)


def _largest_number(dimensions: Sequence[Dimension]) -> int:
    """The largest number in the question: symbols near it and above matter."""
    numbers = {n for d in dimensions for value in _values(d) for n in sympy.sympify(value).atoms(sympy.Integer)}
    return max((abs(int(n)) for n in numbers), default=0)


def _sample(symbols: tuple[sympy.Symbol, ...], top: int) -> np.ndarray:
    """Random values, ``[symbols, samples]``, small ones and those around ``top`` more often, sorted by their sum."""
    random = np.random.default_rng(0)
    ranges = [range(17), range(65), range(0, LARGEST, 8), range(LARGEST + 1)]
    if top > LARGEST:
        ranges += [range(top, top + 65), range(0, 4 * top, top // 64)]
    columns = []
    for symbol in symbols:
        pools = [pool for pool in (_allowed(symbol, values) for values in ranges) if len(pool)]
        if not pools:
            return np.zeros((len(symbols), 0), np.int64)
        drawn = np.concatenate([random.choice(pool, SAMPLES // len(pools)) for pool in pools])
        columns.append(random.permutation(np.resize(drawn, SAMPLES)))
    candidates = np.stack(columns)
    return candidates[:, np.argsort(candidates.sum(0), kind="stable")]


def _allowed(symbol: sympy.Symbol, values: Sequence[int]) -> np.ndarray:
    """The values that agree with what was declared of a symbol."""
    return np.array([value for value in values if value > 0 or not symbol.is_positive], np.int64)


def _assignments(
    symbols: tuple[sympy.Symbol, ...], columns: np.ndarray, every: bool
) -> Sequence[dict[sympy.Symbol, int]]:
    columns = columns if every else columns[:, :1]
    return [dict(zip(symbols, map(int, column), strict=True)) for column in columns.T]
