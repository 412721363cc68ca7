"""Generalized Neighborhood Attention for PyTorch's FlexAttention and torch.compile."""

from gna_flex.attention import explain, flex_attention
from gna_flex.mask import GNABlockMask, gna_mask
from gna_flex.neighborhood import GNA
from gna_flex.reference import reference_attention
from gna_flex.routing import backend
from gna_flex.tiling import TileOrder, permute, unpermute

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
    "unpermute",
]
