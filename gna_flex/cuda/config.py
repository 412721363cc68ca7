"""What the host code has to know of a kernel, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from gna_flex.cuda import jit
from gna_flex.cuda.tables import KernelTiles

SHARED_LIMIT = 232_448
"""Bytes of shared memory that one CTA can have."""


def work_bytes(key_shapes: int, skips: bool = False) -> int:
    """Bytes of ``Work`` with that many grids of key boxes, 60 bytes each; it is aligned to 16.

    >>> work_bytes(1), work_bytes(1, True), work_bytes(2)
    (144, 160, 208)
    """
    return -(-(84 + 60 * key_shapes + 12 * skips) // 16) * 16


WORK_BYTES = work_bytes(1)
"""``Work`` of ``csrc/common/records.cuh``: an item, as its producer hands it on in shared memory."""
Capability = tuple[int, int]
"""Compute capability of a GPU."""


@dataclass(frozen=True)
class KernelConfig(ABC):
    """Everything that is fixed when a kernel is compiled. Subclasses add what only their kernel has.

    All kernels have the same records, windows, parameters and tensor maps: a CTA has :attr:`groups` boxes of at most
    :attr:`rows` queries, which lie side by side and share their key boxes.

    Attributes:
        head_dim: columns, one of :attr:`head_dims`.
        keys: key rows of a shared-memory slot.
        float16: float16 instead of bfloat16.
        float8: float8_e4m3fn inputs and bfloat16 output; only the Blackwell kernel has it.
        dilated: whether a dimension is dilated.
        map_sets: tensor maps per operand, one for each combination of lengths of dilation groups.
        text: whether there are text tokens.
        key_shapes: shapes of key boxes in one launch, at most :attr:`most_key_shapes`.
        skips: warpgroups skip key boxes at the ends of a walk which none of their queries sees.
        bounded_waits: polls after which a wait traps; 0 is for ever. For debugging.
    """

    head_dim: int
    keys: int = 128
    _: KW_ONLY
    float16: bool = False
    float8: bool = False
    dilated: bool = False
    map_sets: int = 1
    text: bool = False
    key_shapes: int = 1
    skips: bool = False
    bounded_waits: int = 0

    folder: ClassVar[str]
    """Where the kernel's sources are, in ``csrc``; also its name."""
    direction: ClassVar[str] = "forward"
    """Which of the sources: ``forward`` or ``backward``; the kernel is named after it."""
    head_dims: ClassVar[tuple[int, ...]]
    """Compiled head dims; others are padded to the next one with zeros."""
    most_key_shapes: ClassVar[int] = 1
    """Shapes of key boxes that one launch can have."""
    rows: ClassVar[int]
    """Queries of one box, and text tokens in one."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """Boxes of queries of one CTA."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of one CTA."""

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Shared memory of one CTA, as the kernel lays it out."""

    @property
    def box_time(self) -> float:
        """Time of a key box, in those of one with as many keys that two boxes of queries share."""
        return 1.0

    @classmethod
    @abstractmethod
    def arch(cls, capability: Capability) -> str:
        """The architecture that the compiler is asked for, on a GPU that the kernel is written for."""

    @classmethod
    @abstractmethod
    def defaults(cls, head_dim: int, capability: Capability, text: bool = False) -> tuple[KernelConfig, ...]:
        """Configurations for a head dim; tiles of the least estimated cost decide between them."""

    @classmethod
    @abstractmethod
    def variants(cls, head_dim: int, capability: Capability, text: bool = False) -> tuple[KernelConfig, ...]:
        """Configurations worth measuring: the default ones, and others that fit shared memory and registers."""

    @classmethod
    def padded(cls, head_dim: int) -> int:
        """The compiled head dim for a head dim."""
        return next(size for size in cls.head_dims if size >= head_dim)

    @property
    def may_have_rests(self) -> bool:
        """Whether key boxes of two shapes are worth trying."""
        return False

    @property
    def may_skip(self) -> bool:
        """Whether warpgroups can skip key boxes which none of their queries sees."""
        return False

    @property
    def maps(self) -> int:
        """Tensor maps of one operand: of the grid, and of text before and after it."""
        return self.map_sets + 2 * self.text

    @property
    def columns(self) -> int:
        """Columns of one chunk of 16-bit floats in shared memory: one row is 128 or 64 bytes."""
        return 64 if self.head_dim % 64 == 0 else 32

    def fits(self, tiles: KernelTiles) -> bool:
        """Whether tiles are for this many boxes of queries, slots of this size, and shapes that the kernel knows."""
        if (tiles.kv_rest and self.most_key_shapes == 1) or (tiles.skips and not self.may_skip):
            return False
        return (tiles.groups, tiles.kv_slots, tiles.rows) == (self.groups, self.keys, self.rows)

    def defines(self) -> dict[str, int]:
        """Macros of the kernel's source."""
        return {
            "HEAD_DIM": self.head_dim,
            "KEYS": self.keys,
            "FLOAT16": int(self.float16),
            "DILATED": int(self.dilated),
            "MAP_SETS": self.map_sets,
            "TEXT": int(self.text),
            "KEY_SHAPES": self.key_shapes,
            "SKIPS": int(self.skips),
            "BOUNDED_WAITS": self.bounded_waits,
        }

    @classmethod
    def source(cls) -> str:
        """The kernel's source."""
        return (jit.source_folder() / cls.folder / f"{cls.direction}.cu").read_text(encoding="utf-8")

    def include(self) -> dict[str, str]:
        """Headers that the source includes, by name."""
        return jit.headers(self.folder)

    def compile(self, arch: str) -> jit.Cubin:
        """Machine code for an architecture; see :func:`gna_flex.cuda.jit.compile`."""
        name = f"{self.folder}_{self.direction}.cu"
        return jit.compile(self.source(), arch=arch, defines=self.defines(), name=name, include=self.include())
