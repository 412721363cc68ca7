"""One thing in the Hopper kernel's PTX is changed at a time: the interpreter must notice, by an error or by the result."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from test_ptx_kernel import GNA, TWO, Config, Problem, check

from ptx import hopper
from ptx.errors import PtxError

PROBLEM = Problem(GNA((8, 16), (5, 9)), Config(64, 32), TWO, heads=2, key_heads=2)
SEEDS = (0, 1)


def occurrences(text: str, pattern: str) -> list[re.Match[str]]:
    return list(re.finditer(pattern, text))


def replaced(text: str, match: re.Match[str], new: str) -> str:
    return text[: match.start()] + new + text[match.end() :]


WAIT = r"L: (mbarrier\.try_wait\S+ p, \[\S+\], )(%\w+);\n@p bra E;\nbra L;\nE:"


def mutants(text: str) -> Iterator[tuple[str, str]]:
    """Names and texts of every mutant."""
    line = text.count

    def each(name: str, pattern: str, new: str) -> Iterator[tuple[str, str]]:
        found = occurrences(text, pattern)
        assert found, f"{name}: nothing like {pattern} in the kernel"
        for match in found:
            yield f"{name}, line {line(chr(10), 0, match.start()) + 1}", replaced(text, match, match.expand(new))

    yield from each("wait removed", WAIT, "")
    yield from each(
        "parity flipped", WAIT, r".reg .b32 other;\nxor.b32 other, \2, 1;\nL: \1other;\n@p bra E;\nbra L;\nE:"
    )
    yield from each("arrival removed", r"\tmbarrier\.arrive\.shared\S+ _, \[\S+\];", "")
    yield from each("arrival doubled", r"\t(mbarrier\.arrive\.shared\S+ _, \[\S+\];)", r"\t\1\n\t\1")
    yield from each(
        "expected bytes off",
        r"(mbarrier\.arrive\.expect_tx\S+ _, \[\S+\], )(%\w+);",
        r"{ .reg .b32 more;\nadd.s32 more, \2, 16;\n\1more; }",
    )
    yield from each(
        "arrivals off", r"(mbarrier\.init\S+ \[\S+\], )(%\w+);", r"{ .reg .b32 more;\nadd.s32 more, \2, 1;\n\1more; }"
    )
    for instruction in (
        r"fence\.proxy\.async\.shared::cta",
        r"fence\.mbarrier_init\.release\.cluster",
        r"wgmma\.fence\.sync\.aligned",
        r"wgmma\.commit_group\.sync\.aligned",
        r"wgmma\.wait_group\.sync\.aligned \d",
        r"cp\.async\.bulk\.wait_group(?:\.read)? 0",
        r"cp\.async\.bulk\.commit_group",
        r"cp\.async\.bulk\.tensor\.5d\.shared::cluster[^;]*",
        r"cp\.async\.bulk\.tensor\.5d\.global[^;]*",
        r"bar\.sync[^;]*",
        r"setmaxnreg\.dec[^;]*",
        r"wgmma\.mma_async[^;]*",
        r"stmatrix[^;]*",
        r"shfl\.sync\.bfly[^;]*",
        r"mbarrier\.init[^;]*",
    ):
        yield from each(f"no {instruction[:40]}", rf"(?<=[\t\n]){instruction};", "")
    yield from each("one group too many", r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;")
    yield from each("coordinates swapped", r"(tensor\.5d\S+ \[[^\[]*\{%\w+, )(%\w+), (%\w+)", r"\1\3, \2")
    yield from each("matrices swapped", r"(stmatrix\S+ \[\S+\], \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2")
    yield from each("operands swapped", r"(cvt\.rn\.bf16x2\.f32 %\w+, )(%\w+), (%\w+);", r"\1\3, \2;")
    yield from each("A swapped", r"(wgmma\S+ \{[^}]*\}, \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2")
    yield from each("accumulator swapped", r"(wgmma\S+ \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2")
    yield from each("V not transposed", r"(wgmma\.[^;]*), 1, 1, 1;", r"\1, 1, 1, 0;")
    yield from each("wrong sign", r"(wgmma\.[^;]*, p), 1, 1, 0, 0;", r"\1, -1, 1, 0, 0;")
    for bit in (5, 33, 37, 61, 62, 63):
        found = occurrences(text, r"\tor\.b64\s+(%\w+), (%\w+), (-?\d+);")
        for match in found[:: 1 if bit == 33 else 7]:
            new = (int(match[3]) ^ 1 << bit) & ((1 << 64) - 1)
            yield (
                f"descriptor bit {bit}, line {line(chr(10), 0, match.start()) + 1}",
                replaced(text, match, f"\tor.b64 {match[1]}, {match[2]}, {new};"),
            )
    for name, step, place in (("column", 8, 1), ("row", 1, 2), ("head", 1, 5)):
        yield from each(
            f"{name} off",
            rf"(?<=[\t\n])(cp\.async\.bulk\.tensor\.5d[^{{]*\{{(?:%\w+, ){{{place - 1}}})(%\w+)([^;]*;)",
            rf"{{ .reg .b32 more;\nadd.s32 more, \2, {step};\n\1more\3 }}",
        )


def survives(text: str) -> bool:
    """Whether a mutant gives the right result with every seed."""
    for seed in SEEDS:
        try:
            check(PROBLEM, seed, change=lambda _: text)
        except (PtxError, AssertionError):
            return False
    return True
