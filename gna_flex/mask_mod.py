"""``mask_mod`` functions for FlexAttention: generated source that decodes indices and calls the rule.

The rule itself is not generated; it is :mod:`gna_flex.intervals`. Every number is a literal (:mod:`gna_flex.literal`).

Coordinates go through :func:`opaque`. NVIDIA's assembler (CUDA 12.8 to 13.0, sm_90) drops the constant of packed 16-bit
additions, which LLVM makes of integer arithmetic on values that it can prove to be small, such as remainders (Triton
issue 11581). Without it, 1 of 204 random masks had wrong gradients on an H200, and a generated permutation kernel went
wrong in another case; with the assembler's optimisations off (``DISABLE_PTXAS_OPT=1``) both were right.
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
    conditions = [] if q_order is None else ["q_grid", "k_grid"]
    for axis in range(gnas[0].ndim):
        conditions += _axis_conditions(gnas, axis, tiled=q_order is not None)
    near = " & ".join(conditions) or "(q_idx >= 0) & (kv_idx >= 0)"
    if gnas[0].text_first or gnas[0].text_last:
        with_text = "q_text | k_text" if q_order is None else "(q_text & k_valid) | (k_text & q_valid)"
        near = f"{with_text} | ({near})"
    return literal_function("gna_mask_mod", [*lines, f"    return {near}"], _NAMES)


def _axis_conditions(gnas: tuple[GNA, ...], axis: int, tiled: bool) -> list[str]:
    """What a pair has to meet in one dimension; nothing where every query sees the whole dimension."""
    dims = [list(gna.dims())[axis] for gna in gnas]
    length = dims[0][0]
    window, stride, dilation, causal = (_per_head(values) for values in list(zip(*dims, strict=True))[1:])
    conditions = []
    if not tiled:
        sees, place = "attends", f"q{axis}, k{axis}, {length}, {window}, {stride}, {dilation}"
    else:
        size = length if dilation == "1" else f"group_length({length}, {dilation}, q_group{axis})"
        sees, place = "sees", f"q{axis}, k{axis}, {size}, {window}, {stride}"
        conditions += [f"(q_group{axis} == k_group{axis})"] if dilation != "1" else []
    if length == 1 or all(dim[1] == length and not dim[4] for dim in dims):
        return conditions
    if causal in ("True", "False"):
        return [*conditions, f"{sees}({place}, {causal})"]
    return [*conditions, f"select({causal}, {sees}({place}, True), {sees}({place}, False))"]


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
    begin, end = grid_places(gna, order)
    if gna.text_first:
        lines.append(f"    token = select(index < {begin}, minimum(index, {gna.text_first - 1}), token)")
    if gna.text_last:
        last = f"minimum(index + {gna.text_first + gna.grid_tokens - end}, {gna.tokens - 1})"
        lines.append(f"    token = select(index >= {end}, {last}, token)")
    return literal_function("to_natural", [*lines, "    return token"], _NAMES)


def grid_places(gna: GNA, order: TileOrder | None) -> tuple[int, int]:
    """Where the grid begins and ends between the text tokens, padding of a tile order included."""
    if order is None:
        return gna.text_first, gna.text_first + gna.grid_tokens
    first, last = (count * order.block for count in order.text_blocks)
    return first, order.tokens - last


def counted_text(gna: GNA, order: TileOrder | None, valid_text: Tensor) -> MaskMod:
    """``mask_mod`` that holds for the keys that count: all of the grid, and of the text as many as ``valid_text`` says.

    Args:
        gna: one GNA with text.
        order: token order of the keys; ``None`` is natural row-major order.
        valid_text: tokens that count in the text before and after the grid, ``[B, 2]``, integers. Numbers outside of
            the text mean none or all of it.
    """
    counts = _text_counts(gna, order)

    def counted(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return counts(valid_text, b, kv_idx)

    return counted


@functools.lru_cache(maxsize=1024)
def _text_counts(gna: GNA, order: TileOrder | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Function of lengths, batch entry and place of a key."""
    begin, end = grid_places(gna, order)
    conditions = [f"((index >= {begin}) | (index < valid[b, zeros_like(b)]))"] if gna.text_first else []
    conditions += [f"((index < {end}) | (index < {end} + valid[b, ones_like(b)]))"] if gna.text_last else []
    lines = ["def text_counts(valid, b, index):", f"    return {' & '.join(conditions) or 'index >= 0'}"]
    # A number among the indices would be a constant tensor, which traced backwards cannot have.
    return literal_function("text_counts", lines, {"zeros_like": torch.zeros_like, "ones_like": torch.ones_like})


