"""``mask_mod`` functions for FlexAttention: generated source that decodes indices and calls the rule.

The rule itself is not generated; it is :mod:`gna_flex.intervals`. Every number is a literal (:mod:`gna_flex.literal`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gna_flex import intervals
from gna_flex.literal import literal_function
from gna_flex.neighborhood import GNA
from gna_flex.tiling import TileOrder

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(batch, head, query index, key index) -> bool``, scalars as FlexAttention passes them."""


@functools.lru_cache(maxsize=1024)
def mask_mod(gnas: tuple[GNA, ...], q_order: TileOrder | None = None, kv_order: TileOrder | None = None) -> MaskMod:
    """FlexAttention ``mask_mod`` of one GNA, or of one GNA per head.

    Args:
        gnas: one GNA, or one per query head; all with the same layout and text.
        q_order: token order of the queries; ``None`` is natural row-major order.
        kv_order: token order of the keys; ``None`` is natural row-major order.
    """
    lines = ["def gna_mask_mod(b, h, q_idx, kv_idx):"]
    lines += _decode(gnas[0], q_order, "q", "q_idx") + _decode(gnas[0], kv_order, "k", "kv_idx")
    conditions = []
    for axis, dims in enumerate(zip(*(gna.dims() for gna in gnas), strict=True)):
        length = dims[0][0]
        window, stride, dilation, causal = (_per_head(values) for values in list(zip(*dims, strict=True))[1:])
        if q_order is None:
            sees, place = "attends", f"q{axis}, k{axis}, {length}, {window}, {stride}, {dilation}"
        else:
            size = length if dilation == "1" else f"group_length({length}, {dilation}, q_group{axis})"
            sees, place = "sees", f"q{axis}, k{axis}, {size}, {window}, {stride}"
            conditions += [f"(q_group{axis} == k_group{axis})"] if dilation != "1" else []
        if causal in ("True", "False"):
            conditions.append(f"{sees}({place}, {causal})")
        else:
            conditions.append(f"select({causal}, {sees}({place}, True), {sees}({place}, False))")
    near = " & ".join(conditions)
    if q_order is not None:
        near = f"q_grid & k_grid & {near}"
    if gnas[0].text_first or gnas[0].text_last:
        near = f"(q_text & k_valid) | (k_text & q_valid) | ({near})"
        if q_order is None:
            near = near.replace(" & k_valid", "").replace(" & q_valid", "")
    lines.append(f"    return {near}")
    return literal_function("gna_mask_mod", lines, _NAMES)


@functools.lru_cache(maxsize=1024)
def to_natural(order: TileOrder) -> Callable[[Tensor], Tensor]:
    """Function from a place in a tile order to the natural index of its token, for mods that use natural indices.

    A padding token gives some token of the sequence, so that a table indexed by it is read inside its bounds.
    """
    gna = order.gna
    lines = ["def to_natural(index):", *_decode(gna, order, "x", "index"), f"    token = {gna.text_first}"]
    strides = [math.prod(gna.layout[axis + 1 :]) for axis in range(gna.ndim)]
    for axis, (length, dilation, stride) in enumerate(zip(gna.layout, gna.dilation, strides, strict=True)):
        position = f"x{axis}" if dilation == 1 else f"x{axis} * {dilation} + x_group{axis}"
        lines.append(f"    token = token + minimum({position}, {length - 1}) * {stride}")
    first, last = (count * order.block for count in order.text_blocks)
    if first:
        lines.append(f"    token = select(index < {first}, minimum(index, {gna.text_first - 1}), token)")
    if last:
        shift = gna.text_first + gna.grid_tokens - (order.tokens - last)
        end = f"minimum(index + {shift}, {gna.tokens - 1})"
        lines.append(f"    token = select(index >= {order.tokens - last}, {end}, token)")
    return literal_function("to_natural", [*lines, "    return token"], _NAMES)


def _decode(gna: GNA, order: TileOrder | None, name: str, index: str) -> list[str]:
    """Lines that set the coordinates of a token, and whether it is text or grid where that matters."""
    has_text = gna.text_first or gna.text_last
    end = gna.text_first + gna.grid_tokens
    lines = []
    if order is None:
        if has_text:
            lines.append(f"    {name}_text = ({index} < {gna.text_first}) | ({index} >= {end})")
            lines.append(f"    {name} = {index} - {gna.text_first}")
        else:
            lines.append(f"    {name} = {index}")
        return lines + _digits(name, [(f"{name}{axis}", size) for axis, size in enumerate(gna.layout)])
    first, last = (count * order.block for count in order.text_blocks)
    end = order.tokens - last
    lines.append(f"    {name} = {index} - {first}")
    groups = [(f"{name}_group{axis}", size) for axis, size in enumerate(gna.dilation)]
    tiles = [(f"{name}_tile{axis}", size) for axis, size in enumerate(order.tiles)]
    places = [(f"{name}{axis}", size) for axis, size in enumerate(order.tile)]
    lines += _digits(name, groups + tiles + places)
    inside = [f"({index} >= {first})"] if first else []
    inside += [f"({index} < {end})"] if last else []
    for axis, (length, dilation) in enumerate(zip(gna.layout, gna.dilation, strict=True)):
        lines.append(f"    {name}{axis} = {name}_tile{axis} * {order.tile[axis]} + {name}{axis}")
        size = length if dilation == 1 else f"group_length({length}, {dilation}, {name}_group{axis})"
        inside.append(f"({name}{axis} < {size})")
    lines.append(f"    {name}_grid = {' & '.join(inside)}")
    if has_text:
        text_end = end + gna.text_last
        lines.append(f"    {name}_text = ({index} < {gna.text_first}) | (({index} >= {end}) & ({index} < {text_end}))")
        lines.append(f"    {name}_valid = {name}_text | {name}_grid")
    return lines


def _digits(name: str, digits: list[tuple[str, int]]) -> list[str]:
    """Lines that split ``name`` into mixed-radix digits, slowest first; a digit of size 1 is zero."""
    lines = []
    for place, (digit, size) in enumerate(digits):
        if size == 1 and any(other > 1 for _, other in digits):
            lines.append(f"    {digit} = 0")
            continue
        weight = math.prod(size for _, size in digits[place + 1 :])
        value = name if weight == 1 else f"{name} // {weight}"
        outermost = math.prod(size for _, size in digits[:place]) == 1
        lines.append(f"    {digit} = {value}" if outermost else f"    {digit} = {value} % {size}")
    return lines


def _per_head(values: tuple[Any, ...]) -> str:
    """A literal, or an expression that picks the literal of head ``h``."""
    if len(set(values)) == 1:
        return str(values[0])
    return f"per_head(h, {values})"


def per_head(h: Tensor, values: tuple[Any, ...]) -> Tensor:
    """``values[h]`` as a chain of comparisons with literals (heads are scalars in a kernel, so this costs nothing)."""
    picked = torch.full_like(h, values[-1], dtype=torch.bool if isinstance(values[0], bool) else h.dtype)
    for head, value in enumerate(values[:-1]):
        if value != values[-1]:
            picked = torch.where(h == head, value, picked)
    return picked


_NAMES = {"per_head": per_head} | {
    name: getattr(intervals, name) for name in ("attends", "sees", "group_length", "minimum", "select")
}
