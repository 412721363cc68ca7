"""One thing at a time is changed in the Hopper kernel's PTX: the interpreter must notice, by an error or by the result.

Two kinds of change cannot matter, and are left out: the first wait for an empty slot, of a phase before the first one,
where the compiler has peeled it off; and a second ``wgmma.fence`` with no register written since the one before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from ptx import launch
from ptx.errors import PtxError, UnsupportedError

# Importing it skips this file, too, without NVRTC.
from test_ptx_kernel import GNA, TWO, Config, KernelTiles, Problem, check

CONFIG = Config(64, 32)
PROBLEM = Problem(GNA((8, 16), (5, 9)), CONFIG, TWO, heads=2, key_heads=2)
RUNS = (
    (PROBLEM, 0),
    (Problem(GNA((8, 16), (8, 16)), CONFIG, TWO, heads=2, key_heads=2, scale=2.0), 0),
    (PROBLEM._replace(scale=2.0), 0),
    (Problem(GNA((9, 9), (5, 4)), CONFIG, KernelTiles((1, 5, 7), 2, 2, (1, 4, 7), 32)), 0),
    *((PROBLEM._replace(heads=6, key_heads=6), seed) for seed in range(3)),
)
"""Problems and seeds, tried in turn: with masks, without any, with rescaling, with empty rows, with many items."""

WAIT = r"L: (mbarrier\.try_wait\S+ p, \[\S+\], )(%\w+);\n@p bra E;\nbra L;\nE:"
LOAD, STORE = r"cp\.async\.bulk\.tensor\.5d\.shared::cluster", r"cp\.async\.bulk\.tensor\.5d\.global"


def more(by: int) -> str:
    """A template: the instruction (1) with a register (2) and the rest (3), the register larger by a number."""
    return rf"{{ .reg .b32 more;\nadd.s32 more, \2, {by};\n\1more\3 }}"


def coordinate(place: int) -> str:
    return rf"(?<=[\t\n])(cp\.async\.bulk\.tensor\.5d[^{{]*\{{(?:%\w+, ){{{place}}})(%\w+)([^;]*;)"


def descriptor(bit: int) -> Callable[[re.Match[str]], str]:
    def change(match: re.Match[str]) -> str:
        return f"{match[1]}{(int(match[2]) ^ 1 << bit) & ((1 << 64) - 1)};"

    return change


DESCRIPTOR = r"(\tor\.b64\s+%\w+, %\w+, )(-?\d+);"
CHANGES: dict[str, tuple[str, str | Callable[[re.Match[str]], str], int]] = {
    "no wait": (WAIT, "", 1),
    "other parity": (WAIT, r".reg .b32 q;\nxor.b32 q, \2, 1;\nL: \1q;\n@p bra E;\nbra L;\nE:", 1),
    "no arrival": (r"\tmbarrier\.arrive\.shared\S+ _, \[\S+\];", "", 1),
    "two arrivals": (r"\t(mbarrier\.arrive\.shared\S+ _, \[\S+\];)", r"\t\1\n\t\1", 1),
    "more bytes": (r"(mbarrier\.arrive\.expect_tx\S+ _, \[\S+\], )(%\w+)(;)", more(16), 1),
    "more arrivals": (r"(mbarrier\.init\S+ \[\S+\], )(%\w+)(;)", more(1), 4),
    "no barrier": (r"mbarrier\.init[^;]*;", "", 4),
    "no proxy fence": (r"fence\.proxy\.async\.shared::cta;", "", 1),
    "no barrier fence": (r"fence\.mbarrier_init\.release\.cluster;", "", 1),
    "no product fence": (r"wgmma\.fence\.sync\.aligned;", "", 1),
    "no product commit": (r"wgmma\.commit_group\.sync\.aligned;", "", 1),
    "no product wait": (r"wgmma\.wait_group\.sync\.aligned \d;", "", 1),
    "one group too many": (r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;", 1),
    "no store wait": (r"cp\.async\.bulk\.wait_group(?:\.read)? 0;", "", 1),
    "no store commit": (r"cp\.async\.bulk\.commit_group;", "", 1),
    "no load": (rf"(?<=[\t\n]){LOAD}[^;]*;", "", 1),
    "no store": (rf"(?<=[\t\n]){STORE}[^;]*;", "", 1),
    "no bar.sync": (r"bar\.sync[^;]*;", "", 1),
    "no registers given back": (r"setmaxnreg\.dec[^;]*;", "", 1),
    "no product": (r"wgmma\.mma_async[^;]*;", "", 5),
    "no stmatrix": (r"stmatrix[^;]*;", "", 3),
    "no shuffle": (r"shfl\.sync\.bfly[^;]*;", "", 3),
    "other column": (coordinate(0), more(8), 1),
    "other row": (coordinate(1), more(1), 1),
    "other head": (coordinate(4), more(1), 1),
    "matrices swapped": (r"(stmatrix\S+ \[\S+\], \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2", 2),
    "halves swapped": (r"(cvt\.rn\.bf16x2\.f32 %\w+, )(%\w+), (%\w+);", r"\1\3, \2;", 11),
    "A swapped": (r"(wgmma\S+ \{[^}]*\}, \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2", 2),
    "accumulator swapped": (r"(wgmma\S+ \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2", 3),
    "V not transposed": (r"(wgmma\.[^;]*), 1, 1, 1;", r"\1, 1, 1, 0;", 2),
    "other sign": (r"(wgmma\.[^;]*, p), 1, 1, 0, 0;", r"\1, -1, 1, 0, 0;", 4),
    **{f"descriptor bit {bit}": (DESCRIPTOR, descriptor(bit), 5) for bit in (5, 33, 37, 61, 62, 63)},
}
"""By name: what is looked for, what takes its place, and the step from one occurrence that is tried to the next."""
QUICK = ("no proxy fence", "no product wait", "no barrier fence", "no store wait", "other column", "more bytes")


@cache
def text() -> str:
    plan = launch.HostPlan((PROBLEM.gna,), CONFIG, TWO, CONFIG.head_dim, False)
    return launch.ptx(plan.config)


def cannot_matter(name: str, at: int, match: re.Match[str]) -> bool:
    """The two kinds of change in the text of this file."""
    if name == "no wait":
        block = re.split(r"\n\$\w+:", text()[:at])[-1]  # straight to the wait, from the last label on
        definitions = re.findall(rf"\n\t(\S+\s+{match[2]}, .*)", block)
        return bool(definitions) and definitions[-1].split()[::2] == ["mov.u32", "1;"]
    if name == "no product fence":
        before = re.findall(r"wgmma\.(\w+)", text()[:at])
        return bool(before) and before[-1] == "commit_group"
    return False


def mutants(name: str) -> Iterator[tuple[int, str]]:
    """Lines and texts of the mutants of a kind."""
    pattern, new, step = CHANGES[name]
    found = list(re.finditer(pattern, text()))
    assert found, f"nothing like {pattern} in the kernel"
    for match in found[::step]:
        if not cannot_matter(name, match.start(), match):
            change = match.expand(new) if isinstance(new, str) else new(match)
            changed = text()[: match.start()] + change + text()[match.end() :]
            assert changed != text()
            yield text().count("\n", 0, match.start()) + 1, changed


def caught(mutant: str) -> str:
    """The error that gives a mutant away, or nothing."""
    for problem, seed in RUNS:
        try:
            check(problem, seed, change=lambda _: mutant)
        except UnsupportedError:
            raise  # a mutant that is no PTX
        except (PtxError, AssertionError) as error:
            return type(error).__name__
    return ""


@pytest.mark.slow
def test_nothing_is_caught_where_nothing_is_wrong() -> None:
    assert caught(text()) == ""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CHANGES]
)
def test_mutants_are_caught(name: str) -> None:
    lines = [line for line, mutant in mutants(name) if not caught(mutant)]
    assert not lines, f"{name}: lines {lines} may change without anybody noticing"
