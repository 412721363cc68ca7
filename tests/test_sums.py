"""How a fused backward keeps sums of the queries' gradients, without a GPU."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from helpers import random_gna
from hypothesis import given
from hypothesis import strategies as st
from ptx.backward import HostPass
from test_tables import random_tiles

from gna_flex import GNA
from gna_flex.cuda.backward import default_config
from gna_flex.cuda.shapes import choose
from gna_flex.cuda.sums import (
    COPY_ROWS,
    ITEMS_PER_COUNTER,
    MOST_ROWS,
    SHARE,
    SLICE_COUNTERS,
    WAVES,
    Meetings,
    Ring,
    Sums,
    rows_of_slices,
    slices_per_counter,
)
from gna_flex.cuda.tables import BOXES, GROUP, KEY_START, Transposed, count, padded_dims, work_records
from gna_flex.presets import preset

SIZES = st.integers(1, 5000)


@given(SIZES, st.integers(1, 8), SIZES, SIZES, st.integers(1, 300), st.integers(1, 200), SIZES)
def test_nobody_waits_for_ever(
    groups: int, heads: int, tokens: int, items: int, per_item: int, processors: int, behind: int
) -> None:
    """Sums of every group have a place, or CTAs that free it, beside which others compute."""
    slice_rows = rows_of_slices(groups * heads * tokens, processors)
    ring = Ring.of(groups, tokens, items, items * per_item, processors, slice_rows, behind)
    assert ring.groups == groups
    assert 1 <= ring.places <= groups
    assert ring.places == groups or ring.rounders > 0
    assert ring.rounders * SHARE <= processors
    assert not ring.rounders or groups * items >= WAVES * processors > ring.rounders
    assert ring.places == groups or ring.places * items >= behind
    assert ring.slice_rows % COPY_ROWS == 0
    assert 0 < ring.slice_rows <= MOST_ROWS


@pytest.mark.parametrize("numbers", [(4, 0, 1, 32), (4, 5, 1, 32), (4, 3, 0, 32)])
def test_rings_without_an_end_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="places"):
        Ring(*numbers)


def tokens_met(gna: GNA, record: np.ndarray, side: tuple[int, int, int]) -> list[int]:
    """All queries in the boxes of a work item, seen or not, by plain loops."""
    places = []
    for axis, dim in enumerate(padded_dims(gna)):
        start, boxes, group = (int(record[column][axis]) for column in (KEY_START, BOXES, GROUP))
        positions = (i * dim.dilation + group for i in range(start, start + boxes * side[axis]))
        places.append([x for x in positions if x < dim.length])
    _, height, width = (dim.length for dim in padded_dims(gna))
    return [(t * height + h) * width + w for t, h, w in product(*places)]


@pytest.mark.parametrize("seed", range(6))
def test_meetings_hold_every_slice_that_an_item_adds_to(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        gna, tiles, rows = Transposed.of(random_gna(rng, text=(0,))), random_tiles(rng), rng.choice([32, 64, 96])
        tiles = replace(tiles, kv_rest=None)  # which a backward never has
        meetings = Meetings.of(gna, tiles, rows)
        slices = -(-gna.tokens // rows)
        assert len(meetings.of_slice) == slices
        share = slices_per_counter(slices)
        assert share * SLICE_COUNTERS >= slices > (share - 1) * SLICE_COUNTERS
        for item, record in enumerate(work_records(gna, tiles)):
            counter = item // ITEMS_PER_COUNTER
            first, last = meetings.of_counter[counter]
            for met in {token // rows for token in tokens_met(gna, record, tiles.kv_tile)}:
                assert first <= met // share <= last
                assert meetings.of_slice[met, 0] <= counter <= meetings.of_slice[met, 1]


def test_items_in_the_order_of_the_sequence_need_fewer_places() -> None:
    """In 2-D, tiles side by side meet rows of the whole grid: sums are complete once all items of a head are."""
    places = {}
    for name in ("lm-32k-strided", "lm-32k", "flux-4k"):
        gna = Transposed.of(preset(name).gna)
        tiles = choose((gna,), 64, 2)
        items = len(work_records(gna, tiles))
        boxes = count(gna, tiles).boxes
        places[name] = -(-Meetings.of(gna, tiles, MOST_ROWS).behind(items, boxes, 132) // items)
    assert places == {"lm-32k-strided": 1, "lm-32k": 1, "flux-4k": 3}


def ring_of(gnas: tuple[GNA, ...], heads: int = 64) -> Ring:
    """Of a pass on a GPU with 132 processors."""
    transposed = tuple(Transposed.of(gna) for gna in gnas)
    fused = HostPass(transposed, default_config(128, True, True), choose(transposed, 64, 2), 128, False)
    fused.processors = 132
    x = torch.empty(1, heads, gnas[0].tokens, 128, dtype=torch.bfloat16, device="meta")
    return fused.ring(x, x)


def test_text_needs_places_for_all_groups() -> None:
    """Its items come first, of all groups: each would wait for rounding that waits for it."""
    ring = ring_of((GNA(32768, 2048, text_first=100),))
    assert ring.rounders
    assert ring.places == ring.groups == 64


def test_places_where_masks_differ() -> None:
    """Of different masks it is not known which items meet a slice: all of a head's do."""
    one, other = GNA(32768, 2048), GNA(32768, 1024)
    assert [ring_of(gnas).places for gnas in ((one,), (one, other) * 32)] == [1, 3]


def test_a_place_is_free_later_the_more_items_are_computed_at_a_time() -> None:
    gna = Transposed.of(GNA(32768, 2048))
    meetings = Meetings.of(gna, choose((gna,), 64, 2), MOST_ROWS)
    behind = [meetings.behind(256, 256 * 34, processors) for processors in (1, 64, 132)]
    assert behind == sorted(behind)
    assert behind[0] > 2048 // 128, "all items that add to a slice come first"
    assert meetings.behind(256, 256 * 8, 132) > behind[-1], "items that are fetched early need a place as early"
    at_the_end = Meetings.all(32768, MOST_ROWS, 256).behind(256, 256 * 34, 132)
    assert at_the_end > 2 * 256, "all at the end takes as long as a group"


def test_sums_are_zeros_for_the_places_only() -> None:
    """Four of six groups of two heads each; counters are another part of the same memory."""
    to = torch.empty(2, 6, 70, 120, dtype=torch.bfloat16)
    sums = Sums.zeros(Ring(6, 4, 1, 32), to, 128, items=20)
    assert sums.sums.shape == (1, 8, 70, 128)
    assert sums.sums.is_contiguous()
    assert sums.counters.dtype == torch.int32
    assert len(sums.counters) == 1 + 6 * (3 + SLICE_COUNTERS)
    sums.counters.fill_(-1)
    assert not sums.sums.any()
    params = sums.params(*map(torch.from_numpy, Meetings.all(70, 32, 20)))
    assert (params.places, params.groups, params.slices, params.slice_rows) == (4, 6, 3, 32)
    assert (params.item_counters, params.slice_counters) == (3, SLICE_COUNTERS)
    assert (params.items_per_counter, params.slices_per_counter) == (ITEMS_PER_COUNTER, 1)
    assert tuple(params.strides) == to.stride()[:3]
