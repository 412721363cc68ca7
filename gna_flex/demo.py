"""The demo: neighborhood attention between the patches of a real photograph, checked against the reference.

Queries and keys are the patches themselves in a random orthogonal basis, so a query attends to those patches of its
window that look alike; values are the patches too, so the output is a picture again.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.color import Color
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gna_flex.attention import explain, flex_attention
from gna_flex.mask import gna_mask
from gna_flex.neighborhood import GNA, Ints
from gna_flex.presets import preset
from gna_flex.reference import reference_attention
from gna_flex.report import Report, report
from gna_flex.routing import Route
from gna_flex.scene import key_ranges
from gna_flex.viz import QUERY, VERMILLION, matplotlib_figure

PATCH = 8
HEADS, HEAD_DIM = 3, 64
"""Together the 8 x 8 x 3 numbers of a patch."""
SHARPNESS = 4.0
"""Scores of equal patches: high enough that attention is about likeness, not an average of the window."""
BUDGET = 8.0
"""Routes add up in different orders; a wrong mask is wrong by many thousand times more."""
VIDEO_MODEL = "hunyuan-video"


@dataclass(frozen=True)
class Demo:
    """What the demo computed. Made by :func:`run_demo`; prints as a page with pictures.

    Attributes:
        image: photograph, ``[height, width, 3]``, 0 to 1.
        output: attention's output as a picture of the same size.
        gna: the neighborhood on the grid of patches.
        query: coordinates of the query that is shown.
        weights: its attention over its window, ``[rows, columns]``, mean over heads.
        route: the route taken, and why.
        dtype: type of the computation, as in ``torch.float32``.
        device: where it ran.
        seconds: time of one call of ``flex_attention``, the first (which may compile) not counted.
        reference_seconds: time of the reference in float64, on the CPU.
        error: largest difference of the output from the reference in float64.
        window_error: largest difference of the shown query's output from plain attention over a slice of the keys.
        budget: what ``error`` may be: ``BUDGET`` times what torch's dense attention loses in this type with this mask.
        model: sparsity report of a video model.
    """

    image: np.ndarray
    output: np.ndarray
    gna: GNA
    query: tuple[int, int]
    weights: np.ndarray
    route: Route
    dtype: str
    device: str
    seconds: float
    reference_seconds: float
    error: float
    window_error: float
    budget: float
    model: Report

    @property
    def passed(self) -> bool:
        """Whether both differences are within the budget."""
        return max(self.error, self.window_error) <= self.budget

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON takes them; no pictures."""
        names = (
            "dtype",
            "device",
            "seconds",
            "reference_seconds",
            "error",
            "window_error",
            "budget",
            "passed",
            "query",
        )
        numbers = {name: getattr(self, name) for name in names}
        route = {"name": self.route.name, "reason": self.route.reason, "rejected": dict(self.route.rejected)}
        size = list(self.image.shape[:2])
        return numbers | {"image": size, "gna": str(self.gna), "route": route, "model": self.model.to_json()}

    def __rich__(self) -> RenderableType:
        rows, columns = key_ranges(self.gna, self.query)
        grid = self.gna.layout
        title = f"A photograph of {grid[0] * PATCH} x {grid[1] * PATCH} pixels is {grid[0]} x {grid[1]} patches: "
        photo = Picture(_shrink(self.image), self.query, (rows, columns))
        peak = self.weights / self.weights.max()
        heat = peak[..., None] * np.array([1.0, 0.85, 0.3]) + (1 - peak[..., None]) * np.array([0.05, 0.1, 0.25])
        size = max(1, 30 // len(columns))
        inside = rows.index(self.query[0]) * size, columns.index(self.query[1]) * size
        enlarged = Picture(heat.repeat(size, 0).repeat(size, 1), inside, None)
        side_by_side = Table.grid(padding=(0, 4, 0, 0))
        side_by_side.add_row(enlarged, self._facts())
        return Group(
            Text.assemble((title, "bold"), f"{self.gna.tokens:,} tokens"),
            Text.assemble((QUERY, f"bold {VERMILLION}"), f" query {self.query} sees its window only, ", str(self.gna)),
            Padding(photo, (1, 0)),
            Text("Where in its window the query looks (bright: much), and what came out:", "bold"),
            Padding(side_by_side, (1, 0)),
            Text(f"route {self.route}", "dim"),
            Padding(Text(f"What such a mask skips in a real video model, {VIDEO_MODEL}:", "bold"), (1, 0)),
            self.model,
        )

    def _facts(self) -> RenderableType:
        table = Table.grid(padding=(0, 2, 0, 0))
        facts: list[tuple[str, str | Text]] = [
            ("result", Text("right", "bold green") if self.passed else Text("WRONG", "bold red")),
            ("", ""),
            ("largest difference", ""),
            ("  from float64 reference", f"{self.error:.1e}"),
            ("  from window cut by hand", f"{self.window_error:.1e}"),
            (f"  allowed for {self.dtype}", f"{self.budget:.1e}"),
            ("", ""),
            ("time", ""),
            (f"  {self.dtype} on {self.device}", f"{self.seconds * 1e3:,.0f} ms"),
            ("  float64 reference on cpu", f"{self.reference_seconds * 1e3:,.0f} ms"),
            ("  route", self.route.name),
        ]
        for name, value in facts:
            table.add_row(name, value)
        return table

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Writes photograph with window, attention of the query, and output side by side.

        Raises:
            ImportError: if matplotlib is missing.
        """
        figure = matplotlib_figure((13, 4.8))
        left, middle, right = figure.subplots(1, 3)
        rows, columns = key_ranges(self.gna, self.query)
        shade = np.full(self.image.shape[:2], 0.35)
        # Patches of the window at full brightness.
        keys = np.zeros(self.gna.layout, bool)
        keys[np.ix_(rows, columns)] = True
        shade[keys.repeat(PATCH, 0).repeat(PATCH, 1)] = 1
        left.imshow(self.image * shade[..., None])
        y, x = ((coordinate + 0.5) * PATCH - 0.5 for coordinate in self.query)
        left.plot(x, y, "D", color=VERMILLION, markersize=7, markeredgecolor="white")
        left.set_title(f"query patch {self.query} and its window")
        shown = middle.imshow(self.weights, cmap="cividis")
        middle.plot(
            columns.index(self.query[1]), rows.index(self.query[0]), "D", color=VERMILLION, markeredgecolor="white"
        )
        middle.set_title("attention of the query")
        figure.colorbar(shown, ax=middle, shrink=0.75)
        right.imshow(self.output)
        right.set_title("output: patches averaged by likeness")
        for plot in (left, middle, right):
            plot.set_axis_off()
        figure.suptitle(f"{self.gna}: largest difference from the float64 reference {self.error:.1e}")
        figure.savefig(path)


class Picture:
    """An image for the terminal, ``[rows, columns, 3]`` from 0 to 1: two rows a line in colour, else in characters.

    What is outside of ``window`` is dark; without colour the window has a frame.
    """

    RAMP = " .:-=+*#%@"

    def __init__(self, image: np.ndarray, query: tuple[int, int], window: tuple[range, range] | None) -> None:
        self.image, self.query, self.window = image, query, window
        self.inside = np.ones(image.shape[:2], bool)
        if window is not None:
            self.inside[:] = False
            self.inside[np.ix_(*window)] = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._plain() if console.color_system is None else self._colored()

    def _colored(self) -> Text:
        dimmed = self.image * np.where(self.inside, 1.0, 0.3)[..., None]
        pixels = (255 * dimmed).round().astype(int)
        if len(pixels) % 2:
            pixels = np.concatenate([pixels, pixels[-1:] * 0])
        text = Text(no_wrap=True)
        for line in range(len(pixels) // 2):
            text.append("\n" * (line > 0))
            for column, (top, bottom) in enumerate(zip(*pixels[2 * line : 2 * line + 2], strict=True)):
                ground = Color.from_rgb(*bottom)
                if (line, column) == (self.query[0] // 2, self.query[1]):
                    text.append(QUERY, Style(color=Color.parse(VERMILLION), bgcolor=ground, bold=True))
                else:
                    text.append("▀", Style(color=Color.from_rgb(*top), bgcolor=ground))
        return text

    def _plain(self) -> Text:
        grey = self.image.mean(-1)
        level = np.stack([grey[row : row + 2].mean(0) for row in range(0, len(grey), 2)])
        text = np.array(list(self.RAMP))[(level * (len(self.RAMP) - 1)).round().astype(int)]
        if self.window is not None:
            self._frame(text, *self.window)
        text[self.query[0] // 2, self.query[1]] = QUERY
        return Text("\n".join("".join(line) for line in text), no_wrap=True)

    @staticmethod
    def _frame(text: np.ndarray, rows: range, columns: range) -> None:
        """Draws a frame around the window where that is inside of the picture."""
        top, bottom = rows[0] // 2 - 1, rows[-1] // 2 + 1
        left, right = columns[0] - 1, columns[-1] + 1
        for line, ends in ((top, "┌┐"), (bottom, "└┘")):
            if 0 <= line < text.shape[0]:
                text[line, max(left, 0) : right + 1] = "─"
                for column, corner in zip((left, right), ends, strict=True):
                    if 0 <= column < text.shape[1]:
                        text[line, column] = corner
        for column in (left, right):
            if 0 <= column < text.shape[1]:
                text[max(top + 1, 0) : bottom, column] = "│"


def load_image(path: str | os.PathLike[str] | None = None) -> np.ndarray:
    """A photograph ``[height, width, 3]`` from 0 to 1; by default the astronaut (NASA, public domain) of scikit-image.

    Raises:
        ImportError: if scikit-image is missing.
        OSError: if the file cannot be read.
    """
    try:
        import skimage.color
        import skimage.data
        import skimage.io
    except ImportError as error:
        raise ImportError(
            "the demo's photograph needs scikit-image, which is missing: pip install gna-flex[demo]"
        ) from error
    image = skimage.data.astronaut() if path is None else skimage.io.imread(os.fspath(path))
    if image.ndim == 2:
        image = skimage.color.gray2rgb(image)
    return np.asarray(skimage.util.img_as_float(image)[..., :3])


def run_demo(
    image: np.ndarray | None = None,
    window: Ints = 15,
    stride: Ints = 1,
    dilation: Ints = 1,
    query: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Demo:
    """Neighborhood attention between the patches (8 x 8 pixels) of an image, and every check of it.

    Args:
        image: ``[height, width, 3]`` from 0 to 1, cropped to whole patches and shrunk to at most 64 x 64 of them; the
            photograph of :func:`load_image` by default.
        window: keys per dimension, in patches.
        stride: queries that share one window, per dimension.
        dilation: step between the keys of a window, per dimension.
        query: patch whose window is shown; one on the face by default, the middle in other images.
        device: where to compute; the accelerator if there is one.
        dtype: type to compute in.

    Raises:
        ImportError: if scikit-image is missing and no image is given.
        ValueError: if the neighborhood does not fit the grid of patches.

    >>> demo = run_demo(np.random.default_rng(0).random((64, 96, 3)), window=5, device="cpu")
    >>> demo.gna.layout, demo.weights.shape, demo.passed
    ((8, 12), (5, 5), True)
    """
    if query is None and image is None:
        query = (13, 27)
    image = _whole_patches(load_image() if image is None else image)
    grid = image.shape[0] // PATCH, image.shape[1] // PATCH
    gna = GNA(grid, window, stride, dilation)
    query = query or (grid[0] // 2, grid[1] // 2)
    if not all(0 <= q < n for q, n in zip(query, grid, strict=True)):
        raise ValueError(f"query={query} is outside of the {grid} patches of the image")
    target = torch.empty(
        0, device=device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    ).device
    basis, *tokens = _tokens(image)
    q, k, v = (x.to(target, dtype) for x in tokens)
    # Some accelerators have no float64, so the truth is computed on the CPU.
    exact = q.cpu().double(), k.cpu().double(), v.cpu().double()

    mask = gna_mask(gna, device=target)
    seconds, out = _timed(lambda: flex_attention(q, k, v, block_mask=mask), target, repeats=3)
    reference_seconds, truth = _timed(lambda: _by_head(*exact, mask.mask_mod), exact[0].device)
    index = torch.arange(gna.tokens, device=target)
    kept = mask.mask_mod(index.new_zeros(()), index.new_zeros(()), index[:, None], index)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
    by_hand, weights = _window_by_hand(gna, query, *exact)
    at = query[0] * grid[1] + query[1]
    return Demo(
        image=image,
        output=_picture(out.cpu().double(), basis, grid),
        gna=gna,
        query=query,
        weights=weights,
        route=explain(q, k, v, mask),
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(target) if target.type == "cuda" else target.type,
        seconds=seconds,
        reference_seconds=reference_seconds,
        error=_distance(out, truth),
        window_error=_distance(out[:, :, at], by_hand),
        budget=BUDGET * _distance(dense, truth),
        model=report(preset(VIDEO_MODEL).gna),
    )


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x.cpu().double() - y.cpu().double()).abs().max())


def _whole_patches(image: np.ndarray) -> np.ndarray:
    step = max(1, math.ceil(max(image.shape[:2]) / (64 * PATCH)))
    image = image[::step, ::step]
    rows, columns = (size // PATCH for size in image.shape[:2])
    if not rows * columns:
        raise ValueError(f"an image of {image.shape[0]} x {image.shape[1]} pixels has no patch of {PATCH} x {PATCH}")
    return image[: rows * PATCH, : columns * PATCH]


def _tokens(image: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Orthogonal basis ``[192, 192]``; query, key and value ``[1, heads, tokens, head dim]`` of the patches in it."""
    rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
    patches = torch.tensor(image).reshape(rows, PATCH, columns, PATCH, 3).transpose(1, 2).reshape(rows * columns, -1)
    basis = torch.linalg.qr(torch.randn(192, 192, generator=torch.Generator().manual_seed(0), dtype=torch.double))[0]
    # Compared by angle and not by contrast, so that every patch has most in common with itself.
    likeness = torch.nn.functional.normalize((patches - patches.mean(0)) @ basis, dim=-1) * HEADS**0.5
    sharp = SHARPNESS * math.sqrt(HEAD_DIM) * likeness
    q, k, v = (x.view(1, -1, HEADS, HEAD_DIM).transpose(1, 2) for x in (sharp, likeness, patches @ basis))
    return basis, q, k, v


def _picture(out: Tensor, basis: Tensor, grid: tuple[int, ...]) -> np.ndarray:
    """Output of the attention back as an image: the way from patches to values, reversed."""
    patches = out.transpose(1, 2).reshape(*grid, -1) @ basis.T
    image = patches.reshape(*grid, PATCH, PATCH, 3).transpose(1, 2).reshape(grid[0] * PATCH, grid[1] * PATCH, 3)
    return np.asarray(image.clamp(0, 1))


def _by_head(q: Tensor, k: Tensor, v: Tensor, mask_mod: Any) -> Tensor:
    """The reference, one head at a time: float64 scores of all heads at once would take gigabytes."""
    heads = zip(*(x.split(1, 1) for x in (q, k, v)), strict=True)
    return torch.cat([reference_attention(qh, kh, vh, mask_mod)[0] for qh, kh, vh in heads], 1)


def _window_by_hand(gna: GNA, query: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, np.ndarray]:
    """Attention of one query over a slice of the keys, without any mask: ``[1, H, D]``, and its mean weights."""
    rows, columns = (slice(r.start, r.stop, r.step) for r in key_ranges(gna, query))
    grid = [x.unflatten(2, gna.layout) for x in (q, k, v)]
    keys, values = (x[:, :, rows, columns] for x in grid[1:])
    scores = torch.einsum("bhd,bhrcd->bhrc", grid[0][:, :, query[0], query[1]], keys) / math.sqrt(q.shape[-1])
    weights = scores.flatten(2).softmax(-1).view_as(scores)
    return torch.einsum("bhrc,bhrcd->bhd", weights, values), np.asarray(weights.mean((0, 1)))


def _timed(function: Any, device: torch.device, repeats: int = 0) -> tuple[float, Any]:
    """Least time of a few calls after a first one (or of the only one), and the result."""
    best = math.inf
    for attempt in range(repeats + 1):
        start = time.perf_counter()
        result = function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        if attempt or not repeats:
            best = min(best, time.perf_counter() - start)
    return best, result


def _shrink(image: np.ndarray) -> np.ndarray:
    """Mean colour of every patch."""
    rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
    return np.asarray(image.reshape(rows, PATCH, columns, PATCH, 3).mean((1, 3)))
