"""What a neighborhood skips: pairs, and blocks of tokens in natural order and in tile order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gna_flex.counts import NATURAL_BLOCK, NATURAL_LIMIT, listed_blocks, relation_of
from gna_flex.intervals import ceil_div
from gna_flex.neighborhood import GNA, Ints
from gna_flex.simulate import Simulation, simulate
from gna_flex.symbolic.proof import Proof, Refutation
from gna_flex.symbolic.prove import prove
from gna_flex.tiling import PARTIAL_COST, TileCounts, TileOrder, choose_tile, tile_counts
from gna_flex.words import amount, by_x, percent, plain_text, times

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gna_flex.routing import Route

TILING_NAMES = {"flat": "natural order", "static": "static tiles", "anchored": "anchored tiles"}


@dataclass(frozen=True)
class BlockReport:
    """Blocks of one token order that the heads of a report visit, summed over them.

    Attributes:
        q_tile, kv_tile: tile of the order per dimension; ``None`` is natural row-major order.
        q_block, kv_block: tokens of a block.
        rows: blocks of queries.
        full, partial: visited blocks of which every pair is kept, and which need the mask.
        total: blocks there are in this order, padding of its tiles included.
        dense: blocks of this size that dense attention visits in natural order.
    """

    q_tile: tuple[int, ...] | None
    kv_tile: tuple[int, ...] | None
    q_block: int
    kv_block: int
    rows: int
    full: int
    partial: int
    total: int
    dense: int

    @property
    def visited(self) -> int:
        """Full and partial blocks together."""
        return self.full + self.partial

    @property
    def visited_pairs(self) -> int:
        """Pairs of (query, key) that are computed, needed or not."""
        return self.visited * self.q_block * self.kv_block

    @property
    def skipped(self) -> float:
        """Share of the blocks of dense attention that is not visited; negative if padding eats up the gain."""
        return 1 - self.visited / self.dense

    @property
    def speedup(self) -> float:
        """Blocks of dense attention over visited ones: what a kernel gains that spends equal time on each."""
        return self.dense / self.visited

    @property
    def predicted_speedup(self) -> float:
        """The same where a partial block costs ``PARTIAL_COST`` full ones, as measured; permutations not included."""
        return self.dense / (self.full + PARTIAL_COST * self.partial)

    @property
    def maskless(self) -> bool:
        """Whether no visited block needs the mask; blocks that stick out of the grid do."""
        return self.partial == 0

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        return asdict(self) | {
            "visited": self.visited,
            "visited_per_row": self.visited / self.rows,
            "skipped": self.skipped,
            "speedup": self.speedup,
            "predicted_speedup": self.predicted_speedup,
            "maskless": self.maskless,
        }


@dataclass(frozen=True)
class Report:
    """What one GNA, or one GNA per head, keeps and visits. Made by :func:`report`; prints as a table.

    Attributes:
        gnas: one GNA, or one per head.
        tokens: grid and text tokens of one sequence, ``S``.
        kept_pairs: (query, key) pairs that the mask keeps, summed over ``gnas``.
        natural: blocks in natural row-major order; ``None`` if left out because there are too many.
        tiles: blocks in tile order; ``None`` if the heads have none in common (their dilations differ).
        best_tile: whether the tile was chosen as the best one, not given.
        simulations: for each different GNA the tiles per query tile in natural order (if counted), and with ``tiles``
            static and anchored.
        proofs: for each different GNA whether static ``tiles`` are perfectly block-sparse, with the reasons.
        route: for a mask, how a call in bfloat16 with head dim 128 would be computed where the mask is.
    """

    gnas: tuple[GNA, ...]
    tokens: int
    kept_pairs: int
    natural: BlockReport | None
    tiles: BlockReport | None
    best_tile: bool
    simulations: tuple[Simulation, ...]
    proofs: tuple[Proof | Refutation, ...]
    route: Route | None = None

    @property
    def perfect(self) -> bool:
        """Whether all masks are perfectly block-sparse in static ``tiles``: proved, not counted."""
        return bool(self.proofs) and all(self.proofs)

    @property
    def all_pairs(self) -> int:
        """Pairs of dense attention, summed over ``gnas``."""
        return len(self.gnas) * self.tokens**2

    @property
    def sparsity(self) -> float:
        """Share of the pairs that the mask leaves out."""
        return 1 - self.kept_pairs / self.all_pairs

    @property
    def flop_speedup(self) -> float:
        """Pairs of dense attention over kept ones: the bound that no kernel can beat."""
        return self.all_pairs / self.kept_pairs

    @property
    def verdict(self) -> str:
        """The numbers in one plain sentence or two."""
        if all(gna.is_dense for gna in self.gnas):
            return "The mask keeps every pair: this is dense attention, there is nothing to skip."
        parts = [f"The mask needs {times(self.flop_speedup)} less arithmetic than dense attention."]
        if self.tiles is None:
            parts.append("Heads with different dilations have no tile order in common.")
            if self.natural:
                parts.append(f"Natural order skips {percent(self.natural.skipped)} of the blocks.")
            return " ".join(parts)
        parts.append(self._tiles_against_natural())
        if self.perfect and self.tiles.maskless:
            parts.append("Every visited block is full, so no mask is evaluated: proved perfectly block-sparse.")
        elif self.perfect:
            parts.append("Proved perfectly block-sparse; only blocks that stick out of the grid need the mask.")
        elif self.tiles.speedup < 1.1:
            parts.append("Blocks of this size barely skip anything: dense attention may be as fast.")
        else:
            parts.append(f"{self.tiles.partial / self.tiles.visited:.0%} of its visited blocks are partial.")
            parts += self._remedy()
        return " ".join(parts)

    def _remedy(self) -> list[str]:
        """The nearest change that makes a single mask perfectly block-sparse and still skips something."""
        if len(self.proofs) != 1 or not isinstance(self.proofs[0], Refutation):
            return []
        remedies = [r for r in self.proofs[0].remedies if "q_tile" not in r.change]
        useful = [r for r in remedies if isinstance(r.proof.gna, GNA) and not r.proof.gna.is_dense]
        return [f"It would be perfectly block-sparse with {useful[0]}."] if useful else []

    def _tiles_against_natural(self) -> str:
        tiles, natural = self.tiles, self.natural
        assert tiles is not None
        if natural is None:
            return f"Tile order visits {times(tiles.speedup)} fewer blocks than dense attention."
        gain = natural.visited_pairs / tiles.visited_pairs
        if gain >= 1.05:
            return f"Tile order visits {times(gain)} fewer blocks than natural order."
        if gain > 0.95:
            return "Tile order visits as many blocks as natural order."
        return f"Tile order visits {times(1 / gain)} more blocks than natural order."

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        heads = [asdict(gna) for gna in self.gnas]
        return {
            "gna": heads[0] if len(heads) == 1 else heads,
            "tokens": self.tokens,
            "kept_pairs": self.kept_pairs,
            "all_pairs": self.all_pairs,
            "flop_sparsity": self.sparsity,
            "flop_speedup": self.flop_speedup,
            "natural": self.natural and self.natural.to_json(),
            "tiles": self.tiles and self.tiles.to_json(),
            "best_tile": self.best_tile,
            "perfectly_block_sparse": self.perfect,
            "simulations": [simulation.to_json() for simulation in self.simulations],
            "proofs": [proof.to_json() for proof in self.proofs],
            "route": self.route and self.route._asdict(),
            "verdict": self.verdict,
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        heads = Counter(self.gnas)
        title = Text("\n").join(
            Text.assemble((str(gna), "bold"), f" ({count} heads)" if len(self.gnas) > 1 else "")
            for gna, count in heads.items()
        )
        pairs = Text.assemble(
            (f"{self.tokens:,}", "bold"),
            " tokens, ",
            (percent(self.kept_pairs / self.all_pairs), "bold"),
            " of the pairs kept: ",
            (times(self.flop_speedup), "bold green"),
            " fewer FLOPs than dense",
        )
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("blocks", no_wrap=True)
        for name in ("full", "partial", "visited", "skipped", "fewer", "predicted"):
            table.add_column(name, justify="right", no_wrap=True)
        if blocks := self.natural or self.tiles:
            dense = amount(blocks.dense)
            table.add_row("dense", dense, "0", dense, "0.0%", "1x", "1x", style="dim")
        rows = [("natural order", self.natural), (self._tile_name(), self.tiles)]
        for name, blocks in rows:
            if blocks is not None:
                table.add_row(*_cells(name, blocks))
        notes = Text("\n").join(Text(note, style="dim") for note in self._notes())
        verdict = Text.assemble(("> ", "bold green"), (self.verdict, "italic"))
        worst = [Padding(self._per_query_tile(), (0, 0, 1, 0))] if len(heads) == 1 and self.simulations else []
        route = [Text(f"\nroute of a call, {self.route}", style="dim")] if self.route else []
        return Group(title, pairs, Padding(table, (1, 0)), *worst, notes, *route, Padding(verdict, (1, 0, 0, 0)))

    def _per_query_tile(self) -> RenderableType:
        """Key tiles that a query tile visits, one row for each tiling."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("key tiles of a query tile", no_wrap=True)
        for name in ("dense", "worst", "mean", "fewer (worst)", "fewer (mean)"):
            table.add_column(name, justify="right", no_wrap=True)
        for s in self.simulations:
            table.add_row(
                TILING_NAMES[s.tiling],
                amount(s.dense),
                amount(s.visited_max),
                f"{s.visited_mean:,.1f}",
                times(s.speedup),
                times(s.mean_speedup),
                style="bold green" if s.perfect else "",
            )
        return table

    def __str__(self) -> str:
        return plain_text(self)

    def _tile_name(self) -> str:
        if self.tiles is None or self.tiles.q_tile is None or self.tiles.kv_tile is None:
            return ""
        q_tile, kv_tile = map(by_x, (self.tiles.q_tile, self.tiles.kv_tile))
        if q_tile == kv_tile:
            return f"{'best tile' if self.best_tile else 'tile'} {q_tile}"
        return f"tiles q {q_tile}, kv {kv_tile}"

    def _notes(self) -> list[str]:
        """What a reader of the table may wonder about."""
        notes = []
        if self.tiles and (self.tiles.q_block, self.tiles.kv_block) != (NATURAL_BLOCK, NATURAL_BLOCK):
            notes.append(
                f"a block of tiles is {self.tiles.q_block} x {self.tiles.kv_block} tokens, others are 128 x 128"
            )
        else:
            notes.append("a block is 128 x 128 tokens")
        if self.natural is None:
            notes.append("natural order left out: too many blocks to list them quickly")
        if self.tiles and self.tiles.total > self.tiles.dense:
            padded, dense = amount(self.tiles.total), amount(self.tiles.dense)
            notes.append(f"tiles stick out of the grid: padding makes {padded} blocks of {dense}")
        notes.append(f"predicted: kernel speed-up where a partial block costs {PARTIAL_COST} full ones")
        return notes


