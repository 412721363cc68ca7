"""Pictures of a neighborhood: one query's window on the grid, the tiles that are visited for it, and the block mask.

:func:`draw` draws in the terminal; :func:`save_png` writes a file (extra ``viz``). What is told by colour is told by
shape too, and the colours can be told apart with every kind of colour vision (Okabe and Ito's palette).
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gna_flex.intervals import ceil_div
from gna_flex.neighborhood import GNA, Ints
from gna_flex.scene import Axis, BlockPicture, axes_of, block_picture, tiles_of
from gna_flex.words import by_x, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, SKY, ORANGE, VERMILLION, GREY = "#0072B2", "#8CC4E8", "#E69F00", "#D55E00", "#E8E8E8"

QUERY, WINDOW, SOME, VISITED, SKIPPED = "◆", "█", "▓", "░", "·"
STYLES = {QUERY: f"bold {VERMILLION}", WINDOW: BLUE, SOME: BLUE, VISITED: SKY, SKIPPED: "bright_black"}
LINE_STYLE = "bright_black"
PANEL_LINES = 32
"""Most lines of a drawn grid."""
FEW, FEW_OF_LINE = 6, 24
"""A dimension is cropped to where something happens if that is less than one part in so many."""


def draw(
    gna: GNA, query: Ints | None = None, *, q_tile: Ints | None = None, kv_tile: Ints | None = None, width: int = 80
) -> RenderableType:
    """A drawing for the terminal: print it with ``rich.print`` or a rich Console. Without colour it stays readable.

    The grid with the window of one query, the tiles visited for it and, for a 3-D grid, a few slices; below it which
    blocks of the mask are visited, in natural order and in tile order. Large grids are drawn coarsely.

    Args:
        gna: the neighborhood.
        query: coordinates of the query; the middle of the grid by default.
        q_tile: tokens of a query tile per dimension; the best tile by default.
        kv_tile: tokens of a key tile per dimension; that of the queries by default.
        width: columns of the terminal.

    Raises:
        ValueError: if the query is outside of the grid, or a tile does not fit the layout.

    >>> from rich.console import Console
    >>> Console(width=60, color_system=None).print(draw(GNA((6, 12), window=3), query=(2, 5), q_tile=(2, 4), width=60))
    ... # doctest: +ELLIPSIS
    layout 6x12, window 3x3, query (2, 5), tiles 2x4
    ...
    """
    axes = axes_of(gna, query, q_tile, kv_tile)
    q_sides, kv_sides = tiles_of(gna, q_tile, kv_tile)
    tiles = (
        f"tiles {by_x(q_sides)}" if q_sides == kv_sides else f"query tiles {by_x(q_sides)}, key tiles {by_x(kv_sides)}"
    )
    place = ", ".join(str(axis.query) for axis in axes)
    title = Text.assemble((str(gna), "bold"), f", query ({place}), ", tiles)
    return Group(
        title,
        Padding(_grid(axes, width), (1, 0)),
        _legend(gna, axes),
        Padding(_block_masks(gna, (q_sides, kv_sides), width), (1, 0, 0, 0)),
    )


def _grid(axes: tuple[Axis, ...], width: int) -> RenderableType:
    if len(axes) == 1:
        return _panel(None, axes[0].zoom(FEW_OF_LINE), width)
    rows, columns = (axis.zoom(FEW) for axis in axes[-2:])
    if len(axes) == 2:
        return _panel(rows, columns, width)
    outer = axes[0]
    slices = _slices(outer, 3 if width < 110 else 5)
    each = (width - 2 * (len(slices) - 1)) // len(slices)
    table = Table.grid(padding=(0, 2, 0, 0))
    names = [Text(f"slice {t}{' (query)' * (t == outer.query)}", "bold" if t == outer.query else "") for t in slices]
    table.add_row(*names)
    panels = (
        _panel(rows, columns, each, outer.window[t], outer.visited[t], t == outer.query, note=False) for t in slices
    )
    table.add_row(*panels)
    band = _panel(None, outer.zoom(FEW_OF_LINE), width)
    heading = f"first dimension: the window takes {outer.window.sum()} of {outer.length} slices"
    return Group(Text(heading, "bold"), band, Text(), table, _cell_note(rows, columns, each))


def _slices(outer: Axis, many: int) -> list[int]:
    """The slice of the query, those at the ends of its window, and the ones just outside."""
    inside = np.flatnonzero(outer.window)
    first, last = int(inside[0]), int(inside[-1])
    wanted = [outer.query, first, last, last + 1, first - 1]
    if len(inside) == 1:
        wanted = [outer.query, outer.query - 1, outer.query + 1]
    wanted = [t for t in dict.fromkeys(wanted) if 0 <= t < outer.length]
    return sorted(wanted[:many])


def _shares(flags: np.ndarray, cell: int) -> np.ndarray:
    """Share of set flags in each cell of ``cell`` tokens."""
    starts = np.arange(0, len(flags), cell)
    sizes = np.minimum(starts + cell, len(flags)) - starts
    return np.asarray(np.add.reduceat(flags.astype(float), starts) / sizes)


def _panel(
    rows: Axis | None,
    columns: Axis,
    width: int,
    in_window: float = 1.0,
    in_visited: float = 1.0,
    has_query: bool = True,
    note: bool = True,
) -> Text:
    """Two dimensions (or one) of the grid as text; the shares tell whether the slice is part of window and tiles."""
    row_cell, column_cell, repeat = _cells(rows, columns, width)
    row_lines = _cells_per_tile(rows, row_cell, 2)
    column_lines = _cells_per_tile(columns, column_cell, 4 // repeat)
    ones = np.ones(1)
    window = np.outer(ones if rows is None else _shares(rows.window, row_cell), _shares(columns.window, column_cell))
    visited = np.outer(ones if rows is None else _shares(rows.visited, row_cell), _shares(columns.visited, column_cell))
    query = (0 if rows is None else rows.query // row_cell), columns.query // column_cell
    many = window.shape[1]
    if column_lines and many * repeat + (many - 1) // column_lines > width:
        column_lines = 0
    text = Text(no_wrap=True)
    for r, (window_row, visited_row) in enumerate(zip(window * in_window, visited * in_visited, strict=True)):
        text.append("\n" * (r > 0))
        if row_lines and column_lines and r and r % row_lines == 0:
            text.append(_rule(many, column_lines, repeat) + "\n", LINE_STYLE)
        for c in range(many):
            if column_lines and c and c % column_lines == 0:
                text.append("│", LINE_STYLE)
            glyph = QUERY if has_query and (r, c) == query else _glyph(window_row[c], visited_row[c])
            text.append(glyph + (" " if glyph in (QUERY, SKIPPED) else glyph) * (repeat - 1), STYLES[glyph])
    if note and (remark := _cell_note(rows, columns, width)):
        text.append("\n").append(remark)
    return text


def _cells_per_tile(axis: Axis | None, cell: int, least: int) -> int:
    """Cells between the lines that part tiles; 0 draws none because they would not fit or be too close."""
    if axis is None or axis.tile % cell or axis.tile < least * cell:
        return 0
    return axis.tile // cell


def _cell_note(rows: Axis | None, columns: Axis, width: int) -> Text:
    """How much of the grid is drawn, and how coarsely."""
    row_cell, column_cell, _ = _cells(rows, columns, width)
    parts = []
    if any(axis is not None and axis.length < axis.whole for axis in (rows, columns)):
        spans = [
            f"{axis.start}-{axis.start + axis.length - 1} of {axis.whole}"
            for axis in (rows, columns)
            if axis is not None
        ]
        parts.append(f"a part of the grid: {', '.join(spans)}")
    if row_cell * column_cell > 1:
        size = f"{row_cell}x{column_cell}" if rows is not None else str(column_cell)
        parts.append(f"a cell is {size} tokens ({SOME} few of them are in the window)")
    return Text("; ".join(parts), "dim")


def _rule(cells: int, every: int, repeat: int) -> str:
    if not every:
        return "─" * (cells * repeat)
    return "".join("┼" * (c > 0 and c % every == 0) + "─" * repeat for c in range(cells))


def _glyph(window: float, visited: float) -> str:
    if window:
        return WINDOW if window >= 0.5 else SOME
    return VISITED if visited else SKIPPED


def _cells(rows: Axis | None, columns: Axis, width: int) -> tuple[int, int, int]:
    """Tokens per cell (down, across) and characters per cell, so that the picture fits and keeps its proportions.

    A character is twice as high as wide: a cell is one token of two characters, or twice as many tokens down as across.
    """
    lines = PANEL_LINES if rows is not None else 1
    height = 1 if rows is None else rows.length
    if 2 * columns.length <= width and height <= lines:
        return 1, 1, 2
    if rows is None:
        return 1, ceil_div(columns.length, width), 1
    cell = max(ceil_div(columns.length, width), ceil_div(height, 2 * lines))
    # A cell that divides the tile lets the lines between tiles be drawn.
    better = [c for c in range(cell, 2 * cell) if columns.tile and columns.tile % c == 0 and rows.tile % (2 * c) == 0]
    cell = better[0] if better else cell
    return 2 * cell, cell, 1


def _legend(gna: GNA, axes: tuple[Axis, ...]) -> Text:
    keys = math.prod(int(axis.window.sum()) for axis in axes)
    others = math.prod(int(axis.visited.sum()) for axis in axes) - keys
    text = Text()
    for glyph, meaning in ((QUERY, "query"), (WINDOW, f"its window, {keys:,} of {gna.grid_tokens:,} keys")):
        text.append(glyph, STYLES[glyph]).append(f" {meaning}   ")
    text.append(SKIPPED, STYLES[SKIPPED]).append(" skipped\n")
    text.append(VISITED, STYLES[VISITED]).append(
        f" {others:,} other keys in the tiles that the tile of the query visits"
    )
    if gna.text_first or gna.text_last:
        text.append(f"\nand it sees all {gna.text_first + gna.text_last:,} text tokens, which are not drawn", "dim")
    return text


FULL, FULL_SOME, PARTIAL, PARTIAL_SOME = "█", "▓", "▒", "░"
BLOCK_STYLES = {FULL: BLUE, FULL_SOME: BLUE, PARTIAL: ORANGE, PARTIAL_SOME: ORANGE, SKIPPED: "bright_black"}


def _block_masks(gna: GNA, tiles: tuple[tuple[int, ...], tuple[int, ...]], width: int) -> RenderableType:
    """The block mask in natural order and in tile order side by side."""
    columns = min((width - 4) // 2, 64)
    table = Table.grid(padding=(0, 4, 0, 0))
    pictures = [block_picture(gna, order, columns // 2, columns) for order in (None, tiles)]
    drawn = [
        (f"{picture.name}: {percent(picture.share)}", _blocks(picture, columns))
        for picture in pictures
        if picture is not None
    ]
    if not drawn:
        return Text("The block mask has too many blocks to draw it quickly.", "dim")
    table.add_row(*(Text(name, "bold") for name, _ in drawn))
    table.add_row(*(text for _, text in drawn))
    legend = Text()
    entries = [
        (FULL, FULL_SOME, "full"),
        (PARTIAL, PARTIAL_SOME, "partial: the mask is needed"),
        (SKIPPED, "", "skipped"),
    ]
    for many, few, meaning in entries:
        legend.append(f"{many} {few}".rstrip(), BLOCK_STYLES[many]).append(f" {meaning}   ")
    legend.append(f"({FULL_SOME} {PARTIAL_SOME} few of the cell)", "dim")
    return Group(
        Text("Block mask (queries down, keys across) and its share of visited blocks", "bold"), table, Text(), legend
    )


def _blocks(picture: BlockPicture, columns: int) -> Text:
    # A character is twice as high as wide.
    repeat = 2 if picture.cell[0] == picture.cell[1] and picture.visited.shape[1] * 2 <= columns else 1
    text = Text(no_wrap=True)
    for r, (visited_row, full_row) in enumerate(zip(picture.visited, picture.full, strict=True)):
        text.append("\n" * (r > 0))
        for visited, full in zip(visited_row, full_row, strict=True):
            text.append(
                (glyph := _block_glyph(visited, full)) + (" " if glyph == SKIPPED else glyph) * (repeat - 1),
                BLOCK_STYLES[glyph],
            )
    return text


def _block_glyph(visited: float, full: float) -> str:
    if not visited:
        return SKIPPED
    if full >= visited / 2:
        return FULL if visited >= 0.5 else FULL_SOME
    return PARTIAL if visited >= 0.5 else PARTIAL_SOME


MOST_PIXELS = 768
"""Most cells along a side of the block mask in a PNG."""
MOST_LINES = 40
"""More tiles than this along a side are not parted by lines in a PNG."""


def matplotlib_figure(size: tuple[float, float]) -> Figure:
    """An empty matplotlib figure of ``size`` inches, without a window or global state.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a PNG needs matplotlib, which is missing: pip install gna-flex[viz]") from error
    return Figure(size, dpi=150, layout="constrained")


