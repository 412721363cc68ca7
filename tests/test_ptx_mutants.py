"""One thing at a time is changed in the Hopper kernel's PTX: the interpreter must notice, by an error or by the result.

Two kinds of change cannot matter, and are left out: the first wait for an empty slot, of a phase before the first one,
where the compiler has peeled it off; and a second ``wgmma.fence`` with no register written since the one before.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from machine_code import needs_nvrtc

needs_nvrtc()

from kernel_mutants import COMMON, Change, Mutation  # noqa: E402
from kernel_problems import HOPPER, ONE_BOX, TWO, Problem  # noqa: E402

from gna_flex import GNA  # noqa: E402
from gna_flex.cuda.kernel import Config  # noqa: E402
from gna_flex.cuda.tables import KernelTiles  # noqa: E402

CONFIG = Config(64, 32)
PROBLEM = Problem(GNA((8, 16), (5, 9)), CONFIG, TWO, heads=2, key_heads=2)
RUNS = (
    (PROBLEM, 0),
    (Problem(GNA((8, 16), (8, 16)), CONFIG, TWO, heads=2, key_heads=2, scale=2.0), 0),
    (PROBLEM._replace(scale=2.0), 0),
    (PROBLEM._replace(scale=30.0), 0),
    (Problem(GNA((9, 9), (5, 4)), CONFIG, KernelTiles((1, 5, 7), 2, 2, (1, 4, 7), 32)), 0),
    (Problem(GNA((8, 32), (5, 9)), CONFIG, KernelTiles((1, 4, 16), 2, 1, (1, 2, 16), 32)), 0),
    *((PROBLEM._replace(heads=6, key_heads=6), seed) for seed in range(3)),
)
"""With masks, without any, with larger scores, with scores computed again, with empty rows, with masks that take two
steps of a product, with many items."""


def descriptor(bit: int) -> Callable[[re.Match[str]], str]:
    def change(match: re.Match[str]) -> str:
        return f"{match[1]}{(int(match[2]) ^ 1 << bit) & ((1 << 64) - 1)};"

    return change


DESCRIPTOR = r"(\tor\.b64\s+%\w+, %\w+, )(-?\d+);"
CHANGES: dict[str, Change] = COMMON | {
    "no product fence": (r"wgmma\.fence\.sync\.aligned;", "", 1),
    "no product commit": (r"wgmma\.commit_group\.sync\.aligned;", "", 1),
    "no product wait": (r"wgmma\.wait_group\.sync\.aligned \d;", "", 1),
    "one group too many": (r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;", 1),
    "no product": (r"wgmma\.mma_async[^;]*;", "", 5),
    "no stmatrix": (r"stmatrix[^;]*;", "", 3),
    "no shuffle": (r"shfl\.sync\.bfly[^;]*;", "", 3),
    "matrices swapped": (r"(stmatrix\S+ \[\S+\], \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2", 2),
    "halves swapped": (r"(cvt\.rn\.bf16x2\.f32 %\w+, )(%\w+), (%\w+);", r"\1\3, \2;", 11),
    "A swapped": (r"(wgmma\S+ \{[^}]*\}, \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2", 2),
    "accumulator swapped": (r"(wgmma\S+ \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2", 3),
    "V not transposed": (r"(wgmma\.[^;]*), 1, 1, 1;", r"\1, 1, 1, 0;", 2),
    "other sign": (r"(wgmma\.[^;]*, p), 1, 1, 0, 0;", r"\1, -1, 1, 0, 0;", 4),
    **{f"descriptor bit {bit}": (DESCRIPTOR, descriptor(bit), 5) for bit in (5, 33, 37, 61, 62, 63)},
}
QUICK = ("no proxy fence", "no product wait", "no barrier fence", "no store wait", "other column", "more bytes")


HOLDING_RUNS = (*((problem._replace(config=ONE_BOX.config), seed) for problem, seed in RUNS), (ONE_BOX, 0))
HOLDING_CHANGES: dict[str, Change] = CHANGES | {
    "other sign": (r"(wgmma\.[^;]*, p), 1, 1, 0;", r"\1, -1, 1, 0;", 4),
    "no ldmatrix": (r"ldmatrix[^;]*;", "", 3),
    "loaded matrices swapped": (r"(ldmatrix\S+ \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2", 3),
}
HOLDING_QUICK = ("no ldmatrix", "no bar.sync", "no store wait")


def cannot_matter(name: str, text: str, match: re.Match[str]) -> bool:
    """The two kinds of change in the text of this file."""
    if name == "no wait":
        block = re.split(r"\n\$\w+:", text[: match.start()])[-1]  # straight to the wait, from the last label on
        definitions = re.findall(rf"\n\t(\S+\s+{match[2]}, .*)", block)
        return bool(definitions) and definitions[-1].split()[::2] == ["mov.u32", "1;"]
    if name == "no product fence":
        before = re.findall(r"wgmma\.(\w+)", text[: match.start()])
        return bool(before) and before[-1] == "commit_group"
    return False


def cannot_matter_holding(name: str, text: str, match: re.Match[str]) -> bool:
    """Nor can the consumers' waits for an item's record: it was written before its queries, which they have.

    Nor the sign of a mask, but for time: infinite scores have the box computed again.
    """
    if name == "other sign":
        fragment = re.findall(r"\{([^{}]*)\}", match[1])[-1].split(", ")
        if any(f"prmt.b32 {register}," in text for register in fragment):  # bytes of what is hidden
            return True
    roles = re.findall(r"setmaxnreg\.(\w+)", text[: match.start()])
    if name == "no wait" and roles and roles[-1] == "inc":
        after = text[match.end() :].split("// begin inline asm")[0]
        if "ld.shared.u32" in after:
            return True
    return cannot_matter(name, text, match)


MUTATION = Mutation(RUNS, CHANGES, cannot_matter)
HOLDING = Mutation(HOLDING_RUNS, HOLDING_CHANGES, cannot_matter_holding, thin=12)
"""The kernel with queries in registers. The last run is of items that nothing but barriers of queries orders."""

TWO_SHAPES = Mutation(
    [(problem, 0) for name, problem in HOPPER.items() if "two shapes" in name and problem.config == CONFIG],
    {
        # Not bit 5 of a mask, of which scores are selected.
        "mask of the first shape": (r"(and\.b32\s+%\w+, %\w+, )32;(?!\n.*\n\tselp\.f32)", r"\g<1>0;", 1),
        "no sign of the second shape": (r"(or\.b32\s+%\w+, %\w+, )32;", r"\g<1>0;", 1),
        "other maps": (r"(selp\.b64\s+%\w+, )(%\w+), (%\w+)", r"\1\3, \2", 1),
    },
)
"""What only a kernel for key boxes of two shapes has."""


@pytest.mark.slow
def test_nothing_is_caught_where_nothing_is_wrong() -> None:
    assert MUTATION.caught(MUTATION.text, MUTATION.runs) is None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CHANGES]
)
def test_mutants_are_caught(name: str) -> None:
    assert MUTATION.survivors(name) == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in HOLDING_QUICK else pytest.mark.slow) for name in HOLDING_CHANGES]
)
def test_mutants_are_caught_with_queries_in_registers(name: str) -> None:
    assert HOLDING.survivors(name) == []


@pytest.mark.parametrize("name", TWO_SHAPES.changes)
def test_mutants_are_caught_with_two_shapes_of_key_boxes(name: str) -> None:
    assert len(TWO_SHAPES.runs) == 2
    assert len(list(TWO_SHAPES.mutants(name))) > 0
    assert TWO_SHAPES.survivors(name) == []
