"""Tiles: boxes of tokens. Token orders in which a tile is contiguous, and which tiles see which, per dimension.

Static tiling: tiles lie on a fixed grid that starts at token 0 of each dilation group. Along one dimension every query
tile sees one interval of key tiles (the union of its queries' windows), of which one sub-interval is full (the
intersection), because both ends of :func:`gna_flex.intervals.key_interval` are monotone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gna_flex.intervals import ceil_div, group_length, key_interval
from gna_flex.literal import literal_function
from gna_flex.neighborhood import GNA, Ints, as_int, per_dim

Interval = Callable[..., tuple[Any, Any]]
"""``key_interval`` or ``query_interval``: from a position to the positions on the other side."""

PARTIAL_COST = 2.5
"""Time of a partial tile over a full one in compiled FlexAttention: 2.2 to 3.0 measured on an H200, head dim 128."""


@dataclass(frozen=True)
class TileOrder:
    """Token order ``[first text | tiles of the grid | last text]`` in which every tile is contiguous.

    Tokens of the grid are sorted by (dilation group, tile, place in the tile), each row-major. Groups are padded to a
    whole number of tiles and text to a whole number of blocks, so every block of ``block`` tokens is one tile or holds
    only text.

    Args:
        gna: the neighborhood; its layout, dilation and text counts fix the order.
        tile: tokens of a tile per dimension, inside one dilation group.

    >>> order = TileOrder(GNA((6, 6), 3), (2, 4))
    >>> order.tokens, order.block
    (48, 8)
    """

    gna: GNA
    tile: tuple[int, ...]

    def __post_init__(self) -> None:
        tile = per_dim("tile", self.tile, self.gna.layout, as_int)
        if min(tile) < 1:
            raise ValueError(f"tile={tile} for layout {self.gna.layout}: every side must be at least 1")
        object.__setattr__(self, "tile", tile)

    @property
    def block(self) -> int:
        """Tokens of one tile."""
        return math.prod(self.tile)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles per dimension in one dilation group."""
        g = self.gna
        return tuple(ceil_div(ceil_div(n, d), t) for n, d, t in zip(g.layout, g.dilation, self.tile, strict=True))

    @property
    def text_blocks(self) -> tuple[int, int]:
        """Blocks of text before and after the grid."""
        return ceil_div(self.gna.text_first, self.block), ceil_div(self.gna.text_last, self.block)

    @property
    def blocks(self) -> int:
        """All blocks: text, then tiles, then text."""
        return sum(self.text_blocks) + math.prod(self.gna.dilation) * math.prod(self.tiles)

    @property
    def tokens(self) -> int:
        """Sequence length in this order, padding included."""
        return self.blocks * self.block

    def permute(self, x: Tensor, dim: int = -2) -> Tensor:
        """Tokens of ``x`` from natural row-major order to this order along ``dim``; padding tokens are zero.

        Made of views and one copy: any dtype, differentiable. ``[..., S, D]`` becomes ``[..., tokens, D]``.
        """
        self._check(x, dim, self.gna.tokens, "the natural order")
        return to_tiles(x, dim, *self._geometry())

    def unpermute(self, x: Tensor, dim: int = -2) -> Tensor:
        """Inverse of :meth:`permute`: drops the padding. ``[..., tokens, D]`` becomes ``[..., S, D]``."""
        self._check(x, dim, self.tokens, "the tile order")
        return from_tiles(x, dim, *self._geometry())

    def literal_permutations(self) -> tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]:
        """:meth:`permute` and :meth:`unpermute` as operators with all sizes as literals, for compiled code.

        Operators, because a compiler would make kernels of the index arithmetic, which NVIDIA's assembler sometimes
        gets wrong (see :mod:`gna_flex.mask_mod`).
        """
        arguments = ", ".join(str(list(value)) for value in self._geometry())
        permute = ["def permute(x, dim):", f"    return ops.to_tiles(x, dim, {arguments})"]
        unpermute = ["def unpermute(x, dim):", f"    return ops.from_tiles(x, dim, {arguments})"]
        names = {"ops": torch.ops.gna_flex}
        return literal_function("permute", permute, names), literal_function("unpermute", unpermute, names)

    def _geometry(self) -> tuple[tuple[int, ...], ...]:
        """Layout; tiles, places in a tile and dilation groups per dimension; text tokens; text places with padding."""
        gna = self.gna
        first, last = (count * self.block for count in self.text_blocks)
        return gna.layout, self.tiles, self.tile, gna.dilation, (gna.text_first, gna.text_last), (first, last)

    def _check(self, x: Tensor, dim: int, tokens: int, order: str) -> None:
        if x.shape[dim] != tokens:
            raise ValueError(
                f"x has {x.shape[dim]} tokens in dimension {dim}, but {order} of {self.gna} with tile {self.tile} "
                f"has {tokens}"
            )


