"""How long attention takes: a small cost model, fitted to measured times, that needs no GPU.

A kernel spends its time on full tiles, on tiles that need the mask, and on starting and ending query tiles; sorting
tokens into tiles costs memory traffic on top. The constants of the routes are in :data:`COSTS`, one row for each route,
device and direction, in nanoseconds of the whole device. Other devices are scaled by their published peaks.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from gna_flex.neighborhood import GNA, Ints
from gna_flex.simulate import TILINGS, simulate, tile_of
from gna_flex.tiling import TileOrder, choose_tile
from gna_flex.words import by_x, plain_text, times

if TYPE_CHECKING:
    from rich.console import RenderableType


class Device(NamedTuple):
    """Published peaks: dense bfloat16 tensor operations and bytes per second; number of multiprocessors."""

    flops: float
    bandwidth: float
    processors: int


DEVICES = {
    "a100": Device(312e12, 2.039e12, 108),
    "h100": Device(989e12, 3.35e12, 132),
    "h200": Device(989e12, 4.8e12, 132),
    "b200": Device(2250e12, 8.0e12, 148),
}
"""SXM modules, from NVIDIA's data sheets: A100 80GB, H100, H200, DGX B200 (one of its 8 GPUs); without sparsity."""


class Cost(NamedTuple):
    """Constants of a route: nanoseconds of the whole device for one head's tiles of 128 x 128 tokens, head dim 128.

    Attributes:
        full: a tile without the mask.
        partial: a tile with the mask.
        query_tile: starting and ending a query tile.
        error: largest relative error of the model on a recorded case.
    """

    full: float
    partial: float
    query_tile: float
    error: float


COSTS = {
    ("dense", "h200", "forward"): Cost(13.0, 13.0, 0.0, 0.05),
    ("dense", "h200", "backward"): Cost(38.5, 38.5, 0.0, 0.05),
    ("flex", "h200", "forward"): Cost(18.4, 30.9, 105.0, 0.19),
    ("flex", "h200", "backward"): Cost(49.9, 80.1, 182.0, 0.10),
    ("flex-tiles", "h200", "forward"): Cost(18.4, 39.2, 105.0, 0.10),
    ("flex-tiles", "h200", "backward"): Cost(49.9, 93.8, 182.0, 0.10),
}
"""Fitted to tests/gpu/records/flex_routes_h200.json by least squares of the relative error (tests/test_predict.py).

Both routes run the same kernel, so a full tile and a query tile cost the same in both; a partial tile does not, because
mask functions differ. The largest error of ``flex`` forward, 18 %, is the only dilated mask; the others are within 8 %.
"""
REFERENCE = "h200"
TILE_TOKENS, HEAD_DIM = 128, 128
"""What the constants were measured with."""
COPY_EFFICIENCY = 0.7
"""Share of peak bandwidth that a permutation reaches: in the record, the two routes of lm-32k-bidirectional differ in
nothing else."""
FILLING = 4
"""Query tiles per multiprocessor below which a device counts as not filled."""
BYTES = {"bfloat16": 2, "float16": 2}
ROUTE_TILINGS = {"flex": ("flat",), "flex-tiles": ("static", "anchored")}
"""Tilings that a route can be asked about; no route runs anchored tiles yet, static ones stand in for their cost."""


@dataclass(frozen=True)
class Prediction:
    """Predicted time of one attention call, in milliseconds. Made by :func:`predict`; prints as a table.

    Attributes:
        gna: the neighborhood.
        route: the route whose constants were used.
        device: the device, a key of :data:`DEVICES`.
        tiling, q_tile, kv_tile: the tiles.
        full_ms, partial_ms: tiles without and with the mask.
        overhead_ms: starting and ending query tiles.
        permutation_ms: bringing tokens into tile order and back.
        dense_ms: dense attention of the same tokens.
        measured: whether the constants were measured in this setting; if not, this is an estimate.
        error: largest relative error of the model on recorded cases; ``None`` for estimates.
        notes: why this is an estimate.
    """

    gna: GNA
    route: str
    device: str
    tiling: str
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    full_ms: float
    partial_ms: float
    overhead_ms: float
    permutation_ms: float
    dense_ms: float
    measured: bool
    error: float | None
    notes: tuple[str, ...]

    @property
    def milliseconds(self) -> float:
        """The whole call."""
        return self.full_ms + self.partial_ms + self.overhead_ms + self.permutation_ms

    @property
    def speedup(self) -> float:
        """Dense attention over this."""
        return self.dense_ms / self.milliseconds

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        return asdict(self) | {"milliseconds": self.milliseconds, "speedup": self.speedup}

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        parts = [
            ("tiles without the mask", self.full_ms),
            ("tiles with the mask", self.partial_ms),
            ("start and end of query tiles", self.overhead_ms),
            ("into tile order and back", self.permutation_ms),
        ]
        for name, value in parts:
            table.add_row(name, f"{value:,.2f} ms")
        table.add_row("together", f"{self.milliseconds:,.2f} ms", style="bold")
        table.add_row("dense attention", f"{self.dense_ms:,.2f} ms", style="dim")
        tiles = " and ".join(map(by_x, dict.fromkeys((self.q_tile, self.kv_tile))))
        how = f"{self.route} on {self.device}, {self.tiling} tiles {tiles}: {times(self.speedup)} faster than dense"
        basis = "constants measured in this setting" if self.measured else "estimate: " + "; ".join(self.notes)
        error = f", within {self.error:.0%} of every recorded case" if self.error is not None else ""
        return Group(Text(str(self.gna), "bold"), Text(how), Padding(table, (1, 0)), Text(f"{basis}{error}", "dim"))

    def __str__(self) -> str:
        return plain_text(self)


