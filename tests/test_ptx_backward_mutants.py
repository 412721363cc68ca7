"""One thing at a time is changed in the backward kernel's PTX: the interpreter must notice, by an error or the result.

The kinds of change are those of the forward kernel, by default some of them, and all with ``PTX_MUTANTS=all``. More
than there cannot matter:

- Consumers take turns, and the next item is taken late, for speed only: nobody needs these two waits. It does not
  matter either whose turn comes first, but in a fused pass, whose consumers need each other's gradients of scores.
- Products of weights are waited for at a box's end. Where rows are keys that is for the compiler, which is short of
  registers; in a fused pass they could be one group with the next products, which are waited for there, too.
- In a fused pass consumer 1 waits for gradients of scores of both. Its turn comes when those of consumer 0 are there,
  and a barrier orders its own.
- For its last gradients of queries a fused pass has registers that only products write: that fence is for the compiler.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import pytest
from machine_code import needs_nvrtc

needs_nvrtc()

from backward_problems import LINE, PASSES, check_pass, pass_shapes  # noqa: E402
from kernel_mutants import ALL, ENDLESS, Change, Mutation, more  # noqa: E402
from kernel_problems import TWO, Problem  # noqa: E402
from ptx.backward import HostPass  # noqa: E402
from ptx.launch import ptx  # noqa: E402
from test_ptx_mutants import CHANGES, QUICK, cannot_matter  # noqa: E402

from gna_flex import GNA  # noqa: E402
from gna_flex.cuda.kernel import Config  # noqa: E402
from gna_flex.cuda.sums import Ring  # noqa: E402
from gna_flex.cuda.tables import KernelTiles  # noqa: E402

CONFIG = Config(64, 32, query_stages=1)
BARRIERS = (
    *("x_full", "x_empty", "z_full", "z_empty") * CONFIG.query_stages,
    *["y_full"] * CONFIG.key_stages,
    *["y_empty"] * CONFIG.key_stages,
    *("r_full", "r_full", "r_empty", "r_empty", "few_left", "turn", "turn", "ds_full"),
)
"""Barriers in the order in which the kernel has them, but for most of fused passes."""
PROBLEM = Problem(GNA((8, 16), (5, 9)), CONFIG, TWO, heads=2, key_heads=2)
MANY = PROBLEM._replace(heads=6, key_heads=6)
RUNS = (
    (PROBLEM, 0),
    (Problem(GNA((8, 16), (8, 16)), CONFIG, KernelTiles((1, 8, 8), 2, 2, (1, 4, 8), 32), heads=2, key_heads=1), 0),
    (Problem(GNA((9, 9), (5, 4)), CONFIG, KernelTiles((1, 5, 7), 2, 2, (1, 4, 7), 32)), 0),
    *((MANY, seed) for seed in range(3)),
)
"""With masks, with all rows but no masks and with grouped heads, with empty rows, with many items."""
LONG = Problem(GNA(300, 40), CONFIG, LINE, heads=2, key_heads=2, blocks=2)
RINGS = {LONG: Ring(2, 1, 1, 256), MANY._replace(blocks=4): Ring(6, 1, 1, 64)}
"""Problems of fused passes in which items wait for CTAs that round, the quicker one first, and how these keep sums."""
ACQUIRE = r"ld\.acquire\.gpu\.global\.s32 (%\w+), \[\S+\];"
OF_SUMS: dict[str, Change] = {
    "no acquire": (ACQUIRE, r"mov.s32 \1, 1000000;", 1),
    "no release": (r"red\.release[^;]*;", "", 1),
    "no fence of all memory": (r"fence\.proxy\.async;", "", 1),
    "no load of sums": (r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier[^;]*;", "", 1),
    "no zeros": (r"cp\.async\.bulk\.global\.shared::cta\.bulk_group[^;]*;", "", 1),
    "other bytes": (r"(cp\.async\.bulk\.\S+ \[\S+\], \[\S+\], )(%\w+)((?:, \[\S+\])?;)", more(-16), 1),
    # Those of rounding: no result of a pass is stored after them.
    "no exchange": (r"shfl\.sync\.bfly[^;]*;(?![\s\S]*st\.global\.cs\.v4)", "", 3),
}
"""Changes of what only fused passes have."""


@dataclass
class PassMutation(Mutation):
    """Mutants of one pass."""

    kind: str = ""

    @cached_property
    def text(self) -> str:
        problem, _ = self.runs[0]
        config, tiles = pass_shapes(problem, self.kind)
        return ptx(HostPass((problem.gna,), config, tiles, config.head_dim, False).config)

    def run(self, problem: Problem, seed: int, mutant: str) -> None:
        ring = RINGS.get(problem) if self.kind == "fused" else None
        check_pass(problem, self.kind, seed, change=lambda _: mutant, most=ENDLESS, ring=ring)


def place(text: str, register: str) -> int:
    """The constants that an address adds up: the kind of a barrier, as only which one of a kind is computed."""
    found = list(re.finditer(rf"\tadd\.s32 \t{register}, ([^,]+), (.+);", text))
    if not found:
        return 0
    before = text[: found[-1].start()]
    return sum(place(before, term) if term.startswith("%") else int(term) for term in found[-1].groups())


def awaits(text: str, match: re.Match[str]) -> str:
    """The kind of barrier that a wait is for, if it is one of :data:`BARRIERS`."""
    inits = {place(text, register) for register in re.findall(r"mbarrier\.init\S+ \[(%\w+)\]", text)}
    names = dict(zip(sorted(inits), BARRIERS, strict=False))
    return names.get(place(text[: match.start()], re.findall(r"\[(%\w+)\]", match[1])[0]), "")


def with_registers(before: str) -> bool:
    """Whether the last product in a text has an operand in registers."""
    return "}, {" in before.rpartition("wgmma.mma_async")[2].partition(";")[0]


def cannot_matter_here(name: str, text: str, match: re.Match[str]) -> bool:
    """What cannot matter in the forward either, and the changes in the text of this file, in its order."""
    fused = "cp.reduce" in text
    before, after = text[: match.start()], text[match.end() :]
    until, _, product = after.partition("wgmma.mma_async")
    if name == "no wait" and awaits(text, match) in ("turn", "few_left"):
        return True
    if name == "no wait" and awaits(text, match) == "ds_full" and with_registers(before):
        return True
    if name == "other parity" and awaits(text, match) == "turn" and not fused:
        return True
    if name == "no product wait" and match[0].endswith(" 1;") and not product:
        return True
    if name == "no product commit" and product and "wgmma" not in until:
        return with_registers(before)  # that of scores is waited for alone
    if name == "no product fence" and f"\t{product.partition('{')[2].partition(',')[0]}," not in text:
        return True
    return cannot_matter(name, text, match)


OF_RESULTS: dict[str, Change] = {
    "no result": (r"st\.global\.cs\.v4\.u32[^;]*;", "", 3),
    "words swapped": (r"(st\.global\.cs\.v4\.u32 \[\S+\], \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2", 3),
}
"""Changes of how results of all passes leave."""
ONLY_FUSED = ("no store wait", "no store commit", "no stmatrix", "matrices swapped")
"""What the other passes have not: copies to memory, and matrices in shared memory."""
CHANGES_HERE = {name: change for name, change in CHANGES.items() if name != "no store"} | OF_RESULTS
CASES = [
    (kind, name)
    for kind in PASSES
    for name in (CHANGES_HERE if ALL else (*QUICK, *OF_RESULTS))
    if kind == "fused" or name not in ONLY_FUSED
]
MUTATIONS = {kind: PassMutation(RUNS, CHANGES_HERE, cannot_matter_here, kind=kind) for kind in PASSES}
RING_RUNS = tuple((problem, seed) for seed in (0, 1, 6) for problem in RINGS)
FUSED_RUNS = (RUNS[0], RING_RUNS[0], *RUNS[1:], *RING_RUNS[1:])
MUTATIONS["fused"] = PassMutation(FUSED_RUNS, CHANGES_HERE, cannot_matter_here, kind="fused")
MUTATIONS["sums"] = PassMutation((*RING_RUNS, *RUNS), OF_SUMS, cannot_matter_here, kind="fused")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_mutants_are_caught(kind: str, name: str) -> None:
    assert MUTATIONS[kind].survivors(name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_SUMS)
def test_changes_of_sums_are_caught(name: str) -> None:
    assert MUTATIONS["sums"].survivors(name) == []


@pytest.mark.parametrize(("problem", "seed"), RING_RUNS)
def test_nothing_is_caught_where_nothing_is_wrong(problem: Problem, seed: int) -> None:
    check_pass(problem, "fused", seed, ring=RINGS[problem], most=ENDLESS)