def to_tiles(
    x: Tensor,
    dim: int,
    layout: Sequence[int],
    tiles: Sequence[int],
    tile: Sequence[int],
    dilation: Sequence[int],
    text: Sequence[int],
    text_places: Sequence[int],
) -> Tensor:
    """:meth:`TileOrder.permute` for sizes given one by one."""
    n, dim = len(layout), dim % x.ndim
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    axes = list(zip(tiles, tile, dilation, strict=True))
    text_first, grid, text_last = x.split([text[0], math.prod(layout), text[1]], dim)
    grid = grid.reshape(*before, *layout, *after)
    grid = _pad(grid, {dim + a: math.prod(axis) for a, axis in enumerate(axes)})
    # Split every dimension into (tile, place in the tile, dilation group), then bring equal kinds together.
    grid = grid.reshape(*before, *[size for axis in axes for size in axis], *after)
    grid = _reorder(grid, dim, [3 * a + kind for kind in (2, 0, 1) for a in range(n)])
    grid = grid.reshape(*before, math.prod(tiles) * math.prod(tile) * math.prod(dilation), *after)
    if not any(text):
        return grid
    return torch.cat([_pad(text_first, {dim: text_places[0]}), grid, _pad(text_last, {dim: text_places[1]})], dim)


def from_tiles(
    x: Tensor,
    dim: int,
    layout: Sequence[int],
    tiles: Sequence[int],
    tile: Sequence[int],
    dilation: Sequence[int],
    text: Sequence[int],
    text_places: Sequence[int],
) -> Tensor:
    """:meth:`TileOrder.unpermute` for sizes given one by one."""
    n, dim = len(layout), dim % x.ndim
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    places = math.prod(tiles) * math.prod(tile) * math.prod(dilation)
    text_first, grid, text_last = x.split([text_places[0], places, text_places[1]], dim)
    grid = grid.reshape(*before, *dilation, *tiles, *tile, *after)
    grid = _reorder(grid, dim, [kind * n + a for a in range(n) for kind in (1, 2, 0)])
    grid = grid.reshape(*before, *[math.prod(axis) for axis in zip(tiles, tile, dilation, strict=True)], *after)
    for a, length in enumerate(layout):
        grid = grid.narrow(dim + a, 0, length)
    grid = grid.reshape(*before, math.prod(layout), *after)
    if not any(text):
        return grid
    return torch.cat([text_first.narrow(dim, 0, text[0]), grid, text_last.narrow(dim, 0, text[1])], dim)


def permute(x: Tensor, gna: GNA, tile: Ints, dim: int = -2) -> Tensor:
    """Tokens of ``x`` from natural row-major order to tile order along ``dim``; see :class:`TileOrder`.

    >>> permute(torch.arange(16).view(16, 1), GNA((4, 4), 2), (2, 2)).flatten().tolist()
    [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    """
    return TileOrder(gna, tile).permute(x, dim)  # type: ignore[arg-type]


def unpermute(x: Tensor, gna: GNA, tile: Ints, dim: int = -2) -> Tensor:
    """Tokens of ``x`` from tile order back to natural row-major order along ``dim``; drops the padding."""
    return TileOrder(gna, tile).unpermute(x, dim)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TileIntervals:
    """Along one dimension, the tiles ``[lo, hi)`` each row tile visits and those ``[full_lo, full_hi)`` fully kept.

    Arrays have shape ``[dilation, row tiles]``; an empty row tile (a short dilation group) visits none.
    """

    lo: np.ndarray
    hi: np.ndarray
    full_lo: np.ndarray
    full_hi: np.ndarray


