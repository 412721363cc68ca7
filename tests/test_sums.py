"""How a fused backward keeps sums of the queries' gradients, without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gna_flex.cuda.sums import COPY_ROWS, MOST_ROWS, SHARE, WAVES, Ring, Sums

SIZES = st.integers(1, 5000)


@given(SIZES, st.integers(1, 8), SIZES, SIZES, st.integers(1, 300), st.integers(1, 200), st.booleans())
def test_nobody_waits_for_ever(
    groups: int, heads: int, tokens: int, items: int, per_item: int, processors: int, whole: bool
) -> None:
    """Sums of every group have a place, or CTAs that free it, beside which others compute."""
    ring = Ring.of(groups, heads, tokens, items, items * per_item, processors, whole)
    assert ring.groups == groups
    assert 1 <= ring.places <= groups
    assert ring.places == groups or ring.rounders > 0
    assert ring.rounders * SHARE <= processors
    assert not ring.rounders or groups * items >= WAVES * processors > ring.rounders
    assert not whole or ring.places == groups
    assert ring.slice_rows % COPY_ROWS == 0
    assert 0 < ring.slice_rows <= MOST_ROWS


@pytest.mark.parametrize("numbers", [(4, 0, 1, 32), (4, 5, 1, 32), (4, 3, 0, 32)])
def test_rings_without_an_end_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="places"):
        Ring(*numbers)


def test_sums_are_zeros_for_the_places_only() -> None:
    """Four of six groups of two heads each; counters are another part of the same memory."""
    to = torch.empty(2, 6, 70, 120, dtype=torch.bfloat16)
    sums = Sums.zeros(Ring(6, 4, 1, 32), to, 128)
    assert sums.sums.shape == (1, 8, 70, 128)
    assert sums.sums.is_contiguous()
    assert sums.counters.dtype == torch.int32
    assert len(sums.counters) == 1 + 2 * 6
    sums.counters.fill_(-1)
    assert not sums.sums.any()
    params = sums.params
    assert (params.places, params.groups, params.slices, params.slice_rows) == (4, 6, 3, 32)
    assert tuple(params.strides) == to.stride()[:3]