def _decode(gna: GNA, order: TileOrder | None, name: str, index: str) -> list[str]:
    """Lines that set the coordinates of a token, and whether it is text or grid where that matters."""
    has_text = gna.text_first or gna.text_last
    first, end = grid_places(gna, order)
    lines = []
    if order is None:
        if has_text:
            lines.append(f"    {name}_text = {_text(gna, index, end)}")
            lines.append(f"    {name} = {index} - {gna.text_first}")
        else:
            lines.append(f"    {name} = {index}")
        lines += _digits(name, [(f"{name}{axis}", size) for axis, size in enumerate(gna.layout)])
        return lines + _opaque([(f"{name}{axis}", size) for axis, size in enumerate(gna.layout)])
    lines.append(f"    {name} = {index} - {first}" if first else f"    {name} = {index}")
    groups = [(f"{name}_group{axis}", size) for axis, size in enumerate(gna.dilation)]
    tiles = [(f"{name}_tile{axis}", size) for axis, size in enumerate(order.tiles)]
    places = [(f"{name}{axis}", size) for axis, size in enumerate(order.tile)]
    lines += _digits(name, groups + tiles + places) + _opaque(groups)
    inside = [f"({index} >= {first})"] if first else []
    inside += [f"({index} < {end})"] if gna.text_last else []
    for axis, (length, dilation) in enumerate(zip(gna.layout, gna.dilation, strict=True)):
        lines.append(f"    {name}{axis} = {name}_tile{axis} * {order.tile[axis]} + {name}{axis}")
        lines += _opaque([(f"{name}{axis}", order.tiles[axis] * order.tile[axis])])
        size = length if dilation == 1 else f"group_length({length}, {dilation}, {name}_group{axis})"
        inside.append(f"({name}{axis} < {size})")
    lines.append(f"    {name}_grid = {' & '.join(inside)}")
    if has_text:
        lines.append(f"    {name}_text = {_text(gna, index, end)}")
        lines.append(f"    {name}_valid = {name}_text | {name}_grid")
    return lines


def _text(gna: GNA, index: str, end: int) -> str:
    """The condition that an index is that of a text token, where the grid ends at ``end``."""
    first = [f"({index} < {gna.text_first})"] if gna.text_first else []
    last = [f"(({index} >= {end}) & ({index} < {end + gna.text_last}))"] if gna.text_last else []
    return " | ".join(first + last)


def _digits(name: str, digits: list[tuple[str, int]]) -> list[str]:
    """Lines that split ``name`` into mixed-radix digits, slowest first; a digit of size 1 is zero."""
    lines = []
    for place, (digit, size) in enumerate(digits):
        if size == 1 and any(other > 1 for _, other in digits):
            lines.append(f"    {digit} = 0")
            continue
        weight = math.prod(size for _, size in digits[place + 1 :])
        outermost = math.prod(size for _, size in digits[:place]) == 1
        value = name if weight == 1 else f"quotient({name}, {weight})"
        lines.append(f"    {digit} = {value}" if outermost else f"    {digit} = remainder({value}, {size})")
    return lines


def _opaque(values: list[tuple[str, int]]) -> list[str]:
    """Lines that hide the range of values below a size; from 16 bits on there is nothing to hide."""
    return [f"    {name} = opaque({name})" for name, size in values if 1 < size <= 1 << 16]


def _per_head(values: tuple[Any, ...]) -> str:
    """A literal, or an expression that picks the literal of head ``h``."""
    if len(set(values)) == 1:
        return str(values[0])
    return f"per_head(h, {values})"


def quotient(index: Tensor, size: int) -> Tensor:
    """``index // size`` for indices that are not negative: without the corrections of signs that kernels pay for."""
    if size & (size - 1) == 0:
        return index >> (size.bit_length() - 1)
    return torch.div(index, size, rounding_mode="trunc")


def remainder(index: Tensor, size: int) -> Tensor:
    """``index % size`` for indices that are not negative."""
    return index & (size - 1) if size & (size - 1) == 0 else torch.fmod(index, size)


def opaque(coordinate: Tensor) -> Tensor:
    """The coordinate (below 2**24), as a value whose range a compiler cannot know."""
    return (coordinate.to(torch.float32) + 0.25).to(torch.int32)


def per_head(h: Tensor, values: tuple[Any, ...]) -> Tensor:
    """``values[h]`` as a chain of comparisons with literals (heads are scalars in a kernel, so this costs nothing)."""
    picked = torch.full_like(h, values[-1], dtype=torch.bool if isinstance(values[0], bool) else h.dtype)
    for head, value in enumerate(values[:-1]):
        if value != values[-1]:
            picked = torch.where(h == head, value, picked)
    return picked


_NAMES = {"per_head": per_head, "quotient": quotient, "remainder": remainder, "opaque": opaque} | {
    name: getattr(intervals, name) for name in ("attends", "sees", "group_length", "minimum", "select")
}
