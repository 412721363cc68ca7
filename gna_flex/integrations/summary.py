"""What neighborhoods skip in a whole model, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from gna_flex.integrations.layers import Plan, Tokens, spans
from gna_flex.neighborhood import GNA, Ints, as_int, per_dim
from gna_flex.predict import predict
from gna_flex.words import percent, plain_text, times

if TYPE_CHECKING:
    from rich.console import RenderableType


class Row(NamedTuple):
    """Layers with the same neighborhood.

    Attributes:
        layers: their numbers.
        gna: what they attend to.
        sparsity: share of the pairs of queries and keys that is left out.
        speedup: attention's predicted speed-up over dense attention on the device.
    """

    layers: tuple[int, ...]
    gna: GNA
    sparsity: float
    speedup: float


@dataclass(frozen=True)
class ModelReport:
    """Rows of the layers with neighborhoods, dense layers, and the device that speed-ups are predicted for."""

    rows: tuple[Row, ...]
    dense: tuple[int, ...]
    device: str

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and names."""
        return {
            "rows": [row._asdict() | {"gna": vars(row.gna)} for row in self.rows],
            "dense": self.dense,
            "device": self.device,
        }

    def __rich__(self) -> RenderableType:
        from rich.table import Table

        layout, _, text = _parts(self.rows[0].gna)
        title = ", ".join([layout, *text])
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("layers")
        table.add_column("attend to")
        for name in ("pairs left out", f"predicted ({self.device})"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(spans(row.layers), ", ".join(_parts(row.gna)[1]), percent(row.sparsity), times(row.speedup))
        if self.dense:
            table.add_row(spans(self.dense), "everything", "0.0%", "1x", style="dim")
        return table

    def __str__(self) -> str:
        return plain_text(self)


def _parts(gna: GNA) -> tuple[str, list[str], list[str]]:
    """A GNA in words: its layout, its neighborhood, and its text."""
    layout, *rest = str(gna).split(", ")
    text = [part for part in rest if "text tokens" in part]
    return layout, rest[: len(rest) - len(text)], text


def summary(plan: Plan, layout: Ints | None, *, device: str, heads: int, head_dim: int) -> ModelReport:
    """The report of a plan, for a layout or that of the last forward.

    Raises:
        ValueError: if there is neither, or a neighborhood does not fit the layout.
    """
    tokens = plan.tokens
    if layout is not None:
        tokens = (tokens or Tokens(()))._replace(layout=per_dim("layout", layout, None, as_int))
    if tokens is None:
        raise ValueError("layout is not known before the first forward: give report(model, layout=...), in tokens")
    rows = []
    for group in range(len(plan.groups)):
        gna = plan.gna(group, tokens)
        speedup = predict(gna, device=device, heads=heads, head_dim=head_dim).speedup
        rows.append(Row(tuple(plan.members(group)), gna, 1 - gna.kept_pairs() / gna.tokens**2, speedup))
    dense = tuple(layer for layer, entry in enumerate(plan.layers) if entry is None)
    return ModelReport(tuple(rows), dense, device)