@functools.lru_cache(maxsize=4096)
def tile_intervals(
    length: int, window: int, stride: int, dilation: int, causal: bool, row_tile: int, col_tile: int, interval: Interval
) -> TileIntervals:
    """Tile intervals of one dimension; ``interval`` is ``key_interval`` (rows are queries) or ``query_interval``."""
    tiles = ceil_div(ceil_div(length, dilation), row_tile)
    size = group_length(length, dilation, np.arange(dilation))[:, None]
    begin = np.arange(tiles)[None, :] * row_tile
    inside = begin < size
    last = np.minimum(begin + row_tile, size) - 1
    # Ends of the windows of the first and the last token of every row tile.
    lo_first, hi_first = interval(np.minimum(begin, size - 1), size, window, stride, causal)
    lo_last, hi_last = interval(np.maximum(last, 0), size, window, stride, causal)
    whole = begin + row_tile <= size
    full_lo = ceil_div(lo_last, col_tile)
    return TileIntervals(
        lo=lo_first // col_tile,
        hi=np.where(inside, ceil_div(hi_last, col_tile), lo_first // col_tile),
        full_lo=full_lo,
        full_hi=np.maximum(np.where(whole, hi_first // col_tile, 0), full_lo),
    )


class TileCounts(NamedTuple):
    """Tiles that one head visits: fully kept ones, and partial ones that need the mask. ``total`` is dense."""

    full: int
    partial: int
    total: int

    @property
    def visited(self) -> int:
        """Full and partial tiles together."""
        return self.full + self.partial

    @property
    def cost(self) -> float:
        """Predicted time in units of one full tile (compiled FlexAttention)."""
        return self.full + PARTIAL_COST * self.partial


def tile_counts(gna: GNA, q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> TileCounts:
    """Visited, full and partial tiles of one head in tile order, text included, in closed form."""
    q, kv = TileOrder(gna, q_tile), TileOrder(gna, kv_tile)
    visited = full = 1
    for dim, tq, tk in zip(gna.dims(), q.tile, kv.tile, strict=True):
        axis = tile_intervals(*dim, tq, tk, key_interval)
        visited *= int(np.sum(axis.hi - axis.lo))
        full *= int(np.sum(axis.full_hi - axis.full_lo))
    q_grid, kv_grid = grid_tiles(q), grid_tiles(kv)
    q_text, kv_text = text_block_counts(q), text_block_counts(kv)
    visited += q_text[0] * (kv_grid[0] + kv_text[0]) + q_grid[0] * kv_text[0]
    full += q_text[1] * (kv_grid[1] + kv_text[1]) + q_grid[1] * kv_text[1]
    return TileCounts(full=full, partial=visited - full, total=q.blocks * kv.blocks)


def grid_tiles(order: TileOrder) -> tuple[int, int]:
    """Tiles of the grid that hold any token, and those without padding."""
    any_token = whole = 1
    for length, dilation, tile in zip(order.gna.layout, order.gna.dilation, order.tile, strict=True):
        size = group_length(length, dilation, np.arange(dilation))
        any_token *= int(np.sum(ceil_div(size, tile)))
        whole *= int(np.sum(size // tile))
    return any_token, whole


def text_block_counts(order: TileOrder) -> tuple[int, int]:
    """Text blocks, and those without padding."""
    gna = order.gna
    return sum(order.text_blocks), gna.text_first // order.block + gna.text_last // order.block


@functools.lru_cache(maxsize=1024)
def choose_tile(gnas: tuple[GNA, ...], block: int = 128) -> tuple[tuple[int, ...], TileCounts]:
    """Tile shape with ``block`` tokens (a power of two per side) of least predicted time, and its counts.

    ``gnas`` is one GNA, or one per head (the counts are then sums over heads).

    >>> choose_tile((GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)),))[0]
    (2, 8, 8)
    """
    candidates = []
    for tile in tile_shapes(gnas[0], block):
        counts = [tile_counts(gna, tile, tile) for gna in gnas]
        candidates.append((tile, TileCounts(*(sum(values) for values in zip(*counts, strict=True)))))
    return min(candidates, key=lambda candidate: (candidate[1].cost, candidate[1].total))


def tile_shapes(gna: GNA, block: int) -> Iterator[tuple[int, ...]]:
    """Power-of-two tile shapes with ``block`` tokens, not larger than a dilation group needs where that is possible."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"block={block} must be a power of two")
    groups = [ceil_div(length, d) for length, d in zip(gna.layout, gna.dilation, strict=True)]
    limits = [1 << (size - 1).bit_length() for size in groups]
    if math.prod(limits) < block:
        limits[-1] *= block // math.prod(limits)

    def shapes(axis: int, left: int) -> Iterable[tuple[int, ...]]:
        if axis == gna.ndim - 1:
            return [(left,)] if left <= limits[axis] else []
        sides = (1 << e for e in range(left.bit_length()) if 1 << e <= min(left, limits[axis]))
        return [(side, *rest) for side in sides for rest in shapes(axis + 1, left // side)]

    return iter(shapes(0, block))


def _pad(x: Tensor, sizes: dict[int, int]) -> Tensor:
    """``x`` padded with zeros at the end of the given dimensions to the given sizes."""
    missing = {dim: size - x.shape[dim] for dim, size in sizes.items()}
    if not any(missing.values()):
        return x
    widths = [width for dim in reversed(range(min(sizes), x.ndim)) for width in (0, missing.get(dim, 0))]
    return torch.nn.functional.pad(x, widths)


def _reorder(x: Tensor, start: int, order: list[int]) -> Tensor:
    """``x`` with the ``len(order)`` dimensions from ``start`` on permuted."""
    stop = start + len(order)
    return x.permute(*range(start), *(start + o for o in order), *range(stop, x.ndim))
