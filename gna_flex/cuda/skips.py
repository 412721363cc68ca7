"""Key boxes that a warpgroup skips: at both ends of an item's walk, where none of its own queries sees a key.

Three boxes of 64 queries straddle two groups of 256 in every second item, and together see an eighth more of 2048 keys
than each of them does. Along one dimension what a box of queries sees is one run of the item's key boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MOST = (1 << 15) - 1
"""Key boxes that a warpgroup can skip at one end of an item's walk."""


class Skips(NamedTuple):
    """Key boxes that each warpgroup skips at the beginning and at the end, ``[items, groups]``.

    ``whole``: items of which every query sees all keys of the boxes that its warpgroup does not skip, ``[items]``.
    """

    first: np.ndarray
    last: np.ndarray
    whole: np.ndarray


def skips(
    interval: Callable[[Any, Any], tuple[Any, Any]], size: Any, starts: Any, box: int, keys: Any, side: int, total: Any
) -> Skips:
    """What warpgroups skip of ``total`` key boxes of ``side`` keys each, from key ``keys`` on; arrays ``[items, 1]``.

    ``interval(i, size)`` are the keys ``[lo, hi)`` that query ``i`` of ``size`` sees; warpgroup ``g`` has the queries
    ``[starts[:, g], starts[:, g] + box)``. Those beyond the end of the sequence see what its last query sees.

    >>> window = lambda i, size: (i // 256 * 256, i // 256 * 256 + 256)
    >>> starts, zero = np.array([[192, 256, 320]]), np.array([[0]])
    >>> skips(window, zero + 512, starts, 64, zero, 64, zero + 8)
    Skips(first=array([[0, 4, 4]]), last=array([[4, 0, 0]]), whole=array([ True]))
    """
    lo, all_hi = interval(np.minimum(starts, size - 1), size)
    all_lo, hi = interval(np.minimum(starts + box, size) - 1, size)
    first = np.minimum((lo - keys) // side, MOST)
    last = np.minimum(total - 1 - (hi - 1 - keys) // side, MOST)
    whole = (keys + first * side >= all_lo) & (keys + (total - last) * side <= all_hi)
    return Skips(first, last, np.all(whole, axis=1))