def _cells(name: str, blocks: BlockReport) -> list[Any]:
    from rich.text import Text

    style = "bold green" if blocks.maskless else ""
    return [
        Text(name, style),
        Text(amount(blocks.full), style),
        Text(amount(blocks.partial), style),
        Text(amount(blocks.visited), style),
        Text(percent(blocks.skipped), style),
        Text(times(blocks.speedup), style),
        Text(times(blocks.predicted_speedup), style),
    ]


def report(
    gna: GNA | Sequence[GNA],
    *,
    q_tile: Ints | None = None,
    kv_tile: Ints | None = None,
    natural: bool | None = None,
) -> Report:
    """Counts what a GNA, or one GNA per head, keeps and visits; nothing of size tokens x tokens is made.

    Args:
        gna: one GNA, or one per head (same layout and text).
        q_tile: tokens of a query tile per dimension; by default the tile predicted to be fastest.
        kv_tile: tokens of a key tile per dimension; by default that of the queries.
        natural: whether to count the blocks of natural order, which takes time in proportion to them; ``None`` counts
            them unless there are too many.

    Raises:
        ValueError: if tiles do not fit the layout, or ``kv_tile`` is given alone.

    >>> result = report(GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)))
    >>> result.tiles.visited // result.tiles.rows, result.perfect, round(result.flop_speedup, 2)
    (81, True, 11.11)
    """
    gnas = (gna,) if isinstance(gna, GNA) else tuple(gna)
    if not gnas or len({(g.layout, g.text_first, g.text_last) for g in gnas}) != 1:
        raise ValueError("gna: a report needs at least one GNA, all of the same layout and with the same text tokens")
    if q_tile is None and kv_tile is not None:
        raise ValueError(f"kv_tile={kv_tile!r} needs a q_tile")
    heads = Counter(gnas)
    flat = _natural(heads, natural)
    tiles = _tiles(heads, q_tile, q_tile if kv_tile is None else kv_tile)
    simulations, proofs = [], []
    for each in heads:
        simulations += [flat[each]] if flat else []
        if tiles and tiles.q_tile and tiles.kv_tile:
            simulations += [simulate(each, tiles.q_tile, tiles.kv_tile, tiling) for tiling in ("static", "anchored")]
            proofs.append(prove(each, tiles.q_tile, tiles.kv_tile))
    return Report(
        gnas=gnas,
        tokens=gnas[0].tokens,
        kept_pairs=sum(count * g.kept_pairs() for g, count in heads.items()),
        natural=_natural_report(heads, flat) if flat else None,
        tiles=tiles,
        best_tile=q_tile is None,
        simulations=tuple(simulations),
        proofs=tuple(proofs),
    )


