"""The Hopper forward kernel: its compile-time configuration and its source."""

from __future__ import annotations

from dataclasses import dataclass

SHARED_LIMIT = 232_448
"""Bytes of shared memory that one CTA can have."""
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Compiled head dims; others are padded to the next one with zeros."""


@dataclass(frozen=True)
class Config:
    """Everything that is fixed when the kernel is compiled; see ``csrc/hopper/forward.cu``.

    Attributes:
        head_dim: columns, one of :data:`HEAD_DIMS`.
        keys: key rows of a shared-memory slot, a multiple of 16.
        consumers: warpgroups of 64 queries each.
        query_stages, key_stages: slots of queries, and of keys and of values.
        float16: float16 instead of bfloat16.
        dilated: whether a dimension is dilated.
        map_sets: tensor maps per operand, one for each combination of lengths of dilation groups.
        text: whether there are text tokens.
        bounded_waits: polls after which a wait traps; 0 is for ever. For debugging.
    """

    head_dim: int
    keys: int = 128
    consumers: int = 2
    query_stages: int = 2
    key_stages: int = 2
    float16: bool = False
    dilated: bool = False
    map_sets: int = 1
    text: bool = False
    bounded_waits: int = 0

    @property
    def columns(self) -> int:
        """Columns of one chunk of an operand in shared memory: one row is 128 or 64 bytes."""
        return 64 if self.head_dim % 64 == 0 else 32

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one CTA, as the kernel lays it out.

        >>> Config(128).shared_bytes
        199152
        """
        mask_words = -(-self.keys // 128)
        queries = self.query_stages * self.consumers * 64 * self.head_dim * 2
        keys = 2 * self.key_stages * self.keys * self.head_dim * 2
        tables = (self.keys + 5) * 16 * mask_words + 2 * 128 + 16 * self.key_stages
        return queries + keys + tables + 8 * (2 * 2 + 2 * self.query_stages + 4 * self.key_stages)

    def defines(self) -> dict[str, int]:
        """Macros of the kernel's source."""
        return {
            "HEAD_DIM": self.head_dim,
            "KEYS": self.keys,
            "CONSUMERS": self.consumers,
            "QUERY_STAGES": self.query_stages,
            "KEY_STAGES": self.key_stages,
            "FLOAT16": int(self.float16),
            "DILATED": int(self.dilated),
            "MAP_SETS": self.map_sets,
            "TEXT": int(self.text),
            "BOUNDED_WAITS": self.bounded_waits,
        }

    def generated_header(self) -> str:
        """``hopper/generated.cuh``: the two matrix multiplications, whose operand lists have one name per register."""
        kind = "f16" if self.float16 else "bf16"
        return (
            "#pragma once\n"
            + _multiply_shared("mma_qk", self.keys, kind)
            + _multiply_registers("mma_pv", self.head_dim, kind)
        )


def _multiply_shared(name: str, columns: int, kind: str) -> str:
    """``d[64, columns] (+)= a b`` with both operands in shared memory."""
    count = columns // 2
    inputs = '"l"(a), "l"(b), "r"(accumulate)'
    body = f".reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
    body += _instruction(columns, kind, f"%{count}, %{count + 1}, p, 1, 1, 0, 0")
    return _wrapper(name, count, "u64 a, u64 b, int accumulate", body, inputs)


def _multiply_registers(name: str, columns: int, kind: str) -> str:
    """``d[64, columns] += a b`` with ``a`` in registers and ``b`` transposed in shared memory."""
    count = columns // 2
    inputs = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)'
    a = ", ".join(f"%{count + i}" for i in range(4))
    body = _instruction(columns, kind, f"{{{a}}}, %{count + 4}, 1, 1, 1, 1")
    return _wrapper(name, count, "u32 a0, u32 a1, u32 a2, u32 a3, u64 b", body, inputs)


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
