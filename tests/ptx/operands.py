"""Operands of matrix products in shared memory: where their elements are, for wgmma and for tcgen05."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ptx.errors import DescriptorError
from ptx.memory import SHARED_BASE, Region
from ptx.tma import swizzle

K = 16
"""Columns of A and of B that one product of 16-bit floats sums over; 32 bytes, whatever the type."""


class Layout(NamedTuple):
    """What the descriptors of both kinds say, in bytes.

    Rows of a plain operand are ``span`` bytes long; ``stride`` leads from 8 rows to the next 8. In a transposed one it
    leads from 8 columns to the next 8, and ``leading`` from one piece of ``span`` bytes of rows to the next.
    """

    start: int
    leading: int
    stride: int
    span: int

    def addresses(self, rows: int, transposed: bool, size: int = 2) -> Any:
        """Addresses of the elements ``[rows, K]``, of ``size`` bytes: 16 columns, or 32 of single bytes.

        Raises:
            DescriptorError: a start or a width that does not fit the swizzle.
        """
        start, leading, stride, span = self
        width = min(size * rows, span) if transposed else 2 * K
        if start % (8 * span) + width > span:
            raise DescriptorError(f"an operand at {start:#x}: not within a row where a pattern of the swizzle begins")
        row, column = np.arange(rows)[:, None], np.arange(2 * K // size)[None]
        if transposed:
            piece = span // size
            places = row // piece * leading + column // 8 * stride + column % 8 * span + row % piece * size
        else:
            places = row // 8 * stride + row % 8 * span + column * size
        return swizzle(start + places, span)


class Places(NamedTuple):
    """Indices in shared memory of an operand's elements, and of the words that hold them; addresses of the latter."""

    elements: np.ndarray
    words: np.ndarray
    addresses: np.ndarray

    def inside(self, memory: Region) -> Places:
        """The same, if they are inside.

        Raises:
            OutOfBoundsError: they are not.
        """
        if self.words[0] < 0 or self.words[-1] >= len(memory.data) // 4:
            memory.elements(self.addresses, 4)
        return self


@functools.lru_cache(maxsize=1 << 14)
def places(layout: Layout, first: int, rows: int, transposed: bool, size: int = 2) -> Places:
    """Where ``rows`` rows from ``first`` on are."""
    addresses = layout.addresses(first + rows, transposed, size)[first:]
    words = np.unique(addresses // 4)
    return Places((addresses - SHARED_BASE) // size, words - SHARED_BASE // 4, 4 * words)


def field(bits: int, first: int, count: int) -> int:
    """``count`` bits of a descriptor from bit ``first`` on."""
    return bits >> first & (1 << count) - 1


def widen(bits: np.ndarray, float16: bool) -> Any:
    """16-bit floats as float32."""
    if float16:
        return bits.view(np.float16).astype(np.float32)
    halves = np.zeros((*bits.shape, 2), np.uint16)
    halves[..., 1] = bits
    return halves.view(np.float32)[..., 0]


def _e4m3(bits: int) -> float:
    sign, exponent, mantissa = -1 if bits & 0x80 else 1, bits >> 3 & 15, bits & 7
    if bits & 0x7F == 0x7F:
        return float("nan")
    return sign * ((8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9)


E4M3 = np.array([_e4m3(bits) for bits in range(256)], np.float32)
"""The number of each byte as a float of 8 bits: 4 of exponent, 3 of mantissa, and no infinity."""


def e4m3_bits(x: np.ndarray) -> Any:
    """Floats rounded to e4m3, to the nearest even, as bytes; those that are too large become the largest."""
    size = np.minimum(np.abs(x.astype(np.float64)), 448)
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(size, 2.0**-9))), -6) - 3)
    bits = np.searchsorted(E4M3[:0x7F], np.rint(size / step) * step).astype(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), bits | np.signbit(x).astype(np.uint8) << np.uint8(7))