def save_png(
    path: str | os.PathLike[str],
    gna: GNA,
    query: Ints | None = None,
    *,
    order: str = "tiles",
    q_tile: Ints | None = None,
    kv_tile: Ints | None = None,
) -> None:
    """Writes a picture: left the grid with one query's window and the tiles visited for it, right the block mask.

    Args:
        path: file to write; the ending picks the format (``.png``, ``.svg``, ``.pdf``).
        gna: the neighborhood.
        query: coordinates of the query; the middle of the grid by default.
        order: token order of the block mask, ``"tiles"`` or ``"row-major"``.
        q_tile: tokens of a query tile per dimension; the best tile by default.
        kv_tile: tokens of a key tile per dimension; that of the queries by default.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if an argument does not fit the layout.
    """
    if order not in ("tiles", "row-major"):
        raise ValueError(f"order={order!r}: give 'tiles' or 'row-major'")
    figure = matplotlib_figure((11, 6.4) if gna.ndim == 3 else (12, 6.2))
    axes = axes_of(gna, query, q_tile, kv_tile)
    left, right = figure.subfigures(1, 2, width_ratios=[0.8 if gna.ndim == 3 else 1.05, 1], squeeze=False)[0]
    figure.suptitle(f"Generalized neighborhood attention: {gna}", fontsize=11)
    if gna.ndim == 3:
        slices = _slices(axes[0], 3)
        plots = left.subplots(len(slices), 1, squeeze=False)[:, 0]
        for plot, t in zip(plots, slices, strict=True):
            _plot_grid(plot, axes[1:], bool(axes[0].window[t]), bool(axes[0].visited[t]), t == axes[0].query)
            plot.set_title(f"slice {t} of {axes[0].length}{', with the query' * (t == axes[0].query)}", fontsize=9)
    else:
        _plot_grid(left.subplots(), axes, True, True, True)
    place = ", ".join(str(axis.query) for axis in axes)
    keys = math.prod(int(axis.window.sum()) for axis in axes)
    entries = {f"query ({place})": VERMILLION, f"its window, {keys:,} keys": BLUE, "other keys in visited tiles": SKY}
    _plot_legend(left, entries | {"skipped": GREY})
    picture = block_picture(gna, tiles_of(gna, q_tile, kv_tile) if order == "tiles" else None, MOST_PIXELS, MOST_PIXELS)
    plot = right.subplots()
    if picture is None:
        plot.set_axis_off()
        plot.text(0.5, 0.5, "too many blocks to draw the mask", ha="center")
    else:
        _plot_blocks(plot, picture)
    _plot_legend(right, {"full": BLUE, "partial: the mask is needed": ORANGE, "skipped": GREY})
    figure.savefig(path)


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def _plot_grid(plot: Axes, axes: tuple[Axis, ...], in_window: bool, in_visited: bool, has_query: bool) -> None:
    """One slice of the grid, a pixel per token, with lines between tiles."""
    columns = axes[-1].zoom(FEW if len(axes) == 2 else FEW_OF_LINE)
    rows = axes[0].zoom(FEW) if len(axes) == 2 else Axis(0, np.ones(1, bool), np.ones(1, bool), 0, 1)
    image = np.broadcast_to(_rgb(GREY), (rows.length, columns.length, 3)).copy()
    image[np.outer(rows.visited, columns.visited) & in_visited] = _rgb(SKY)
    image[np.outer(rows.window, columns.window) & in_window] = _rgb(BLUE)
    ends = columns.start - 0.5, columns.start + columns.length - 0.5, rows.start + rows.length - 0.5, rows.start - 0.5
    flat = len(axes) == 1
    plot.imshow(image, extent=ends, interpolation="nearest", aspect="auto" if flat else "equal")
    for axis, line in ((columns, plot.axvline), (rows, plot.axhline)):
        if axis.tile > 1 and axis.length <= MOST_LINES * axis.tile:
            for edge in range(axis.start + axis.tile, axis.start + axis.length, axis.tile):
                line(edge - 0.5, color="white", linewidth=0.8)
    if has_query:
        x, y = columns.start + columns.query, rows.start + rows.query
        plot.plot(x, y, "D", color=VERMILLION, markersize=6, markeredgecolor="white", markeredgewidth=0.8)
    _integer_ticks(plot)
    if flat:
        plot.set_yticks([])
        plot.set_box_aspect(0.15)


def _integer_ticks(plot: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (plot.xaxis, plot.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))


def _plot_blocks(plot: Axes, picture: BlockPicture) -> None:
    """The block mask; a cell of several blocks has the mixed colour of what is in it."""
    visited = picture.visited[..., None]
    full = picture.full[..., None] / np.maximum(visited, 1e-12)
    # Few visited blocks among very many must not fade away.
    strength = np.where(visited > 0, np.maximum(visited**0.4, 0.5), 0)
    image = strength * (full * _rgb(BLUE) + (1 - full) * _rgb(ORANGE)) + (1 - strength) * _rgb(GREY)
    rows, columns = (side * cell for side, cell in zip(picture.visited.shape, picture.cell, strict=True))
    plot.imshow(image, extent=(0, columns, rows, 0), interpolation="nearest", aspect="auto")
    plot.set_box_aspect(1)
    plot.set_title(f"block mask in {picture.name}: {percent(picture.share)} of the blocks visited", fontsize=10)
    _integer_ticks(plot)
    plot.set_xlabel("blocks of keys")
    plot.set_ylabel("blocks of queries")


def _plot_legend(figure: Any, entries: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=color, label=label) for label, color in entries.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2 if len(patches) > 3 else 3, frameon=False)
