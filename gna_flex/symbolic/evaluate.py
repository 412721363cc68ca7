"""SymPy expressions of integer value, evaluated on arrays of integers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sympy

_FUNCTIONS: dict[Any, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Pow: operator.pow,
    sympy.Mod: operator.mod,
    sympy.Min: np.minimum,
    sympy.Max: np.maximum,
}


def integers(expression: sympy.Expr, values: Mapping[sympy.Symbol, np.ndarray]) -> Any:
    """An expression evaluated in integers: quotients round down, which is exact where they are integers.

    Raises:
        ValueError: if the expression holds a function that is not supported.

    >>> n = sympy.Symbol("n", integer=True, positive=True)
    >>> integers(n // 7 + 2 * n, {n: np.array([6, 7, 49])}).tolist()
    [12, 15, 105]
    """
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return values[expression]
    if isinstance(expression, sympy.ceiling):
        return -integers(-expression.args[0], values)
    if isinstance(expression, sympy.floor):
        return integers(expression.args[0], values)
    numerator, denominator = sympy.fraction(sympy.together(expression))
    if denominator != 1:
        return integers(numerator, values) // integers(denominator, values)
    if isinstance(expression, sympy.Pow) and not expression.exp.is_Integer:
        raise ValueError(f"{expression}: powers with symbols in the exponent are not supported")
    function = _FUNCTIONS.get(expression.func)
    if function is None:
        raise ValueError(f"{expression}: {expression.func.__name__} is not supported; use + - * // % Min Max")
    return functools.reduce(function, (integers(argument, values) for argument in expression.args))
