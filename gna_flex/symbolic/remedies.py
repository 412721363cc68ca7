"""The nearest changes that make a neighborhood perfectly block-sparse, each proved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gna_flex.neighborhood import GNA
from gna_flex.symbolic.lemmas import Tiling, perfect
from gna_flex.symbolic.proof import Proof
from gna_flex.symbolic.prove import prove
from gna_flex.words import by_x

KINDS: tuple[tuple[str, ...], ...] = (
    ("stride",),
    ("window",),
    ("kv_tile",),
    ("q_tile",),
    ("layout",),
    ("stride", "kv_tile"),
    ("window", "stride"),
    ("q_tile", "kv_tile"),
)
"""What may change; two arguments together are tried where neither does alone."""
REACH = 4096
"""How far from its value an argument is changed."""
PAIR_REACH = 256
"""How far two arguments are changed together."""


@dataclass(frozen=True)
class Remedy:
    """A change of one argument, or of two, and the proof that it is enough.

    Attributes:
        change: new values per dimension, by argument: "stride", "window", "kv_tile", "q_tile" or "layout" (padding).
        before: the values that they replace.
        proof: that the changed neighborhood is perfectly block-sparse in the changed tiles.
    """

    change: dict[str, tuple[int, ...]]
    before: dict[str, tuple[int, ...]]
    proof: Proof

    def __str__(self) -> str:
        names = {"q_tile": "query tile", "kv_tile": "key tile"}
        parts = [
            f"{names.get(name, name)} {by_x(value)} instead of {by_x(self.before[name])}"
            for name, value in self.change.items()
        ]
        return " and ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The change as JSON takes it."""
        return {name: list(value) for name, value in self.change.items()}


def nearest_remedies(gna: GNA, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], tiling: Tiling) -> tuple[Remedy, ...]:
    """The nearest remedy of each kind: in every dimension that fails, the least change that helps.

    >>> [str(r) for r in nearest_remedies(GNA((64, 64), 16, (8, 1)), (8, 8), (8, 8), "static")][:2]
    ['stride 16x16 instead of 8x1', 'window 24x64 instead of 16x16']
    """
    remedies: list[Remedy] = []
    dims = [
        dict(
            zip(("layout", "window", "stride", "dilation", "causal", "q_tile", "kv_tile"), (*dim, tq, tk), strict=True)
        )
        for dim, tq, tk in zip(gna.dims(), q_tile, kv_tile, strict=True)
    ]
    failing = [not _perfect(dim, tiling) for dim in dims]
    for names in KINDS:
        if len(names) > 1 and any(set(r.change) <= set(names) for r in remedies):
            continue
        changes = [_nearest(dim, names, tiling) if fails else {} for dim, fails in zip(dims, failing, strict=True)]
        if all(change is not None for change in changes):
            new = [dim | (change or {}) for dim, change in zip(dims, changes, strict=True)]
            remedies.append(_remedy(gna, dims, new, names, tiling))
    return tuple(remedies)


def _remedy(
    gna: GNA, old: list[dict[str, Any]], new: list[dict[str, Any]], names: tuple[str, ...], tiling: Tiling
) -> Remedy:
    def column(rows: list[dict[str, Any]], name: str) -> tuple[int, ...]:
        return tuple(row[name] for row in rows)

    parts = [column(new, name) for name in ("layout", "window", "stride", "dilation", "causal")]
    changed = GNA(*parts, text_first=gna.text_first, text_last=gna.text_last)  # type: ignore[arg-type, misc]
    proof = prove(changed, column(new, "q_tile"), column(new, "kv_tile"), tiling)
    assert isinstance(proof, Proof)
    return Remedy({n: column(new, n) for n in names}, {n: column(old, n) for n in names}, proof)


def _nearest(dim: dict[str, Any], names: tuple[str, ...], tiling: Tiling) -> dict[str, int] | None:
    """The least change of the named numbers of one dimension, larger values where two are as near."""
    reach = REACH if len(names) == 1 else PAIR_REACH
    axes = [_candidates(dim, name, reach, alone=len(names) == 1) for name in names]
    grids = dict(zip(names, np.meshgrid(*axes, indexing="ij"), strict=True))
    values = dim | grids
    legal = (values["stride"] <= values["window"]) & (values["window"] * values["dilation"] <= values["layout"])
    good = np.broadcast_to(_perfect(values, tiling) & legal, grids[names[0]].shape)
    if not good.any():
        return None
    distance = sum(abs(grids[name] - dim[name]) for name in names)
    # A tie goes to the larger value: a larger stride or tile is the faster one.
    rank = np.where(good, 2 * distance - (grids[names[-1]] > dim[names[-1]]), np.iinfo(np.int64).max)
    best = np.unravel_index(int(np.argmin(rank)), rank.shape)
    return {name: int(grids[name][best]) for name in names}


def _candidates(dim: dict[str, Any], name: str, reach: int, alone: bool) -> np.ndarray:
    """Values near the present one that may be legal, the others staying as they are if ``alone``."""
    now, group = dim[name], dim["layout"] // dim["dilation"]
    lowest, highest = {
        "stride": (1, dim["window"] if alone else group),
        "window": (dim["stride"] if alone else 1, group),
        "q_tile": (1, now + reach),
        "kv_tile": (1, now + reach),
        "layout": (now, now + reach),
    }[name]
    return np.arange(max(lowest, now - reach), min(highest, now + reach) + 1)


def _perfect(values: dict[str, Any], tiling: Tiling) -> Any:
    names = {"length": "layout"} | {n: n for n in ("window", "stride", "dilation", "causal", "q_tile", "kv_tile")}
    return perfect(tiling=tiling, **{argument: values[name] for argument, name in names.items()})
