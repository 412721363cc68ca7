"""Attention forward for Blackwell in Triton: compiles it, without a GPU, and prints its PTX and launch as JSON.

Arguments: head dim, keys of a step, "bf16", "fp16" or "fp8e4nv" (with bfloat16 out), 1 for warps with roles ("warp
specialization") or 0.
"""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROWS = 128


@triton.jit
def attention(
    q, k, v, o, lse, scale, queries, length,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, ROLES: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """``q``, ``k``, ``v``, ``o`` are tensor descriptors of a head; ``scale`` includes log2(e); ``lse`` has base 2.

    The weight of a row's maximum is 2 to the ``LIFT``.
    """
    first = tl.program_id(0) * ROWS
    x = q.load([first, 0])
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.range(0, length, KEYS, warp_specialize=ROLES):
        scores = tl.dot(x, k.load([i, 0]).T) * scale
        scores = tl.where((i + tl.arange(0, KEYS) < length)[None, :], scores, float("-inf"))
        top = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - (top - LIFT)[:, None])
        factor = tl.exp2(maximum - top)
        total = total * factor + tl.sum(weights, 1)
        out = tl.dot(weights.to(x.dtype), v.load([i, 0]), out * factor[:, None])
        maximum = top
    o.store([first, 0], (out / total[:, None]).to(o.dtype))
    rows = first + tl.arange(0, ROWS)
    tl.store(lse + rows, maximum + (tl.log2(total) - LIFT), rows < queries)


def main(width: int, keys: int, kind: str, roles: int) -> None:
    """Prints the PTX, the threads and the bytes of shared memory."""
    boxes = {"q": ROWS, "k": keys, "v": keys, "o": ROWS}
    types = dict.fromkeys("qkv", kind) | {"o": "bf16" if kind == "fp8e4nv" else kind}
    signature = {name: f"tensordesc<{types[name]}[{rows},{width}]>" for name, rows in boxes.items()}
    signature |= {"lse": "*fp32", "scale": "fp32", "queries": "i32", "length": "i32"}
    constants = {
        "WIDTH": width,
        "ROWS": ROWS,
        "KEYS": keys,
        "ROLES": bool(roles),
        "LIFT": 8.0 if kind == "fp8e4nv" else 0.0,
    }
    source = ASTSource(attention, signature | dict.fromkeys(constants, "constexpr"), constants)
    made = triton.compile(source, target=GPUTarget("cuda", 100, 32), options={"num_warps": 4, "num_stages": 2})
    facts = {"ptx": made.asm["ptx"], "threads": 32 * made.metadata.num_warps, "shared": made.metadata.shared}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
