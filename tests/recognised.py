"""Masks written in many styles, and what recognising them gives."""

import numpy as np
import torch
from helpers import Sizes, dense_mask

from gna_flex import GNA
from gna_flex.symbolic.recognise import recognise
from gna_flex.symbolic.trace import ElementIndexing

SMALL = Sizes(one=30, two=8, three=4)


def dense(mod, q_len, kv_len=None, head=0):
    """A mask_mod on all pairs, called by torch's vmap as FlexAttention does."""
    b, h = torch.tensor(0), torch.tensor(head)
    call = torch.vmap(torch.vmap(mod, in_dims=(None, None, None, 0)), in_dims=(None, None, 0, None))
    with ElementIndexing():
        keep = call(b, h, torch.arange(q_len), torch.arange(kv_len or q_len))
    return torch.broadcast_to(keep, (q_len, kv_len or q_len)).numpy()


def found(mod, **options):
    """The recognised GNA of a mask_mod; its dense mask is the mask that torch evaluates."""
    result = recognise(mod, **options)
    assert result, result.reason
    assert isinstance(result.gna, GNA)
    if result.gna.tokens <= 3000:
        assert (dense(mod, result.gna.tokens) == dense_mask(result.gna)).all()
    return result.gna


def refused(mod, **options):
    """The reason why a mask is not recognised."""
    result = recognise(mod, **options)
    assert not result, f"recognised as {result}"
    assert result.gna is None
    assert str(result) == f"not recognised: {result.reason}"
    return result.reason


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def clamped_center(gna):
    """Distance to a center that is kept away from the edges."""
    (height, width), (rows, columns) = gna.layout, gna.window

    def mod(b, h, q_idx, kv_idx):
        center_y = (q_idx // width).clamp(rows // 2, height - 1 - rows // 2)
        center_x = (q_idx % width).clamp(columns // 2, width - 1 - columns // 2)
        near_y = (kv_idx // width - center_y).abs() <= rows // 2
        return near_y & ((kv_idx % width - center_x).abs() <= columns // 2)

    return mod


def chebyshev(gna):
    """The larger of two distances."""
    (height, width), (rows, columns) = gna.layout, gna.window
    assert rows == columns

    def mod(b, h, q_idx, kv_idx):
        y = torch.clamp(torch.div(q_idx, width, rounding_mode="floor"), rows // 2, height - 1 - rows // 2)
        x = torch.clamp(torch.remainder(q_idx, width), rows // 2, width - 1 - rows // 2)
        return torch.maximum((kv_idx // width - y).abs(), (x - kv_idx % width).abs()) <= rows // 2

    return mod


def window_start(gna):
    """``start <= key < start + window`` in every dimension, with a loop over them."""

    def mod(b, h, q_idx, kv_idx):
        keep = q_idx >= 0
        for length, window in zip(gna.layout[::-1], gna.window[::-1], strict=True):
            q, k = q_idx % length, kv_idx % length
            q_idx, kv_idx = q_idx // length, kv_idx // length
            start = torch.minimum(torch.maximum(q - window // 2, torch.zeros_like(q)), length - torch.tensor(window))
            keep = keep & (k >= start) & (k < start + window)
        return keep

    return mod


def where_edges(gna):
    """Three cases per dimension: first edge, last edge, between."""

    def near(q, k, length, window):
        half = window // 2
        inside = (k >= q - half) & (k < q - half + window)
        last = torch.where(q - half + window > length, k >= length - window, inside)
        return torch.where(q < half, k < window, last)

    def mod(b, h, q_idx, kv_idx):
        keep = True
        for axis, (length, window) in enumerate(zip(gna.layout, gna.window, strict=True)):
            weight = int(np.prod(gna.layout[axis + 1 :]))
            keep = near(q_idx // weight % length, kv_idx // weight % length, length, window) & keep
        return keep

    return mod


def lookup_bounds(gna):
    """Tables of the first and last key per coordinate."""
    tables = []
    for length, window in zip(gna.layout, gna.window, strict=True):
        low = (torch.arange(length) - window // 2).clamp(0, length - window)
        tables.append((low, low + window))

    def mod(b, h, q_idx, kv_idx):
        keep = torch.ones_like(q_idx, dtype=torch.bool)
        for (low, high), length in list(zip(tables, gna.layout, strict=True))[::-1]:
            q, k = torch.fmod(q_idx, length), torch.fmod(kv_idx, length)
            q_idx, kv_idx = q_idx // length, kv_idx // length
            keep = torch.logical_and(keep, (low[q] <= k) & (k < high[q]))
        return keep

    return mod


def lookup_of_tokens(gna):
    """Tables of the coordinates of every token, and of the allowed pairs of coordinates."""
    places = [torch.from_numpy(x) for x in np.unravel_index(np.arange(gna.tokens), gna.layout)]
    allowed = [torch.from_numpy(dense_mask(GNA(n, w))) for n, w in zip(gna.layout, gna.window, strict=True)]

    def mod(b, h, q_idx, kv_idx):
        keep = True
        for place, table in zip(places, allowed, strict=True):
            keep = table[place[q_idx], place[kv_idx]] & keep
        return keep

    return mod


def without_and(gna):
    """Logic by negation: not (too early or too late)."""

    def mod(b, h, q_idx, kv_idx):
        outside = q_idx < 0
        for axis, (length, window) in enumerate(zip(gna.layout, gna.window, strict=True)):
            weight = int(np.prod(gna.layout[axis + 1 :]))
            q, k = q_idx // weight % length, kv_idx // weight % length
            start = (q - window // 2).clamp(min=0).clamp(max=length - window)
            outside = outside | (k < start) | torch.logical_not(k - start < window)
        return ~outside

    return mod


def bits(gna):
    """Shifts and masks, for sides that are powers of two."""
    (height, width), (rows, columns) = gna.layout, gna.window
    shift = width.bit_length() - 1

    def mod(b, h, q_idx, kv_idx):
        y0 = ((q_idx >> shift) - rows // 2).clamp(0, height - rows)
        x0 = ((q_idx & (width - 1)) - columns // 2).clamp(0, width - columns)
        dy, dx = (kv_idx >> shift) - y0, (kv_idx & (width - 1)) - x0
        return (dy >= 0) & (dy < rows) & (dx >= 0) & (dx < columns)

    return mod
