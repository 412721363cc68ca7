"""Whether a mask is a GNA of a given layout: exactly, part by part and dimension by dimension."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from gna_flex.neighborhood import GNA
from gna_flex.symbolic.exact import Array, Tables, combine, conditions, conjunction, inner_nodes, rows
from gna_flex.symbolic.match import Dimension, find_dimension, from_matrix, key_intervals
from gna_flex.symbolic.trace import Node, Refused, constant, make, render
from gna_flex.tiling import TileOrder

MOST_TOKENS = 4096
"""Up to this many tokens, dimensions that a condition mixes are decided by all pairs."""
MOST_PAIRS = 1 << 26
PROBES = 64
"""A token of the grid is looked for at so many places: with less of a grid than that part, no text is found."""


class Places(NamedTuple):
    """Where the tokens of one side are: of the grid in row-major order, of the text, and padding."""

    grid: Array
    text: Array
    padding: Array

    @property
    def everything(self) -> int:
        """The number of places."""
        return len(self.grid) + len(self.text) + len(self.padding)

    @property
    def tokens(self) -> Array:
        """Places of grid and text."""
        return np.concatenate([self.grid, self.text])


@dataclass(frozen=True)
class Geometry:
    """What is given about the tokens: the layout, text around it, and token orders (``None`` is row-major)."""

    layout: tuple[int, ...]
    text_first: int = 0
    text_last: int = 0
    orders: tuple[TileOrder, TileOrder] | None = None

    @property
    def tokens(self) -> int:
        """Grid and text tokens."""
        return self.text_first + math.prod(self.layout) + self.text_last

    @property
    def lengths(self) -> tuple[int, int]:
        """Sequence lengths of queries and keys, padding of tile orders included."""
        return (self.orders[0].tokens, self.orders[1].tokens) if self.orders else (self.tokens, self.tokens)

    @property
    def dilation(self) -> tuple[int, ...]:
        """The dilation that a window of one key is given."""
        return self.orders[0].gna.dilation if self.orders else (1,) * len(self.layout)

    def place_of(self, side: int) -> Array:
        """Place of every token in natural order, for queries (0) or keys (1)."""
        if self.orders is None:
            return np.arange(self.tokens)
        numbers = torch.arange(1, self.tokens + 1)[:, None]
        return np.argsort(self.orders[side].permute(numbers)[:, 0].numpy(), kind="stable")[-self.tokens :]

    def places(self, side: int) -> Places:
        """Places by kind."""
        place = self.place_of(side)
        end = self.text_first + math.prod(self.layout)
        text = np.concatenate([place[: self.text_first], place[end:]])
        padding = np.setdiff1d(np.arange(self.lengths[side]), place)
        return Places(place[self.text_first : end], text, padding)


class Decision(NamedTuple):
    """The GNA, and how it was decided."""

    gna: GNA
    how: str


def decide(tables: Tables, geometry: Geometry) -> Decision:
    """The GNA of a layout that a mask is.

    Raises:
        Refused: if there is none, or if that cannot be decided.
    """
    q, k = geometry.places(0), geometry.places(1)
    near = tables.part(q.grid, k.grid)
    dims, how = _dimensions(near, geometry)
    demand(tables, q.padding, np.arange(k.everything), False, "padding sees key")
    demand(tables, q.tokens, k.padding, False, "sees padding at")
    demand(tables, q.text, k.tokens, True, "text does not see key")
    demand(tables, q.grid, k.text, True, "does not see text at")
    window, stride, dilation, causal = zip(*dims, strict=True)
    gna = GNA(geometry.layout, window, stride, dilation, causal, geometry.text_first, geometry.text_last)
    return Decision(gna, how)


def demand(tables: Tables, queries: Array, keys: Array, wanted: bool, what: str) -> None:
    """Refuse a mask that is not the same everywhere in a part."""
    if not len(queries) or not len(keys):
        return
    part = tables.part(queries, keys)
    if part.op == "const" and part.value == wanted:
        return
    if len(queries) * len(keys) > MOST_PAIRS:
        raise Refused(f"{len(queries)} x {len(keys)} pairs are too many to compare where `{render(part, 160)}`")
    for start, keep in rows(part, len(queries), len(keys)):
        wrong = keep != wanted
        if wrong.any():
            row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
            raise Refused(f"query {queries[start + row]}: {what} {keys[column]}")


def text_around(tables: Sequence[Tables], tokens: int) -> tuple[int, int]:
    """How many tokens are text before and after the grid, if the masks of all heads are GNAs in natural order.

    Text tokens see everything, and everything sees them. Either all tokens of a grid are like that, and then the mask
    is dense and needs no text, or none is: so there is only one answer, and it takes a few tokens to find it. Whether
    the masks are GNAs is left to :func:`decide`.
    """
    everything = np.arange(tokens)

    @functools.cache
    def is_text(token: int) -> bool:
        own = np.array([token])
        pairs = itertools.product(tables, ((own, everything), (everything, own)))
        return all(keep.all() for table, (q, k) in pairs for _, keep in rows(table.part(q, k), len(q), len(k)))

    if not is_text(0) and not is_text(tokens - 1):
        return 0, 0
    places = np.linspace(0, tokens - 1, PROBES + 1, dtype=int).tolist()
    inside = next((place for place in places if not is_text(place)), None)
    if inside is None:
        return 0, 0
    first = bisect.bisect_left(range(inside), True, key=lambda place: not is_text(place))
    last = bisect.bisect_left(range(tokens - 1 - inside), True, key=lambda place: not is_text(tokens - 1 - place))
    return first, last


def _dimensions(near: Node, geometry: Geometry) -> tuple[list[Dimension], str]:
    """Parameters of every dimension from the mask between the tokens of the grid."""
    layout = geometry.layout
    if near.op == "const" and not near.value:
        raise Refused("no token of the grid sees another one")
    grid = _Grid(layout)
    found = [part for condition in conditions(near) for part in grid.split_equality(condition)]
    dims = [Dimension(length, 1, 1, False) for length in layout]
    parts = _components(found, grid, len(layout))
    for axes, parts_of_axes in parts:
        condition = constant(True)
        for part in parts_of_axes:
            condition = conjunction("and", condition, part)
        reduced = grid.reduce(condition, axes)
        if len(axes) > 1:
            relations = _separate(reduced, parts_of_axes, axes, layout)
        for place, axis in enumerate(axes):
            try:
                seen = key_intervals(reduced, layout[axis]) if len(axes) == 1 else from_matrix(relations[place])
                dims[axis] = find_dimension(layout[axis], seen, geometry.dilation[axis])
            except Refused as reason:
                text = " & ".join(f"({render(part, 160)})" for part in parts_of_axes)
                raise Refused(f"dimension {axis}: {reason}; the condition is {text}") from None
    return dims, "pairs" if any(len(axes) > 1 for axes, _ in parts) else "dimensions"


class _Grid:
    """The tokens of a layout, and what a table of them depends on."""

    def __init__(self, layout: tuple[int, ...]) -> None:
        self.layout = layout
        self._axes: dict[Node, tuple[int, ...]] = {}

    def axes_of_leaf(self, leaf: Node) -> tuple[int, ...]:
        """The dimensions on which the values of a table depend."""
        if leaf not in self._axes:
            values = leaf.value.reshape(self.layout)
            varies = [(values != values.take([0], axis)).any() for axis in range(values.ndim)]
            self._axes[leaf] = tuple(axis for axis, varied in enumerate(varies) if varied)
        return self._axes[leaf]

    def axes(self, condition: Node) -> tuple[int, ...]:
        """The dimensions on which a condition depends."""
        leaves = [node for node in inner_nodes(condition) if node.op == "leaf"]
        return tuple(sorted({axis for leaf in leaves for axis in self.axes_of_leaf(leaf)}))

    def split_equality(self, condition: Node) -> list[Node]:
        """``f(q) == f(k)`` with ``f`` of several dimensions and never twice the same: equal in each of them."""
        if condition.op != "eq" or [arg.op for arg in condition.args] != ["leaf", "leaf"]:
            return [condition]
        a, b = condition.args
        axes = self.axes(condition)
        if len(axes) < 2 or a.uses == b.uses or not np.array_equal(a.value, b.value):
            return [condition]
        if len(np.unique(a.value)) != math.prod(self.layout[axis] for axis in axes):
            return [condition]
        coordinates = np.unravel_index(np.arange(math.prod(self.layout)), self.layout)
        return [
            make("eq", (Node("leaf", side.args, torch.int64, coordinates[axis], side.uses) for side in (a, b)))
            for axis in axes
        ]

    def reduce(self, condition: Node, axes: tuple[int, ...]) -> Node:
        """A condition on these dimensions alone, with tables of their tokens only."""
        known: dict[Node, Node] = {}
        others = tuple(0 if axis not in axes else slice(None) for axis in range(len(self.layout)))
        for node in inner_nodes(condition):
            if node.op == "leaf":
                values = node.value.reshape(self.layout)[others].ravel()
                known[node] = Node("leaf", node.args, node.dtype, values, node.uses)
            else:
                known[node] = combine(node, [known[arg] for arg in node.args])
        return known[condition]


def _components(found: list[Node], grid: _Grid, ndim: int) -> list[tuple[tuple[int, ...], list[Node]]]:
    """Conditions by the dimensions that they depend on together."""
    group = list(range(ndim))
    for condition in found:
        axes = grid.axes(condition)
        if len(axes) > 1 and math.prod(grid.layout[axis] for axis in axes) > MOST_TOKENS:
            raise Refused(
                f"`{render(condition, 300)}` depends on dimensions {', '.join(map(str, axes))} of layout {grid.layout} "
                f"at once, and their tokens are too many to compare all pairs (more than {MOST_TOKENS})"
            )
        for axis in axes[1:]:
            group = [group[axes[0]] if number == group[axis] else number for number in group]
    parts = []
    for number in dict.fromkeys(group):
        axes = tuple(axis for axis in range(ndim) if group[axis] == number)
        inside = [condition for condition in found if set(grid.axes(condition)) & set(axes)]
        size = math.prod(grid.layout[axis] for axis in axes)
        if len(axes) > 1 and size > MOST_TOKENS:
            raise Refused(
                f"`{render(inside[0], 300)}` and other conditions tie dimensions {', '.join(map(str, axes))} of layout "
                f"{grid.layout} together, and their tokens are too many to compare all pairs (more than {MOST_TOKENS})"
            )
        if inside:
            parts.append((axes, inside))
    return parts


def _separate(condition: Node, parts: list[Node], axes: tuple[int, ...], layout: tuple[int, ...]) -> list[Array]:
    """All pairs of a condition on several dimensions as one relation per dimension."""
    sizes = [layout[axis] for axis in axes]
    count = math.prod(sizes)
    keep = np.concatenate([part for _, part in rows(condition, count, count)])
    pairs = keep.reshape(*sizes, *sizes)
    n = len(axes)
    relations = []
    product = np.ones((1,) * (2 * n), dtype=bool)
    for place in range(n):
        relation = pairs.any(tuple(x for x in range(2 * n) if x % n != place))
        relations.append(relation)
        shape = [sizes[place] if x % n == place else 1 for x in range(2 * n)]
        product = product & relation.reshape(shape)
    wrong = np.broadcast_to(product, pairs.shape) != pairs
    if wrong.any():
        text = " & ".join(f"({render(part, 160)})" for part in parts)
        where = np.unravel_index(int(wrong.argmax()), wrong.shape)
        query, key = (tuple(int(x) for x in side) for side in (where[:n], where[n:]))
        raise Refused(
            f"dimensions {', '.join(map(str, axes))} do not act on their own: query {query} would see key {key} if "
            f"each of them decided for itself; the condition is {text}"
        )
    return relations
