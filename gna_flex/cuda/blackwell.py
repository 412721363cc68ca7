"""The Blackwell forward kernel: its compile-time configuration. It compiles, and no call is routed to it yet.

Records, windows, parameters and tensor maps are those of the Hopper kernel; see :mod:`gna_flex.cuda.forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = ("sm_100a", "sm_100f", "sm_103a")
"""What the kernel is compiled for: B200 alone, its whole family, and B300."""
HEAD_DIMS = (32, 64, 96, 128)
"""Compiled head dims; others are padded to the next one with zeros."""
ROWS = 128
"""Queries of one tile, and text tokens in its box; a CTA has two tiles."""
THREADS = 512
"""Threads of one CTA."""


@dataclass(frozen=True)
class BlackwellConfig:
    """Everything that is fixed when the kernel is compiled; see ``csrc/blackwell/forward.cu``.

    Attributes:
        head_dim: columns, one of :data:`HEAD_DIMS`.
        keys: key rows of a shared-memory slot: 32, 64, 96 or 128.
        key_stages: slots, each for keys or values of one box.
        output_stages: slots of output, each for one tile and one chunk of columns.
        polynomial: of 8 pairs of exponentials in the middle columns, those without the unit for exponentials.
        float16: float16 instead of bfloat16.
        dilated: whether a dimension is dilated.
        map_sets: tensor maps per operand, one for each combination of lengths of dilation groups.
        text: whether there are text tokens.
        bounded_waits: polls after which a wait traps; 0 is for ever. For debugging.
    """

    head_dim: int
    keys: int = 128
    key_stages: int = 3
    output_stages: int = 2
    polynomial: int = 0
    float16: bool = False
    dilated: bool = False
    map_sets: int = 1
    text: bool = False
    bounded_waits: int = 0

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one CTA, as the kernel lays it out.

        >>> BlackwellConfig(128).shared_bytes
        200240
        """
        row = 128 if self.head_dim % 64 == 0 else 64
        queries, outputs = 2 * ROWS * self.head_dim * 2, self.output_stages * ROWS * row
        ring = self.key_stages * self.keys * self.head_dim * 2
        tables = (self.keys + 5) * 16 + 2 * ROWS * 4 + 2 * 128
        return queries + outputs + ring + tables + 8 * (16 + 2 * self.key_stages + 2 * self.output_stages) + 16

    def defines(self) -> dict[str, int]:
        """Macros of the kernel's source."""
        return {
            "HEAD_DIM": self.head_dim,
            "KEYS": self.keys,
            "KEY_STAGES": self.key_stages,
            "OUTPUT_STAGES": self.output_stages,
            "POLYNOMIAL": self.polynomial,
            "FLOAT16": int(self.float16),
            "DILATED": int(self.dilated),
            "MAP_SETS": self.map_sets,
            "TEXT": int(self.text),
            "BOUNDED_WAITS": self.bounded_waits,
        }
