"""Masks with lengths of text per batch entry, from the definition."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_within_budget, dense_attention, dense_mask, exact_attention, gna_id
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from gna_flex import GNA, GNABlockMask, flex_attention, gna_mask

BOTH = GNA((5, 7), (3, 4), (2, 1), text_first=9, text_last=6)
LAST = GNA((6, 6), 3, dilation=(2, 1), causal=(False, True), text_last=21)
FIRST = GNA(40, 7, 3, text_first=5)
GNAS = pytest.mark.parametrize("gna", [BOTH, LAST, FIRST], ids=gna_id)
FRONTS = pytest.mark.parametrize("front", [flex_attention, torch_flex_attention], ids=["ours", "torchs"])
LENGTHS = ((0, 1), (1, 0), (3, 3), (5, 2))
"""Lengths ``(first, last)`` of four batch entries; all texts of the masks above are at least as long."""


def keep_of(gna: GNA, lengths: Any = LENGTHS) -> np.ndarray:
    """Kept pairs ``[B, 1, S, S]``, from the definition: keys past the lengths are taken out."""
    keep = np.repeat(dense_mask(gna)[None], len(lengths), 0)
    for entry, (first, last) in enumerate(lengths):
        end = gna.tokens - gna.text_last
        keep[entry, :, first : gna.text_first] = False
        keep[entry, :, end + last :] = False
    return keep[:, None]


def given(gna: GNA, lengths: Any = LENGTHS) -> dict[str, Any]:
    """Arguments of ``with_valid_text`` for the texts that there are."""
    first, last = zip(*lengths, strict=True)
    return ({"first": list(first)} if gna.text_first else {}) | ({"last": list(last)} if gna.text_last else {})


def padded(gna: GNA, lengths: Any = LENGTHS, **options: Any) -> GNABlockMask:
    return gna_mask(gna, device="cpu", **options).with_valid_text(**given(gna, lengths))


def inputs(gna: GNA, batch: int = len(LENGTHS), heads: int = 2, **options: Any) -> list[Tensor]:
    return [torch.randn(batch, heads, gna.tokens, 16, **options) for _ in "qkv"]


def assert_attends(out: Tensor, qkv: list[Tensor], gna: GNA, lengths: Any = LENGTHS, keep: Any = None) -> None:
    keep = keep_of(gna, lengths) if keep is None else keep
    exact, plain = (f(*qkv, keep).out for f in (exact_attention, dense_attention))
    assert_within_budget("out", out, exact, plain)
