"""Windows of all positions, as the tables that kernels read, and the lengths of dilation groups."""

from __future__ import annotations

import numpy as np

from gna_flex.cuda.tables import PLAIN, Dim, padded_dims
from gna_flex.intervals import ceil_div
from gna_flex.neighborhood import GNA


def class_lengths(gna: GNA) -> np.ndarray:
    """Positions per dimension in each length class, int32 ``[9, 3]``; -1 where a class does not occur.

    Bit ``i`` of a class says that its groups are the shorter ones in dimension ``i``: a dilation that does not divide
    a length makes groups of two lengths. Class 8 is the undivided layout, which only text queries use.

    >>> class_lengths(GNA((8, 9), 2, dilation=(1, 2)))[:5].tolist()
    [[1, 8, 5], [-1, -1, -1], [-1, -1, -1], [-1, -1, -1], [1, 8, 4]]
    """
    lengths = np.full((PLAIN + 1, 3), -1, np.int32)
    dims = padded_dims(gna)
    ragged = sum(1 << axis for axis, dim in enumerate(dims) if dim[0] % dim[3])
    for lengths_class in range(PLAIN):
        if not lengths_class & ~ragged:
            lengths[lengths_class] = [
                dim[0] // dim[3] if lengths_class >> axis & 1 else ceil_div(dim[0], dim[3])
                for axis, dim in enumerate(dims)
            ]
    if gna.text_first or gna.text_last:
        lengths[PLAIN] = [dim[0] for dim in dims]
    return lengths


def window_table(gna: GNA) -> tuple[np.ndarray, np.ndarray]:
    """Windows ``[lo, hi)`` of every position, int32 ``[rows, 2]``, and where they start, int32 ``[9, 3]``.

    The window of position ``x`` in dimension ``i`` of a length class is row ``offsets[class, i] + x``. Classes that do
    not occur have offset -1; see :func:`class_lengths`.

    >>> windows, offsets = window_table(GNA(4, 2))
    >>> windows.tolist(), offsets[0].tolist()
    ([[0, 1], [0, 1], [0, 2], [0, 2], [1, 3], [2, 4]], [0, 1, 2])
    """
    lengths = class_lengths(gna)
    offsets = np.full_like(lengths, -1)
    rows: list[np.ndarray] = []
    total = 0
    for axis, dim in enumerate(padded_dims(gna)):
        # Classes that agree in this dimension share its rows.
        for text, classes in ((False, lengths[:PLAIN, axis]), (True, lengths[PLAIN:, axis])):
            for size in np.unique(classes[classes > 0])[::-1]:
                offsets[PLAIN if text else 0 :, axis][: len(classes)][classes == size] = total
                rows.append(_windows(dim, int(size), everything=text))
                total += int(size)
    return np.concatenate(rows), offsets


def _windows(dim: Dim, size: int, everything: bool) -> np.ndarray:
    position = np.arange(size)
    lo, hi = (0, size) if everything else dim.interval(position, size)
    return np.stack(np.broadcast_arrays(lo, hi, position)[:2], axis=1).astype(np.int32)
