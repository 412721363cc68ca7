"""Closed-form block lists against lists counted from the dense mask."""

import itertools
import math
import random

import numpy as np
import pytest
from helpers import dense_blocks, dense_mask, gna_id, listed_blocks, random_gna, random_tile, tile_places, tiled_mask
from hypothesis import given
from hypothesis import strategies as st

from gna_flex import GNA, TileOrder, blocks
from gna_flex.blocks import RowMajorRelation, TiledRelation, block_lists, range_boxes
from gna_flex.intervals import key_interval, query_interval

SIZES = [1, 2, 3, 4, 5, 7, 8, 16, 32]


def assert_lists(relation, partial: np.ndarray, full: np.ndarray, what: object) -> None:
    for width in (None, relation.columns + 2):
        lists = block_lists(relation, width)
        assert all(array.dtype == np.int32 for array in lists)
        longest = max(1, lists.partial_counts.max(), lists.full_counts.max())
        for counts, indices, expected in ((*lists[:2], partial), (*lists[2:], full)):
            assert (listed_blocks(counts, indices, relation.columns) == expected).all(), what
            assert not indices[np.arange(indices.shape[1]) >= counts[:, None]].any(), f"unused entries are 0: {what}"
            assert indices.shape == (relation.rows, indices.shape[1] if width is None else width)
            assert indices.shape[1] <= longest or width is not None


def check_row_major(gna: GNA, q_block: int, kv_block: int) -> None:
    partial, full = dense_blocks(dense_mask(gna), q_block, kv_block)
    what = (gna, q_block, kv_block)
    assert_lists(RowMajorRelation(gna, q_block, kv_block, key_interval), partial, full, what)
    assert_lists(RowMajorRelation(gna, kv_block, q_block, query_interval), partial.T, full.T, what)


def check_tiled(gna: GNA, q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> None:
    keep = tiled_mask(dense_mask(gna), tile_places(gna, q_tile), tile_places(gna, kv_tile))
    partial, full = dense_blocks(keep, math.prod(q_tile), math.prod(kv_tile))
    what = (gna, q_tile, kv_tile)
    q, kv = TileOrder(gna, q_tile), TileOrder(gna, kv_tile)
    assert_lists(TiledRelation(q, kv, key_interval), partial, full, what)
    assert_lists(TiledRelation(kv, q, query_interval), partial.T, full.T, what)


@pytest.mark.parametrize("number", range(20))
def test_row_major_lists_of_random_cases(number):
    rng = random.Random(number)
    for _ in range(100):
        check_row_major(random_gna(rng), rng.choice(SIZES), rng.choice(SIZES))


@pytest.mark.parametrize("number", range(20))
def test_tiled_lists_of_random_cases(number):
    rng = random.Random(number)
    for _ in range(100):
        gna = random_gna(rng)
        q_tile = random_tile(rng, gna.ndim)
        check_tiled(gna, q_tile, q_tile if rng.random() < 0.4 else random_tile(rng, gna.ndim))


EDGES = [
    GNA(1, 1),
    GNA((1, 1, 1), 1),
    GNA(1, 1, text_first=1, text_last=1),
    GNA((1, 30), (1, 7)),
    GNA((30, 1), (7, 1), dilation=(3, 1)),
    GNA((2, 2), 1, dilation=2),
    GNA((7, 7), (3, 2), dilation=(2, 3), causal=True, text_first=4, text_last=3),
    GNA.dense((5, 6), text_last=2),
    GNA.blocked((8, 8), 4),
    GNA(33, 33, stride=33, causal=True),
    GNA((3, 5, 4), (1, 5, 2), text_first=64),
    GNA((6, 10), (3, 5), dilation=2, stride=(3, 1), text_first=5),
]


@pytest.mark.parametrize("gna", EDGES, ids=gna_id)
def test_edges_in_row_major_order(gna):
    for q_block, kv_block in itertools.product([1, 3, 4, 16, 200], repeat=2):
        check_row_major(gna, q_block, kv_block)


@pytest.mark.parametrize("gna", EDGES, ids=gna_id)
def test_edges_in_tile_order(gna):
    tiles = [(1,) * gna.ndim, (2,) * gna.ndim, (3, 2, 1)[: gna.ndim], (1, 16, 2)[: gna.ndim]]
    for q_tile, kv_tile in itertools.product(tiles, repeat=2):
        check_tiled(gna, q_tile, kv_tile)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7])
def test_rounds_of_rows_fit_together(monkeypatch, rows_at_once):
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", rows_at_once)
    rng = random.Random(rows_at_once)
    for _ in range(15):
        gna = random_gna(rng)
        check_row_major(gna, rng.choice(SIZES), rng.choice(SIZES))
        check_tiled(gna, random_tile(rng, gna.ndim), random_tile(rng, gna.ndim))


def test_text_blocks_are_full_where_whole():
    """Blocks of 4: text, grid of 12 tokens, text; only the last block is cut."""
    lists = block_lists(RowMajorRelation(GNA(12, 4, stride=4, text_first=4, text_last=6), 4, 4, key_interval))
    assert lists.full_counts.tolist() == [5, 3, 3, 3, 5, 0]
    assert lists.partial_counts.tolist() == [1, 1, 1, 1, 1, 6]
    assert lists.full_indices[1, :3].tolist() == [0, 1, 4]


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    layout = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    first = draw(st.integers(0, math.prod(layout) - 1))
    return layout, first, draw(st.integers(first, math.prod(layout) - 1))


@given(ranges())
def test_range_boxes_are_a_partition(case):
    layout, first, last = case
    low, high, active = range_boxes(np.array([first]), np.array([last]), layout)
    tokens = []
    for box in np.flatnonzero(active[0]):
        sides = [range(a, b + 1) for a, b in zip(low[0, box], high[0, box], strict=True)]
        tokens += [int(np.ravel_multi_index(point, layout)) for point in itertools.product(*sides)]
    assert sorted(tokens) == list(range(first, last + 1))


def test_many_rows_at_a_realistic_size():
    """Rows of a large grid, each checked against the windows of its tokens."""
    gna = GNA((12, 40, 44), (5, 7, 9), (1, 2, 3))
    relation = RowMajorRelation(gna, 128, 128, key_interval)
    lists = block_lists(relation)
    assert relation.rows == relation.columns == -(-gna.tokens // 128)
    for row in random.Random(0).sample(range(relation.rows), 20):
        seen, common = set(), set(range(gna.tokens))
        tokens = range(row * 128, min((row + 1) * 128, gna.tokens))
        for token in tokens:
            point = np.unravel_index(token, gna.layout)
            dims = zip(point, gna.layout, gna.window, gna.stride, strict=True)
            sides = [range(*key_interval(int(x), n, w, s, False)) for x, n, w, s in dims]
            keys = {(t * 40 + y) * 44 + x for t, y, x in itertools.product(*sides)}
            seen |= keys
            common &= keys
        visited = {key // 128 for key in seen}
        full = {b for b in visited if len(tokens) == 128 and set(range(b * 128, b * 128 + 128)) <= common}
        assert set(lists.full_indices[row, : lists.full_counts[row]].tolist()) == full
        assert set(lists.partial_indices[row, : lists.partial_counts[row]].tolist()) == visited - full
