"""Whether the block lists of a BlockMask say what its mask_mod says."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.nn.attention.flex_attention import BlockMask

from gna_flex.intervals import ceil_div
from gna_flex.mask import gna_mask
from gna_flex.neighborhood import GNA
from gna_flex.symbolic.exact import Array, Tables
from gna_flex.symbolic.recognise_layout import Geometry, demand
from gna_flex.symbolic.trace import Refused

MOST_BLOCKS = 1 << 26


def check_block_lists(mask: BlockMask, gnas: tuple[GNA, ...], tables: list[Tables], geometry: Geometry) -> None:
    """Refuse a BlockMask whose block lists keep other pairs than its mask_mod, which is these GNAs.

    Blocks listed as partial without need are fine, for their pairs are masked one by one.
    """
    q_block, kv_block = mask.BLOCK_SIZE
    shape = tuple(ceil_div(length, block) for length, block in zip(geometry.lengths, mask.BLOCK_SIZE, strict=True))
    if shape[0] * shape[1] > MOST_BLOCKS:
        raise Refused(f"block lists of {shape[0]} x {shape[1]} blocks are too many to compare")
    lists = {kind: _dense(mask, kind, shape) for kind in ("kv", "full_kv")}
    for kind, listed in lists.items():
        transposed = _dense(mask, kind.replace("kv", "q"), shape[::-1])
        if transposed is not None and (listed is None or (transposed.swapaxes(2, 3) != listed).any()):
            raise Refused(f"the block lists of queries per key block do not agree with {kind}_indices")
    partial, full = lists["kv"], lists["full_kv"]
    assert partial is not None
    full = np.zeros_like(partial) if full is None else full
    if (partial & full).any():
        raise Refused("a block is listed both as partial and as full")
    order: Any = "row-major"
    if geometry.orders is not None:
        if (q_block, kv_block) != tuple(tile.block for tile in geometry.orders):
            raise Refused(f"blocks of {q_block} x {kv_block} tokens are not the tiles of the token order")
        if any(gna.dilation != geometry.dilation for gna in gnas):
            raise Refused(f"the token order is one of dilation {geometry.dilation}, but the mask is {gnas[0]}")
        order = tuple(tile.tile for tile in geometry.orders)
    ours = gna_mask(gnas, order=order, q_block=q_block, kv_block=kv_block, device="cpu")
    needed, whole = _dense(ours, "kv", shape), _dense(ours, "full_kv", shape)
    assert needed is not None
    assert whole is not None
    heads = max(partial.shape[1], len(gnas))
    if {partial.shape[1], len(gnas)} - {1, heads}:
        raise Refused(f"the block lists are for {partial.shape[1]} heads, but the mask for {len(gnas)}")
    for head in range(heads):
        listed_head, own = head % partial.shape[1], head % len(gnas)
        _compare(partial[:, listed_head], full[:, listed_head], needed[0, own], whole[0, own])
        for row, column in np.argwhere((full[:, listed_head] & ~whole[0, own]).any(0)):
            queries, keys = (
                np.arange(place * block, min((place + 1) * block, length))
                for place, block, length in zip((row, column), mask.BLOCK_SIZE, geometry.lengths, strict=True)
            )
            what = f"block ({row}, {column}) is listed as full, but the mask_mod drops key"
            demand(tables[own], queries, keys, True, what)


def _compare(partial: Array, full: Array, needed: Array, whole: Array) -> None:
    """Every block that keeps a pair is listed; blocks listed as full have been made so, but for those at the ends."""
    missing = (needed | whole) & ~(partial | full)
    if missing.any():
        row, column = (int(x) for x in np.argwhere(missing)[0][1:])
        raise Refused(f"block ({row}, {column}) is not listed, but the mask_mod keeps pairs of it")
    wrong = full & ~(needed | whole)
    if wrong.any():
        row, column = (int(x) for x in np.argwhere(wrong)[0][1:])
        raise Refused(f"block ({row}, {column}) is listed as full, but the mask_mod drops all of it")


def _dense(mask: BlockMask, kind: str, shape: tuple[int, ...]) -> Array | None:
    """A block list as booleans ``[B, H, rows, columns]``."""
    counts, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
    if counts is None or indices is None:
        return None
    counts, indices = counts.cpu().numpy(), indices.cpu().numpy()
    if counts.shape[-1] != shape[0]:
        raise Refused(f"{kind}_num_blocks has {counts.shape[-1]} rows of blocks, but the tokens need {shape[0]}")
    used = np.arange(indices.shape[-1]) < counts[..., None]
    if (counts > indices.shape[-1]).any() or (used & ((indices < 0) | (indices >= shape[1]))).any():
        raise Refused(f"{kind}_indices lists blocks that do not exist")
    place = np.nonzero(used)
    times = np.zeros((*counts.shape, shape[1]), np.int32)
    np.add.at(times, (*place[:-1], indices[used]), 1)
    if (times > 1).any():
        raise Refused(f"{kind}_indices lists a block twice")
    return times > 0
