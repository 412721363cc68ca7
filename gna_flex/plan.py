"""``MaskPlan``: everything that fixes a GNA mask but its device, and the lengths of text that masks may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks

from gna_flex.intervals import ceil_div
from gna_flex.mask_mod import MaskMod, counted_text, grid_places, mask_mod, to_natural
from gna_flex.neighborhood import GNA
from gna_flex.tiling import TileOrder, choose_tile

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class MaskPlan:
    """Everything that fixes a GNA mask but its device and, with ``valid_text``, the lengths of its text.

    ``gnas`` is one GNA, or one per head.
    """

    gnas: tuple[GNA, ...]
    q_order: TileOrder | None
    kv_order: TileOrder | None
    q_block: int
    kv_block: int
    batch: int | None = None
    heads: int | None = None
    and_mask: MaskMod | None = None
    valid_text: bool = False

    @property
    def seq_lengths(self) -> tuple[int, int]:
        """Query and key tokens, padding of tile orders included."""
        tokens = self.gnas[0].tokens
        return (
            self.q_order.tokens if self.q_order else tokens,
            self.kv_order.tokens if self.kv_order else tokens,
        )

    @property
    def lists(self) -> tuple[list[int], list[int], list[int], list[int], list[bool], int, int]:
        """Layout; windows, strides, dilations and causal flags of all GNAs in a row; text before and after."""
        gnas = self.gnas
        windows, strides, dilations = (
            [n for gna in gnas for n in getattr(gna, name)] for name in ("window", "stride", "dilation")
        )
        causal = [flag for gna in gnas for flag in gna.causal]
        return list(gnas[0].layout), windows, strides, dilations, causal, gnas[0].text_first, gnas[0].text_last

    @property
    def block_counts(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        q_len, kv_len = self.seq_lengths
        return ceil_div(q_len, self.q_block), ceil_div(kv_len, self.kv_block)

    @property
    def text_blocks(self) -> np.ndarray:
        """Which blocks of keys hold text, as booleans."""
        begin, end = grid_places(self.gnas[0], self.kv_order)
        start = np.arange(self.block_counts[1]) * self.kv_block
        return (start < begin) | (start + self.kv_block > end)

    def in_tiles(self) -> tuple[TileOrder, MaskPlan]:
        """The tile order predicted to be fastest, and the same mask in it."""
        order = TileOrder(self.gnas[0], choose_tile(self.gnas)[0])
        return order, replace(self, q_order=order, kv_order=order, q_block=order.block, kv_block=order.block)

    def mask_mod(self, valid_text: Tensor | None = None) -> MaskMod:
        """The mask_mod, in the token order of the plan; the condition of ``and_mask`` is met in natural indices.

        ``valid_text`` are the lengths of the text ``[B, 2]`` of a plan that has them.
        """
        conditions = [mask_mod(self.gnas, self.q_order, self.kv_order)]
        if self.and_mask is not None:
            conditions.append(self._in_order(self.and_mask))
        if valid_text is not None:
            conditions.append(counted_text(self.gnas[0], self.kv_order, valid_text))
        return conditions[0] if len(conditions) == 1 else and_masks(*conditions)

    def _in_order(self, extra: MaskMod) -> MaskMod:
        """A condition in natural indices as one in the token order of the plan."""
        if self.q_order is None or self.kv_order is None:
            return extra
        q_natural, kv_natural = to_natural(self.q_order), to_natural(self.kv_order)

        def extra_in_tile_order(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return extra(b, h, q_natural(q_idx), kv_natural(kv_idx))

        return extra_in_tile_order


def text_lengths(
    gna: GNA, first: Tensor | Sequence[int] | None, last: Tensor | Sequence[int] | None, device: torch.device
) -> Tensor:
    """Text tokens that count before and after the grid, ``[B, 2]``, int32; see ``GNABlockMask.with_valid_text``.

    >>> text_lengths(GNA((8, 8), 3, text_last=77), None, [77, 9], torch.device("cpu")).tolist()
    [[0, 77], [0, 9]]
    """
    given = [
        None if lengths is None else _checked(name, lengths, gna, count, device)
        for name, lengths, count in (("first", first, gna.text_first), ("last", last, gna.text_last))
    ]
    sizes = list(dict.fromkeys(len(lengths) for lengths in given if lengths is not None))
    if not sizes:
        raise ValueError(f"give first, last or both: lengths of the text tokens before and after the grid of {gna}")
    if len(sizes) > 1:
        raise ValueError(f"first and last have {sizes} lengths: each batch entry of {gna} needs one of both")
    (size,) = sizes
    wholes = [torch.full((size,), count, dtype=torch.int32, device=device) for count in (gna.text_first, gna.text_last)]
    return torch.stack([w if lengths is None else lengths for w, lengths in zip(wholes, given, strict=True)], 1)


def _checked(name: str, lengths: Tensor | Sequence[int], gna: GNA, count: int, device: torch.device) -> Tensor:
    """Lengths of one text as an int32 tensor ``[B]`` with values from 0 to ``count``."""
    if not count:
        raise ValueError(f"{name}={_short(lengths)}: {gna} has no text tokens there (text_{name}=0)")
    tensor = torch.as_tensor(lengths)
    if tensor.ndim != 1 or not len(tensor):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but the lengths of text of {gna} must be [B], one for each batch "
            "entry"
        )
    if tensor.dtype not in INTEGERS:
        raise ValueError(f"{name} is of {tensor.dtype}, but the lengths of text of {gna} must be integers")
    if tensor.device.type == "cpu":
        wrong = (tensor < 0) | (tensor > count)
        if wrong.any():
            entry = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name}[{entry}]={int(tensor[entry])}, but {gna} has {count} such text tokens: lengths must be from 0 "
                f"to {count}"
            )
    # Copies to a GPU do not wait for it; numbers out of range must not wrap around.
    return tensor.to(device, non_blocking=device.type != "cpu").long().clamp(0, count).int()


def _short(lengths: Tensor | Sequence[int]) -> str:
    return f"tensor of shape {tuple(lengths.shape)}" if isinstance(lengths, Tensor) else repr(lengths)
