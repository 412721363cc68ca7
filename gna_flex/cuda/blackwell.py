"""The Blackwell forward kernel: its compile-time configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from gna_flex.cuda.config import SHARED_LIMIT, WORK_BYTES, Capability, KernelConfig

ARCHITECTURES = {(10, 0): "sm_100a", (10, 3): "sm_103a"}
"""Architectures of B200 and B300, by capability."""
FAMILY = "sm_100f"
"""What all GPUs of the family have in common, for those that are not known yet."""
HEAD_DIMS = (32, 64, 96, 128)
ROWS = 128
"""Queries of one tile, and text tokens in its box."""
TILES = 2
"""Tiles of a CTA, which share their key boxes."""
MOST_STAGES = 6
"""More slots of keys are of no use: loads are a few boxes ahead as it is."""
POLYNOMIAL = {(10, 0): 2}
"""Of 8 pairs of exponentials in the middle columns, those without the unit for them: an eighth of all where that unit
is the slowest part, on B200; B300 has twice as many."""

POLYNOMIAL_ERROR = 1e-4
"""Largest relative error of an exponential by polynomial: far below a rounding to 16 bits, but log-sum-exps show it."""


@dataclass(frozen=True)
class BlackwellConfig(KernelConfig):
    """A configuration of the Blackwell kernel; see ``csrc/blackwell/forward.cu``.

    Attributes:
        keys: key rows of a shared-memory slot: 32, 64, 96 or 128.
        key_stages: slots, each for keys or values of one box.
        output_stages: slots of output, each for one tile and one chunk of columns.
        polynomial: of 8 pairs of exponentials in the middle columns, those without the unit for exponentials.
    """

    key_stages: int = 3
    output_stages: int = 2
    polynomial: int = 0

    folder: ClassVar[str] = "blackwell"
    head_dims: ClassVar[tuple[int, ...]] = HEAD_DIMS
    rows: ClassVar[int] = ROWS

    @property
    def groups(self) -> int:
        """Boxes of queries: two tiles."""
        return TILES

    @property
    def threads(self) -> int:
        """Sixteen warps."""
        return 512

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one CTA, as the kernel lays it out.

        >>> BlackwellConfig(128).shared_bytes
        200272
        """
        size = 1 if self.float8 else 2
        queries, outputs = TILES * ROWS * self.head_dim * size, self.output_stages * ROWS * 2 * self.columns
        ring = self.key_stages * self.keys * self.head_dim * size
        tables = (self.keys + 5) * 16 + TILES * ROWS * 4 + 2 * WORK_BYTES
        return queries + outputs + ring + tables + 8 * (16 + 2 * self.key_stages + 2 * self.output_stages) + 16

    @classmethod
    def arch(cls, capability: Capability) -> str:
        """The GPU's own architecture where that is known, else that of its family.

        >>> BlackwellConfig.arch((10, 3))
        'sm_103a'
        """
        return ARCHITECTURES.get(capability, FAMILY)

    @classmethod
    def defaults(
        cls, head_dim: int, capability: Capability = (10, 0), text: bool = False
    ) -> tuple[BlackwellConfig, ...]:
        """One configuration: as many slots as shared memory has room for.

        >>> [(config.head_dim, config.key_stages) for config in BlackwellConfig.defaults(40)]
        [(64, 6)]
        """
        return (cls._with_keys(128, head_dim, capability),)

    @classmethod
    def variants(
        cls, head_dim: int, capability: Capability = (10, 0), text: bool = False
    ) -> tuple[BlackwellConfig, ...]:
        """Configurations worth measuring: the default one, smaller slots, and another share of polynomials.

        >>> [(config.keys, config.polynomial) for config in BlackwellConfig.variants(128)]
        [(128, 2), (96, 2), (128, 0)]
        """
        (default,) = cls.defaults(head_dim, capability)
        other = replace(default, polynomial=0 if default.polynomial else 2)
        return default, cls._with_keys(96, head_dim, capability), other

    @classmethod
    def _with_keys(cls, keys: int, head_dim: int, capability: Capability) -> BlackwellConfig:
        polynomial = POLYNOMIAL.get(capability, 0)
        found = (cls(cls.padded(head_dim), keys, n, polynomial=polynomial) for n in range(MOST_STAGES, 1, -1))
        return next(config for config in found if config.shared_bytes <= SHARED_LIMIT)

    def defines(self) -> dict[str, int]:
        """Macros of the kernel's source."""
        own = {"KEY_STAGES": self.key_stages, "OUTPUT_STAGES": self.output_stages, "POLYNOMIAL": self.polynomial}
        return super().defines() | own | {"FLOAT8": int(self.float8)}
