"""Decides conditions that hold symbols: true for all legal values, for none, or what remains of them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import sympy
from sympy.logic.boolalg import Boolean

from gna_flex.symbolic.evaluate import integers
from gna_flex.symbolic.lemmas import Condition, Value

Verdict: TypeAlias = "bool | Boolean"
"""True, False, or the SymPy condition that remains."""
MOST_FACTS = 3
"""Most facts that are added up to show a comparison; the same one may be used again."""

POINTS = 256


def decide(condition: Condition, facts: tuple[sympy.Expr, ...] = ()) -> Verdict:
    """The verdict on one condition; an undecided one comes back simplified, equal for all legal values.

    Args:
        condition: what to decide.
        facts: expressions known not to be negative.

    >>> n = sympy.Symbol("n", integer=True, positive=True)
    >>> decide(Condition("divides", 8, 16 * n, "key tile", "window"))
    True
    >>> decide(Condition("divides", 8, 16 * n + 12 * n + 4, "key tile", "window"))
    Eq(Mod(n + 1, 2), 0)
    """
    left, right = condition.left, condition.right
    if isinstance(left, int) and isinstance(right, int):
        return bool(condition.holds)
    left, right = tidy(left), tidy(right)
    if condition.relation == "divides":
        return divides(left, right, facts)
    if condition.relation == "equals":
        return _equals(left, right, facts)
    verdict = at_most(left, right, facts)
    if condition.relation == "at most":
        return verdict
    return not verdict if isinstance(verdict, bool) else sympy.Gt(left, right)


def tidy(value: Value) -> sympy.Expr:
    """An expression multiplied out, with halves of odd numbers rounded down."""
    expression = sympy.expand(sympy.sympify(value))
    return sympy.expand(expression.replace(_is_floor_of_odd_half, lambda half: half.args[0] - sympy.Rational(1, 2)))


def divides(divisor: sympy.Expr, value: sympy.Expr, facts: tuple[sympy.Expr, ...] = ()) -> Verdict:
    """Whether the positive ``divisor`` divides ``value``; multiples of it are dropped from what remains."""
    terms = [t for t in sympy.Add.make_args(value) if not _is_whole(t / divisor)]
    divisor, rest = _reduced(divisor, terms)
    if rest == 0 or _is_whole(rest / divisor):
        return True
    if rest.could_extract_minus_sign():
        rest = -rest
    if _never(divisor, rest) or (not_negative(rest - 1, facts) and not_negative(divisor - rest - 1, facts)):
        return False
    return _plain(sympy.Eq(sympy.Mod(rest, divisor, evaluate=False), 0))


def _is_whole(quotient: sympy.Expr) -> bool:
    """Whether no denominator remains; SymPy's own ``is_integer`` is wrong for some even and odd numbers."""
    return bool(sympy.fraction(sympy.together(sympy.expand(quotient)))[1] == 1)


def _never(divisor: sympy.Expr, value: sympy.Expr) -> bool:
    """Whether all terms but a constant have a factor in common with the divisor that the constant has not."""
    constant, rest = value.as_coeff_Add()
    numbers = [divisor, constant, *(term.as_coeff_Mul()[0] for term in sympy.Add.make_args(rest))]
    if not all(number.is_Integer for number in numbers):
        return False
    return bool(constant % math.gcd(divisor, *numbers[2:]) != 0)


def _reduced(divisor: sympy.Expr, terms: Sequence[sympy.Expr]) -> tuple[sympy.Expr, sympy.Expr]:
    """Divisor and sum with small coefficients and no common factor, if the divisor is a number."""
    parts = [term.as_coeff_Mul() for term in terms]
    if not divisor.is_Integer or not all(number.is_Integer for number, _ in parts):
        return divisor, sympy.Add(*terms)
    # Of the two residues the one nearer to zero.
    residues = [(number + divisor // 2) % divisor - divisor // 2 for number, _ in parts]
    factor = sympy.Integer(math.gcd(divisor, *residues))
    return divisor / factor, sympy.Add(*(n / factor * term for n, (_, term) in zip(residues, parts, strict=True)))


def at_most(left: sympy.Expr, right: sympy.Expr, facts: tuple[sympy.Expr, ...]) -> Verdict:
    """Whether ``left <= right``, both integers."""
    if not_negative(right - left, facts):
        return True
    if not_negative(left - right - 1, facts):
        return False
    return _plain(sympy.Le(left, right))


@functools.lru_cache(maxsize=4096)
def not_negative(value: sympy.Expr, facts: tuple[sympy.Expr, ...]) -> bool:
    """Whether ``value >= 0`` follows from the signs of its symbols and from a sum of up to three facts."""
    value = sympy.expand(value)
    if value.is_nonnegative:
        return True
    if value.is_number or value.is_negative:
        return False
    if _negative_somewhere(value, facts):
        return False
    related = [fact for fact in facts if fact.free_symbols & value.free_symbols]
    return any(
        sympy.expand(value - sympy.Add(*chosen)).is_nonnegative
        for many in range(1, MOST_FACTS + 1)
        for chosen in itertools.combinations_with_replacement(related, many)
    )


def _negative_somewhere(value: sympy.Expr, facts: tuple[sympy.Expr, ...]) -> bool:
    """Whether some values of the symbols that agree with the facts make it negative: then there is nothing to show."""
    symbols = tuple(sorted(set().union(value.free_symbols, *(fact.free_symbols for fact in facts)), key=str))
    points = dict(zip(symbols, _points(len(symbols)), strict=True))
    # Some of the points are illegal, and may divide by zero; facts sort them out.
    with np.errstate(divide="ignore"):
        agree = np.ones(POINTS, bool)
        for fact in facts:
            agree &= np.asarray(integers(fact, points)) >= 0
        return bool(np.any(agree & (np.asarray(integers(value, points)) < 0)))


@functools.lru_cache(maxsize=16)
def _points(symbols: int) -> np.ndarray:
    """Positive numbers to try, small and large, ``[symbols, POINTS]``."""
    return np.exp(np.random.default_rng(0).uniform(0, 8, (symbols, POINTS))).astype(np.int64)


def conjunction(verdicts: Iterable[Verdict]) -> Verdict:
    """All of several verdicts."""
    return _plain(sympy.And(*verdicts))


def disjunction(verdicts: Iterable[Verdict]) -> Verdict:
    """Any of several verdicts."""
    return _plain(sympy.Or(*verdicts))


def _equals(left: sympy.Expr, right: sympy.Expr, facts: tuple[sympy.Expr, ...]) -> Verdict:
    difference = sympy.expand(left - right)
    if difference == 0:
        return True
    if not_negative(difference - 1, facts) or not_negative(-difference - 1, facts):
        return False
    return _plain(sympy.Eq(left, right))


def _is_floor_of_odd_half(expression: sympy.Expr) -> bool:
    return isinstance(expression, sympy.floor) and _is_whole(expression.args[0] - sympy.Rational(1, 2))


def _plain(verdict: Boolean) -> Verdict:
    """A Python bool in place of SymPy's true and false."""
    return bool(verdict) if verdict in (sympy.true, sympy.false) else verdict
