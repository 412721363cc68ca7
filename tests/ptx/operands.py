"""Operands of matrix products in shared memory: where their elements are, for wgmma and for tcgen05."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ptx.errors import DescriptorError
from ptx.tma import swizzle

K = 16
"""Columns of A and of B that one product of 16-bit floats sums over."""


class Layout(NamedTuple):
    """What the descriptors of both kinds say, in bytes.

    Rows of a plain operand are ``span`` bytes long; ``stride`` leads from 8 rows to the next 8. In a transposed one it
    leads from 8 columns to the next 8, and ``leading`` from one piece of ``span`` bytes of rows to the next.
    """

    start: int
    leading: int
    stride: int
    span: int

    def addresses(self, rows: int, transposed: bool) -> Any:
        """Addresses of the elements ``[rows, 16]``.

        Raises:
            DescriptorError: a start or a width that does not fit the swizzle.
        """
        start, leading, stride, span = self
        width = min(2 * rows, span) if transposed else 2 * K
        if start % (8 * span) + width > span:
            raise DescriptorError(f"an operand at {start:#x}: not within a row where a pattern of the swizzle begins")
        row, column = np.arange(rows)[:, None], np.arange(K)[None]
        if transposed:
            piece = span // 2
            places = row // piece * leading + column // 8 * stride + column % 8 * span + row % piece * 2
        else:
            places = row // 8 * stride + row % 8 * span + column * 2
        return swizzle(start + places, span)


@functools.lru_cache(maxsize=4096)
def places(layout: Layout, first: int, rows: int, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Addresses of ``rows`` rows from ``first`` on, and those of the words that hold them."""
    addresses = layout.addresses(first + rows, transposed)[first:]
    return addresses, np.unique(addresses // 4 * 4)


def field(bits: int, first: int, count: int) -> int:
    """``count`` bits of a descriptor from bit ``first`` on."""
    return bits >> first & (1 << count) - 1


def widen(bits: np.ndarray, float16: bool) -> Any:
    """16-bit floats as float32."""
    if float16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
