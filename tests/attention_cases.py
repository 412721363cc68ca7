"""Masks with inputs for attention of every kind: sizes, heads, head dims, how tensors lie in memory."""

from typing import Any, NamedTuple

import numpy as np
import torch
from helpers import dense_mask
from torch import Tensor

import gna_flex
from gna_flex import GNA, gna_mask

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Case(NamedTuple):
    """A mask, and inputs for it; ``storage`` says how the inputs lie in memory."""

    gna: GNA | tuple[GNA, ...]
    heads: int = 2
    kv_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    batch: int = 2
    storage: str = "contiguous"
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    @property
    def gnas(self) -> tuple[GNA, ...]:
        return (self.gna,) if isinstance(self.gna, GNA) else self.gna

    def mask(self, **options: Any) -> gna_flex.GNABlockMask:
        return gna_mask(self.gna, device="cpu", **(self.options | options))

    def keep(self) -> np.ndarray:
        """Kept pairs ``[heads that differ, S, S]``."""
        return np.stack([dense_mask(gna) for gna in self.gnas])

    def inputs(self, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
        sizes = [(self.heads, self.dim), (self.kv_heads, self.dim), (self.kv_heads, self.value_dim)]
        tensors = [self._tensor(heads, dim, dtype) for heads, dim in sizes]
        if self.storage == "packed":
            packed = torch.randn(self.batch, self.gnas[0].tokens, 3, self.heads, self.dim).to(dtype)
            tensors = [x.transpose(1, 2) for x in packed.unbind(2)]
        return [x.requires_grad_() for x in tensors] if grad else tensors

    def _tensor(self, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
        tokens = self.gnas[0].tokens
        if self.storage == "tokens-before-heads":
            return torch.randn(self.batch, tokens, heads, dim).to(dtype).transpose(1, 2)
        if self.storage == "cut":
            return torch.randn(self.batch, heads, tokens + 3, dim + 5).to(dtype)[:, :, 2:-1, 3:-2]
        if self.storage == "expanded":
            return torch.randn(1, heads, tokens, dim).to(dtype).expand(self.batch, -1, -1, -1)
        return torch.randn(self.batch, heads, tokens, dim).to(dtype)


SMALL = GNA((6, 9), (3, 4), (2, 1), text_last=5)
HEADS_DIFFER = GNA((6, 9), (3, 4)), GNA((6, 9), (6, 9)), GNA((6, 9), (5, 1), causal=True)
DILATIONS_DIFFER = GNA((6, 9), (3, 4)), GNA((6, 9), (3, 2), dilation=(2, 3))
CASES = {
    "1d": Case(GNA(37, 5)),
    "1d-causal": Case(GNA(44, 7, 3, causal=True)),
    "2d-odd": Case(GNA((5, 7), (3, 2))),
    "2d-even-window": Case(GNA((6, 10), (4, 2), (1, 2))),
    "3d": Case(GNA((3, 4, 5), (2, 3, 2), (1, 3, 2), causal=(True, False, False))),
    "tail-tiles": Case(GNA((17, 19), (5, 6), (4, 3))),
    "dilation": Case(GNA((7, 11), (2, 3), dilation=(3, 2))),
    "dilation-causal-text": Case(GNA((5, 8), (2, 2), (2, 1), dilation=(2, 3), causal=True, text_first=3, text_last=2)),
    "one-token": Case(GNA((1, 1, 1), 1)),
    "tiny-grid-text": Case(GNA((2, 1), 1, text_first=1, text_last=1)),
    "text-first": Case(GNA((6, 9), (3, 4), text_first=7)),
    "text-last": Case(SMALL),
    "dense": Case(GNA.dense((4, 6))),
    "blocked": Case(GNA.blocked((8, 10), 4)),
    "grouped-heads": Case(SMALL, heads=6, kv_heads=2),
    "one-kv-head": Case(SMALL, heads=4, kv_heads=1, value_dim=24),
    "tokens-before-heads": Case(SMALL, storage="tokens-before-heads"),
    "packed": Case(SMALL, storage="packed"),
    "cut": Case(SMALL, storage="cut"),
    "expanded": Case(SMALL, storage="expanded"),
    "head-dim-8": Case(SMALL, dim=8, value_dim=8),
    "head-dim-24": Case(SMALL, dim=24, value_dim=24),
    "head-dim-40": Case(SMALL, dim=40, value_dim=40),
    "value-dim": Case(SMALL, dim=16, value_dim=40),
    "two-blocks": Case(GNA((12, 14), (5, 3)), options={"q_block": 64, "kv_block": 32}),
    "heads-differ": Case(HEADS_DIFFER, heads=3, kv_heads=3),
    "dilations-differ": Case(DILATIONS_DIFFER, batch=1),
    # Several at once, for routes that are compiled.
    "1d-causal-grouped-heads-value-dim": Case(GNA(44, 7, 3, causal=True), heads=6, kv_heads=2, value_dim=40),
    "3d-packed-text-first": Case(
        GNA((3, 4, 5), (2, 3, 2), (1, 3, 2), causal=(True, False, False), text_first=7), storage="packed"
    ),
    "tail-tiles-tokens-before-heads": Case(
        GNA((17, 19), (5, 6), (4, 3), text_last=5), dim=32, value_dim=32, storage="tokens-before-heads"
    ),
    "heads-differ-head-dim-8": Case(HEADS_DIFFER, heads=3, kv_heads=3, dim=8, value_dim=8),
    "dilations-differ-head-dim-40": Case(DILATIONS_DIFFER, batch=1, dim=40, value_dim=40),
}