class Call(NamedTuple):
    """What a prediction depends on besides mask and tiles; checked by :func:`checked_call`."""

    route: str
    device: str
    heads: int
    batch: int
    head_dim: int
    dtype: str
    backward: bool


def checked_call(
    gna: GNA,
    *,
    tiling: str = "static",
    route: str | None = None,
    device: str = REFERENCE,
    heads: int = 24,
    batch: int = 1,
    head_dim: int = HEAD_DIM,
    dtype: Any = "bfloat16",
    backward: bool = False,
) -> Call:
    """The settings of a call; the route is by default the one that runs the tiling.

    Raises:
        ValueError: if a value is not known or not positive, or the route does not run the tiling.
    """
    if tiling not in TILINGS:
        raise ValueError(f"tiling={tiling!r} for layout {gna.layout} is not known; tilings are {', '.join(TILINGS)}")
    if route is None:
        route = next(name for name, tilings in ROUTE_TILINGS.items() if tiling in tilings)
    if route not in ROUTE_TILINGS:
        raise ValueError(f"route={route!r} has no cost model; routes with one are {', '.join(ROUTE_TILINGS)}")
    if tiling not in ROUTE_TILINGS[route]:
        tilings = " or ".join(ROUTE_TILINGS[route])
        raise ValueError(f"route={route!r} does not run tiling={tiling!r} on layout {gna.layout}: it runs {tilings}")
    if device not in DEVICES:
        raise ValueError(f"device={device!r} is not known; devices are {', '.join(DEVICES)}")
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES:
        raise ValueError(f"dtype={dtype!r} has no cost model; types with one are {', '.join(BYTES)}")
    for argument, value in (("heads", heads), ("batch", batch), ("head_dim", head_dim)):
        if value < 1:
            raise ValueError(f"{argument}={value} for layout {gna.layout} must be at least 1")
    return Call(route, device, heads, batch, head_dim, name, backward)


class Prices(NamedTuple):
    """Milliseconds of one tile without the mask, with it, and of one query tile, over all heads; and of the rest."""

    full: float
    partial: float
    query_tile: float
    permutation: float
    dense: float


def prices(gna: GNA, q_block: int, kv_block: int, places: int, call: Call) -> Prices:
    """What tiles of ``q_block x kv_block`` tokens cost.

    ``places`` is the number of query and key tokens in the order of the route, padding included.
    """
    cost, dense = cost_of(call.route, call), cost_of("dense", call)
    heads = call.heads * call.batch
    ms = 1e-6 * heads
    area = q_block * kv_block / TILE_TOKENS**2
    full = cost.full * head_dim_factor(call.head_dim)
    # The mask is evaluated per pair, whatever the head dim.
    partial = full + cost.partial - cost.full
    moved = 0.0
    if call.route == "flex-tiles":
        # Two tensors in query order and two in key order, each read once and written once.
        moved = 2 * (places + 2 * gna.tokens) * call.head_dim * BYTES[call.dtype] * heads
    return Prices(
        full=ms * area * full,
        partial=ms * area * partial,
        query_tile=ms * q_block / TILE_TOKENS * cost.query_tile,
        permutation=1e3 * moved / (COPY_EFFICIENCY * DEVICES[call.device].bandwidth),
        dense=ms * (gna.tokens / TILE_TOKENS) ** 2 * dense.full * dense_head_dim_factor(call.head_dim),
    )


def cost_of(route: str, call: Call) -> Cost:
    """The constants of a route on the device of the call, scaled from those of an H200 if it was not measured."""
    direction = "backward" if call.backward else "forward"
    if (route, call.device, direction) in COSTS:
        return COSTS[route, call.device, direction]
    cost, scale = COSTS[route, REFERENCE, direction], DEVICES[REFERENCE].flops / DEVICES[call.device].flops
    return Cost(cost.full * scale, cost.partial * scale, cost.query_tile * scale, cost.error)


