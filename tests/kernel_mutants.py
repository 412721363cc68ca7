"""Kernels with one thing changed in their PTX, and whether anybody notices: what the tests of all kernels share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kernel_problems import Problem, check
from ptx import launch
from ptx.errors import PtxError, UnsupportedError

Change = tuple[str, str | Callable[[re.Match[str]], str], int]
"""What is looked for, what takes its place, and the step from one occurrence that is tried to the next."""
ALL = os.getenv("PTX_MUTANTS") == "all"
"""Whether every occurrence of a change is tried."""
ENDLESS = 400_000
"""Instructions that no problem here takes."""
WAIT = r"L: (mbarrier\.try_wait\S+ p, \[\S+\], )(%\w+);\n@p bra E;\nbra L;\nE:"
LOAD, STORE = r"cp\.async\.bulk\.tensor\.5d\.shared::cluster", r"cp\.async\.bulk\.tensor\.5d\.global"


def more(by: int) -> str:
    """A template: the instruction (1) with a register (2) and the rest (3), the register larger by a number."""
    return rf"{{ .reg .b32 more; add.s32 more, \2, {by}; \1more\3 }}"


def coordinate(place: int) -> str:
    return rf"(?<=[\t\n])(cp\.async\.bulk\.tensor\.5d[^{{]*\{{(?:%\w+, ){{{place}}})(%\w+)([^;]*;)"


COMMON: dict[str, Change] = {
    "no wait": (WAIT, "", 1),
    "other parity": (WAIT, r".reg .b32 q;\nxor.b32 q, \2, 1;\nL: \1q;\n@p bra E;\nbra L;\nE:", 1),
    "no arrival": (r"\tmbarrier\.arrive\.shared\S+ _, \[\S+\];", "", 1),
    "two arrivals": (r"\t(mbarrier\.arrive\.shared\S+ _, \[\S+\];)", r"\t\1 \1", 1),
    "more bytes": (r"(mbarrier\.arrive\.expect_tx\S+ _, \[\S+\], )(%\w+)(;)", more(16), 1),
    "more arrivals": (r"(mbarrier\.init\S+ \[\S+\], )(%\w+)(;)", more(1), 4),
    "no barrier": (r"mbarrier\.init[^;]*;", "", 4),
    "no proxy fence": (r"fence\.proxy\.async\.shared::cta;", "", 1),
    "no barrier fence": (r"fence\.mbarrier_init\.release\.cluster;", "", 1),
    "no store wait": (r"cp\.async\.bulk\.wait_group(?:\.read)? 0;", "", 1),
    "no store commit": (r"cp\.async\.bulk\.commit_group;", "", 1),
    "no load": (rf"(?<=[\t\n]){LOAD}[^;]*;", "", 1),
    "no store": (rf"(?<=[\t\n]){STORE}[^;]*;", "", 1),
    "no bar.sync": (r"bar\.sync[^;]*;", "", 1),
    "no registers given back": (r"setmaxnreg\.dec[^;]*;", "", 1),
    "other column": (coordinate(0), more(8), 1),
    "other row": (coordinate(1), more(1), 1),
    "other head": (coordinate(4), more(1), 1),
}
"""Changes of what both kernels have, by name."""


@dataclass
class Mutation:
    """A kernel, the changes of its PTX, and the problems and seeds that are tried in turn until one shows a change.

    ``cannot_matter`` says which occurrences of a change are left out, by the change's name, the text and the match.
    Steps are ``thin`` times as long as the changes say, and begin somewhere in the first one.
    """

    runs: Sequence[tuple[Problem, int]]
    changes: Mapping[str, Change]
    cannot_matter: Callable[[str, str, re.Match[str]], bool] = lambda *_: False
    thin: int = 1

    @cached_property
    def text(self) -> str:
        problem, _ = self.runs[0]
        config = problem.config
        types = (config.float16, config.float8)
        plan = launch.HostPlan((problem.gna,), config, problem.tiles, config.head_dim, *types)
        return launch.ptx(plan.config)

    def mutants(self, name: str) -> Iterator[tuple[int, str]]:
        """Lines and texts of the mutants of a kind."""
        pattern, new, step = self.changes[name]
        found = list(re.finditer(pattern, self.text))
        found = [match for match in found if not self.cannot_matter(name, self.text, match)]
        assert found, f"nothing like {pattern} in the kernel"
        stride = 1 if ALL else step * self.thin
        for match in found[len(name) % min(stride, len(found)) :: stride]:
            change = match.expand(new) if isinstance(new, str) else new(match)
            changed = self.text[: match.start()] + change + self.text[match.end() :]
            assert changed != self.text
            yield self.text.count("\n", 0, match.start()) + 1, changed

    def caught(self, mutant: str, runs: Sequence[tuple[Problem, int]]) -> tuple[Problem, int] | None:
        """The first run that gives a mutant away, if any does."""
        for run in runs:
            try:
                self.run(*run, mutant)
            except (PtxError, AssertionError) as error:
                if type(error) is UnsupportedError:
                    raise  # a mutant that is no PTX
                return run
        return None

    def run(self, problem: Problem, seed: int, mutant: str) -> None:
        """Runs a mutant on a problem and compares its results."""
        check(problem, seed, change=lambda _: mutant, most=ENDLESS)

    def survivors(self, name: str) -> list[int]:
        """Lines that may change without anybody noticing."""
        runs, found = list(self.runs), []
        for line, mutant in self.mutants(name):
            catcher = self.caught(mutant, runs)
            if catcher is None:
                found.append(line)
            else:  # likely to give away the next one, too
                runs.remove(catcher)
                runs.insert(0, catcher)
        return found
