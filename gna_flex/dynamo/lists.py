"""Operators for block lists in graphs: whether those of a mask are those of a GNA, and lists in tile order.

A graph cannot hold tensors of its own, so that both take the numbers of the GNAs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gna_flex.intervals import ceil_div
from gna_flex.kernels import lasting
from gna_flex.mask import GNABlockMask, gna_mask
from gna_flex.neighborhood import GNA
from gna_flex.torch_private import BLOCK_TABLES, not_compiling

Lists = tuple[Tensor | None, ...]
"""The eight tensors of a BlockMask, in the order of its constructor."""

_NUMBERS = "int[] layout, int[] window, int[] stride, int[] dilation, bool[] causal, int text_first, int text_last"
_library = torch.library.Library("gna_flex", "FRAGMENT")
_library.define(
    f"lists_agree(Tensor?[] lists, {_NUMBERS}, int q_block, int kv_block) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"tiled_lists(Tensor like, {_NUMBERS}, int[] tile) -> ({', '.join(['Tensor'] * len(BLOCK_TABLES))})",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def agree(lists: Lists, gnas: tuple[GNA, ...], q_block: int, kv_block: int) -> Tensor:
    """Whether block lists, with the mask_mod of these GNAs, keep exactly the pairs of these: a boolean on their device.

    Every block with a kept pair is listed once, blocks listed as full keep all pairs, and the lists of keys and those
    of queries, where there are any, say the same. Nothing waits for the device.
    """
    device = lists[0].device  # type: ignore[union-attr]
    rows, columns = (ceil_div(gnas[0].tokens, block) for block in (q_block, kv_block))
    if any(x is not None and x.shape[2] != size for x, size in zip(lists, [rows] * 4 + [columns] * 4, strict=True)):
        return torch.zeros((), dtype=torch.bool, device=device)
    sizes = (columns, columns, rows, rows)
    pairs: Any = zip(lists[::2], lists[1::2], sizes, strict=True)
    listed = [_dense(n, at, size) if n is not None and at is not None else None for n, at, size in pairs]
    needed, whole = _expected(gnas, q_block, kv_block, device)
    partial, full, by_key, full_by_key = (None if x is None else x[0] for x in listed)
    assert partial is not None
    full = torch.zeros_like(partial) if full is None else full
    conditions = [x[1] for x in listed if x is not None]
    conditions += [(partial | full | ~needed).all(), (whole | ~full).all(), ~(partial & full).any()]
    conditions += [(x.mT == y).all() for x, y in ((by_key, partial), (full_by_key, full)) if x is not None]
    return torch.stack(conditions).all()


def _dense(counts: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """A list of blocks as booleans ``[B, H, rows, columns]``, and whether it lists only blocks that exist, and once."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    used = used & (indices >= 0) & (indices < columns)
    dense = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=indices.device)
    dense = dense.scatter_(-1, torch.where(used, indices, columns).long(), True)[..., :columns]
    return dense, (dense.sum(-1) == counts).all()


@functools.lru_cache(maxsize=16)
def _expected(gnas: tuple[GNA, ...], q_block: int, kv_block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which blocks have a kept pair, and which keep all, as booleans ``[1, H, rows, columns]``."""

    def make() -> tuple[Tensor, Tensor]:
        mask: Any = gna_mask(gnas, q_block=q_block, kv_block=kv_block, device=device)
        columns = ceil_div(gnas[0].tokens, kv_block)
        partial, _ = _dense(mask.kv_num_blocks, mask.kv_indices, columns)
        full, _ = _dense(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
        return partial | full, full

    with not_compiling():
        return lasting(make)


@functools.lru_cache(maxsize=16)
def _tiled(gnas: tuple[GNA, ...], tile: tuple[int, ...], device: torch.device) -> GNABlockMask:
    with not_compiling():
        return lasting(lambda: gna_mask(gnas, order=tile, device=device))


def _gnas(numbers: Any) -> tuple[GNA, ...]:
    """One GNA, or one per head, from the numbers of an operator: layout, values of all heads in a row, text."""
    layout, *values, first, last = numbers
    n = len(layout)

    def of_head(at: int) -> GNA:
        window, stride, dilation, causal = (one[at : at + n] for one in values)
        return GNA(layout, window, stride, dilation, causal, text_first=first, text_last=last)

    return tuple(of_head(at) for at in range(0, len(values[0]), n))


def _lists_agree(lists: Any, *rest: Any) -> Tensor:
    *numbers, q_block, kv_block = rest
    return agree(tuple(lists), _gnas(numbers), q_block, kv_block)


def _tiled_lists(like: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *numbers, tile = rest
    mask = _tiled(_gnas(numbers), tuple(tile), like.device)
    return tuple(getattr(mask, name).clone() for name in BLOCK_TABLES)


def _tiled_lists_fake(like: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *numbers, tile = rest
    mask = _tiled(_gnas(numbers), tuple(tile), like.device)
    return tuple(like.new_empty(getattr(mask, name).shape) for name in BLOCK_TABLES)


_library.impl("lists_agree", _lists_agree, "CompositeExplicitAutograd")
_library.impl("tiled_lists", _tiled_lists, "CompositeExplicitAutograd")
torch.library.register_fake(
    "gna_flex::lists_agree", lambda lists, *rest: lists[0].new_empty((), dtype=torch.bool), lib=_library
)
torch.library.register_fake("gna_flex::tiled_lists", _tiled_lists_fake, lib=_library)
