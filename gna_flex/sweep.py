"""Tile counts of many strides and tiles at once: counted per dimension, combined by products.

A count of tiles is a product over dimensions, so a table per dimension (stride x side of the query tile x side of the
key tile) is enough for every combination of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gna_flex.neighborhood import GNA, Ints
from gna_flex.simulate import stride_counts, text_tiles
from gna_flex.tiling import TileOrder, text_block_counts, tile_shapes

Array = np.ndarray
Tile = tuple[int, ...]
Pairs = tuple[tuple[Tile, Tile], ...]
"""Pairs (query tile, key tile)."""

AT_ONCE = 1 << 20
"""Query tiles times strides that are counted at a time: bounds memory to a few 10 MiB."""


class DimensionTable(NamedTuple):
    """Numbers of one dimension for every stride and pair of tiles: arrays ``[strides, pairs]``, int64.

    ``most`` is the largest number of key tiles that a query tile visits; ``visited``, ``full`` and ``whole`` are sums
    over query tiles, see :class:`gna_flex.simulate.DimensionCounts`.
    """

    most: Array
    visited: Array
    full: Array
    whole: Array


@functools.lru_cache(maxsize=256)
def _side_table(
    dim: tuple[int, int, int, bool], strides: tuple[int, ...], sides: tuple[tuple[int, int], ...], tiling: str
) -> DimensionTable:
    """The table of a dimension ``(length, window, dilation, causal)`` for pairs (query side, key side)."""
    parts = []
    for q_side, kv_side in sides:
        rows = max(1, AT_ONCE * q_side // dim[0])
        chunks = [strides[begin : begin + rows] for begin in range(0, len(strides), rows)]
        columns = [_column(dim, chunk, q_side, kv_side, tiling) for chunk in chunks]
        parts.append([np.concatenate(values) for values in zip(*columns, strict=True)])
    return DimensionTable(*(np.stack(columns, 1) for columns in zip(*parts, strict=True)))


def _column(
    dim: tuple[int, int, int, bool], strides: tuple[int, ...], q_side: int, kv_side: int, tiling: str
) -> tuple[Array, ...]:
    """The numbers of a table for one pair of sides, ``[strides]`` each."""
    length, window, dilation, causal = dim
    column = np.array(strides, dtype=np.int64)[:, None]
    counts = stride_counts(length, window, column, dilation, causal, q_side, kv_side, tiling)
    return counts.visited.max(1), *(values.sum(1) for values in (counts.visited, counts.full, counts.whole))


def dimension_tables(gna: GNA, strides: Sequence[Sequence[int]], pairs: Pairs, tiling: str) -> list[DimensionTable]:
    """Per dimension the numbers for each of its strides and each pair of tiles, static or anchored."""
    tables = []
    for axis, (length, window, _, dilation, causal) in enumerate(gna.dims()):
        sides = [(q[axis], kv[axis]) for q, kv in pairs]
        distinct = tuple(sorted(set(sides)))
        table = _side_table((length, window, dilation, causal), tuple(strides[axis]), distinct, tiling)
        place = {side: index for index, side in enumerate(distinct)}
        columns = [place[side] for side in sides]
        tables.append(DimensionTable(*(values[:, columns] for values in table)))
    return tables


def tile_pairs(gna: GNA, q_tokens: Ints = 128, kv_tokens: Ints = 128) -> Pairs:
    """All pairs of power-of-two tiles with so many tokens, not larger than the grid needs.

    >>> tile_pairs(GNA((4, 4), 2), 8, 4)[:2]
    (((2, 4), (1, 4)), ((2, 4), (2, 2)))
    """

    def shapes(tokens: Ints) -> list[Tile]:
        numbers = tokens if isinstance(tokens, Sequence) else [tokens]
        return [shape for number in dict.fromkeys(numbers) for shape in tile_shapes(gna, number)]

    return tuple(itertools.product(shapes(q_tokens), shapes(kv_tokens)))


class StrideSweep(NamedTuple):
    """Counts of every stride for one pair of tiles: arrays of the shape of the window, at index ``stride - 1``.

    Attributes:
        q_tile, kv_tile: the tiles.
        visited_max: most key tiles that a query tile of the grid visits.
        visited: visited key tiles, summed over query tiles, text included.
        full: those of which every pair is kept.
    """

    q_tile: Tile
    kv_tile: Tile
    visited_max: Array
    visited: Array
    full: Array


def sweep_strides(gna: GNA, pairs: Pairs, tiling: str = "static") -> Iterator[StrideSweep]:
    """Simulates every stride ``1 .. window`` of every dimension, for one pair of tiles after the other.

    The numbers are those of :func:`gna_flex.simulate.simulate`; the stride of ``gna`` itself does not matter.

    Raises:
        ValueError: if the tiling is ``flat``, whose counts are no products.

    >>> gna = GNA((30, 48, 80), (18, 24, 24))
    >>> sweep = next(sweep_strides(gna, (((4, 8, 8), (2, 8, 8)),)))
    >>> sweep.visited_max.shape, int(sweep.visited_max[15, 7, 7])
    ((18, 24, 24), 81)
    """
    check_factors(gna, tiling)
    tables = dimension_tables(gna, [range(1, window + 1) for window in gna.window], pairs, tiling)
    for number, (q_tile, kv_tile) in enumerate(pairs):
        q, kv = TileOrder(gna, q_tile), TileOrder(gna, kv_tile)
        text = text_tiles(q, kv).visited
        most, visited, full = (
            functools.reduce(np.multiply.outer, (values[:, number] for values in kind))
            for kind in zip(*((table.most, table.visited, table.full) for table in tables), strict=True)
        )
        yield StrideSweep(q_tile, kv_tile, most + text_block_counts(kv)[0], visited + text, full + text)


def prune_strides(strides: Array | Sequence[Sequence[int]], costs: Array | Sequence[float]) -> Array:
    """Which strides are worth considering, by product of strides; the rule of the paper (arXiv 2504.16922).

    A stride is kept if no stride with a smaller or equal product is at least as fast; among equals the
    lexicographically smallest is kept.

    Args:
        strides: ``[strides, dims]``.
        costs: visited tiles, or time: ``[strides]``, or ``[strides, columns]`` to prune every column by itself.

    Returns:
        Booleans of the shape of ``costs``.

    >>> prune_strides([(1, 1), (2, 1), (1, 2), (2, 2)], [9, 6, 6, 7]).tolist()
    [True, False, True, False]
    """
    steps, values = np.asarray(strides), np.asarray(costs)
    products = steps.prod(1)
    order = np.lexsort((*steps.T[::-1], products))
    values, products = values[order], products[order]
    first = np.flatnonzero(np.diff(products, prepend=0))
    group = np.searchsorted(products[first], products)
    least = np.minimum.reduceat(values, first, axis=0)
    gains = np.ones(least.shape, dtype=bool)
    gains[1:] = least[1:] < np.minimum.accumulate(least, axis=0)[:-1]
    best = (values == least[group]) & gains[group]
    # Of several equal ones of a product only the first.
    rank = np.cumsum(best, axis=0)
    kept: Array = np.empty_like(best)
    kept[order] = best & (rank - (rank - best)[first][group] == 1)
    return kept


def check_factors(gna: GNA, tiling: str) -> None:
    """Refuses a tiling whose counts are no products over dimensions."""
    if tiling not in ("static", "anchored"):
        raise ValueError(
            f"tiling={tiling!r} for layout {gna.layout} cannot be searched: only counts of static and anchored tiles "
            "are products over dimensions (simulate takes flat ones)"
        )
