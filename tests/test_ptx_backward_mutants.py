"""One thing at a time is changed in the backward kernel's PTX: the interpreter must notice, by an error or the result.

The kinds of change are those of the forward kernel, by default some of them, and all with ``PTX_MUTANTS=all``. Two more
cannot matter than there. Where rows are keys, weights times gradients of outputs need not be done when gradients of
scores become operands: that wait is for the compiler, which is short of registers. And at the end all stores have been
read, so that the last wait is for what is written only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import pytest
from machine_code import needs_nvrtc

needs_nvrtc()

from backward_problems import PASSES, check_pass, pass_shapes  # noqa: E402
from kernel_mutants import ALL, ENDLESS, Mutation  # noqa: E402
from kernel_problems import TWO, Problem  # noqa: E402
from ptx.backward import HostPass  # noqa: E402
from ptx.launch import ptx  # noqa: E402
from test_ptx_mutants import CHANGES, QUICK, cannot_matter  # noqa: E402

from gna_flex import GNA  # noqa: E402
from gna_flex.cuda.kernel import Config  # noqa: E402
from gna_flex.cuda.tables import KernelTiles  # noqa: E402

CONFIG = Config(64, 32, query_stages=1)
PROBLEM = Problem(GNA((8, 16), (5, 9)), CONFIG, TWO, heads=2, key_heads=2)
RUNS = (
    (PROBLEM, 0),
    (Problem(GNA((8, 16), (8, 16)), CONFIG, TWO, heads=2, key_heads=1), 0),
    (Problem(GNA((9, 9), (5, 4)), CONFIG, KernelTiles((1, 5, 7), 2, 2, (1, 4, 7), 32)), 0),
    *((PROBLEM._replace(heads=6, key_heads=6), seed) for seed in range(3)),
)
"""With masks, without any and with grouped heads, with empty rows, with many items."""


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
        check_pass(problem, self.kind, seed, change=lambda _: mutant, most=ENDLESS)


def cannot_matter_here(name: str, text: str, match: re.Match[str]) -> bool:
    """What cannot matter in the forward either, and the two changes in the text of this file."""
    before = re.findall(r"wgmma\.mma_async[^;]*;", text[: match.start()])
    of_weights = bool(before) and before[-1].endswith(", 1, 1, 1;") and "wgmma.mma_async" in text[match.end() :]
    for_the_compiler = name == "one group too many" and of_weights
    at_the_end = name == "no store wait" and ".read" not in match[0]
    # So is the wait after the last product; but in a fused pass it is for gradients of queries, too.
    of_values = name == "no product wait" and match[0].endswith(" 1;") and "wgmma.mma_async" not in text[match.end() :]
    for_the_compiler |= of_values and "cp.reduce" not in text
    return cannot_matter(name, text, match) or at_the_end or for_the_compiler


NAMES = [name for name in CHANGES if name != "no shuffle"]  # it has none
MUTATIONS = {kind: PassMutation(RUNS, CHANGES, cannot_matter_here, kind=kind) for kind in PASSES}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", NAMES if ALL else QUICK)
def test_mutants_are_caught(name: str, kind: str) -> None:
    assert MUTATIONS[kind].survivors(name) == []
