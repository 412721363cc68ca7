"""Generalized Neighborhood Attention for PyTorch's FlexAttention and torch.compile."""

from typing import TYPE_CHECKING, Any

from gna_flex.attention import explain, flex_attention
from gna_flex.mask import GNABlockMask, gna_mask
from gna_flex.neighborhood import GNA
from gna_flex.reference import reference_attention
from gna_flex.routing import backend
from gna_flex.tiling import TileOrder, permute, unpermute

if TYPE_CHECKING:
    from gna_flex.cuda.tune import tune as tune
else:

    def __getattr__(name: str) -> Any:
        """``tune``, at its first use: everything else does without the CUDA kernel."""
        if name != "tune":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from gna_flex.cuda.tune import tune

        return tune


__version__ = "0.1.0"

__all__ = [
    "GNA",
    "GNABlockMask",
    "TileOrder",
    "__version__",
    "backend",
    "explain",
    "flex_attention",
    "gna_mask",
    "permute",
    "reference_attention",
    "tune",
    "unpermute",
]
