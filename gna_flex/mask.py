"""``gna_mask()``: a FlexAttention BlockMask of a GNA, built in closed form, that routes itself."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gna_flex import kernels
from gna_flex.blocks import BlockLists, Relation, RowMajorRelation, TiledRelation, block_lists
from gna_flex.flex import RoutedTuple, Tiles, full_width, route_of, stand_in
from gna_flex.intervals import ceil_div, key_interval, query_interval
from gna_flex.mask_mod import MaskMod, to_natural
from gna_flex.neighborhood import GNA, Ints, as_int
from gna_flex.plan import MaskPlan, text_lengths
from gna_flex.tiling import Interval, TileCounts, TileOrder, choose_tile
from gna_flex.torch_private import BLOCK_TABLES

if TYPE_CHECKING:
    from gna_flex.cuda.forward import Launcher
    from gna_flex.report import Report
    from gna_flex.routing import Route

DEFAULT_BLOCK = 128
FULL_WIDTH_ENTRIES = 1 << 18
"""Up to this many entries the index tables are as wide as torch makes them; beyond it only as wide as needed."""
MOST_ENTRIES = 1 << 31
"""Masks whose block lists would be longer than this (8 GiB) are refused."""
UNUSED = np.iinfo(np.int32).max
"""Stands for an unused entry of a table while it is sorted."""
PERMUTE_COST = 12.0
"""Time to bring query, key and value of a block into tile order and the output back, in full tiles (H200: 10 to 13)."""


class PlanTables:
    """The block tables of a plan on a device; masks that differ only in the lengths of their text share them."""

    def __init__(self, plan: MaskPlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.tables, self.counts = _tables(plan, device)

    def tiles(self, valid_text: Tensor | None) -> Tiles:
        """The plan in its best tile order."""
        order, plan, tables, functions = self._in_tiles
        block_mask = BlockMask(**_arguments(plan, tables, valid_text))
        return Tiles(order, block_mask, block_mask.as_tuple(), *functions, to_natural(order))

    @functools.cached_property
    def _in_tiles(self) -> tuple[TileOrder, MaskPlan, dict[str, Any], tuple[Any, Any]]:
        order, plan = self.plan.in_tiles()
        return order, plan, _tables(plan, self.device)[0], order.literal_permutations()

    @functools.cached_property
    def with_valid_text(self) -> PlanTables:
        """Those of the same mask with lengths of its text."""
        return PlanTables(replace(self.plan, valid_text=True), self.device)


class GNABlockMask(BlockMask):
    """A BlockMask made by :func:`gna_mask`. It carries its GNA and takes ``flex_attention`` calls over.

    It works wherever torch takes a BlockMask. Slices and crops of it are plain BlockMasks, as torch makes them.

    Attributes:
        plan: everything that fixes the mask.
        counts: full, partial and all blocks, summed over the heads that differ.
        plain: the same block lists as a BlockMask that does not route itself.
        lists: the GNAs as the numbers that operators take.
        valid_text: text tokens before and after the grid that count, ``[B, 2]``, int32; ``None`` where all do.
        capability: compute capability of the mask's CUDA device; ``None`` on others.
        launchers: kernels of calls that were made before, for :mod:`gna_flex.direct`.
    """

    def __init__(
        self,
        plan: MaskPlan,
        device: torch.device,
        valid_text: Tensor | None = None,
        tables: PlanTables | None = None,
    ) -> None:
        self._tables = tables or PlanTables(plan, device)
        arguments = _arguments(plan, self._tables.tables, valid_text)
        super().__init__(**arguments)
        self.plain = BlockMask(**arguments)
        self.plan, self.counts, self.valid_text = plan, self._tables.counts, valid_text
        self.handle = f"mask{next(_serial)}"
        self.lists = plan.lists
        self.capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        self.launchers: dict[Any, Launcher] = {}
        kernels.missing()  # finds out outside of graphs, which cannot
        self._tiles: Tiles | None = None
        # A graph cannot build tables, so they are ready beforehand on devices where compiled code may ask for them.
        self._tiles_pay = device.type != "cpu" and self.tiles_pay()
        if self._tiles_pay:
            self._tiles = self._tables.tiles(valid_text)
        _masks[self.handle] = self

    @property
    def gna(self) -> GNA | tuple[GNA, ...]:
        """The GNA of the mask, or one GNA per head."""
        return self.plan.gnas[0] if len(self.plan.gnas) == 1 else self.plan.gnas

    def with_valid_text(
        self, *, first: Tensor | Sequence[int] | None = None, last: Tensor | Sequence[int] | None = None
    ) -> GNABlockMask:
        """The mask for a batch whose text is padded: of each batch entry only the leading text tokens count.

        The others are keys of nobody. As queries they see what counts, so their outputs are finite; drop them. The
        block tables are built at the first call and shared from then on, so call it for every batch. In compiled
        functions lengths are inputs: masks of other lengths need no compilation.

        Args:
            first: how many of the tokens before the grid count, ``[B]``, integers from 0 to ``text_first``; by default
                all. On a GPU, where a check would have to wait for it, numbers outside count as the nearest inside.
            last: how many of the tokens after the grid count, likewise.

        Returns:
            A mask for batches of ``B``. Lengths that this mask has already are replaced.

        Raises:
            ValueError: if neither is given, there is no such text, or shape, type or values are wrong.
            RuntimeError: inside of a compiled function.

        >>> mask = gna_mask(GNA((8, 8), window=3, text_last=77), device="cpu")
        >>> mask.with_valid_text(last=[77, 9]).valid_text.tolist()
        [[0, 77], [0, 9]]
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("with_valid_text inside a compiled function: call it outside and pass the mask")
        valid_text = text_lengths(self.plan.gnas[0], first, last, self.device)
        if self.plan.batch not in (None, 1, len(valid_text)):
            raise ValueError(f"lengths of {len(valid_text)} batch entries, but the mask was made for {self.plan.batch}")
        return self.counting(valid_text)

    def counting(self, valid_text: Tensor) -> GNABlockMask:
        """The mask with lengths ``[B, 2]`` of its text, on its device."""
        tables = self._tables if self.plan.valid_text else self._tables.with_valid_text
        return GNABlockMask(tables.plan, self.device, valid_text, tables)

    def check_batch(self, batch: int) -> None:
        """Refuses queries of another batch size than that of the lengths of text.

        Raises:
            ValueError: if they differ.
        """
        if self.valid_text is not None and self.valid_text.shape[0] != batch:
            raise ValueError(
                f"the mask has text lengths of {self.valid_text.shape[0]} batch entries (with_valid_text), but query "
                f"has {batch}"
            )

    def report(self, *, q_tile: Ints | None = None, kv_tile: Ints | None = None) -> Report:
        """What the mask skips, what it buys, and the proof: :func:`gna_flex.report.report` of its GNA.

        It also has the :meth:`route` of a call. A further condition (``and_mask``) and lengths of text are left out.

        >>> gna_mask(GNA((16, 16), 8, 8), device="cpu").report(q_tile=(8, 8)).perfect
        True
        """
        from gna_flex.report import report

        result = report(self.plan.gnas, q_tile=q_tile, kv_tile=kv_tile)
        with contextlib.suppress(RuntimeError):  # no route takes such a call, or not the forced one
            result = replace(result, route=self.route())
        return result

    def route(self, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Route:
        """The route of an inference call with this mask, and why; :func:`gna_flex.explain` is exact about a call.

        Raises:
            RuntimeError: if there is none.

        >>> gna_mask(GNA((16, 16), 8, 8), device="cpu").route().name
        'reference'
        """
        heads = self.plan.heads or len(self.plan.gnas)
        query, key = (
            stand_in((self.plan.batch or 1, heads, tokens, head_dim), dtype, self.device)
            for tokens in self.plan.seq_lengths
        )
        return route_of(query, key, self, needs_grad=False, value=key)

    @property
    def device(self) -> torch.device:
        """Where the block lists are."""
        return self.kv_num_blocks.device

    @property
    def tiles(self) -> Tiles:
        """The mask in the tile order predicted to be fastest; built at its first use outside of a graph."""
        if self._tiles is None:
            self._tiles = self._tables.tiles(self.valid_text)
        return self._tiles

    def has_tiles(self, compiling: bool = False) -> bool:
        """Whether the mask can be brought into tile order; inside a graph, whether that has been done."""
        return self._tiles is not None if compiling else _can_tile(self.plan)

    def tiles_pay(self, compiling: bool = False) -> bool:
        """Whether tile order is predicted to be faster than the tokens as given, permutations included."""
        return self._tiles_pay if compiling else self._predicted_to_pay

    @functools.cached_property
    def _predicted_to_pay(self) -> bool:
        if not _can_tile(self.plan):
            return False
        blocks = len(self.plan.gnas) * self.plan.block_counts[0]
        return choose_tile(self.plan.gnas)[1].cost + PERMUTE_COST * blocks < self.counts.cost

    def as_tuple(self, flatten: bool = True) -> Any:
        """What torch passes to its FlexAttention operator: an object like torch's tuple, which routes the call."""
        parts = super().as_tuple(flatten)  # type: ignore[call-overload]
        return RoutedTuple(self, parts, eager=not torch.compiler.is_compiling()) if flatten else parts

    def to(self, device: torch.device | str) -> GNABlockMask:
        """The mask on another device."""
        target = torch.empty(0, device=device).device
        if target == self.device:
            return self
        return GNABlockMask(self.plan, target, None if self.valid_text is None else self.valid_text.to(target))

    def __reduce__(self) -> Any:
        return GNABlockMask, (self.plan, self.device, self.valid_text)

    def canonical(self) -> BlockMask:
        """A plain BlockMask laid out as by ``create_block_mask``: tables as wide as the mask, unused entries filled."""
        return full_width(self)

    def to_dense(self) -> Tensor:
        """Visited blocks as ones, skipped ones as zeros: ``[B, H, query blocks, key blocks]``, int32."""
        return self.canonical().to_dense()

    def __getitem__(self, index: Any) -> BlockMask:  # type: ignore[override]
        return self.canonical()[index]

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:  # type: ignore[override]
        return self.canonical()._adjust(new_q_len, new_kv_len)

    def sparsity(self) -> float:
        """Percentage of blocks that are skipped."""
        return 100 * (1 - self.counts.visited / self.counts.total)

    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """A drawing of the blocks: full cells, partly visited ones, and blanks; ``-1`` draws every block."""
        rows, columns = self.plan.block_counts
        cells = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
        steps = [1 if n == -1 else max(1, ceil_div(size, n)) for size, n in zip((rows, columns), cells, strict=True)]
        shape = (ceil_div(rows, steps[0]), ceil_div(columns, steps[1]))
        batch, heads = self.kv_num_blocks.shape[:2]
        pictures = []
        for b, h in itertools.islice(itertools.product(range(batch), range(heads)), limit):
            share = self._visited_per_cell(b, h, steps, shape)
            lines = ["".join(" ░█"[(x > 0) + (x == 1)] * 2 for x in row) for row in share.tolist()]
            pictures.append("\n".join([f"({b}, {h})", *lines, ""]))
        if batch * heads > limit:
            pictures += ["...", "To print out more, set BlockMask.to_string(limit=N)"]
            pictures += ["You can also index (BlockMask[batch, head]) to choose a specific batch or head"]
        return "\n".join(pictures)

    def _visited_per_cell(self, b: int, h: int, steps: list[int], shape: tuple[int, int]) -> Tensor:
        """Share of visited blocks in every cell of ``steps`` blocks."""
        visited = torch.zeros(math.prod(shape))
        for kind in ("kv", "full_kv"):
            counts, indices = (getattr(self, kind + name)[b, h].cpu() for name in ("_num_blocks", "_indices"))
            row = torch.arange(len(counts)).repeat_interleave(counts)
            column = indices[torch.arange(indices.shape[-1]) < counts[:, None]]
            cell = row // steps[0] * shape[1] + column // steps[1]
            visited += torch.bincount(cell, minlength=math.prod(shape))
        sizes = [
            torch.full((n,), step).clamp(max=total - torch.arange(n) * step)
            for n, step, total in zip(shape, steps, self.plan.block_counts, strict=True)
        ]
        return visited.view(shape) / (sizes[0][:, None] * sizes[1])

    def __repr__(self) -> str:
        gnas = self.plan.gnas
        what = str(gnas[0]) if len(gnas) == 1 else f"{len(gnas)} heads, the first with {gnas[0]}"
        if self.valid_text is not None:
            what += f"; lengths of text for batches of {len(self.valid_text)}"
        order = "row-major" if self.plan.q_order is None else f"tiles {self.plan.q_order.tile}"
        if self.plan.kv_order != self.plan.q_order and self.plan.kv_order is not None:
            order += f" and {self.plan.kv_order.tile}"
        counts = self.counts
        return (
            f"GNABlockMask({what}; order {order}, shape {tuple(self.shape)}, blocks {self.BLOCK_SIZE}, visited "
            f"{counts.visited} of {counts.total} ({counts.full} full), {self.sparsity():.2f}% skipped, {self.device})"
        )

    def __str__(self) -> str:
        return f"{self!r}\n{self.to_string()}"


_serial = itertools.count()
_masks: weakref.WeakValueDictionary[str, GNABlockMask] = weakref.WeakValueDictionary()


def mask_of(handle: str) -> GNABlockMask:
    """The living mask with this handle."""
    return _masks[handle]


Order = str | int | Sequence[int] | Sequence[Sequence[int]]


def gna_mask(
    gna: GNA | Sequence[GNA],
    *,
    order: Order = "row-major",
    q_block: int | None = None,
    kv_block: int | None = None,
    device: torch.device | str | None = None,
    B: int | None = None,
    H: int | None = None,
    and_mask: MaskMod | None = None,
) -> GNABlockMask:
    """The BlockMask of a GNA, in closed form: time and memory are those of its block lists, never tokens x tokens.

    Equal to ``create_block_mask`` of the same ``mask_mod``, block by block. Pass it to
    :func:`gna_flex.flex_attention`, or to torch's own ``flex_attention``, which then takes the same routes.

    Args:
        gna: one GNA, or one per query head (same layout and text).
        order: order of the tokens in query, key and value: ``"row-major"``, the natural one; a tile such as
            ``(4, 4, 8)`` for :class:`gna_flex.TileOrder`; a pair of tiles for queries and keys; or ``"tiles"`` for the
            tile predicted to be fastest. Tokens must then be brought into that order (:func:`gna_flex.permute`). With
            the natural order ``flex_attention`` does so by itself where it pays.
        q_block: query tokens per block; 128, or the tokens of a tile.
        kv_block: key tokens per block, likewise.
        device: where the block lists go; by default the accelerator if there is one, as in torch.
        B: batch size of the block lists, as in ``create_block_mask``; by default they broadcast.
        H: heads of the block lists, likewise.
        and_mask: a further condition (a ``mask_mod`` in natural token indices) that a pair has to meet. Blocks are then
            kept as they are, but none counts as full.

    Raises:
        ValueError: if the arguments do not fit each other.
        RuntimeError: inside of a compiled function (with ``fullgraph=True``; else torch.compile breaks the graph here).

    >>> gna_mask(GNA((32, 32), window=8), device="cpu").counts
    TileCounts(full=0, partial=22, total=64)
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("gna_mask inside a compiled function: build the mask outside and pass or capture it")
    gnas = (gna,) if isinstance(gna, GNA) else tuple(gna)
    _check_heads(gnas, H)
    q_order, kv_order = _orders(gnas, order, q_block)
    plan = MaskPlan(
        gnas=gnas,
        q_order=q_order,
        kv_order=kv_order,
        q_block=_block("q_block", q_block, q_order),
        kv_block=_block("kv_block", kv_block, kv_order),
        batch=B,
        heads=H,
        and_mask=and_mask,
    )
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return GNABlockMask(plan, torch.empty(0, device=device).device)


def _check_heads(gnas: tuple[GNA, ...], heads: int | None) -> None:
    if not gnas or not all(isinstance(gna, GNA) for gna in gnas):
        raise TypeError(f"gna={gnas!r}: gna_mask takes a GNA, or one GNA per head")
    if len({(gna.layout, gna.text_first, gna.text_last) for gna in gnas}) > 1:
        raise ValueError("gna: all heads need the same layout and the same text tokens, but they differ")
    if len(gnas) > 1 and heads not in (None, len(gnas)):
        raise ValueError(f"H={heads}, but gna has {len(gnas)} heads")


def _orders(gnas: tuple[GNA, ...], order: Order, block: int | None) -> tuple[TileOrder, TileOrder] | tuple[None, None]:
    """Token orders of queries and keys; ``None`` is row-major."""
    if order == "row-major":
        return None, None
    if len({gna.dilation for gna in gnas}) > 1:
        raise ValueError(f"order={order!r}: heads with different dilations have no tile order in common")
    if order == "tiles":
        tile = TileOrder(gnas[0], choose_tile(gnas, DEFAULT_BLOCK if block is None else block)[0])
        return tile, tile
    if isinstance(order, str):
        raise ValueError(f"order={order!r}: give 'row-major', 'tiles', a tile, or a pair of tiles")
    pair = order if isinstance(order, Sequence) and all(isinstance(t, Sequence) for t in order) else (order, order)
    if len(pair) != 2:
        raise ValueError(f"order={order!r}: give one tile, or a pair of tiles for queries and keys")
    return TileOrder(gnas[0], pair[0]), TileOrder(gnas[0], pair[1])  # type: ignore[arg-type]


def _block(name: str, block: int | None, order: TileOrder | None) -> int:
    if block is None:
        return order.block if order else DEFAULT_BLOCK
    size = as_int(name, block)
    if size < 1:
        raise ValueError(f"{name}={size}: a block needs at least 1 token")
    if order is not None and size != order.block:
        raise ValueError(f"{name}={size}, but a tile {order.tile} has {order.block} tokens")
    return size


def _can_tile(plan: MaskPlan) -> bool:
    """Whether tokens in the order of the plan can be brought into tile order."""
    return plan.q_order is None and len({gna.dilation for gna in plan.gnas}) == 1


def _arguments(plan: MaskPlan, tables: dict[str, Any], valid_text: Tensor | None) -> dict[str, Any]:
    """Arguments of a BlockMask."""
    return {
        "seq_lengths": plan.seq_lengths,
        **tables,
        "BLOCK_SIZE": (plan.q_block, plan.kv_block),
        "mask_mod": plan.mask_mod(valid_text),
    }


def _tables(plan: MaskPlan, device: torch.device) -> tuple[dict[str, Any], TileCounts]:
    """The eight tensors of a BlockMask, and how many blocks are full, partial and there at all."""
    rows, columns = plan.block_counts
    keys_of = [_lists(plan, gna, key_interval) for gna in plan.gnas]
    queries_of = [_lists(plan, gna, query_interval) for gna in plan.gnas]
    tables = [table for lists in (keys_of, queries_of) for table in _stack(plan, lists, device)]
    counts = TileCounts(
        full=sum(int(lists.full_counts.sum()) for lists in keys_of),
        partial=sum(int(lists.partial_counts.sum()) for lists in keys_of),
        total=rows * columns * len(plan.gnas),
    )
    return dict(zip(BLOCK_TABLES, tables, strict=True)), counts


def _lists(plan: MaskPlan, gna: GNA, interval: Interval) -> BlockLists:
    """Keys per query block (``key_interval``), or queries per key block (``query_interval``)."""
    at_least = gna.kept_pairs() // (plan.q_block * plan.kv_block)
    if at_least > MOST_ENTRIES:
        raise ValueError(
            f"the block lists of {gna} with blocks of {plan.q_block} x {plan.kv_block} would have {at_least:.1e} "
            "entries or more: use a smaller window or larger blocks"
        )
    sides = [(plan.q_order, plan.q_block), (plan.kv_order, plan.kv_block)]
    (row_order, row_block), (col_order, col_block) = sides if interval is key_interval else reversed(sides)
    relation: Relation
    if row_order is None or col_order is None:
        relation = RowMajorRelation(gna, row_block, col_block, interval)
    else:
        row_order, col_order = replace(row_order, gna=gna), replace(col_order, gna=gna)
        relation = TiledRelation(row_order, col_order, interval)
    width = relation.columns if relation.rows * relation.columns <= FULL_WIDTH_ENTRIES else None
    lists = block_lists(relation, width)
    if plan.and_mask is None and not plan.valid_text:
        return lists
    cut = plan.text_blocks if plan.and_mask is None else np.ones(plan.block_counts[1], dtype=bool)
    return _as_partial(lists, cut[lists.full_indices] if interval is key_interval else cut[:, None])


def _as_partial(lists: BlockLists, which: np.ndarray) -> BlockLists:
    """The lists with those entries of the full blocks counted as partial, ascending again."""
    partial, full = (_entries(*pair) for pair in zip(lists[::2], lists[1::2], strict=True))
    which = which[:, : full.shape[1]]
    partial = np.concatenate([partial, np.where(which, full, UNUSED)], 1)
    tables = (partial, lists.partial_indices), (np.where(which, UNUSED, full), lists.full_indices)
    return BlockLists(*itertools.chain(*(_ascending(entries, table.shape[1]) for entries, table in tables)))


def _entries(counts: np.ndarray, table: np.ndarray) -> np.ndarray:
    """A table as wide as its longest row."""
    table = table[:, : counts.max()]
    return np.where(np.arange(table.shape[1]) < counts[:, None], table, UNUSED)


def _ascending(entries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts and table of the used entries of every row, at least ``width`` wide."""
    counts = (entries != UNUSED).sum(1, dtype=np.int32)
    longest = int(counts.max())
    table = np.zeros((len(entries), max(longest, width)), dtype=np.int32)
    entries = np.sort(entries, 1)[:, :longest]
    table[:, :longest] = np.where(entries == UNUSED, 0, entries)
    return counts, table


def _stack(plan: MaskPlan, lists: list[BlockLists], device: torch.device) -> list[Tensor]:
    """The four arrays of every head as tensors ``[B, H, rows(, width)]``, tables equally wide as in each head."""
    tensors = []
    width = max(array.shape[1] for arrays in lists for array in arrays if array.ndim == 2)
    for arrays in zip(*lists, strict=True):
        if arrays[0].ndim == 2 and any(array.shape[1] < width for array in arrays):
            arrays = tuple(np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays)
        table = torch.from_numpy(np.stack(arrays) if len(arrays) > 1 else arrays[0][None])[None].to(device)
        tensors.append(table.expand(plan.batch or 1, plan.heads or len(plan.gnas), *table.shape[2:]))
    return tensors
