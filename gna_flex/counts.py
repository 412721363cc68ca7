"""Blocks of a whole mask, listed a few thousand rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gna_flex.blocks import BlockLists, Relation, RowMajorRelation, Runs, TiledRelation, block_lists
from gna_flex.intervals import key_interval
from gna_flex.neighborhood import GNA, Ints
from gna_flex.tiling import TileOrder

NATURAL_BLOCK = 128
"""Tokens per block in natural order, as torch's ``create_block_mask`` has them."""
NATURAL_LIMIT = 1 << 26
"""Most blocks that are listed to count those of natural order (about 4 s) unless the caller asks for more."""
ROWS_AT_ONCE = 2048
SAMPLE_ROWS = 16


def relation_of(gna: GNA, q_tile: Ints | None = None, kv_tile: Ints | None = None) -> Relation:
    """Which block of keys each block of queries sees, in natural order or, given tiles, in tile order."""
    if q_tile is None:
        return RowMajorRelation(gna, NATURAL_BLOCK, NATURAL_BLOCK, key_interval)
    kv_tile = q_tile if kv_tile is None else kv_tile
    return TiledRelation(TileOrder(gna, q_tile), TileOrder(gna, kv_tile), key_interval)  # type: ignore[arg-type]


class _SomeRows:
    """``rows`` rows of a relation from ``begin`` on."""

    def __init__(self, relation: Relation, begin: int, rows: int) -> None:
        self.relation, self.begin, self.rows = relation, begin, rows
        self.columns, self.block = relation.columns, relation.block

    def runs(self, rows: np.ndarray) -> tuple[Runs, Runs]:
        return self.relation.runs(rows + self.begin)


def lists_by_rows(relation: Relation) -> Iterator[tuple[int, BlockLists]]:
    """The block lists of a relation a few thousand rows at a time, each with its first row: memory stays small."""
    for begin in range(0, relation.rows, ROWS_AT_ONCE):
        yield begin, block_lists(_SomeRows(relation, begin, min(ROWS_AT_ONCE, relation.rows - begin)))


def listed_blocks(relation: Relation) -> int:
    """About how many blocks the lists of a relation hold, from a few rows in its middle."""
    rows = min(SAMPLE_ROWS, relation.rows)
    lists = block_lists(_SomeRows(relation, (relation.rows - rows) // 2, rows))
    return int(lists.full_counts.sum() + lists.partial_counts.sum()) * relation.rows // rows
