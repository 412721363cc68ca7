"""``compile_report()``: which FlexAttention calls of compiled graphs take our routes, and why the others do not."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gna_flex.neighborhood import GNA
from gna_flex.words import plain_text

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger("gna_flex")

GRAPHS_KEPT = 256


@dataclass(frozen=True)
class CompiledCall:
    """One FlexAttention call of a graph.

    Attributes:
        name: its name in the graph.
        where: file and line of the call, where torch knows it.
        gna: the GNA that its mask is, or one per head; ``None`` where it is none, or nobody looked.
        route: ``"hopper"``, ``"blackwell"`` or ``"flex-tiles"``; empty where the call was left to FlexAttention.
        reason: why.
    """

    name: str
    where: str
    gna: GNA | tuple[GNA, ...] | None
    route: str
    reason: str


@dataclass(frozen=True)
class CompileReport:
    """What became of the FlexAttention calls of compiled graphs. Made by :func:`compile_report`; prints as a table.

    Attributes:
        graphs: the calls of every graph, the oldest graph first.
        seconds: time that it took to recognise masks and to rewrite the graphs.
    """

    graphs: tuple[tuple[CompiledCall, ...], ...]
    seconds: float

    @property
    def calls(self) -> tuple[CompiledCall, ...]:
        """The calls of all graphs."""
        return tuple(call for graph in self.graphs for call in graph)

    @property
    def routed(self) -> int:
        """How many calls take one of our routes."""
        return sum(bool(call.route) for call in self.calls)

    @property
    def summary(self) -> str:
        """One line."""
        if not self.calls:
            return "no FlexAttention call was compiled"
        return (
            f"{self.routed} of {len(self.calls)} FlexAttention calls take our routes ({self.seconds:.2f} s to find out)"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self) | {"routed": self.routed}

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        if not self.calls:
            return Text(self.summary)
        table = Table("graph", "call", "mask", "route", "because", box=None, pad_edge=False)
        for number, graph in enumerate(self.graphs):
            for call in graph:
                gnas = call.gna if isinstance(call.gna, tuple) else (call.gna,)
                mask = (
                    "" if call.gna is None else str(gnas[0]) if len(gnas) == 1 else f"{len(gnas)} heads, {gnas[0]} ..."
                )
                texts = (str(number), call.where or call.name, mask, call.route or "left alone", call.reason)
                table.add_row(*(Text(text) for text in texts))
        return Group(table, Text(self.summary))

    def __str__(self) -> str:
        return plain_text(self, 160)


_reports: deque[CompileReport] = deque(maxlen=GRAPHS_KEPT)


def compile_report(last: int | None = None) -> CompileReport:
    """What the ``"gna_flex"`` backend, or :func:`gna_flex.recognise_masks`, did with the graphs compiled so far.

    Calls with a mask of :func:`gna_flex.gna_mask` route themselves while torch traces them; they are listed where they
    took the CUDA kernel. Graphs without any FlexAttention call are not listed.

    Args:
        last: only that many graphs, the latest ones; by default all of this process (at most 256).

    Raises:
        ValueError: if ``last`` is negative.

    >>> print(compile_report(last=0))
    no FlexAttention call was compiled
    """
    if last is not None and last < 0:
        raise ValueError(f"last={last}: the number of graphs must not be negative")
    reports = list(_reports)
    reports = reports if last is None else reports[len(reports) - min(last, len(reports)) :]
    return CompileReport(tuple(graph for report in reports for graph in report.graphs), sum(r.seconds for r in reports))


def remember(calls: list[CompiledCall], seconds: float) -> None:
    """Keeps and logs what became of the calls of one graph."""
    if not calls:
        return
    report = CompileReport((tuple(calls),), seconds)
    _reports.append(report)
    log.info("%s", report.summary)
    for call in calls:
        log.debug("%s %s: %s, %s", call.name, call.where, call.route or "left alone", call.reason)
