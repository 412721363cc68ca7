"""Tiles that an attention kernel visits, counted without running one, for three ways to cut tokens into tiles.

- ``static``: query and key tiles are boxes on a fixed grid that starts at token 0 of each dilation group.
- ``anchored``: the key tiles of a query tile start where the window of its first query starts.
- ``flat``: stretches of consecutive tokens in natural row-major order, as plain FlexAttention has them.

This is the simulator that Generalized Neighborhood Attention (arXiv 2504.16922, section 3) describes and does not
publish: it counts tiles per dimension and multiplies, so its cost does not grow with the number of pairs. Flat blocks
are no products; they are counted in runs, about one for each line of the grid that a block of queries sees.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gna_flex.blocks import ROWS_AT_ONCE, RangeBoxes, RowMajorRelation, Runs, contained_blocks, touched_blocks
from gna_flex.intervals import ceil_div, group_length, key_interval
from gna_flex.neighborhood import GNA, Ints, as_int, per_dim
from gna_flex.tiling import TileOrder, grid_tiles, text_block_counts
from gna_flex.words import amount, by_x, percent, plain_text, times

if TYPE_CHECKING:
    from rich.console import RenderableType

TILINGS = ("static", "anchored", "flat")
"""Ways to cut tokens into tiles."""
HISTOGRAM_ROWS = 10
HISTOGRAM_WIDTH = 40

Array = np.ndarray
Histogram = tuple[tuple[int, int], ...]
"""Pairs (key tiles visited, number of query tiles), ascending."""


@dataclass(frozen=True)
class Simulation:
    """Key tiles that the query tiles of one head visit. Made by :func:`simulate`; prints as a table.

    A visited tile is *full* if every pair of existing tokens in it is kept (padding places do not count), else
    *partial*.

    Attributes:
        gna: the neighborhood.
        tiling: ``static``, ``anchored`` or ``flat``.
        q_tile, kv_tile: tokens of a tile per dimension.
        query_tiles: number of query tiles, those of text included.
        dense: key tiles that a query tile visits in dense attention.
        visited_max: most key tiles that a query tile without text visits (text queries visit everything).
        visited: visited key tiles, summed over all query tiles.
        full: those of them that are full, which need no mask.
        ragged: those of ``full`` that stick out of the grid or their dilation group: a kernel must still skip keys
            beyond the end.
        whole: those of ``full`` of which neither side sticks out, the only ones that FlexAttention runs unmasked.
        histogram: pairs (key tiles visited, number of query tiles), ascending; text included.
    """

    gna: GNA
    tiling: str
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    query_tiles: int
    dense: int
    visited_max: int
    visited: int
    full: int
    ragged: int
    whole: int
    histogram: Histogram

    @property
    def partial(self) -> int:
        """Visited tiles that need the mask, summed over all query tiles."""
        return self.visited - self.full

    @property
    def visited_mean(self) -> float:
        """Key tiles that a query tile visits on average."""
        return self.visited / self.query_tiles

    @property
    def speedup(self) -> float:
        """Dense tiles over those of the worst query tile: the figure of the paper."""
        return self.dense / self.visited_max

    @property
    def mean_speedup(self) -> float:
        """Dense tiles over visited ones: the saving in work, which tiles at the edges can push above ``speedup``."""
        return self.dense / self.visited_mean

    @property
    def flop_speedup(self) -> float:
        """All pairs over kept pairs: the bound that no tiling beats but for rounding of the dense tiles."""
        return float(self.gna.tokens**2 / self.gna.kept_pairs())

    @property
    def perfect(self) -> bool:
        """Whether the tiling is perfectly block-sparse: no visited tile needs the mask."""
        return self.partial == 0

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        return asdict(self) | {
            "partial": self.partial,
            "visited_mean": self.visited_mean,
            "speedup": self.speedup,
            "mean_speedup": self.mean_speedup,
            "flop_speedup": self.flop_speedup,
            "perfectly_block_sparse": self.perfect,
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("query tile", "key tiles", "speed-up"):
            table.add_column(name, justify="left" if name == "query tile" else "right", no_wrap=True)
        table.add_row("dense", f"{self.dense:,}", "1x", style="dim")
        table.add_row("worst", f"{self.visited_max:,}", times(self.speedup))
        table.add_row("mean", f"{self.visited_mean:,.1f}", times(self.mean_speedup))
        table.add_row("pairs kept", "", times(self.flop_speedup), style="dim")
        bars = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        bars.add_column("key tiles visited", justify="right", no_wrap=True)
        bars.add_column("query tiles", justify="right", no_wrap=True)
        bars.add_column("", no_wrap=True)
        rows = _bins(self.histogram)
        most = max(count for _, _, count in rows)
        for low, high, count in rows:
            label = f"{low:,}" if low == high else f"{low:,} - {high:,}"
            bars.add_row(label, f"{count:,}", "#" * ceil_div(HISTOGRAM_WIDTH * count, most))
        title = Text(str(self.gna), "bold")
        verdict = Text.assemble(("> ", "bold green"), (self._verdict(), "italic"))
        return Group(title, Text(self._tiles()), Padding(table, (1, 0)), bars, Padding(verdict, (1, 0, 0, 0)))

    def __str__(self) -> str:
        return plain_text(self)

    def _tiles(self) -> str:
        q_tile, kv_tile = map(by_x, (self.q_tile, self.kv_tile))
        return f"{self.tiling} tiles: queries {q_tile}, keys {kv_tile}; {self.query_tiles:,} query tiles"

    def _verdict(self) -> str:
        if self.perfect:
            end = f" ({percent(self.ragged / self.full)} of the tiles stick out of the grid)" if self.ragged else ""
            return f"No visited tile needs the mask: perfectly block-sparse{end}."
        return f"{percent(self.partial / self.visited)} of the {amount(self.visited)} visited tiles need the mask."


def _bins(histogram: Histogram) -> list[tuple[int, int, int]]:
    """The histogram as at most ``HISTOGRAM_ROWS`` rows (lowest, highest, query tiles), empty ones left out."""
    if len(histogram) <= HISTOGRAM_ROWS:
        return [(visited, visited, count) for visited, count in histogram]
    low, high = histogram[0][0], histogram[-1][0]
    width = ceil_div(high - low + 1, HISTOGRAM_ROWS)
    counts: Counter[int] = Counter()
    for visited, count in histogram:
        counts[(visited - low) // width] += count
    return [(low + row * width, min(low + (row + 1) * width - 1, high), counts[row]) for row in sorted(counts)]


def simulate(gna: GNA, q_tile: Ints, kv_tile: Ints | None = None, tiling: str = "static") -> Simulation:
    """Counts the key tiles that every query tile visits, and how many of them are full.

    Text before and after the grid is cut into blocks of its own, except in flat tiling, where it is part of the
    sequence. Text queries visit everything, and every query visits all text.

    Args:
        gna: the neighborhood.
        q_tile: tokens of a query tile, one per dimension or one for all. In flat tiling a block has as many tokens as
            the tile, and one number is the tokens of a block.
        kv_tile: the same for keys; by default that of the queries.
        tiling: ``static``, ``anchored`` or ``flat``; see :mod:`gna_flex.simulate`.

    Raises:
        ValueError: if a tile does not fit the layout, or the tiling is not known.

    >>> result = simulate(GNA((30, 48, 80), (18, 24, 24)), (4, 8, 8), (2, 8, 8))
    >>> result.visited_max, round(result.speedup, 2), result.perfect
    (275, 3.27, False)
    >>> simulate(GNA((30, 48, 80), (18, 24, 24), (2, 8, 8)), (2, 8, 8)).perfect
    True
    """
    if tiling not in TILINGS:
        raise ValueError(f"tiling={tiling!r} for layout {gna.layout} is not known; tilings are {', '.join(TILINGS)}")
    q = tile_of("q_tile", q_tile, gna, tiling)
    kv = q if kv_tile is None else tile_of("kv_tile", kv_tile, gna, tiling)
    return _simulate_flat(gna, q, kv) if tiling == "flat" else _simulate_boxes(gna, q, kv, tiling)


def tile_of(name: str, tile: Ints, gna: GNA, tiling: str = "static") -> tuple[int, ...]:
    """A checked tile: tokens per dimension, or, in flat tiling, possibly one number of consecutive tokens.

    >>> tile_of("q_tile", 8, GNA((16, 16), 8)), tile_of("q_tile", 128, GNA((16, 16), 8), "flat")
    ((8, 8), (128,))
    """
    sides = per_dim(name, tile, None, as_int)
    if tiling != "flat" or len(sides) > 1:
        sides = per_dim(name, sides if len(sides) > 1 else tile, gna.layout, as_int)
    if min(sides) < 1:
        raise ValueError(f"{name}={tile!r} for layout {gna.layout}: every side must be at least 1 token")
    return sides


class DimensionCounts(NamedTuple):
    """Key tiles along one dimension, per query tile: arrays ``[..., query tiles]`` over all dilation groups, int64.

    ``visited`` tiles hold a kept pair, ``full`` ones keep every pair of existing tokens. ``ragged`` ones (0 or 1) are
    full and stick out of their dilation group; ``whole`` ones are full, and neither they nor the query tile stick out.
    """

    visited: Array
    full: Array
    ragged: Array
    whole: Array


@functools.lru_cache(maxsize=4096)
def dimension_counts(
    length: int,
    window: int,
    stride: int,
    dilation: int,
    causal: bool,
    q_tile: int,
    kv_tile: int,
    tiling: str = "static",
) -> DimensionCounts:
    """Tiles along one dimension, static or anchored. Query tiles are in order of (dilation group, place).

    Multiplied over dimensions, ``visited``, ``full``, ``full - ragged`` and ``whole`` count the tiles of the grid.
    The arrays have shape ``[query tiles]`` and are read-only.

    >>> dimension_counts(16, 5, 1, 1, False, 4, 4).visited.tolist()
    [2, 3, 3, 2]
    >>> dimension_counts(16, 5, 1, 1, False, 4, 4, "anchored").visited.tolist()
    [2, 2, 2, 2]
    """
    counts = stride_counts(length, window, stride, dilation, causal, q_tile, kv_tile, tiling)
    for values in counts:
        values.flags.writeable = False
    return counts


def stride_counts(
    length: int,
    window: int,
    stride: int | Array,
    dilation: int,
    causal: bool,
    q_tile: int,
    kv_tile: int,
    tiling: str = "static",
) -> DimensionCounts:
    """:func:`dimension_counts` for one stride, or for an array ``[strides, 1]`` of them: ``[strides, query tiles]``.

    >>> stride_counts(16, 5, np.array([[1], [4]]), 1, False, 4, 4).visited.tolist()
    [[2, 3, 3, 2], [2, 2, 2, 2]]
    """
    groups = group_length(length, dilation, np.arange(dilation))[:, None]
    first, size = np.broadcast_arrays(np.arange(ceil_div(ceil_div(length, dilation), q_tile)) * q_tile, groups)
    # A short dilation group may have a query tile less than the others.
    first, size = first[first < size], size[first < size]
    last = np.minimum(first + q_tile, size) - 1
    # Ends of windows never decrease: their union is [some, some_end), their intersection [every, every_end).
    some, every_end = key_interval(first, size, window, stride, causal)
    every, some_end = key_interval(last, size, window, stride, causal)
    origin = some if tiling == "anchored" else np.zeros_like(some)
    at_end = every_end == size
    begin = ceil_div(every - origin, kv_tile)
    end = np.where(at_end, ceil_div(size - origin, kv_tile), (every_end - origin) // kv_tile)
    full = np.maximum(end - begin, 0)
    ragged = ((full > 0) & at_end & ((size - origin) % kv_tile > 0)).astype(np.int64)
    return DimensionCounts(
        visited=ceil_div(some_end - origin, kv_tile) - (some - origin) // kv_tile,
        full=full,
        ragged=ragged,
        whole=np.where(first + q_tile <= size, full - ragged, 0),
    )


class TextTiles(NamedTuple):
    """Tiles that are visited because query or key is text; all are full. See :class:`Simulation`."""

    visited: int
    unragged: int
    whole: int


def text_tiles(q: TileOrder, kv: TileOrder) -> TextTiles:
    """What text adds to the tiles of the grid: text queries visit everything, every query tile visits all text.

    >>> text_tiles(TileOrder(GNA((8, 8), 3, text_last=20), (4, 4)), TileOrder(GNA((8, 8), 3, text_last=20), (4, 4)))
    TextTiles(visited=20, unragged=14, whole=9)
    """
    # Each as (all tiles, those without padding).
    q_grid, kv_grid, q_text, kv_text = grid_tiles(q), grid_tiles(kv), text_block_counts(q), text_block_counts(kv)

    def visits(rows: int, columns: int) -> int:
        return q_text[rows] * (kv_grid[columns] + kv_text[columns]) + q_grid[rows] * kv_text[columns]

    return TextTiles(visited=visits(0, 0), unragged=visits(0, 1), whole=visits(1, 1))


def _simulate_boxes(gna: GNA, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], tiling: str) -> Simulation:
    """Static and anchored tiles: every dimension by itself, then products; text on top."""
    axes = [dimension_counts(*dim, tq, tk, tiling) for dim, tq, tk in zip(gna.dims(), q_tile, kv_tile, strict=True)]
    q, kv = TileOrder(gna, q_tile), TileOrder(gna, kv_tile)
    every_key, key_text = grid_tiles(kv)[0] + text_block_counts(kv)[0], text_block_counts(kv)[0]
    histogram = Counter({visited + key_text: n for visited, n in _product_histogram(axes)})
    visited_max = max(histogram)
    if query_text := text_block_counts(q)[0]:
        histogram[every_key] += query_text
    visited, full, unragged, whole = (
        math.prod(int(values.sum()) for values in kind)
        for kind in zip(*((axis.visited, axis.full, axis.full - axis.ragged, axis.whole) for axis in axes), strict=True)
    )
    text = text_tiles(q, kv)
    return Simulation(
        gna=gna,
        tiling=tiling,
        q_tile=q_tile,
        kv_tile=kv_tile,
        query_tiles=grid_tiles(q)[0] + query_text,
        dense=math.prod(map(ceil_div, gna.layout, kv_tile)) + key_text,
        visited_max=visited_max,
        visited=visited + text.visited,
        full=full + text.visited,
        ragged=full - unragged + text.visited - text.unragged,
        whole=whole + text.whole,
        histogram=tuple(sorted(histogram.items())),
    )


def _product_histogram(axes: list[DimensionCounts]) -> list[tuple[int, int]]:
    """How many query tiles visit how many key tiles, from the distinct counts of each dimension."""
    values, counts = np.ones(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    for axis in axes:
        distinct, repeats = np.unique(axis.visited, return_counts=True)
        values, place = np.unique(np.multiply.outer(values, distinct), return_inverse=True)
        sums = np.zeros(len(values), dtype=np.int64)
        np.add.at(sums, place.ravel(), np.multiply.outer(counts, repeats).ravel())
        counts = sums
    return list(zip(values.tolist(), counts.tolist(), strict=True))


class _ExistingPairs(RowMajorRelation):
    """Natural order in which places beyond the last token do not keep a block from being full."""

    def _full(self, row: Array, whole: Array, only_text: Array, boxes: RangeBoxes) -> Runs:
        start, stop = super()._full(row, np.ones_like(whole), only_text, boxes)
        places = self.columns * self.block
        return Runs(start, np.where(stop % places == self.gna.tokens, ceil_div(stop, places) * places, stop))


def _simulate_flat(gna: GNA, q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> Simulation:
    """Blocks of consecutive tokens: runs of blocks are counted, not listed."""
    q_block, kv_block = math.prod(q_tile), math.prod(kv_tile)
    relation = _ExistingPairs(gna, q_block, kv_block, key_interval)
    columns, last_column = relation.columns, int(gna.tokens % kv_block > 0)
    visited = np.zeros(relation.rows, dtype=np.int64)
    full = ragged = whole = 0
    for begin in range(0, relation.rows, ROWS_AT_ONCE):
        rows = np.arange(begin, min(begin + ROWS_AT_ONCE, relation.rows))
        some, every = relation.runs(rows)
        start, stop = touched_blocks(some, kv_block)
        # An empty run may lie beyond the last row.
        np.add.at(visited, np.minimum(begin + start // columns, relation.rows - 1), np.maximum(stop - start, 0))
        every = contained_blocks(every, kv_block)
        blocks, in_last_column = _blocks_before(every, columns, len(rows) * columns)
        full, ragged = full + blocks, ragged + in_last_column * last_column
        # Without the last row, if it has padding.
        blocks, in_last_column = _blocks_before(every, columns, (gna.tokens // q_block - begin) * columns)
        whole += blocks - in_last_column * last_column
    first = np.arange(relation.rows) * q_block
    last = np.minimum(first + q_block, gna.tokens)
    only_grid = (first >= gna.text_first) & (last <= gna.text_first + gna.grid_tokens)
    return Simulation(
        gna=gna,
        tiling="flat",
        q_tile=q_tile,
        kv_tile=kv_tile,
        query_tiles=relation.rows,
        dense=columns,
        visited_max=int(visited[only_grid].max() if only_grid.any() else visited.max()),
        visited=int(visited.sum()),
        full=full,
        ragged=ragged,
        whole=whole,
        histogram=tuple(
            (int(value), int(count)) for value, count in zip(*np.unique(visited, return_counts=True), strict=True)
        ),
    )


def _blocks_before(runs: Runs, columns: int, end: int) -> tuple[int, int]:
    """Blocks of the runs that come before ``end``, and how many of them are the last of a row."""
    stop = np.minimum(runs.stop, end)
    start = np.minimum(runs.start, stop)
    return int(np.sum(stop - start)), int(np.sum(stop // columns - start // columns))


def end_to_end(speedup: float, share: float, steps: int, dense_steps: int = 0) -> float:
    """Speed-up of a whole model in which only attention, and only in some of its steps, is faster.

    ``1 / (1 - f p + f p / S)`` with ``f = share`` and ``p = (steps - dense_steps) / steps``.

    Args:
        speedup: speed-up ``S`` of attention, larger than 0.
        share: share ``f`` of the dense model's time that is attention, between 0 and 1.
        steps: steps of the model (of diffusion, say), at least 1.
        dense_steps: how many of them stay dense.

    Raises:
        ValueError: if a value is outside its range.

    >>> round(end_to_end(11.1, share=0.6069, steps=50, dense_steps=15), 2)
    1.63
    """
    if not speedup > 0:
        raise ValueError(f"speedup={speedup!r} must be larger than 0")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share!r} must be between 0 and 1: it is attention's share of the time")
    if steps < 1:
        raise ValueError(f"steps={steps!r} must be at least 1")
    if not 0 <= dense_steps <= steps:
        raise ValueError(f"dense_steps={dense_steps!r} must be between 0 and steps={steps}")
    sparse = share * (steps - dense_steps) / steps
    return 1 / (1 - sparse + sparse / speedup)
