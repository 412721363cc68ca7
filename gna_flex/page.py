"""One self-contained HTML page about a mask: its layout, windows and tiles to click through, and what they buy.

The mask rule is not written again for the browser: the page carries, for every coordinate of every dimension, the
window and the leader that :mod:`gna_flex.intervals` gives. Tiles follow from the windows of their first and last query.
"""

from __future__ import annotations

import html
import json
import os
import string
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gna_flex.counts import NATURAL_LIMIT, listed_blocks, relation_of
from gna_flex.intervals import group_length, key_interval, leader
from gna_flex.neighborhood import GNA, Ints
from gna_flex.simulate import TILINGS, simulate
from gna_flex.symbolic import Proof, Refutation, prove
from gna_flex.symbolic.lemmas import Tiling
from gna_flex.tiling import PARTIAL_COST, TileOrder, choose_tile, tile_shapes

LONGEST = 1 << 18
"""Most coordinates of a dimension whose windows are put into a page."""
BLOCKS = (64, 128, 256)
"""Tokens of the tiles that the page lets its reader choose from."""
BY_DIMENSION: tuple[Tiling, ...] = ("static", "anchored")
SCRIPTS = ("page_model.js", "page_draw.js", "page_numbers.js", "page_strips.js", "page_tables.js", "page.js")
NAMES = {1: ("position",), 2: ("H", "W"), 3: ("T", "H", "W")}


def page(
    gna: GNA | Sequence[GNA],
    *,
    q_tile: Ints | None = None,
    kv_tile: Ints | None = None,
    title: str | None = None,
) -> str:
    """An HTML page that explores a GNA, or one GNA per head; it needs no network and no other file.

    It draws the layout with the window of one query (click, drag or arrow keys) and the tiles visited for it, for
    static and anchored tiling and any common tile shape, and tells what the tiling buys and whether that is proven.

    Args:
        gna: one GNA, or one per head (same layout and text).
        q_tile: tokens of a query tile per dimension that the page begins with; by default the best tile.
        kv_tile: the same for keys; by default that of the queries.
        title: heading of the page; by default the description of the mask, or the number of heads.

    Returns:
        The text of the page.

    Raises:
        ValueError: if heads differ in layout or text, tiles do not fit the layout, ``kv_tile`` is given alone, or a
            dimension has more than ``LONGEST`` tokens.

    >>> text = page(GNA((16, 16), window=8, stride=4), q_tile=(8, 8))
    >>> text.startswith("<!doctype html>"), "src=" in text
    (True, False)
    """
    data = page_data(gna, q_tile=q_tile, kv_tile=kv_tile, title=title)
    return string.Template(_read("page.html")).substitute(
        title=html.escape(data["title"]),
        style=_read("page.css"),
        script="".join(_read(name) for name in SCRIPTS),
        # A "<" could end the script element that holds the data.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def save_page(
    file: str | os.PathLike[str],
    gna: GNA | Sequence[GNA],
    *,
    q_tile: Ints | None = None,
    kv_tile: Ints | None = None,
    title: str | None = None,
) -> None:
    """Writes :func:`page` to a file; arguments and errors are the same.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_page(f"{folder}/mask.html", GNA((16, 16), 8), q_tile=8)
    ...     "<canvas" in Path(f"{folder}/mask.html").read_text("utf-8")
    True
    """
    Path(file).write_text(page(gna, q_tile=q_tile, kv_tile=kv_tile, title=title), encoding="utf-8")


