"""Which window, stride, dilation and causal flag a relation of one dimension has: found, then compared everywhere."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from gna_flex.intervals import group_length, key_interval
from gna_flex.symbolic.exact import Array, evaluate, inner_nodes, rows, split
from gna_flex.symbolic.trace import Node, Refused, make

MATRIX_LENGTH = 2048
"""Up to this length all pairs of a dimension are compared; beyond it, only where a condition changes."""
MOST_LENGTH = 1 << 23
MOST_WORK = 1 << 28


class Dimension(NamedTuple):
    """Parameters of one dimension."""

    window: int
    stride: int
    dilation: int
    causal: bool

    def __str__(self) -> str:
        return f"window {self.window}, stride {self.stride}, dilation {self.dilation}" + ", causal" * self.causal


class KeyIntervals(NamedTuple):
    """Keys ``[low, high)`` of every query, as positions in its dilation group."""

    dilation: int
    low: Array
    high: Array

    def keys(self, query: int) -> str:
        """The keys of a query in words."""
        group = query % self.dilation
        first, last = (int(x) * self.dilation + group for x in (self.low[query], self.high[query] - 1))
        step = f" in steps of {self.dilation}" if self.dilation > 1 else ""
        return f"keys {first} to {last}{step}" if last > first else f"key {first}"


def key_intervals(condition: Node, length: int) -> KeyIntervals:
    """The keys that every query sees under a condition on one dimension.

    Raises:
        Refused: if they are not one interval of a dilation group, for some query.
    """
    return _by_pairs(condition, length) if length <= MATRIX_LENGTH else _by_changes(condition, length)


def from_matrix(keep: Array) -> KeyIntervals:
    """Intervals from all pairs ``[queries, keys]``."""
    length = len(keep)
    counts = keep.sum(1)
    if not counts.all():
        raise Refused(f"query {int(counts.argmin())} sees no key")
    dilation = _dilation(keep[-1])
    low, high = np.zeros(length, np.int64), np.zeros(length, np.int64)
    for group in range(dilation):
        inside = keep[group::dilation, group::dilation]
        low[group::dilation] = inside.argmax(1)
        high[group::dilation] = inside.shape[1] - inside[:, ::-1].argmax(1)
        whole = (inside.sum(1) == counts[group::dilation]) & (
            high[group::dilation] - low[group::dilation] == counts[group::dilation]
        )
        if not whole.all():
            query = int(whole.argmin()) * dilation + group
            raise Refused(f"query {query} sees keys {_some(np.flatnonzero(keep[query]))}, which are not one window")
    return KeyIntervals(dilation, low, high)


def _by_pairs(condition: Node, length: int) -> KeyIntervals:
    return from_matrix(np.concatenate([part for _, part in rows(condition, length, length)]))


def _dilation(last_row: Array) -> int:
    """Step between the keys of the last query: it sees its whole window, so no other step is possible."""
    keys = np.flatnonzero(last_row)
    return int(keys[1] - keys[0]) if len(keys) > 1 else 1


def _some(keys: Array) -> str:
    shown = ", ".join(str(int(key)) for key in keys[:6])
    return shown + (f", ... ({len(keys)} keys)" if len(keys) > 6 else "")


def find_dimension(length: int, seen: KeyIntervals, dilation: int = 1) -> Dimension:
    """The parameters with exactly these key intervals: the smallest stride where several give the same mask.

    No other window, dilation or causal flag is possible: the last query of a dilation group sees its whole window, and
    the first query sees it too unless the dimension is causal. Every stride divides the distance between changes.

    Args:
        length: tokens of the dimension.
        seen: the keys of every query.
        dilation: the dilation that a window of one key is given, for which every dilation is the same mask.

    Raises:
        Refused: if there are none; the message names a query.
    """
    counts = seen.high - seen.low
    window = int(counts.max())
    x = np.arange(length)
    if window == 1 and length >= dilation and (seen.low == x).all():
        seen = KeyIntervals(dilation, x // dilation, x // dilation + 1)
    step = seen.dilation
    causal = bool(window > 1 and counts[0] == 1)
    if window * step > length:
        raise Refused(f"a window of {window} keys with dilation {step} does not fit into {length} tokens")
    place, size = x // step, group_length(length, step, x % step)
    changes = np.flatnonzero(seen.low[step:] != seen.low[:-step]) + step
    distance = int(np.gcd.reduce(place[changes])) if len(changes) else 1
    best: tuple[int, KeyIntervals, Dimension] | None = None
    for stride in (s for s in range(1, min(distance, window) + 1) if distance % s == 0):
        low, high = key_interval(place, size, window, stride, causal)
        wrong = (low != seen.low) | (high != seen.high)
        found = Dimension(window, stride, step, causal)
        if not wrong.any():
            return found
        if best is None or np.count_nonzero(wrong) < best[0]:
            best = int(np.count_nonzero(wrong)), KeyIntervals(step, low, high), found
    assert best is not None
    query = int(np.flatnonzero((best[1].low != seen.low) | (best[1].high != seen.high))[0])
    raise Refused(f"query {query} sees {seen.keys(query)}, but with {best[2]} it would see {best[1].keys(query)}")


def _by_changes(condition: Node, length: int) -> KeyIntervals:
    """Intervals of a long dimension: the condition is evaluated only where it can change along the keys."""
    condition = _without_abs(condition)
    order = inner_nodes(condition)
    everyone, last = np.arange(length), np.full(length, length - 1)
    dilation = _dilation(np.broadcast_to(_at(condition, last, everyone, order), (length,)))
    atoms = _atoms(condition)
    if length > MOST_LENGTH or dilation * length * (len(atoms) + 1) > MOST_WORK:
        raise Refused(f"{length} tokens with dilation {dilation} are too many to compare")
    low, high = np.zeros(length, np.int64), np.zeros(length, np.int64)
    for group in range(dilation):
        keys = everyone[group::dilation]
        changes = np.stack([np.zeros(length, np.int64), *_changes(atoms, keys, length)])
        changes.sort(axis=0)
        ends = np.concatenate([changes[1:], np.full((1, length), len(keys))])
        seen = np.stack([_at(condition, everyone, keys[np.minimum(row, len(keys) - 1)], order) for row in changes])
        seen &= ends > changes
        first = np.where(seen, changes, len(keys)).min(0)
        past = np.where(seen, ends, 0).max(0)
        count = np.where(seen, ends - changes, 0).sum(0)
        own = everyone % dilation == group
        broken = np.where(own, (count == 0) | (count != past - first), count > 0)
        if broken.any():
            raise Refused(f"query {int(broken.argmax())} does not see one window of keys")
        low[own], high[own] = first[own], past[own]
    return KeyIntervals(dilation, low, high)


def _at(node: Node, queries: Array, keys: Array, order: list[Node]) -> Array:
    """The value of an expression for pairs."""

    def leaf(node: Node) -> Array:
        return node.value[queries if "q" in node.uses else keys]

    return np.broadcast_to(evaluate(node, leaf, order), queries.shape)


def _without_abs(root: Node) -> Node:
    """The same condition with bounds of absolute values as two conditions."""
    known: dict[Node, Node] = {}
    for node in inner_nodes(root):
        if node.op == "leaf":
            known[node] = node
            continue
        new = make(node.op, (known[arg] for arg in node.args), node.dtype, node.value)
        known[node] = _split_all(new)
    return known[root]


def _split_all(node: Node) -> Node:
    parts = split(node)
    if parts is None or node.op in ("and", "or"):
        return node
    return make(parts[0], (_split_all(part) for part in parts[1:]))


def _atoms(condition: Node) -> list[Node]:
    """The conditions of which an expression is a Boolean combination."""
    atoms: dict[Node, None] = {}
    stack = [condition]
    while stack:
        node = stack.pop()
        same = node.op in ("eq", "ne") and node.args[0].dtype == torch.bool
        if same or node.op in ("and", "or", "xor", "not", "where"):
            stack += node.args
        elif "k" in node.uses:
            atoms[node] = None
    return list(atoms)


def _changes(atoms: list[Node], keys: Array, length: int) -> list[Array]:
    """For every query, the positions in ``keys`` at which an atom may change."""
    found: list[Array] = []
    for atom in atoms:
        if atom.op == "leaf":
            turns = np.flatnonzero(np.diff(atom.value[keys])) + 1
            if len(turns) > 16:
                raise Refused(f"`{atom}` changes too often among {length} tokens")
            found += [np.full(length, turn) for turn in turns]
            continue
        if atom.op not in ("lt", "le", "eq", "ne") or len(atom.args) != 2:
            raise Refused(f"`{atom}` is not a comparison that {length} tokens can be decided by")
        difference = _join(_direction(atom.args[0], keys), _flip(_direction(atom.args[1], keys)))
        if difference is None:
            raise Refused(f"`{atom}` does not rise or fall along {length} keys")
        kinds = ("lt", "le") if atom.op in ("eq", "ne") else (atom.op,)
        found += [_first_change(make(kind, atom.args), keys, length, difference) for kind in kinds]
    return found


def _first_change(atom: Node, keys: Array, length: int, direction: int) -> Array:
    """Where a condition that changes at most once changes, by bisection for all queries at once."""
    order, queries = inner_nodes(atom), np.arange(length)
    low, high = np.zeros(length, np.int64), np.full(length, len(keys))
    for _ in range(len(keys).bit_length() + 1):
        middle = (low + high) // 2
        holds = _at(atom, queries, keys[np.minimum(middle, len(keys) - 1)], order)
        before = (holds if direction > 0 else ~holds) & (middle < high)
        low, high = np.where(before, middle + 1, low), np.where(before, high, middle)
    return low


def _flip(direction: int | None) -> int | None:
    return None if direction is None else -direction


def _join(a: int | None, b: int | None) -> int | None:
    """Direction of a sum: 1 rising, -1 falling, 0 constant, ``None`` unknown."""
    if a is None or b is None or a * b < 0:
        return None
    return a or b


def _direction(root: Node, keys: Array) -> int | None:
    """Whether a value rises or falls along the keys, whatever the query."""
    known: dict[Node, int | None] = {}
    for node in inner_nodes(root):
        known[node] = _direction_of(node, [known[arg] for arg in node.args] if node.op != "leaf" else [], keys)
    return known[root]


def _direction_of(node: Node, args: list[int | None], keys: Array) -> int | None:
    if "k" not in node.uses:
        return 0
    if node.op == "leaf":
        steps = np.diff(node.value[keys].astype(np.float64) if node.value.dtype == bool else node.value[keys])
        return 0 if not steps.any() else 1 if (steps >= 0).all() else -1 if (steps <= 0).all() else None
    if node.op in ("add", "min", "max"):
        return _join(*args)
    if node.op == "sub":
        return _join(args[0], _flip(args[1]))
    if node.op == "neg":
        return _flip(args[0])
    if node.op == "cast":
        return args[0]
    if node.op in ("mul", "floordiv", "truncdiv", "shr", "shl") and node.args[1].op == "const":
        factor = node.args[1].value
        return args[0] if node.op in ("shr", "shl") or factor > 0 else _flip(args[0])
    return None
