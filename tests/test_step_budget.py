"""What a step of the Blackwell kernel costs, counted from its machine code: as csrc/README says, beside CUTLASS's."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
from machine_code import disassembler, needs_nvrtc
from step_budget import Code, Instruction, Step, cutlass, exponential_clocks, ours, product_clocks, shared_clocks
from third_party import Cutlass

from gna_flex.cuda import jit
from gna_flex.cuda.blackwell import BlackwellConfig

needs_nvrtc()

pytestmark = [
    pytest.mark.usefixtures("kernel_cache"),
    pytest.mark.skipif(not disassembler(), reason="there is no nvdisasm"),
]

README = (jit.source_folder() / "README.md").read_text()
WRITTEN = f"compiled by NVRTC {jit.nvrtc_version()}." in README
TOLERANCE = {"rel": 0.05} if WRITTEN else {"rel": 0.1, "abs": 1}
"""Releases of the compiler that the table names may differ by so much from it, older and newer ones by more."""


@functools.cache
def our_step(head_dim: int, folder: Path, float8: bool = False) -> Step:
    (config,) = BlackwellConfig.defaults(head_dim)
    path = folder / f"{head_dim}-{float8}.cubin"
    path.write_bytes(replace(config, float8=float8).compile("sm_100a").code)
    return ours(Code(path), head_dim, float8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


def table(column: int) -> dict[str, list[int]]:
    """A column of the table of csrc/README.md: numbers by the name of the row."""
    rows = re.findall(r"^\| ((?:clocks|issue|instructions|registers)[^|]*) \|(.*)\|$", README, re.MULTILINE)
    return {name: [int(n) for n in re.findall(r"\d+", cells.split("|")[column])] for name, cells in rows}


def numbers(step: Step, head_dim: int) -> dict[str, int]:
    return {
        "clocks: products": product_clocks(head_dim),
        "clocks: exponentials by their unit": round(exponential_clocks(step.exponentials / 128)),
        "clocks: shared memory": shared_clocks(head_dim),
        "issue slots of the busiest scheduler, no mask": step.slots(),
        "issue slots, with a mask and a new maximum": step.slots(masked=True, rescaled=True),
        "instructions of softmax, no mask": step.softmax,
        "instructions of softmax, with a mask": step.masked,
        "instructions of correction, no new maximum": step.correction,
        "instructions of correction, new maximum": step.rescaled,
        "instructions of the warp that multiplies": step.multiply,
    }


def assert_as_written(step: Step, head_dim: int, column: int) -> None:
    written = table(column)
    assert written.keys() - numbers(step, head_dim).keys() == {"registers: softmax, correction, others"}
    for name, number in numbers(step, head_dim).items():
        assert written[name] == [pytest.approx(number, **TOLERANCE)], name


@pytest.mark.parametrize(("column", "head_dim"), [(0, 64), (1, 128)])
def test_our_steps(column: int, head_dim: int, folder: Path) -> None:
    assert_as_written(our_step(head_dim, folder), head_dim, column)
    source = (jit.source_folder() / "blackwell" / "forward.cu").read_text()
    line = next(line for line in source.splitlines() if "kSoftmaxRegisters =" in line)
    assert [int(n) for n in re.findall(r"= (\d+)", line)] == table(column)["registers: softmax, correction, others"]


def test_nothing_but_masks_uses_all_issue_slots(folder: Path) -> None:
    for head_dim in (64, 128):
        step = our_step(head_dim, folder)
        longest = max(product_clocks(head_dim), exponential_clocks(step.exponentials / 128))
        assert step.slots(rescaled=True) < 0.8 * longest
        assert step.slots(masked=True) < 1.05 * longest


def test_a_step_in_8_bits(folder: Path) -> None:
    """At head dim 128 exponentials limit it, even where every step has a new maximum."""
    text = (jit.source_folder() / "README.md").read_text()
    found = re.search(r"both head dims: (\d+) clocks, (\d+) % less\s.*\s.*to spare \((\d+) of (\d+)\)", text)
    assert found
    clocks, saved, slots, of = map(int, found.groups())
    step = our_step(128, folder, float8=True)
    exponentials = exponential_clocks(step.exponentials / 128)
    assert product_clocks(128, float8=True) < exponentials == clocks == of
    assert saved == round(100 * (1 - exponentials / product_clocks(128)))
    assert slots == pytest.approx(step.slots(rescaled=True), **TOLERANCE)


@pytest.mark.slow
def test_steps_of_cutlass(folder: Path) -> None:
    theirs = cutlass(Code(Cutlass(128).files() / "cutlass_fmha.cubin"), 128)
    mine = our_step(128, folder)
    assert_as_written(theirs, 128, 2)
    assert mine.slots() < theirs.slots()
    assert mine.slots(masked=True, rescaled=True) < theirs.slots(masked=True, rescaled=True)


def test_clocks() -> None:
    """Products and exponentials as FlashAttention-4's authors have them; shared memory at their 128 bytes a clock."""
    assert product_clocks(128) == exponential_clocks() == 1024
    assert shared_clocks(128) == 512 + 256 + 256, "scores, weights times values, copies"
    assert shared_clocks(128, tiles=1) == 1280


def test_paths_through_code() -> None:
    code = Code.__new__(Code)
    plain, branch = Instruction("FADD", False, -1), Instruction("BRA", True, 4)
    # A branch over two instructions, one that waits, an exit that no path takes.
    code.instructions = [plain, branch, plain, plain, Instruction("SYNCS.A", False, -1), Instruction("BRA", True, 4)]
    code.instructions += [
        Instruction("BRA", False, 8),
        Instruction("EXIT", False, -1),
        plain,
        Instruction("BRA", True, 0),
    ]
    assert code.loops == [(4, 6), (0, 10)]
    assert code.path(0, 10) == {"FADD": 2, "BRA": 4, "SYNCS": 1}
    assert code.path(0, 10, longest=True) == {"FADD": 4, "BRA": 4, "SYNCS": 1}
    assert code.innermost(SYNCS=1) == (4, 6)
    assert code.innermost(FADD=2) == (0, 10)
