"""What a picture of a neighborhood shows: one query's window and tiles per dimension, and the block mask in cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gna_flex.counts import NATURAL_LIMIT, listed_blocks, lists_by_rows, relation_of
from gna_flex.intervals import ceil_div, group_length, key_interval
from gna_flex.neighborhood import GNA, Ints, as_int, per_dim
from gna_flex.tiling import TileOrder, choose_tile, tile_intervals
from gna_flex.words import by_x


def key_ranges(gna: GNA, query: tuple[int, ...]) -> tuple[range, ...]:
    """Coordinates per dimension of the keys of one query; its window is their product.

    >>> key_ranges(GNA((8, 8), window=3, dilation=(1, 2)), (4, 4))
    (range(3, 6), range(2, 7, 2))
    """
    ranges = []
    for q, (length, window, stride, dilation, causal) in zip(query, gna.dims(), strict=True):
        group = q % dilation
        lo, hi = key_interval(q // dilation, group_length(length, dilation, group), window, stride, causal)
        ranges.append(range(lo * dilation + group, (hi - 1) * dilation + group + 1, dilation))
    return tuple(ranges)


@dataclass(frozen=True)
class Axis:
    """One dimension of a picture: which tokens are in the window of the query, and which lie in tiles visited for it.

    ``tile`` is the side of a key tile in tokens of the grid, 0 where dilation takes tiles apart. A crop begins at token
    ``start`` of ``whole`` ones.
    """

    query: int
    window: np.ndarray
    visited: np.ndarray
    tile: int
    whole: int
    start: int = 0

    @property
    def length(self) -> int:
        """Tokens that are shown."""
        return len(self.window)

    def zoom(self, few: int) -> Axis:
        """The surroundings of the visited tiles where these are less than ``1 / few`` of all, else everything."""
        seen = np.flatnonzero(self.visited)
        first, last = int(seen[0]), int(seen[-1]) + 1
        if (last - first) * few >= self.length:
            return self
        margin = max((last - first) // 2, 1)
        first, last = max(first - margin, 0), min(last + margin, self.length)
        if self.tile:
            first, last = first // self.tile * self.tile, ceil_div(last, self.tile) * self.tile
        crop = slice(first, min(last, self.length))
        return Axis(self.query - first, self.window[crop], self.visited[crop], self.tile, self.whole, first)


def axes_of(gna: GNA, query: Ints | None, q_tile: Ints | None, kv_tile: Ints | None) -> tuple[Axis, ...]:
    """The picture of one query, dimension by dimension; by default the query in the middle and the best tile.

    Raises:
        ValueError: if the query is outside the grid or has the wrong number of coordinates.
    """
    place = tuple(n // 2 for n in gna.layout) if query is None else per_dim("query", query, gna.layout, as_int)
    if any(not 0 <= q < n for q, n in zip(place, gna.layout, strict=True)):
        raise ValueError(f"query={place} is outside of the layout {gna.layout}")
    q_sides, kv_sides = tiles_of(gna, q_tile, kv_tile)
    axes = []
    for q, keys, dim, q_side, kv_side in zip(place, key_ranges(gna, place), gna.dims(), q_sides, kv_sides, strict=True):
        length, dilation = dim[0], dim[3]
        tiles = tile_intervals(*dim, q_side, kv_side, key_interval)
        at = q % dilation, q // dilation // q_side
        x = np.arange(length)
        key_tile = x // dilation // kv_side
        visited = (x % dilation == at[0]) & (tiles.lo[at] <= key_tile) & (key_tile < tiles.hi[at])
        axes.append(Axis(q, np.isin(x, keys), visited, kv_side if dilation == 1 else 0, length))
    return tuple(axes)


def tiles_of(gna: GNA, q_tile: Ints | None, kv_tile: Ints | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query and key tile: as given, keys as queries by default, or the best tile for both."""
    if q_tile is None and kv_tile is not None:
        raise ValueError(f"kv_tile={kv_tile!r} needs a q_tile")
    if q_tile is None:
        best = choose_tile((gna,))[0]
        return best, best
    q, kv = (TileOrder(gna, tile).tile for tile in (q_tile, q_tile if kv_tile is None else kv_tile))  # type: ignore[arg-type]
    return q, kv


@dataclass(frozen=True)
class BlockPicture:
    """A block mask in cells of several blocks: the share of visited and of full blocks, ``[rows, columns]``.

    ``cell`` is how many blocks a cell is, down and across; ``share`` is that of visited blocks in the whole mask.
    """

    name: str
    visited: np.ndarray
    full: np.ndarray
    cell: tuple[int, int]
    share: float


def block_picture(
    gna: GNA, tiles: tuple[tuple[int, ...], tuple[int, ...]] | None, rows: int, columns: int
) -> BlockPicture | None:
    """The block mask of a GNA in at most ``rows`` x ``columns`` cells; ``None`` if it has too many blocks to list.

    ``tiles`` are the query and the key tile, ``None`` is natural row-major order.

    >>> block_picture(GNA(512, 256, 128), None, 4, 4).visited.sum(1).tolist()
    [2.0, 3.0, 3.0, 2.0]
    """
    relation = relation_of(gna, *(tiles or ()))
    if listed_blocks(relation) > NATURAL_LIMIT:
        return None
    cell = ceil_div(relation.rows, rows), ceil_div(relation.columns, columns)
    row_cells, column_cells = np.arange(relation.rows) // cell[0], np.arange(relation.columns) // cell[1]
    shape = int(row_cells[-1]) + 1, int(column_cells[-1]) + 1
    partial, full = np.zeros(shape[0] * shape[1]), np.zeros(shape[0] * shape[1])
    for begin, lists in lists_by_rows(relation):
        for sums, counts, indices in (
            (partial, lists.partial_counts, lists.partial_indices),
            (full, lists.full_counts, lists.full_indices),
        ):
            row = row_cells[begin : begin + len(counts)].repeat(counts)
            column = column_cells[indices[np.arange(indices.shape[1]) < counts[:, None]]]
            sums += np.bincount(row * shape[1] + column, minlength=len(sums))
    share = float(partial.sum() + full.sum()) / (relation.rows * relation.columns)
    sizes = np.outer(np.bincount(row_cells), np.bincount(column_cells))
    full, partial = full.reshape(shape) / sizes, partial.reshape(shape) / sizes
    name = "natural order" if tiles is None else f"tile order {' and '.join(dict.fromkeys(map(by_x, tiles)))}"
    return BlockPicture(name, full + partial, full, cell, share)