def page_data(
    gna: GNA | Sequence[GNA],
    *,
    q_tile: Ints | None = None,
    kv_tile: Ints | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """What a page shows, as JSON takes it; arguments and errors are those of :func:`page`.

    ``tables`` holds every different dimension once, with ``lo``, ``hi`` and ``leader`` of each of its coordinates as
    :func:`runs`; ``heads`` holds every different GNA once, with its tile shapes, simulations and proofs.

    >>> data = page_data(GNA((16, 32), window=(8, 16), stride=8), q_tile=8)
    >>> data["layout"], [table["window"] for table in data["tables"]], data["heads"][0]["q_tile"]
    ([16, 32], [8, 16], [8, 8])
    """
    gnas = (gna,) if isinstance(gna, GNA) else tuple(gna)
    _check(gnas, q_tile, kv_tile)
    heads = tuple(dict.fromkeys(gnas))
    dims = list(dict.fromkeys(dim for head in heads for dim in head.dims()))
    first = heads[0]
    return {
        "title": title or (str(first) if len(heads) == 1 else f"{len(gnas)} heads"),
        "layout": list(first.layout),
        "names": list(NAMES[first.ndim]),
        "text": [first.text_first, first.text_last],
        "tokens": first.tokens,
        "partial_cost": PARTIAL_COST,
        "tables": [_table(*dim) for dim in dims],
        "heads": [_head(head, gnas, dims, *_tiles(head, gnas, q_tile, kv_tile)) for head in heads],
    }


def runs(values: np.ndarray) -> list[int]:
    """Integers as runs of equal steps, which are short for windows: ``step, count, step, count``, beginning at 0.

    >>> runs(np.array([0, 0, 0, 4, 5, 6, 7]))
    [0, 3, 4, 1, 1, 3]
    """
    steps = np.diff(values, prepend=0)
    starts = np.flatnonzero(np.diff(steps, prepend=steps[0] - 1))
    counts = np.diff(starts, append=len(steps))
    return np.stack([steps[starts], counts], 1).ravel().tolist()


def _check(gnas: tuple[GNA, ...], q_tile: Ints | None, kv_tile: Ints | None) -> None:
    if not gnas or len({(g.layout, g.text_first, g.text_last) for g in gnas}) != 1:
        raise ValueError("gna: a page needs at least one GNA, all of the same layout and with the same text tokens")
    if q_tile is None and kv_tile is not None:
        raise ValueError(f"kv_tile={kv_tile!r} needs a q_tile")
    if max(gnas[0].layout) > LONGEST:
        raise ValueError(f"layout={gnas[0].layout}: a page shows dimensions of at most {LONGEST:,} tokens")


def _table(length: int, window: int, stride: int, dilation: int, causal: bool) -> dict[str, Any]:
    """One dimension: window ``[lo, hi)`` and leader of each coordinate, as positions in its dilation group."""
    x = np.arange(length)
    place, size = x // dilation, group_length(length, dilation, x % dilation)
    lo, hi = key_interval(place, size, window, stride, causal)
    return {
        "length": length,
        "window": window,
        "stride": stride,
        "dilation": dilation,
        "causal": causal,
        "lo": runs(lo),
        "hi": runs(hi),
        "leader": runs(leader(place, size, stride, causal)),
    }


def _head(
    head: GNA, gnas: tuple[GNA, ...], dims: list[Any], q_tile: tuple[int, ...], kv_tile: tuple[int, ...]
) -> dict[str, Any]:
    """One GNA: the heads that have it, its dimensions as indices into ``tables``, and what is known of its tiles."""
    answers = {name: prove(head, q_tile, kv_tile, tiling=name) for name in BY_DIMENSION}
    # Flat tiles do not split into dimensions: counting them takes time in proportion to them.
    tilings = TILINGS if listed_blocks(relation_of(head)) <= NATURAL_LIMIT else BY_DIMENSION
    shapes = dict.fromkeys((q_tile, kv_tile, *(shape for block in BLOCKS for shape in tile_shapes(head, block))))
    return {
        "heads": [index for index, each in enumerate(gnas) if each == head],
        "label": str(head),
        "dims": [dims.index(dim) for dim in head.dims()],
        "kept_pairs": head.kept_pairs(),
        "q_tile": list(q_tile),
        "kv_tile": list(kv_tile),
        "tiles": [list(shape) for shape in shapes],
        "simulations": {name: _numbers(simulate(head, q_tile, kv_tile, tiling=name).to_json()) for name in tilings},
        "proofs": {name: str(answer) for name, answer in answers.items()},
        "witnesses": {name: _witness(answer) for name, answer in answers.items()},
    }


def _witness(answer: Proof | Refutation) -> list[int] | None:
    """A query that does not see a key of a tile that it visits, if there is one."""
    witness = answer.witness if isinstance(answer, Refutation) else None
    return list(witness.dropped[0]) if witness else None


def _numbers(simulation: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a simulation; the histogram it counts itself, for any tile."""
    return {name: value for name, value in simulation.items() if name not in ("gna", "histogram")}


def _tiles(
    head: GNA, gnas: tuple[GNA, ...], q_tile: Ints | None, kv_tile: Ints | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query and key tile that the page begins with: as given, or the best one for all heads that can share it."""
    if q_tile is None:
        best = choose_tile(tuple(each for each in gnas if each.dilation == head.dilation))[0]
        return best, best
    kv_tile = q_tile if kv_tile is None else kv_tile
    return TileOrder(head, q_tile).tile, TileOrder(head, kv_tile).tile  # type: ignore[arg-type]


def _read(name: str) -> str:
    return resources.files("gna_flex").joinpath(name).read_text(encoding="utf-8")
