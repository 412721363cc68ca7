"""``recognise()``: the GNA that a foreign ``mask_mod`` or BlockMask is, proved, or the reason why there is none."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from gna_flex.intervals import attends
from gna_flex.mask import GNABlockMask
from gna_flex.neighborhood import GNA, Ints, as_int, per_dim
from gna_flex.symbolic.exact import Tables
from gna_flex.symbolic.listed import check_block_lists
from gna_flex.symbolic.recognise_layout import Decision, Geometry, decide, text_around
from gna_flex.symbolic.trace import INPUTS, ElementIndexing, Node, Refused, nodes_of, render, trace
from gna_flex.tiling import TileOrder
from gna_flex.torch_private import BLOCK_TABLES

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_LAYOUTS = 40
SAMPLES = 24

_HOW = {
    "carried": "the mask was made from it",
    "dimensions": "every dimension compared exactly",
    "pairs": "all pairs of tokens compared in the dimensions that the mask mixes",
}


@dataclass(frozen=True)
class Recognition:
    """Whether a mask is a GNA; true if it is.

    Attributes:
        gna: the GNA that keeps exactly the same pairs (one per head where heads differ), or ``None``.
        reason: how that is known, or which part of the mask is not a GNA.
        how: ``"carried"`` (the mask was made from it), ``"dimensions"`` (every dimension compared exactly), ``"pairs"``
            (all pairs of tokens compared), or ``""`` where there is none.
        orders: token orders of queries and keys; ``None`` is the natural row-major one.
        expression: what the mask computes from batch ``b``, head ``h``, query ``q`` and key ``k``.
    """

    gna: GNA | tuple[GNA, ...] | None
    reason: str
    how: str = ""
    orders: tuple[TileOrder, TileOrder] | None = None
    expression: str = ""

    def __bool__(self) -> bool:
        return self.gna is not None

    def __str__(self) -> str:
        if self.gna is None:
            return f"not recognised: {self.reason}"
        if isinstance(self.gna, GNA):
            return f"GNA of {self.gna} ({self.reason})"
        heads = "; ".join(f"head {head}: {gna}" for head, gna in enumerate(self.gna))
        return f"{len(self.gna)} GNAs, one per head: {heads} ({self.reason})"

    def __rich__(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        gnas = self.gna if isinstance(self.gna, tuple) else (self.gna,)
        for head, gna in enumerate(gnas):
            name = "GNA" if len(gnas) == 1 else f"head {head}"
            table.add_row(name, Text("none", "red") if gna is None else Text(str(gna), "green"))
        table.add_row("because", Text(self.reason))
        if self.orders:
            table.add_row("order", Text(f"tiles of {self.orders[0].tile} and {self.orders[1].tile}"))
        if self.expression:
            table.add_row("mask", Text(self.expression))
        return table


def recognise(
    mask: Callable[..., Any] | BlockMask,
    *,
    layout: Ints | None = None,
    text_first: int = 0,
    text_last: int = 0,
    q_len: int | None = None,
    kv_len: int | None = None,
    heads: int | None = None,
    order: TileOrder | tuple[TileOrder, TileOrder] | None = None,
) -> Recognition:
    """The GNA that a mask is, proved to keep exactly the same pairs; or why it is none.

    The mask_mod is traced to an expression. What depends on one token is tabulated for all of them; the rest is
    compared with the rule of :class:`gna_flex.GNA` for every pair of coordinates of every dimension. No answer is a
    guess: where two descriptions give the same mask, the one with the smallest strides is returned, and a mask that
    cannot be decided is not recognised.

    Args:
        mask: a mask_mod of FlexAttention, or a BlockMask, whose block lists then have to agree with its mask_mod.
        layout: grid size in tokens; without it, layouts that the numbers in the mask suggest are tried.
        text_first: tokens stored before the grid; without a layout, text on both sides is found if none is given.
        text_last: tokens stored after the grid, likewise.
        q_len: query tokens, where no layout and no BlockMask tells.
        kv_len: key tokens; a GNA has as many as queries.
        heads: heads for which to recognise a mask_mod that depends on the head.
        order: token order of the mask, or a pair for queries and keys; they fix layout and text.

    >>> found = recognise(lambda b, h, q, k: (q >= k) & (q - k <= 255), q_len=32768)
    >>> found.gna
    GNA(layout=(32768,), window=(256,), stride=(1,), dilation=(1,), causal=(True,), text_first=0, text_last=0)
    >>> print(recognise(lambda b, h, q, k: (q - k).abs() <= 1, q_len=8).reason.split(";")[0])
    dimension 0: query 0 sees keys 0 to 1, but with window 3, stride 1, dilation 1 it would see keys 0 to 2
    """
    carried = _carried(mask)
    if carried is not None:
        return carried
    job = _Job(mask, heads)
    orders = (order, order) if isinstance(order, TileOrder) else order
    if orders is None and isinstance(mask, GNABlockMask) and mask.plan.q_order and mask.plan.kv_order:
        orders = mask.plan.q_order, mask.plan.kv_order
    given = _geometry(layout, text_first, text_last, orders)
    lengths = _lengths(mask, q_len, kv_len, given)
    try:
        return job.run(given, lengths, (text_first, text_last))
    except Refused as refused:
        return Recognition(None, str(refused), expression=job.expression)


def _carried(mask: Any) -> Recognition | None:
    """The answer for an unchanged mask of this package, which knows what it was made from."""
    if not isinstance(mask, BlockMask) and not callable(mask):
        raise TypeError(f"mask={mask!r}: recognise takes a mask_mod or a BlockMask")
    if not isinstance(mask, GNABlockMask) or mask.plan.and_mask is not None or mask.plan.valid_text:
        return None
    if any(getattr(mask, name) is not getattr(mask.plain, name) for name in (*BLOCK_TABLES, "mask_mod")):
        return None
    if (mask.seq_lengths, mask.BLOCK_SIZE) != (mask.plain.seq_lengths, mask.plain.BLOCK_SIZE):
        return None
    plan = mask.plan
    orders = (plan.q_order, plan.kv_order) if plan.q_order and plan.kv_order else None
    return Recognition(mask.gna, _HOW["carried"], "carried", orders)


def _geometry(
    layout: Ints | None, text_first: int, text_last: int, orders: tuple[TileOrder, TileOrder] | None
) -> Geometry | None:
    """Layout, text and orders as given; ``None`` where no layout is."""
    if orders is not None:
        if not all(isinstance(order, TileOrder) for order in orders) or len(orders) != 2:
            raise TypeError(f"order={orders!r}: give a TileOrder, or one for queries and one for keys")
        facts = {(o.gna.layout, o.gna.text_first, o.gna.text_last, o.gna.dilation) for o in orders}
        if len(facts) > 1:
            raise ValueError("order: both orders need the same layout, text tokens and dilation, but they differ")
        own = orders[0].gna
        if layout is not None and per_dim("layout", layout, None, as_int) != own.layout:
            raise ValueError(f"layout={layout!r}, but the layout of the order is {own.layout}")
        for name, value, count in (("text_first", text_first, own.text_first), ("text_last", text_last, own.text_last)):
            if value not in (0, count):
                raise ValueError(f"{name}={value}, but the order has {count}")
        return Geometry(own.layout, own.text_first, own.text_last, orders)
    for name, value in (("text_first", text_first), ("text_last", text_last)):
        if as_int(name, value) < 0:
            raise ValueError(f"{name}={value}: the number of text tokens must not be negative")
    if layout is None:
        return None
    dense = GNA(per_dim("layout", layout, None, as_int), -1)
    return Geometry(dense.layout, as_int("text_first", text_first), as_int("text_last", text_last))


def _lengths(mask: Any, q_len: int | None, kv_len: int | None, given: Geometry | None) -> tuple[int, int] | None:
    """Sequence lengths as given, of the BlockMask, or of the layout."""
    known = tuple(mask.seq_lengths) if isinstance(mask, BlockMask) else given.lengths if given else None
    if known is None:
        if q_len is None and kv_len is None:
            return None
        q_len, kv_len = (kv_len if q_len is None else q_len), (q_len if kv_len is None else kv_len)
        return as_int("q_len", q_len), as_int("kv_len", kv_len)
    for name, value, own in (("q_len", q_len, known[0]), ("kv_len", kv_len, known[1])):
        if value is not None and as_int(name, value) != own:
            raise ValueError(f"{name}={value}, but the {'mask' if isinstance(mask, BlockMask) else 'layout'} has {own}")
    return known[0], known[1]


class _Job:
    """One call: the mask, its expression and its tables."""

    def __init__(self, mask: Any, heads: int | None) -> None:
        self.mask, self.heads, self.expression = mask, heads, ""
        self.mask_mod = mask.mask_mod if isinstance(mask, BlockMask) else mask

    def run(self, given: Geometry | None, lengths: tuple[int, int] | None, text: tuple[int, int]) -> Recognition:
        """The answer, or :class:`Refused`."""
        device = self.mask.kv_num_blocks.device if isinstance(self.mask, BlockMask) else "cpu"
        root = trace(self.mask_mod, device)
        self.expression = render(root)
        if "b" in root.uses:
            raise Refused(f"the mask depends on the batch: {_first_use(root, 'b')}")
        if lengths is None:
            raise Refused("the number of tokens is not known: give layout= or q_len=")
        if given is None and (lengths[0] != lengths[1] or lengths[0] <= sum(text)):
            raise Refused(f"{lengths[0]} query and {lengths[1]} key tokens: a GNA has as many of both, and a grid")
        if given is not None and given.lengths != lengths:
            raise Refused(
                f"layout {given.layout} with {given.text_first} + {given.text_last} text tokens has sequences of "
                f"{given.lengths[0]} and {given.lengths[1]} tokens, but the mask has {lengths[0]} and {lengths[1]}"
            )
        tables = [Tables(root, *lengths, head) for head in range(self.head_count(root))]
        geometry, decisions = self.search(root, tables, given, lengths[0], text)
        gnas = tuple(decision.gna for decision in decisions)
        gnas = gnas[:1] if len(set(gnas)) == 1 else gnas
        how = "pairs" if any(decision.how == "pairs" for decision in decisions) else "dimensions"
        _check_samples(self.mask_mod, gnas, geometry, device)
        if isinstance(self.mask, BlockMask):
            check_block_lists(self.mask, gnas, tables, geometry)
        found = gnas[0] if len(gnas) == 1 else gnas
        return Recognition(found, _HOW[how], how, geometry.orders, self.expression)

    def head_count(self, root: Node) -> int:
        """Heads that may differ."""
        if "h" not in root.uses:
            return 1
        own = int(self.mask.kv_num_blocks.shape[1]) if isinstance(self.mask, BlockMask) else 1
        heads = own if self.heads is None else as_int("heads", self.heads)
        if heads < 1 or (own > 1 and heads != own):
            raise ValueError(f"heads={heads}, but there is at least one, and the mask is for {own}")
        if heads == 1 and self.heads is None:
            raise Refused(f"the mask depends on the head: {_first_use(root, 'h')}; give heads=")
        return heads

    def search(
        self, root: Node, tables: list[Tables], given: Geometry | None, tokens: int, text: tuple[int, int]
    ) -> tuple[Geometry, list[Decision]]:
        """The layout and one decision per head."""
        if given is not None:
            return given, [decide(table, given) for table in tables]
        text = text if any(text) else text_around(tables, tokens)
        refusals = []
        for layout in itertools.islice(_layouts(root, tokens - sum(text)), MOST_LAYOUTS):
            geometry = Geometry(layout, *text)
            try:
                return geometry, [decide(table, geometry) for table in tables]
            except Refused as refused:
                refusals.append((layout, str(refused)))
        around = f" with {text[0]} + {text[1]} text tokens" if any(text) else ""
        if len(refusals) == 1:
            raise Refused(f"layout {refusals[0][0]}{around}: {refusals[0][1]}" if around else refusals[0][1])
        tried = ", ".join(str(layout) for layout, _ in refusals)
        last = f"{refusals[-1][0]}: {refusals[-1][1]}"
        raise Refused(f"no layout was given, and it is no GNA of {tried}{around}; of {last}")


def _layouts(root: Node, tokens: int) -> Iterator[tuple[int, ...]]:
    """Layouts that the numbers in divisions suggest, fewest dimensions first. Only hypotheses: each is then decided."""
    sizes = dict.fromkeys(size for node in nodes_of(root) for size in _sizes(node))
    sizes = {size: None for size in sizes if 1 < size < tokens and tokens % size == 0}
    yield (tokens,)
    yield from ((tokens // size, size) for size in sizes)
    cubes: dict[tuple[int, int, int], None] = {}
    for a, b in itertools.product(sizes, sizes):
        if a > b and a % b == 0:
            cubes[tokens // a, a // b, b] = None
        if tokens % (a * b) == 0 and a * b < tokens:
            cubes[tokens // (a * b), a, b] = None
    yield from cubes


def _sizes(node: Node) -> list[int]:
    """Numbers in a node that may be sides of a layout: divisors, and sizes of tables indexed by coordinates."""
    if node.op == "lookup":
        return [size for size, index in zip(node.value.shape, node.args, strict=True) if index.op not in INPUTS]
    if len(node.args) < 2 or node.args[1].op != "const" or node.dtype == torch.bool:
        return []
    value = int(node.args[1].value)
    if node.op == "shr":
        return [1 << min(max(value, 0), 31)]
    return [value + (node.op == "and")] if node.op in ("floordiv", "truncdiv", "mod", "fmod", "and") else []


def _first_use(root: Node, name: str) -> str:
    """The smallest condition that uses an input, in words."""
    node = next(node for node in nodes_of(root) if name in node.uses and node.dtype == torch.bool)
    return f"`{render(node, 160)}`"


def _check_samples(mask_mod: Callable[..., Any], gnas: tuple[GNA, ...], geometry: Geometry, device: Any) -> None:
    """Ask the function itself for a few pairs, in case it is not the same at every call."""
    draw = random.Random(0)
    places = [geometry.place_of(side) for side in (0, 1)]
    for number, (head, gna) in itertools.product(range(SAMPLES), enumerate(gnas)):
        q = draw.randrange(gna.tokens)
        k = q if number < 4 else min(max(q + draw.randint(-9, 9), 0), gna.tokens - 1)
        k = draw.randrange(gna.tokens) if number % 2 else k
        pair = [torch.tensor(x, device=device) for x in (0, head, int(places[0][q]), int(places[1][k]))]
        try:
            with ElementIndexing(reading=True):
                kept = mask_mod(*pair)
        except Exception as error:
            raise Refused(f"the mask_mod cannot be called: {type(error).__name__}: {error}") from error
        if bool(kept) != keeps(gna, q, k):
            raise Refused(f"the mask_mod gives {bool(kept)} for query {q} and key {k}, unlike when it was traced")


def keeps(gna: GNA, q: int, k: int) -> bool:
    """Whether a GNA keeps a pair of natural token indices.

    >>> keeps(GNA((4, 4), 3), 0, 3)
    False
    """
    q, k = q - gna.text_first, k - gna.text_first
    if not (0 <= q < gna.grid_tokens and 0 <= k < gna.grid_tokens):
        return True
    places = (np.unravel_index(x, gna.layout) for x in (q, k))
    return all(bool(attends(int(i), int(j), *dim)) for i, j, dim in zip(*places, gna.dims(), strict=True))
