"""The first tile that needs a mask, in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from gna_flex.intervals import ceil_div, group_length, key_interval, query_interval
from gna_flex.neighborhood import GNA
from gna_flex.symbolic.lemmas import Tiling, moves


@dataclass(frozen=True)
class Witness:
    """A query tile, a key tile that it visits, and two pairs of tokens in them: one kept, one dropped.

    Coordinates are those of the layout. The query tile is the first (dilation group by dilation group, row by row) that
    visits a key tile of which it does not want every key, and the key tile is its first such.

    Attributes:
        group: dilation group per dimension.
        q_tile, kv_tile: place of the tiles in their group, counted in tiles; anchored key tiles count from the first
            one that the query tile visits.
        queries, keys: coordinates of the tokens in the tiles per dimension.
        kept, dropped: (query, key), each a coordinate per dimension.
    """

    group: tuple[int, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    queries: tuple[range, ...]
    keys: tuple[range, ...]
    kept: tuple[tuple[int, ...], tuple[int, ...]]
    dropped: tuple[tuple[int, ...], tuple[int, ...]]

    def __str__(self) -> str:
        group = f" of dilation group {_place(self.group)}" if any(self.group) else ""
        return (
            f"The first tile that needs a mask: query tile {_place(self.q_tile)}{group}, queries {_box(self.queries)}, "
            f"and key tile {_place(self.kv_tile)}, keys {_box(self.keys)}. "
            f"There query {_place(self.kept[0])} sees key {_place(self.kept[1])}, "
            f"but query {_place(self.dropped[0])} does not see key {_place(self.dropped[1])}."
        )

    def to_json(self) -> dict[str, Any]:
        """All coordinates, as JSON takes them."""
        values: dict[str, Any] = {name: list(getattr(self, name)) for name in ("group", "q_tile", "kv_tile")}
        for name in ("queries", "keys"):
            values[name] = [[r.start, r.stop, r.step] for r in getattr(self, name)]
        return values | {name: [list(end) for end in getattr(self, name)] for name in ("kept", "dropped")}


class _Group(NamedTuple):
    """One dilation group of one dimension, cut into tiles."""

    length: int
    window: int
    stride: int
    causal: bool
    q_tile: int
    kv_tile: int
    tiling: Tiling

    def interval(self, i: int) -> tuple[int, int]:
        return key_interval(i, self.length, self.window, self.stride, self.causal)

    def queries(self, tile: int) -> tuple[int, int]:
        """First and last query of a tile."""
        return tile * self.q_tile, min((tile + 1) * self.q_tile, self.length) - 1


class _Pairs(NamedTuple):
    """A query tile and a key tile that it visits in one dimension: a kept pair, and a dropped one if partial."""

    kv_tile: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    kept: tuple[int, int]
    dropped: tuple[int, int] | None


def first_witness(gna: GNA, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], tiling: Tiling) -> Witness:
    """The witness of a neighborhood that is not perfectly block-sparse.

    Raises:
        ValueError: if it is.

    >>> found = first_witness(GNA(64, window=16), (8,), (8,), "static")
    >>> found.q_tile, found.kv_tile, found.dropped
    ((1,), (0,), ((15,), (0,)))
    """
    dims = list(gna.dims())
    for group in _groups(dims):
        parts = [
            _Group(group_length(n, d, g), w, s, causal, tq, tk, tiling)
            for (n, w, s, d, causal), g, tq, tk in zip(dims, group, q_tile, kv_tile, strict=True)
        ]
        # The first tile in row-major order differs from tile 0 in one dimension at most: another one may be 0 as well.
        firsts = [_first_partial(part) for part in parts]
        places = [
            tuple(tile if a == axis else 0 for a in range(len(parts)))
            for axis, tile in enumerate(firsts)
            if tile is not None
        ]
        if places:
            return _witness(dims, group, parts, min(places))
    raise ValueError(f"{gna} is perfectly block-sparse in query tiles {q_tile} and key tiles {kv_tile}")


def _groups(dims: list[tuple[int, int, int, int, bool]]) -> Iterator[tuple[int, ...]]:
    """The first dilation group of every combination of lengths, in row-major order."""
    choices: list[list[int]] = [[0] if n % d == 0 else [0, n % d] for n, _, _, d, _ in dims]

    def combine(axis: int) -> Iterator[tuple[int, ...]]:
        if axis == len(choices):
            yield ()
            return
        for first in choices[axis]:
            for rest in combine(axis + 1):
                yield first, *rest

    return combine(0)


def _first_partial(group: _Group) -> int | None:
    """The first query tile of a dimension with a partial key tile, in closed form: only a few can be it.

    They are tile 0 and those where windows move for the first and the second time and where they come to the right edge
    (lemma *moves*): between these, tiles are like their predecessors.
    """
    turns = []
    if not group.causal and group.length > group.window:
        at = moves(group.length, group.window, group.stride)
        turns = [
            at.first_move,
            at.first_move + group.stride,
            ceil_div(at.slack + at.offset, group.stride) * group.stride,
        ]
    tiles = {0} | {turn // group.q_tile for turn in turns if turn < group.length}
    return next((tile for tile in sorted(tiles) if _partial_index(group, tile) is not None), None)


def _first_index(group: _Group, tile: int) -> int:
    """The first key tile that a query tile visits."""
    return 0 if group.tiling == "anchored" else group.interval(group.queries(tile)[0])[0] // group.kv_tile


def _partial_index(group: _Group, tile: int) -> int | None:
    """The first partial key tile that a query tile visits; ``None`` if all are full."""
    a, b = group.queries(tile)
    (lo, hi_all), (_, hi) = group.interval(a), group.interval(b)
    origin = lo if group.tiling == "anchored" else 0
    first, last = _first_index(group, tile), ceil_div(hi - origin, group.kv_tile) - 1
    if _pairs(group, tile, first).dropped:
        return first
    # Full tiles lie side by side, so the first partial tile comes right after them.
    after = last + 1 if hi_all == group.length else (hi_all - origin) // group.kv_tile
    return after if after <= last else None


def _pairs(group: _Group, tile: int, index: int) -> _Pairs:
    """The pairs of a query tile and the visited key tile ``index``."""
    a, b = group.queries(tile)
    (lo, hi_all), (lo_all, _) = group.interval(a), group.interval(b)
    begin = (lo if group.tiling == "anchored" else 0) + index * group.kv_tile
    end = min(begin + group.kv_tile, group.length)
    key = max(begin, lo)
    query = max(a, query_interval(key, group.length, group.window, group.stride, group.causal)[0])
    dropped = (b, begin) if lo_all > begin else (a, end - 1) if hi_all < end else None
    return _Pairs(index, (a, b + 1), (begin, end), (query, key), dropped)


def _witness(
    dims: list[tuple[int, int, int, int, bool]], group: tuple[int, ...], parts: list[_Group], place: tuple[int, ...]
) -> Witness:
    pairs = [_pairs(part, tile, _first_index(part, tile)) for part, tile in zip(parts, place, strict=True)]
    if not any(pair.dropped for pair in pairs):
        # Row by row, the first partial tile differs from the first tile in the last dimension that has partial ones.
        partial = [_partial_index(part, tile) for part, tile in zip(parts, place, strict=True)]
        axis, index = max((axis, index) for axis, index in enumerate(partial) if index is not None)
        pairs[axis] = _pairs(parts[axis], place[axis], index)
    dilations = [dim[3] for dim in dims]

    def at(positions: list[int]) -> tuple[int, ...]:
        return tuple(p * d + g for p, d, g in zip(positions, dilations, group, strict=True))

    def coordinates(ends: list[tuple[int, int]]) -> tuple[range, ...]:
        places = zip(ends, dilations, group, strict=True)
        return tuple(range(x * d + g, (y - 1) * d + g + 1, d) for (x, y), d, g in places)

    dropped = [pair.dropped or pair.kept for pair in pairs]
    return Witness(
        group=group,
        q_tile=place,
        kv_tile=tuple(pair.kv_tile for pair in pairs),
        queries=coordinates([pair.queries for pair in pairs]),
        keys=coordinates([pair.keys for pair in pairs]),
        kept=(at([pair.kept[0] for pair in pairs]), at([pair.kept[1] for pair in pairs])),
        dropped=(at([pair[0] for pair in dropped]), at([pair[1] for pair in dropped])),
    )


def _place(place: tuple[int, ...]) -> str:
    return str(place[0]) if len(place) == 1 else f"({', '.join(map(str, place))})"


def _box(ranges: tuple[range, ...]) -> str:
    return " x ".join(f"{r[0]}..{r[-1]}" + (f" step {r.step}" if r.step > 1 and len(r) > 1 else "") for r in ranges)
