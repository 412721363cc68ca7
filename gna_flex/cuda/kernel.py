"""The Hopper forward kernel: its compile-time configuration and its source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from gna_flex.cuda.config import SHARED_LIMIT, Capability, KernelConfig, work_bytes
from gna_flex.cuda.tables import ROWS

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
TRIOS = {32: (128, 96), 64: (128, 112, 96), 128: (80, 64)}
"""Key rows of a slot that three consumers have by default, by head dim."""
PAIRS = {64: (192, 144), 96: (128, 144, 96), 128: (128, 144, 96), 192: (96,), 256: (64,)}
"""The same of two consumers."""
SLOTS = (192, 160, 144, 128, 112, 96)
"""Key rows of a slot that two consumers may have, beside those of the default configurations."""
MOST_REGISTERS = 184
"""Registers for output, scores and weights that leave a thread of two consumers enough for the rest."""


@dataclass(frozen=True)
class Config(KernelConfig):
    """A configuration of the Hopper kernel; see ``csrc/hopper/forward.cu``.

    Attributes:
        keys: key rows of a shared-memory slot, a multiple of 16.
        consumers: warpgroups of 64 queries each.
        query_stages, key_stages: slots of queries, and of keys and of values.
        holds_queries: consumers hold their queries in registers, instead of having every product read them from
            shared memory.
    """

    consumers: int = 2
    query_stages: int = 2
    key_stages: int = 2
    holds_queries: bool = False

    folder: ClassVar[str] = "hopper"
    head_dims: ClassVar[tuple[int, ...]] = HEAD_DIMS
    rows: ClassVar[int] = ROWS
    most_key_shapes: ClassVar[int] = 2

    @property
    def groups(self) -> int:
        """Boxes of queries: one for each consumer."""
        return self.consumers

    @property
    def threads(self) -> int:
        """Consumers, and one more warpgroup that loads."""
        return 128 * (self.consumers + 1)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one CTA, as the kernel lays it out.

        >>> Config(128).shared_bytes
        207632
        """
        mask_words = -(-self.keys // 128)
        queries = self.query_stages * self.consumers * ROWS * self.head_dim * 2
        keys = 2 * self.key_stages * self.keys * self.head_dim * 2
        places = 64 * self.keys * (not self.float16 and self.consumers == 2)
        tables = places + (self.keys + 5) * 16 * mask_words + 4 * ROWS
        tables += 2 * work_bytes(self.key_shapes, self.skips) + 16 * self.key_stages
        return queries + keys + tables + 8 * (2 * 2 + 2 * self.query_stages + 4 * self.key_stages)

    @property
    def box_time(self) -> float:
        """Time of a key box: what three consumers take for one and a half times as many queries as two, measured.

        At head dim 128 it includes that masks cost three more.

        >>> Config(64, 112, consumers=3).box_time, Config(32, 128, consumers=3).box_time
        (1.33, 1.21)
        """
        times = {32: 1.21, 128: 1.37 if self.keys > 64 else 1.35}
        return 1.0 if self.consumers == 2 else times.get(self.head_dim, 1.33)

    @property
    def may_skip(self) -> bool:
        """Whether warpgroups can skip key boxes: three, whose boxes often straddle groups of queries with one window.

        With two slots of keys none can get ahead of the others: no gain at head dim 128 with 80 keys.
        """
        return self.consumers == 3 and self.key_stages > 2

    @property
    def may_have_rests(self) -> bool:
        """Whether key boxes of two shapes are worth trying: for two consumers at head dim 128, as measured."""
        return self.head_dim == 128 and self.consumers == 2

    @classmethod
    def arch(cls, capability: Capability) -> str:
        """``sm_90a``: the one architecture that has the kernel's instructions."""
        return "sm_90a"

    @classmethod
    def defaults(cls, head_dim: int, capability: Capability = (9, 0), text: bool = False) -> tuple[Config, ...]:
        """Configurations for a head dim; tiles of the least estimated cost decide between them.

        Measured on H100s and H200s. Two consumers: at head dims 96 and 128, 144 keys beat 128 by 2 % where boxes need
        no mask and by more where most do; beyond that registers are short. Three gain 10 to 20 % at head dim 32; 15 %
        at 64, but for windows of few boxes; and 5 % at 128 where windows are long and nothing is masked, with 80 keys,
        or along one dimension, with 64 of which they skip some. Text was not measured with either. They have three
        slots of 16 KB, or two of more.
        """
        padded = cls.padded(head_dim)
        trios = TRIOS.get(padded, ()) if padded < 128 or not text else ()
        slots = 1 if padded > 128 else 2
        return (
            *(Config(padded, keys, consumers=3, key_stages=3 if padded * keys <= 64 * 128 else 2) for keys in trios),
            *(
                Config(padded, keys, query_stages=slots, holds_queries=_holds(padded, keys, text))
                for keys in PAIRS.get(padded, ())
            ),
        )

    @classmethod
    def variants(cls, head_dim: int, capability: Capability = (9, 0), text: bool = False) -> tuple[Config, ...]:
        """Configurations worth measuring: the default ones, and others that fit shared memory and registers.

        >>> [(config.keys, config.consumers) for config in Config.variants(64)]
        [(128, 3), (112, 3), (96, 3), (192, 2), (144, 2), (160, 2)]
        """
        defaults = cls.defaults(head_dim, capability, text)
        padded = cls.padded(head_dim)
        keys = [n for n in SLOTS if n not in {config.keys for config in defaults}]
        # Output and scores in float32, weights in half as many registers.
        keys = [n for n in keys if padded // 2 + n * 3 // 4 <= MOST_REGISTERS]
        others = [Config(padded, n, holds_queries=_holds(padded, n, text)) for n in keys]
        others = [c if c.shared_bytes <= SHARED_LIMIT else replace(c, query_stages=1) for c in others]
        return *defaults, *(config for config in others if config.shared_bytes <= SHARED_LIMIT)

    def defines(self) -> dict[str, int]:
        """Macros of the kernel's source."""
        own = {"CONSUMERS": self.consumers, "QUERY_STAGES": self.query_stages, "KEY_STAGES": self.key_stages}
        return super().defines() | own | {"HOLDS_QUERIES": int(self.holds_queries)}

    def include(self) -> dict[str, str]:
        """Headers that the source includes, by name; one of them is written for the configuration."""
        return super().include() | {"hopper/generated.cuh": self.generated_header()}

    def generated_header(self) -> str:
        """``hopper/generated.cuh``: the matrix multiplications, whose operand lists have one name per register."""
        kind = "f16" if self.float16 else "bf16"
        return (
            "#pragma once\n"
            + multiply_shared("mma_qk", self.keys, kind)
            + _multiply_registers("mma_pv", self.head_dim, kind, transposed=True)
            + _multiply_registers("mma_held", self.keys, kind)
        )


def _holds(head_dim: int, keys: int, text: bool) -> bool:
    """Whether queries are held in registers by default: where it was measured to pay, and consumers have enough.

    >>> _holds(128, 128, True), _holds(128, 128, False), _holds(128, 144, True)
    (True, False, False)
    """
    return text and head_dim == 128 and keys <= 128


def multiply_shared(name: str, columns: int, kind: str, transposed: tuple[bool, bool] = (False, False)) -> str:
    """``d[64, columns] (+)= a b`` with both operands in shared memory; transposed ones have ``k`` rows."""
    count = columns // 2
    inputs, layout = '"l"(a), "l"(b), "r"(accumulate)', ", ".join(str(int(x)) for x in transposed)
    body = f".reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
    body += _instruction(columns, kind, f"%{count}, %{count + 1}, p, 1, 1, {layout}")
    return _wrapper(name, count, "u64 a, u64 b, int accumulate", body, inputs)


def _multiply_registers(name: str, columns: int, kind: str, transposed: bool = False) -> str:
    """``d[64, columns] (+)= a b``, ``a`` in registers and ``b`` in shared memory; if transposed it has ``k`` rows."""
    count = columns // 2
    inputs = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate)'
    a = ", ".join(f"%{count + i}" for i in range(4))
    body = f".reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
    body += _instruction(columns, kind, f"{{{a}}}, %{count + 4}, p, 1, 1, {int(transposed)}")
    return _wrapper(name, count, "u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int accumulate", body, inputs)


def _instruction(columns: int, kind: str, operands: str) -> str:
    accumulator = ", ".join(f"%{i}" for i in range(columns // 2))
    shape = f"m64n{columns}k16.f32.{kind}.{kind}"
    return f"wgmma.mma_async.sync.aligned.{shape} {{{accumulator}}}, {operands};"


def _wrapper(name: str, count: int, arguments: str, body: str, inputs: str) -> str:
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void {name}(float (&d)[{count}], {arguments}) {{\n"
        f'  asm volatile("{{\\n{body}\\n}}" : {outputs} : {inputs});\n}}\n'
    )
