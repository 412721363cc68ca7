"""Which windows, strides and tiles are fast: combinations of all of them, ranked by predicted time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gna_flex.intervals import ceil_div
from gna_flex.neighborhood import GNA, Bools, Ints, as_int, per_dim
from gna_flex.predict import Call, checked_call, predict, prices
from gna_flex.simulate import simulate, text_tiles
from gna_flex.sweep import Array, Pairs, Tile, check_factors, dimension_tables, prune_strides, tile_pairs
from gna_flex.tiling import TileOrder, grid_tiles, text_block_counts
from gna_flex.words import by_x, percent, plain_text, times

if TYPE_CHECKING:
    from rich.console import RenderableType

TOLERANCE = 0.05
"""Windows of a search keep the wanted share of pairs up to this relative error."""
LATTICE_STEPS = {1: 32, 2: 8, 3: 4}
"""Least number of lattice steps that the proportional window is made of, for 1, 2 and 3 dimensions."""
AT_ONCE = 1 << 20
"""Combinations of strides and tiles that are evaluated at a time: bounds memory to a few 10 MiB."""
MOST_STRIDES = 1 << 22
"""More strides than this are refused."""


@dataclass(frozen=True)
class Candidate:
    """One setting of a search. Tiles are counted for one head; times are for all heads.

    Attributes:
        window, stride: of the GNA.
        q_tile, kv_tile: tokens of a tile per dimension.
        visited_max, visited_mean: key tiles that a query tile visits; text queries are in the mean alone.
        full, partial: visited tiles that keep every pair, and others, summed over query tiles.
        perfect: whether there is no partial one.
        sparsity: share of the pairs that the mask leaves out.
        milliseconds: predicted time.
        speedup: predicted time of dense attention over that.
        measured: whether the prediction rests on measurements in this setting.
    """

    window: Tile
    stride: Tile
    q_tile: Tile
    kv_tile: Tile
    visited_max: int
    visited_mean: float
    full: int
    partial: int
    perfect: bool
    sparsity: float
    milliseconds: float
    speedup: float
    measured: bool

    @property
    def stride_product(self) -> int:
        """Queries that share a window; 1 is true sliding window attention."""
        return math.prod(self.stride)


@dataclass(frozen=True)
class SearchResult:
    """Settings by predicted time. Made by :func:`search`; prints as a table.

    Attributes:
        gna: layout, dilation, causality and text of all candidates (its window and stride do not matter).
        call: route, device and sizes that times are predicted for.
        tiling: ``static`` or ``anchored``.
        evaluated: number of settings that were compared.
        windows: number of windows among them.
        candidates: the fastest, fastest first.
        pareto: settings of which none is both as fast and of as small a stride product, by stride product; they
            need not be among ``candidates``.
    """

    gna: GNA
    call: Call
    tiling: str
    evaluated: int
    windows: int
    candidates: tuple[Candidate, ...]
    pareto: tuple[Candidate, ...]

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        shared = {name: value for name, value in asdict(self.gna).items() if name not in ("window", "stride")}
        return {
            **shared,
            "call": self.call._asdict(),
            "tiling": self.tiling,
            "evaluated": self.evaluated,
            "windows": self.windows,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "pareto": [asdict(candidate) for candidate in self.pareto],
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("", "window", "stride", "q tile", "kv tile"):
            table.add_column(name, no_wrap=True)
        for name in ("sparsity", "partial", "ms", "speed-up"):
            table.add_column(name, justify="right", no_wrap=True)
        others = [candidate for candidate in self.pareto if candidate not in self.candidates]
        for candidate in (*self.candidates, *others):
            table.add_row(*_cells(candidate, candidate in self.pareto), style="bold" if candidate.perfect else "")
        layout = by_x(self.gna.layout)
        basis = "measured constants" if self.candidates[0].measured else "an estimate"
        plural = "window" if self.windows == 1 else "windows"
        head = f"layout {layout}: {self.evaluated:,} settings with {self.windows:,} {plural}, {self.tiling} tiles"
        call = self.call
        times_for = f"times predicted for {call.route} on {call.device}, {call.heads} heads of {call.head_dim}: {basis}"
        note = "* none is both faster and of smaller stride product; bold: perfectly block-sparse (partial 0%)"
        return Group(Text(head, "bold"), Text(times_for), Padding(table, (1, 0)), Text(note, "dim"))

    def __str__(self) -> str:
        return plain_text(self, width=120)


def _cells(candidate: Candidate, in_pareto: bool) -> list[str]:
    sides = (candidate.window, candidate.stride, candidate.q_tile, candidate.kv_tile)
    return [
        "*" if in_pareto else "",
        *map(by_x, sides),
        percent(candidate.sparsity),
        percent(candidate.partial / (candidate.full + candidate.partial)),
        f"{candidate.milliseconds:,.2f}",
        times(candidate.speedup),
    ]


def search(
    layout: Ints,
    *,
    sparsity: float | None = None,
    speedup: float | None = None,
    window: Ints | None = None,
    strides: str | Sequence[Ints] = "powers",
    q_tokens: Ints = (128,),
    kv_tokens: Ints = (128,),
    tiling: str = "static",
    dilation: Ints = 1,
    causal: Bools = False,
    text_first: int = 0,
    text_last: int = 0,
    tiles: str = "best",
    prune: bool = False,
    limit: int = 20,
    progress: Callable[[int, int], object] | None = None,
    **call: Any,
) -> SearchResult:
    """Ranks windows, strides and pairs of tiles by predicted time, and finds the best for every stride product.

    A smaller stride product is closer to a sliding window for every query, so ``pareto`` is the trade of quality for
    speed. Exactly one of ``sparsity``, ``speedup`` and ``window`` is given; for the first two windows come from
    :func:`windows_for`.

    Args:
        layout: grid size in tokens, slowest dimension first.
        sparsity: share of the pairs to leave out, between 0 and 1.
        speedup: arithmetic of dense attention over the wanted one: ``1 / (1 - sparsity)``.
        window: the window.
        strides: ``"powers"`` of two, ``"all"``, or strides (one number or one per dimension each). The first two leave
            dimensions without a mask at stride 1, where others change nothing.
        q_tokens: tokens of a query tile, one power of two or several.
        kv_tokens: the same for keys.
        tiling: ``static`` or ``anchored``.
        dilation: step between the keys of a window, in tokens.
        causal: whether a dimension is causal.
        text_first: text tokens before the grid.
        text_last: text tokens after the grid.
        tiles: ``"best"`` ranks every window and stride once, with its fastest tiles; ``"all"`` ranks all of them.
        prune: leave out strides that :func:`prune_strides` leaves out, for each window and pair of tiles.
        limit: length of ``candidates``.
        progress: called with (windows done, all windows) after each window.
        **call: ``device``, ``route``, ``heads``, ``batch``, ``head_dim``, ``dtype`` and ``backward``, as
            :func:`gna_flex.predict.predict` takes them.

    Raises:
        ValueError: if not exactly one goal is given, it cannot be met, or a value is not known or does not fit.

    >>> result = search((30, 48, 80), window=(18, 24, 24))
    >>> best = result.candidates[0]
    >>> best.stride, best.q_tile, best.kv_tile, best.perfect
    ((2, 8, 8), (2, 8, 8), (2, 8, 8), True)
    """
    base = GNA(layout, 1, 1, dilation, causal, text_first, text_last)
    check_factors(base, tiling)
    settings = checked_call(base, tiling=tiling, **call)
    if limit < 1:
        raise ValueError(f"limit={limit} for layout {base.layout} must be at least 1")
    if tiles not in ("best", "all"):
        raise ValueError(f"tiles={tiles!r} for layout {base.layout}: give 'best' or 'all'")
    gnas = [replace(base, window=wanted) for wanted in _windows(base, sparsity, speedup, window)]
    pairs = tile_pairs(base, q_tokens, kv_tokens)
    costs = _pair_costs(base, pairs, settings)
    best: list[Setting] = []
    front: list[Setting] = []
    evaluated = 0
    for done, gna in enumerate(gnas, 1):
        steps = _strides(gna, strides, exact=window is not None)
        chunks = _milliseconds(gna, steps, pairs, costs, tiling) if len(steps) else ()
        for begin, milliseconds in chunks:
            if prune:
                milliseconds = np.where(prune_strides(steps, milliseconds), milliseconds, np.inf)
            evaluated += int(np.isfinite(milliseconds).sum())
            chunk = _Chunk(gna.window, steps, pairs[begin : begin + milliseconds.shape[1]], milliseconds)
            best = _ranked([*best, *chunk.fastest(limit, tiles)], tiles)[:limit]
            front = _front([*front, *chunk.front()])
        if progress:
            progress(done, len(gnas))
    if not best:
        raise ValueError(f"strides={strides!r}: none fits into a window that was found for layout {base.layout}")
    candidates, pareto = (
        tuple(_candidate(base, setting, tiling, settings) for setting in some) for some in (best, front)
    )
    return SearchResult(base, settings, tiling, evaluated, len(gnas), candidates, pareto)


class Setting(NamedTuple):
    """A combination and its predicted time; sorts by time, then by what is closest to a sliding window."""

    milliseconds: float
    product: int
    window: Tile
    stride: Tile
    q_tile: Tile
    kv_tile: Tile


class _Chunk(NamedTuple):
    """Predicted times ``[strides, pairs]`` of one window; left-out combinations are infinite."""

    window: Tile
    strides: Array
    pairs: Pairs
    milliseconds: Array

    def setting(self, stride: int, pair: int) -> Setting:
        steps = tuple(self.strides[stride].tolist())
        return Setting(float(self.milliseconds[stride, pair]), math.prod(steps), self.window, steps, *self.pairs[pair])

    def fastest(self, limit: int, tiles: str) -> list[Setting]:
        """The first ``limit`` settings in their order; with ``tiles="best"`` one of each stride."""
        values = self.milliseconds.min(1) if tiles == "best" else self.milliseconds.ravel()
        bar = np.partition(values, limit - 1)[limit - 1] if len(values) > limit else np.inf
        places = np.flatnonzero((values <= bar) & np.isfinite(values))
        if tiles == "best":
            stride, pair = places, self.milliseconds[places].argmin(1)
        else:
            stride, pair = np.divmod(places, len(self.pairs))
        order = np.lexsort((pair, stride, self.strides.prod(1)[stride], values[places]))[:limit]
        return [self.setting(int(s), int(p)) for s, p in zip(stride[order], pair[order], strict=True)]

    def front(self) -> list[Setting]:
        """Settings of which none is both as fast and of as small a stride product."""
        fastest = self.milliseconds.min(1)
        kept = np.flatnonzero(prune_strides(self.strides, fastest) & np.isfinite(fastest))
        return [self.setting(int(s), int(self.milliseconds[s].argmin())) for s in kept]


def _ranked(settings: list[Setting], tiles: str) -> list[Setting]:
    """The settings in order; with ``tiles="best"`` the first of each window and stride."""
    ordered = sorted(settings)
    if tiles == "all":
        return ordered
    first: dict[tuple[Tile, Tile], Setting] = {}
    for setting in ordered:
        first.setdefault((setting.window, setting.stride), setting)
    return list(first.values())


def _front(settings: list[Setting]) -> list[Setting]:
    """The settings, by stride product, of which none is both as fast and of as small a stride product."""
    kept: list[Setting] = []
    for setting in sorted(settings, key=lambda setting: (setting.product, setting)):
        if not kept or setting.milliseconds < kept[-1].milliseconds:
            kept.append(setting)
    return kept


class _PairCosts(NamedTuple):
    """What does not depend on window and stride, per pair of tiles: arrays ``[pairs]``; times are milliseconds."""

    full: Array
    partial: Array
    overhead: Array
    permutation: Array
    text_visited: Array
    text_whole: Array


def _pair_costs(gna: GNA, pairs: Pairs, call: Call) -> _PairCosts:
    rows = []
    for q_tile, kv_tile in pairs:
        q, kv = TileOrder(gna, q_tile), TileOrder(gna, kv_tile)
        price, text = prices(gna, q.block, kv.block, q.tokens + kv.tokens, call), text_tiles(q, kv)
        query_tiles = grid_tiles(q)[0] + text_block_counts(q)[0]
        overhead = price.query_tile * query_tiles
        rows.append((price.full, price.partial, overhead, price.permutation, text.visited, text.whole))
    return _PairCosts(*(np.array(values) for values in zip(*rows, strict=True)))


def _milliseconds(
    gna: GNA, strides: Array, pairs: Pairs, costs: _PairCosts, tiling: str
) -> Iterator[tuple[int, Array]]:
    """Predicted times ``[strides, some pairs]``, and the number of the first of these pairs."""
    distinct, index = zip(*(np.unique(column, return_inverse=True) for column in strides.T), strict=True)
    tables = dimension_tables(gna, distinct, pairs, tiling)
    width = max(1, AT_ONCE // max(1, len(strides)))
    for begin in range(0, len(pairs), width):
        part = slice(begin, begin + width)
        cost = _PairCosts(*(values[part] for values in costs))
        visited, whole = (
            functools.reduce(np.multiply, (values[:, part][place] for values, place in zip(kind, index, strict=True)))
            for kind in zip(*((table.visited, table.whole) for table in tables), strict=True)
        )
        whole += cost.text_whole
        masked = visited + cost.text_visited - whole
        yield begin, cost.full * whole + cost.partial * masked + cost.overhead + cost.permutation


def _candidate(base: GNA, setting: Setting, tiling: str, call: Call) -> Candidate:
    gna = replace(base, window=setting.window, stride=setting.stride)
    counts = simulate(gna, setting.q_tile, setting.kv_tile, tiling)
    forecast = predict(gna, q_tile=setting.q_tile, kv_tile=setting.kv_tile, tiling=tiling, **call._asdict())
    return Candidate(
        window=setting.window,
        stride=setting.stride,
        q_tile=setting.q_tile,
        kv_tile=setting.kv_tile,
        visited_max=counts.visited_max,
        visited_mean=counts.visited_mean,
        full=counts.full,
        partial=counts.partial,
        perfect=counts.perfect,
        sparsity=1 - 1 / counts.flop_speedup,
        milliseconds=forecast.milliseconds,
        speedup=forecast.speedup,
        measured=forecast.measured,
    )


def _strides(gna: GNA, strides: str | Sequence[Ints], exact: bool) -> Array:
    """The strides of a window, ``[strides, dims]``, in lexicographic order."""
    if isinstance(strides, str):
        if strides not in ("powers", "all"):
            raise ValueError(f"strides={strides!r} for layout {gna.layout}: give 'powers', 'all' or a list of strides")
        axes: list[Sequence[int]] = []
        for length, window, _, dilation, causal in gna.dims():
            unmasked = window * dilation == length and not causal
            most = 1 if unmasked else window
            axes.append(range(1, most + 1) if strides == "all" else [1 << e for e in range(most.bit_length())])
        if math.prod(map(len, axes)) > MOST_STRIDES:
            raise ValueError(
                f"strides={strides!r} for layout {gna.layout}: window {gna.window} has more than {MOST_STRIDES:,} of "
                "them; give 'powers' or a list"
            )
        return np.array(list(itertools.product(*axes)))
    rows = [per_dim("strides", stride, gna.layout, as_int) for stride in strides]
    fitting = sorted({row for row in rows if all(1 <= s <= w for s, w in zip(row, gna.window, strict=True))})
    if exact and len(fitting) < len(set(rows)):
        raise ValueError(
            f"strides={strides!r} for layout {gna.layout}: every stride must be at least 1 and not exceed "
            f"the window {gna.window}"
        )
    return np.array(fitting).reshape(-1, gna.ndim)


def _windows(gna: GNA, sparsity: float | None, speedup: float | None, window: Ints | None) -> list[Tile]:
    """The windows of a search, from the one goal that is given."""
    if sum(goal is not None for goal in (sparsity, speedup, window)) != 1:
        raise ValueError(
            f"sparsity={sparsity}, speedup={speedup}, window={window} for layout {gna.layout}: give exactly one"
        )
    if window is not None:
        return [GNA(gna.layout, window, 1, gna.dilation).window]
    if speedup is not None and not speedup >= 1:
        raise ValueError(f"speedup={speedup} for layout {gna.layout} must be at least 1")
    return windows_for(gna, 1 - 1 / speedup if speedup is not None else sparsity or 0.0)


def windows_for(gna: GNA, sparsity: float) -> list[Tile]:
    """Windows at which a GNA, at stride 1, leaves out this share of the pairs.

    Sides are multiples of a power of two, at most a quarter of the side that is proportional to the layout (an eighth
    in 2-D, a 32nd in 1-D), from half to twice that side; or whole dimensions. Shares of the layout differ by a factor
    of 2 at most between dimensions, whole ones aside. The kept share is within 5 % of the wanted one; where that leaves
    none, the one window proportional to the layout is taken.

    Raises:
        ValueError: if no window leaves out so much or so little.

    >>> (18, 24, 24) in windows_for(GNA((30, 48, 80), 1), 0.91)
    True
    """
    sizes = [length // d for length, d in zip(gna.layout, gna.dilation, strict=True)]

    def kept(window: Sequence[int]) -> float:
        return replace(gna, window=tuple(window), stride=(1,) * gna.ndim).kept_pairs() / gna.tokens**2

    wanted, least, most = 1 - sparsity, kept([1] * gna.ndim), kept(sizes)
    if not least <= wanted <= most:
        raise ValueError(
            f"sparsity={sparsity} for layout {gna.layout}: windows there leave out {1 - most:.4g} to {1 - least:.4g}"
        )

    def proportional(share: float) -> list[int]:
        return [max(1, round(share * size)) for size in sizes]

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(proportional(middle)) < wanted else (low, middle)
    even = min((proportional(share) for share in (low, high)), key=lambda window: abs(kept(window) - wanted))
    axes = [_sides(side, size, LATTICE_STEPS[gna.ndim]) for side, size in zip(even, sizes, strict=True)]
    balanced = (window for window in itertools.product(*axes) if _balanced(window, sizes))
    return [window for window in balanced if abs(kept(window) - wanted) <= TOLERANCE * wanted] or [tuple(even)]


def _sides(side: int, size: int, steps: int) -> list[int]:
    """Sides of windows around the proportional one."""
    step = 1 << (max(1, side // steps).bit_length() - 1)
    multiples = range(ceil_div(side, 2 * step) * step, min(2 * side, size) + 1, step)
    return sorted({*multiples, size} if size > side else {*multiples, side})


def _balanced(window: Tile, sizes: list[int]) -> bool:
    """Whether the shares of the dimensions that are not whole differ by a factor of 2 at most."""
    parts = [(side, size) for side, size in zip(window, sizes, strict=True) if side < size]
    return all(a * m <= 2 * b * n for a, n in parts for b, m in parts)