def estimate_notes(call: Call, tiling: str, blocks: tuple[int, int], query_tiles: int) -> tuple[str, ...]:
    """In which ways a call differs from the measured ones; empty if it does not."""
    device = DEVICES[call.device]
    direction = "backward" if call.backward else "forward"
    few = call.heads * call.batch * query_tiles < FILLING * device.processors
    differences = {
        f"no measurement on {call.device}, scaled from {REFERENCE} by published peaks": (
            (call.route, call.device, direction) not in COSTS
        ),
        "no route runs anchored tiles yet, costed as static ones": tiling == "anchored",
        f"head dim {call.head_dim} scaled from {HEAD_DIM}": call.head_dim != HEAD_DIM,
        f"{call.dtype} taken to be as fast as bfloat16": call.dtype != "bfloat16",
        f"blocks of {blocks[0]} x {blocks[1]} tokens scaled from {TILE_TOKENS} x {TILE_TOKENS}": (
            blocks != (TILE_TOKENS, TILE_TOKENS)
        ),
        "too few query tiles to fill the device, it will take longer": few,
    }
    return tuple(note for note, holds in differences.items() if holds)


def head_dim_factor(head_dim: int) -> float:
    """Time of a tile in compiled FlexAttention over that at head dim 128: arithmetic, down to 64.

    FlashAttention-3 (arXiv 2407.08608, figure 5) has Triton's kernel at equal FLOP/s for 64 and 128 on an H100.

    >>> head_dim_factor(64), head_dim_factor(256)
    (0.5, 2.0)
    """
    return max(head_dim, 64) / HEAD_DIM


def dense_head_dim_factor(head_dim: int) -> float:
    """The same for dense attention, where the softmax costs as much as 64 channels: same source, 0.65 to 0.72 at 64.

    >>> round(dense_head_dim_factor(64), 2), dense_head_dim_factor(256)
    (0.67, 2.0)
    """
    return max((head_dim + 64) / (HEAD_DIM + 64), head_dim / HEAD_DIM)


def predict(
    gna: GNA,
    *,
    q_tile: Ints | None = None,
    kv_tile: Ints | None = None,
    tiling: str = "static",
    device: str = REFERENCE,
    route: str | None = None,
    heads: int = 24,
    batch: int = 1,
    head_dim: int = HEAD_DIM,
    dtype: Any = "bfloat16",
    backward: bool = False,
) -> Prediction:
    """Predicts the time of one attention call, forward or (``backward=True``) backward alone, and of dense attention.

    Meant for calls that fill the device; ``notes`` say so where one does not.

    Args:
        gna: the neighborhood of all heads.
        q_tile: tokens of a query tile; by default the best tile of 128 tokens, or 128 consecutive tokens.
        kv_tile: tokens of a key tile; by default that of the queries.
        tiling: ``static`` (tile order), ``flat`` (natural order) or ``anchored`` (estimate: no route runs it yet).
        device: one of :data:`DEVICES`; ``h200`` is measured, others are estimates.
        route: ``flex`` or ``flex-tiles``; by default the one that runs the tiling.
        heads: heads of queries; keys and values have as many.
        batch: sequences.
        head_dim: channels of a head.
        dtype: ``bfloat16`` or ``float16``, by name or as torch has it.
        backward: the backward pass in place of the forward pass.

    Raises:
        ValueError: if a value is not known, not positive or does not fit the layout.

    >>> result = predict(GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)))
    >>> round(result.milliseconds), round(result.dense_ms), result.measured
    (36, 253, True)
    """
    call = checked_call(
        gna,
        tiling=tiling,
        route=route,
        device=device,
        heads=heads,
        batch=batch,
        head_dim=head_dim,
        dtype=dtype,
        backward=backward,
    )
    if q_tile is None:
        if kv_tile is not None:
            raise ValueError(f"kv_tile={kv_tile!r} for layout {gna.layout} needs a q_tile")
        q_tile = TILE_TOKENS if tiling == "flat" else choose_tile((gna,), TILE_TOKENS)[0]
    q = tile_of("q_tile", q_tile, gna, tiling)
    counts = simulate(gna, q, kv_tile, tiling)
    places = 0 if tiling == "flat" else TileOrder(gna, q).tokens + TileOrder(gna, counts.kv_tile).tokens
    blocks = math.prod(q), math.prod(counts.kv_tile)
    price = prices(gna, *blocks, places, call)
    notes = estimate_notes(call, tiling, blocks, counts.query_tiles)
    return Prediction(
        gna=gna,
        route=call.route,
        device=device,
        tiling=tiling,
        q_tile=q,
        kv_tile=counts.kv_tile,
        full_ms=price.full * counts.whole,
        partial_ms=price.partial * (counts.visited - counts.whole),
        overhead_ms=price.query_tile * counts.query_tiles,
        permutation_ms=price.permutation,
        dense_ms=price.dense,
        measured=not notes,
        error=None if notes else cost_of(call.route, call).error,
        notes=notes,
    )
