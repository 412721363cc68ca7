"""Exact values of a traced mask: tables over all tokens, and expressions simplified for a part of the tokens.

Whatever depends on the query alone, or on the key alone, is a table with one number per token. The rest is small, and
is evaluated only for the pairs that matter. Values that may overflow their type or may round are refused, so that
eager mode and every compiled kernel agree with what is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from gna_flex.symbolic.trace import FLOATS, INTEGERS, Node, Refused, constant, make, nodes_of

Array = Any
"""A NumPy array of bool, int64 or float64, or a NumPy scalar."""

CHUNK = 1 << 20
"""Pairs evaluated at a time."""

_FLOAT_LIMIT = 2.0**30
_FLOAT_STEP = 2.0**-10
"""Floating-point values must be multiples of the step below the limit: then float64 has no rounding at all."""

_INT64_LIMIT = 1 << 62


def _truncdiv(a: Array, b: Array) -> Array:
    return np.abs(a) // np.abs(b) * (np.sign(a) * np.sign(b))


_COMPUTE: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "floordiv": np.floor_divide,
    "truncdiv": _truncdiv,
    "truediv": np.true_divide,
    "mod": np.remainder,
    "fmod": np.fmod,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "min": np.minimum,
    "max": np.maximum,
    "where": np.where,
}


def compute(node: Node, args: list[Array]) -> Array:
    """The value of an operator on values of its operands, without any check."""
    if node.op == "const":
        return _as_array(node.value, node.dtype)
    if node.op == "cast":
        return _as_array(np.trunc(args[0]) if node.dtype in INTEGERS else args[0], node.dtype)
    if node.op == "lookup":
        return _as_array(node.value[tuple(args)], node.dtype)
    return _COMPUTE[node.op](*args)


def _as_array(value: Any, dtype: torch.dtype) -> Array:
    kind = np.bool_ if dtype == torch.bool else np.float64 if dtype in FLOATS else np.int64
    return np.asarray(value).astype(kind)


Bounds = tuple[Any, Any]
"""Smallest and largest value, as Python numbers: exact, however large."""


def bounds_of(node: Node, args: list[Bounds]) -> Bounds:
    """Bounds of an operator from the bounds of its operands."""
    if node.dtype == torch.bool:
        return (0, 1)
    if node.op == "lookup":
        return _as_array(node.value, node.dtype).min().item(), _as_array(node.value, node.dtype).max().item()
    if node.op in ("add", "sub", "mul", "shl"):
        act: Any = {"add": _plus, "sub": _minus, "mul": _times, "shl": _shifted}[node.op]
        corners = [act(x, y) for x in args[0] for y in args[1]]
        return min(corners), max(corners)
    if node.op in ("min", "max"):
        pick = min if node.op == "min" else max
        return pick(args[0][0], args[1][0]), pick(args[0][1], args[1][1])
    if node.op == "where":
        return min(args[1][0], args[2][0]), max(args[1][1], args[2][1])
    if node.op == "cast":
        return args[0]
    if node.op == "neg":
        return -args[0][1], -args[0][0]
    largest = max(abs(bound) for pair in args for bound in pair)
    if node.op in ("and", "or", "xor", "not"):
        largest = (1 << int(largest).bit_length()) if node.dtype in INTEGERS else largest
    return (0 if node.op == "abs" else -largest), largest


def _plus(x: Any, y: Any) -> Any:
    return x + y


def _minus(x: Any, y: Any) -> Any:
    return x - y


def _times(x: Any, y: Any) -> Any:
    return x * y


def _shifted(x: int, y: int) -> int:
    return x << max(y, 0) if y < 64 else _INT64_LIMIT


class Tables:
    """A mask on a number of query and key tokens: tables of what depends on one side, and bounds of the rest.

    Args:
        root: the traced mask.
        q_len: query tokens.
        kv_len: key tokens.
        head: the head for which the mask is wanted.

    Raises:
        Refused: if a value may overflow or round, or a lookup may lie outside of its table.
    """

    def __init__(self, root: Node, q_len: int, kv_len: int, head: int = 0) -> None:
        self.root = root
        self.inputs = {"q": np.arange(q_len), "k": np.arange(kv_len), "h": np.asarray(head)}
        self.order = nodes_of(root)
        self.values: dict[Node, Array] = {}
        self.bounds: dict[Node, Bounds] = {}
        for node in self.order:
            self._add(node)

    def _add(self, node: Node) -> None:
        bounds = [self.bounds[arg] for arg in node.args]
        if node.op in self.inputs:
            self.values[node] = self.inputs[node.op]
        elif self.is_mixed(node):
            _check_operands(node, bounds)
            self.bounds[node] = bounds_of(node, bounds)
            _check_range(node, self.bounds[node])
            return
        else:
            expected = bounds_of(node, bounds) if node.args else (0, 0)
            if max(map(abs, expected)) >= _INT64_LIMIT:
                raise Refused(f"`{node}` may overflow")
            _check_operands(node, bounds)
            self.values[node] = compute(node, [self.values[arg] for arg in node.args])
        values = self.values[node]
        self.bounds[node] = values.min().item(), values.max().item()
        _check_range(node, self.bounds[node])
        if node.dtype in FLOATS:
            _check_exact(node, [values, *(self.values[arg] for arg in node.args)])

    def is_mixed(self, node: Node) -> bool:
        """Whether a value depends on both sides."""
        return {"q", "k"} <= node.uses

    def part(self, q_tokens: Array, k_tokens: Array) -> Node:
        """The mask for some of the queries and some of the keys: tables become leaves, constants are folded."""
        known: dict[Node, Node] = {}
        sides = {"q": q_tokens, "k": k_tokens}
        wanted = self._leaves()
        for node in self.order:
            if node in wanted:
                known[node] = _leaf(node, self.values[node], sides)
            elif self.is_mixed(node):
                known[node] = combine(node, [known[arg] for arg in node.args])
        return known[self.root]

    def _leaves(self) -> set[Node]:
        """The largest one-sided values: what mixed operators use directly, or the whole mask."""
        leaves = {arg for node in self.order if self.is_mixed(node) for arg in node.args if not self.is_mixed(arg)}
        return leaves | ({self.root} - {node for node in self.order if self.is_mixed(node)})


def _leaf(node: Node, values: Array, sides: dict[str, Array]) -> Node:
    side = "".join(node.uses & {"q", "k"})
    chosen = values[sides[side]] if side and values.ndim else values
    if chosen.ndim == 0 or (chosen == chosen[0]).all():
        return constant(chosen.flat[0].item(), node.dtype)
    return Node("leaf", (node,), node.dtype, chosen, frozenset(side))


def _check_operands(node: Node, bounds: list[Bounds]) -> None:
    """What an operator demands of its operands."""
    if node.op in ("floordiv", "truncdiv", "mod", "fmod", "truediv") and bounds[1][0] <= 0 <= bounds[1][1]:
        raise Refused(f"`{node}` may divide by zero")
    if node.op in ("shl", "shr") and not 0 <= bounds[1][0] <= bounds[1][1] < 31:
        raise Refused(f"`{node}` may shift by fewer than 0 or more than 30 bits")
    if node.op == "lookup":
        for (low, high), size in zip(bounds, node.value.shape, strict=True):
            if not -size <= low <= high < size:
                raise Refused(f"`{node}` may read place {low if low < -size else high} of a table of {size}")
    if node.op == "cast" and node.dtype not in FLOATS and node.args[0].dtype in FLOATS and {"q", "k"} <= node.uses:
        raise Refused(f"`{node}` rounds a value that depends on query and key")
    mixed_floats = ("cast", "neg", "abs", "min", "max", "where")
    if node.dtype in FLOATS and {"q", "k"} <= node.uses and node.op not in mixed_floats:
        raise Refused(f"`{node}` is floating-point arithmetic on a value that depends on query and key")
    if node.dtype == torch.float32 and node.op == "cast" and max(map(abs, bounds[0])) > 1 << 24:
        raise Refused(f"`{node}` may be too large to be exact in torch.float32")
    if node.dtype in FLOATS and node.op == "cast" and max(map(abs, bounds[0])) > _FLOAT_LIMIT:
        raise Refused(f"`{node}` may be too large to be exact in {node.dtype}")


def _check_range(node: Node, bounds: Bounds) -> None:
    if node.dtype in INTEGERS:
        limits = torch.iinfo(node.dtype)
        if not max(limits.min, -_INT64_LIMIT) <= bounds[0] <= bounds[1] <= min(limits.max, _INT64_LIMIT):
            raise Refused(f"`{node}` may be {bounds[0]} to {bounds[1]}, which overflows {node.dtype}")


def _check_exact(node: Node, values: list[Array]) -> None:
    """Floating-point values have to be such that no way to compute them can round."""
    if node.op == "truediv" and (values[2].ndim or np.frexp(values[2])[0] not in (0.5, -0.5)):
        raise Refused(f"`{node}` is a floating-point division, which kernels round differently")
    if node.dtype == torch.float32 and not (values[0].astype(np.float32) == values[0]).all():
        raise Refused(f"`{node}` is not exact in torch.float32")
    if node.op in ("const", "lookup", "cast"):
        return
    for number in values:
        steps = number / _FLOAT_STEP
        if not (np.isfinite(number) & (np.abs(number) <= _FLOAT_LIMIT) & (steps == np.trunc(steps))).all():
            raise Refused(f"`{node}` is floating-point arithmetic that may round")


def combine(node: Node, args: list[Node]) -> Node:
    """The operator on simplified operands; constants are folded."""
    if all(arg.op == "const" for arg in args):
        return constant(compute(node, [compute(arg, []) for arg in args]).item(), node.dtype)
    if node.dtype != torch.bool:
        if node.op == "where" and args[0].op == "const":
            return args[1] if args[0].value else args[2]
        return make(node.op, args, node.dtype, node.value)
    return _combine_bool(node, args)


def _combine_bool(node: Node, args: list[Node]) -> Node:
    fixed = {place: arg.value for place, arg in enumerate(args) if arg.op == "const"}
    if node.op in ("and", "or") and fixed:
        place, value = next(iter(fixed.items()))
        return args[1 - place] if value == (node.op == "and") else constant(value)
    if node.op == "where":
        condition, a, b = args
        if 0 in fixed:
            return a if fixed[0] else b
        if 1 in fixed:
            return conjunction("or", condition, b) if fixed[1] else conjunction("and", invert(condition), b)
        if 2 in fixed:
            return conjunction("or", invert(condition), a) if fixed[2] else conjunction("and", condition, a)
    if node.op == "not":
        return invert(args[0])
    return make(node.op, args, value=node.value)


def conjunction(op: str, a: Node, b: Node) -> Node:
    """``a & b`` or ``a | b``, folded."""
    return _combine_bool(Node(op), [a, b])


def invert(node: Node) -> Node:
    """The opposite of a condition, with the negation moved inside as far as that is exact."""
    if node.op == "const":
        return constant(not node.value)
    if node.op == "not":
        return node.args[0]
    if node.op in ("lt", "le"):
        return make("le" if node.op == "lt" else "lt", reversed(node.args))
    if node.op in ("eq", "ne"):
        return make("ne" if node.op == "eq" else "eq", node.args)
    if node.op in ("and", "or"):
        return make("or" if node.op == "and" else "and", (invert(arg) for arg in node.args))
    if node.op == "leaf":
        return Node("leaf", (make("not", node.args),), node.dtype, ~node.value, node.uses)
    return make("not", (node,))


def split(node: Node, magnitudes: bool = True) -> tuple[str, Node, Node] | None:
    """A condition as ``a & b`` or ``a | b``, where it is one: also a bound of a maximum, minimum or absolute value.

    Args:
        node: the condition.
        magnitudes: whether to split bounds of absolute values.
    """
    if node.op in ("and", "or"):
        return node.op, node.args[0], node.args[1]
    if node.op not in ("lt", "le") or node.args[0].dtype == torch.bool:
        return None
    for place, arg in enumerate(node.args):
        other = node.args[1 - place]

        def bound(value: Node, place: int = place, other: Node = other) -> Node:
            return make(node.op, (value, other) if place == 0 else (other, value))

        if arg.op in ("min", "max"):
            every = (arg.op == "max") == (place == 0)
            return "and" if every else "or", bound(arg.args[0]), bound(arg.args[1])
        if arg.op == "abs" and magnitudes:
            inner = arg.args[0]
            return "and" if place == 0 else "or", bound(inner), bound(make("neg", (inner,), inner.dtype))
    return None


def conditions(node: Node) -> list[Node]:
    """The conditions that all have to hold."""
    found, stack = [], [node]
    while stack:
        node = stack.pop()
        parts = split(node, magnitudes=False)
        if parts and parts[0] == "and":
            stack += parts[:0:-1]
        elif not (node.op == "const" and node.value):
            found.append(node)
    return found


def evaluate(root: Node, leaf: Callable[[Node], Array], order: list[Node] | None = None) -> Array:
    """The value of a simplified expression, with the values of its leaves given by a function."""
    values: dict[Node, Array] = {}
    for node in order or inner_nodes(root):
        values[node] = leaf(node) if node.op == "leaf" else compute(node, [values[arg] for arg in node.args])
    return values[root]


def inner_nodes(root: Node) -> list[Node]:
    """Every node of a simplified expression, leaves as they are."""
    return nodes_of(root, ("leaf",))


def rows(root: Node, q_count: int, k_count: int) -> Iterator[tuple[int, Array]]:
    """The mask of all pairs, some rows at a time: the first row, and booleans ``[rows, k_count]``."""
    order = inner_nodes(root)
    step = max(1, CHUNK // max(k_count, 1))
    for start in range(0, q_count, step):
        stop = min(start + step, q_count)

        def leaf(node: Node, start: int = start, stop: int = stop) -> Array:
            return node.value[start:stop, None] if "q" in node.uses else node.value

        yield start, np.broadcast_to(evaluate(root, leaf, order), (stop - start, k_count))
