"""One thing at a time is changed in the Blackwell kernel's PTX: the interpreter must notice, by an error or the result."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from machine_code import needs_nvrtc

needs_nvrtc()

from kernel_mutants import COMMON, Change, Mutation, more  # noqa: E402
from kernel_problems import Problem, tiles  # noqa: E402

from gna_flex import GNA  # noqa: E402
from gna_flex.cuda.blackwell import BlackwellConfig  # noqa: E402

CONFIG = BlackwellConfig(64, 32)
PROBLEM = Problem(GNA((8, 16), (5, 9)), CONFIG, tiles((1, 4, 16), (1, 4, 8), 32), heads=2, key_heads=2)
RUNS = (
    (PROBLEM._replace(gnas=GNA((8, 24), (8, 17)), tiles=tiles((1, 4, 8), (1, 4, 8), 32)), 0),
    (Problem(GNA((8, 16), (8, 16)), CONFIG, tiles((1, 4, 16), (1, 2, 16), 32), heads=2, key_heads=2, scale=2.0), 0),
    (PROBLEM._replace(scale=2.0), 0),
    (Problem(GNA((9, 9), (5, 4)), CONFIG, tiles((1, 9, 5), (1, 4, 7), 32, split=2)), 0),
    (Problem(GNA((4, 8), (4, 8)), CONFIG, tiles((1, 2, 8), (1, 4, 8), 32), heads=3, key_heads=3), 0),
    (PROBLEM._replace(values_last=True, batch=2), 0),
    (Problem(GNA((4, 64), (4, 24), (1, 16)), CONFIG, tiles((1, 2, 16), (1, 4, 8), 32, split=2)), 0),
    (Problem(GNA((64, 4), (24, 4), (16, 1)), CONFIG, tiles((1, 16, 2), (1, 8, 4), 32)), 0),
    (Problem(GNA((32, 2, 4), (12, 2, 4), (8, 1, 1)), CONFIG, tiles((8, 1, 4), (4, 2, 4), 32, split=0)), 0),
    *((PROBLEM._replace(heads=6, key_heads=6, blocks=blocks), seed) for seed, blocks in enumerate((2, 1, 1))),
)
"""Tried in turn: some boxes need a mask; none does; all do, with rescaling; rows that are not filled; one key box; values
that lie otherwise than keys; windows that all rows share, in each dimension; many items."""


def number(change: Callable[[int], int]) -> Callable[[re.Match[str]], str]:
    """The constant (2) between the parts (1) and (3) of an instruction, changed."""
    return lambda match: f"{match[1]}{change(int(match[2]))}{match[3]}"


def instruction_bit(bit: int) -> Callable[[re.Match[str]], str]:
    return number(lambda value: value ^ 1 << bit)


def operand_bit(bit: int) -> str:
    """A template: a register (2) that an instruction (1) makes, with a bit flipped."""
    return rf"\1\nxor.b64 \2, \2, {1 << bit};"


def inverted(match: re.Match[str]) -> str:
    opposite = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
    return f"{match[1]}{opposite[match[2]]}{match[3]}"


INSTRUCTION = r"(mov\.b32\s+%r\d+, )(13[45]\d{6})(;)"
OPERAND = r"(or\.b64\s+(%rd\d+), %rd\d+, 46117566620\d+;)"
CHANGES: dict[str, Change] = COMMON | {
    "no before fence": (r"tcgen05\.fence::before_thread_sync;", "", 1),
    "no after fence": (r"tcgen05\.fence::after_thread_sync;", "", 1),
    "no commit": (r"tcgen05\.commit[^;]*;", "", 1),
    "two commits": (r"(tcgen05\.commit[^;]*;)", r"\1\n\1", 1),
    "no wait for loads": (r"tcgen05\.wait::ld\.sync\.aligned;", "", 1),
    "no wait for stores": (r"tcgen05\.wait::st\.sync\.aligned;", "", 1),
    "no product": (r"tcgen05\.mma[^;]*;", "", 1),
    "no alloc": (r"tcgen05\.alloc[^;]*;", "", 1),
    "fewer columns": (r"(tcgen05\.alloc[^;]*), 512;", r"\1, 256;", 1),
    "no dealloc": (r"tcgen05\.dealloc[^;]*;", "", 1),
    "fewer columns freed": (r"(tcgen05\.dealloc[^;]*), 512;", r"\1, 256;", 1),
    "no load of tensor memory": (r"tcgen05\.ld\.[^;]*;", "", 1),
    "no store to tensor memory": (r"tcgen05\.st\.[^;]*;", "", 1),
    "accumulate": (r"(\.reg \.pred p;\nsetp\.)ne(\.b32 p, %r\d+, 0;\ntcgen05)", r"\1eq\2", 1),
    "accumulator elsewhere": (r"(tcgen05\.mma\S+ \[)(%r\d+)(\][^;]*;)", more(16), 1),
    "weights elsewhere": (r"(tcgen05\.mma\S+ \[%r\d+\], \[)(%r\d+)(\][^;]*;)", more(8), 1),
    "A and B swapped": (r"(tcgen05\.mma\S+ \[%r\d+\], )(%rd\d+), (%rd\d+)", r"\1\3, \2", 1),
    "load from other columns": (r"(tcgen05\.ld[^\[]*\[)(%r\d+)(\];)", more(32), 1),
    "load from other lanes": (r"(tcgen05\.ld[^\[]*\[)(%r\d+)(\];)", more(32 << 16), 1),
    "store to other columns": (r"(tcgen05\.st\S+ \[)(%r\d+)(\][^;]*;)", more(16), 1),
    "loaded registers swapped": (r"(tcgen05\.ld\S+ \{%r\d+, )(%r\d+), (%r\d+)", r"\1\3, \2", 1),
    "stored registers swapped": (r"(tcgen05\.st\S+ \[%r\d+\], \{%r\d+, )(%r\d+), (%r\d+)", r"\1\3, \2", 1),
    **{f"instruction bit {bit}": (INSTRUCTION, instruction_bit(bit), 1) for bit in range(32)},
    **{f"operand bit {bit}": (OPERAND, operand_bit(bit), 9) for bit in range(64)},
    "halves swapped": (r"(cvt\.rn\.bf16x2\.f32 %\w+, )(%\w+), (%\w+);", r"\1\3, \2;", 11),
    "not scaled": (r"fma\.rn\.ftz\.f32x2 (%rd\d+), (%rd\d+), [^;]*;", r"mov.b64 \1, \2;", 5),
    "output not rescaled": (r"mul\.rn\.ftz\.f32x2 (%rd\d+), (%rd\d+), [^;]*;", r"mov.b64 \1, \2;", 9),
    "sum without a part": (r"add\.rn\.ftz\.f32x2 (%rd\d+), (%rd\d+), [^;]*;", r"mov.b64 \1, \2;", 4),
    "no exponential": (r"ex2\.approx\.ftz\.f32 (%r\d+), (%r\d+);", r"mov.b32 \1, \2;", 7),
    "score not masked": (r"selp\.b32\s+%r\d+, (?:%r\d+, -8388608|-8388608, %r\d+), %p\d+;", "", 5),
    "mask not inverted": (r"not\.b32(\s+%r\d+, %r\d+;)", r"mov.b32\1", 1),
    "no store to shared memory": (r"\tst\.shared\S+\s+\[[^;]*(?<!\{0, 0, 0, 0\});", "", 1),
    "no log-sum-exp": (r"\tst\.global[^;]*;", "", 1),
    "items skipped": (r"(atom\S+\s+%r\d+, \[\S+\], )1;", r"\g<1>2;", 1),
    "any instead of all": (r"(vote\.sync\.)all", r"\1any", 1),
    "all instead of any": (r"(vote\.sync\.)any", r"\1all", 1),
    "no shuffle": (r"shfl\.sync[^;]*;", "", 1),
    "comparison inverted": (r"(\tsetp\.)(eq|ne|lt|ge|gt|le)((?:\.\w+)*\.[bsu]32)", inverted, 1),
    "other constant": (
        r"(\t(?:add|shl|and|shr|mad\.lo|mul\.lo)\.[bsu]32\s+%r\d+, %r\d+, )(\d+)(;)",
        number(lambda x: x + 1),
        1,
    ),
    "other parameter": (r"(ld\.param\.\w+\s+[^;]*\[gna_forward_param_1\+)(\d+)(\];)", number(lambda x: x + 4), 1),
    "other shared memory": (r"(ld\.shared\.b32\s+%r\d+, \[%r\d+\+)(\d+)(\];)", number(lambda x: x + 4), 1),
}
MUTATION = Mutation(RUNS, CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_mutants_are_caught(name: str) -> None:
    assert MUTATION.survivors(name) == []