def _natural(heads: Counter[GNA], wanted: bool | None) -> dict[GNA, Simulation] | None:
    """Natural order in blocks of 128 tokens, if wanted or quick."""
    relations = {gna: relation_of(gna) for gna in heads}
    if wanted is None:
        wanted = sum(listed_blocks(relation) for relation in relations.values()) <= NATURAL_LIMIT
    return {gna: simulate(gna, NATURAL_BLOCK, tiling="flat") for gna in heads} if wanted else None


def _natural_report(heads: Counter[GNA], flat: dict[GNA, Simulation]) -> BlockReport:
    counts = {gna: TileCounts(s.whole, s.visited - s.whole, s.query_tiles * s.dense) for gna, s in flat.items()}
    return _block_report(heads, counts, None, None, NATURAL_BLOCK, NATURAL_BLOCK)


def _tiles(heads: Counter[GNA], q_tile: Ints | None, kv_tile: Ints | None) -> BlockReport | None:
    if len({gna.dilation for gna in heads}) > 1:
        return None
    first = next(iter(heads))
    if q_tile is None or kv_tile is None:
        q_tile = kv_tile = choose_tile(tuple(heads.elements()))[0]
    q, kv = TileOrder(first, q_tile), TileOrder(first, kv_tile)  # type: ignore[arg-type]
    counts = {gna: tile_counts(gna, q.tile, kv.tile) for gna in heads}
    return _block_report(heads, counts, q.tile, kv.tile, q.block, kv.block)


def _block_report(
    heads: Counter[GNA],
    counts: dict[GNA, TileCounts],
    q_tile: tuple[int, ...] | None,
    kv_tile: tuple[int, ...] | None,
    q_block: int,
    kv_block: int,
) -> BlockReport:
    first, many = next(iter(heads)), heads.total()
    rows = ceil_div(first.tokens, q_block) if q_tile is None else TileOrder(first, q_tile).blocks
    return BlockReport(
        q_tile=q_tile,
        kv_tile=kv_tile,
        q_block=q_block,
        kv_block=kv_block,
        rows=rows * many,
        full=sum(heads[gna] * count.full for gna, count in counts.items()),
        partial=sum(heads[gna] * count.partial for gna, count in counts.items()),
        total=sum(heads[gna] * count.total for gna, count in counts.items()),
        dense=ceil_div(first.tokens, q_block) * ceil_div(first.tokens, kv_block) * many,
    )
