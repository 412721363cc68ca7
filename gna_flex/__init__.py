"""Generalized Neighborhood Attention for PyTorch's FlexAttention and torch.compile."""

import importlib
from typing import TYPE_CHECKING, Any

import torch

from gna_flex.attention import explain, flex_attention
from gna_flex.mask import GNABlockMask, gna_mask
from gna_flex.neighborhood import GNA
from gna_flex.reference import reference_attention
from gna_flex.routing import backend
from gna_flex.tiling import TileOrder, permute, unpermute

# MKL chooses its functions at their first call. If threads make that call at the same time, one of them may get some
# that are right to four digits, for this call only (pytorch/pytorch#188792; seen with torch 2.11 and 2.13). Hence the
# first call of those that the reference takes is made here, by one thread.
for _dtype in (torch.float32, torch.float64):
    torch.ones(1, dtype=_dtype, device="cpu").exp().log()

if TYPE_CHECKING:
    from gna_flex.cuda.tune import tune as tune
    from gna_flex.dynamo.backend import recognise_masks as recognise_masks
    from gna_flex.dynamo.report import compile_report as compile_report
else:
    _LATER = {
        "compile_report": "gna_flex.dynamo.report",
        "recognise_masks": "gna_flex.dynamo.backend",
        "tune": "gna_flex.cuda.tune",
    }

    def __getattr__(name: str) -> Any:
        """Names of modules that are imported at their first use, for everything else does without them."""
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_LATER[name]), name)


__version__ = "0.1.0"

__all__ = [
    "GNA",
    "GNABlockMask",
    "TileOrder",
    "__version__",
    "backend",
    "compile_report",
    "explain",
    "flex_attention",
    "gna_mask",
    "permute",
    "recognise_masks",
    "reference_attention",
    "tune",
    "unpermute",
]
