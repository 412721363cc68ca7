"""One thing at a time is changed in the Blackwell kernel's PTX: an error or a wrong result must give it away.

``PTX_MUTANTS=all python -m pytest -n 2 tests/test_ptx_blackwell_mutants.py`` tries every occurrence of every change.
:func:`cannot_matter` has the changes that change nothing, with the reason for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from machine_code import needs_nvrtc

needs_nvrtc()

from kernel_mutants import COMMON, Change, Mutation, more  # noqa: E402
from kernel_problems import Problem, tiles  # noqa: E402

from gna_flex import GNA  # noqa: E402
from gna_flex.cuda import jit  # noqa: E402
from gna_flex.cuda.blackwell import BlackwellConfig  # noqa: E402

CONFIG = BlackwellConfig(64, 32)
PROBLEM = Problem(GNA((8, 16), (5, 9)), CONFIG, tiles((1, 4, 16), (1, 4, 8), 32), heads=2, key_heads=2)
SOME_MASKED = PROBLEM._replace(gnas=GNA((8, 24), (8, 17)), tiles=tiles((1, 4, 8), (1, 4, 8), 32))
UNMASKED = Problem(GNA((8, 16), (8, 16)), CONFIG, tiles((1, 4, 16), (1, 2, 16), 32), heads=2, key_heads=2, scale=2.0)
UNFILLED = Problem(GNA((9, 9), (5, 4)), CONFIG, tiles((1, 5, 5), (1, 4, 7), 32, split=2))
RUNS = (
    (SOME_MASKED._replace(heads=1, key_heads=1), 0),
    (UNMASKED, 0),
    (PROBLEM._replace(scale=2.0), 0),
    (UNFILLED, 0),
    # One key box; values that lie otherwise than keys; a window for each head; windows that all rows of a tile share.
    (Problem(GNA((4, 8), (4, 8)), CONFIG, tiles((1, 2, 8), (1, 4, 8), 32), heads=3, key_heads=3), 0),
    (PROBLEM._replace(values_last=True, batch=2), 0),
    (PROBLEM._replace(gnas=(GNA((8, 16), (3, 5)), GNA((8, 16), (5, 9)))), 0),
    (Problem(GNA((4, 64), (4, 24), (1, 16)), CONFIG, tiles((1, 2, 16), (1, 4, 8), 32, split=2)), 0),
    (Problem(GNA((64, 4), (24, 4), (16, 1)), CONFIG, tiles((1, 16, 2), (1, 8, 4), 32)), 0),
    (Problem(GNA((30, 2, 4), (12, 2, 4), (8, 1, 1)), CONFIG, tiles((8, 1, 4), (4, 2, 4), 32, split=0)), 0),
    # Many items, of one block and of two.
    *((PROBLEM._replace(heads=6, key_heads=6, blocks=blocks), seed) for seed, blocks in enumerate((2, 1, 1))),
)
WORK = CONFIG.shared_bytes - 16 - 8 * (16 + 2 * CONFIG.key_stages + 2 * CONFIG.output_stages) - 2 * 128
MASKED, KEY_HEAD = WORK + 28, WORK + 100
"""Where shared memory holds the first item: whether it has masks, and its key head."""


def number(change: Callable[[int], int]) -> Callable[[re.Match[str]], str]:
    """The constant (2) between the parts (1) and (3) of an instruction, changed."""
    return lambda match: f"{match[1]}{change(int(match[2]))}{match[3]}"


def instruction_bit(bit: int) -> Callable[[re.Match[str]], str]:
    return number(lambda value: value ^ 1 << bit)


def operand_bit(bit: int) -> str:
    """A template: a register (2) that an instruction (1) makes, with a bit flipped."""
    return rf"\1 xor.b64 \2, \2, {1 << bit};"


def inverted(match: re.Match[str]) -> str:
    opposite = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
    return f"{match[1]}{opposite[match[2]]}{match[3]}"


INSTRUCTION = r"(mov\.b32\s+%r\d+, )(13[456]\d{6})(;)"
BITS_OF_KEYS = 1 << 62 | 1 << 46 | 64 << 32 | 1 << 16
OPERAND = r"(or\.b64\s+(%rd\d+), %rd\d+, BITS;)"
PLAIN = OPERAND.replace("BITS", str(BITS_OF_KEYS))
TRANSPOSED = OPERAND.replace("BITS", rf"(?!{BITS_OF_KEYS})46\d{{17}}")
CHANGES: dict[str, Change] = COMMON | {
    "no before fence": (r"tcgen05\.fence::before_thread_sync;", "", 1),
    "no after fence": (r"tcgen05\.fence::after_thread_sync;", "", 1),
    "no commit": (r"tcgen05\.commit[^;]*;", "", 1),
    "two commits": (r"(tcgen05\.commit[^;]*;)", r"\1 \1", 1),
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
    "shifted further": (r"(\tshl\.b32\s+%r\d+, %r\d+, )(\d+)(;)", number(lambda x: x + 1), 1),
    "address further on": (r"(\tadd\.s32\s+%r\d+, %r\d+, )(\d{2,})(;)", number(lambda x: x + 1024), 2),
    "number of the host larger": (r"(ld\.param\.b32\s+(%r\d+), [^;]*;)", r"\1 add.s32 \2, \2, 1;", 1),
    "number in shared memory larger": (r"(ld\.shared\.b32\s+(%r\d+), [^;]*;)", r"\1 add.s32 \2, \2, 1;", 1),
}


LATER = (
    *("no exponential", "no store to shared memory", "no zeros"),
    *("number of the host larger", "number in shared memory larger"),
)
"""Changes whose patterns, or whose exceptions, are in the words and addresses that NVRTC has since 13.2."""


def cannot_matter(name: str, text: str, match: re.Match[str]) -> bool:
    """Whether a change is one of those that change nothing."""
    before, after = text[: match.start()], text[match.end() :]
    calls = re.findall(r"tcgen05\.[\w:]+", before)
    if name == "no store wait":  # the last one: memory is read, and the end of the kernel waits for its writes
        return ".read" not in match[0]
    if name == "no before fence":  # the warp has done nothing with tensor memory since its last one, or at all
        return calls[-1] in ("tcgen05.fence::before_thread_sync", "tcgen05.relinquish_alloc_permit")
    if name == "no after fence":  # the first one: who allocates also multiplies, and commits tell of the allocation
        return "tcgen05.fence::after_thread_sync" not in calls
    if name == "comparison inverted":
        operands = f"{match[3]} {after.split(';')[0]}"
        full = operands.startswith(".u32") and match[2] == "ge"
        always_mask = full or operands.endswith(f", {CONFIG.keys}")
        swap_roles = operands.endswith(", 14")  # one of which loads keys and the other one items, a thread each
        no_such_loop = re.search(r", \d{4}$", operands)  # zeros, in larger slots: MUTATIONS["slots"]
        return bool(always_mask or swap_roles or no_such_loop)
    if name == "no store to shared memory":  # the key head, which only text needs
        return f"+{KEY_HEAD}]" in match[0]
    if "further" in name:  # setting up: words of masks beyond slots of 32 keys, zeros in a loop that they do not enter
        return "setmaxnreg" not in before
    if "larger" in name:
        float_ = re.search(rf"\.f32 [^;]*{match[2]}\b", after)  # its last bit
        # The window of a row that does not exist.
        row = re.search(rf"^.*\n(?:.*\n){{,9}}\s+add\.s32\s+(%r\d+), {match[2]}, -1;\n\s+min\.s32\s[^;]*\1;", after)
        return bool(float_ or row) or f"+{MASKED}]" in match[0]  # a mask where none is needed
    return False


# Rows of an operand that is not transposed are in one piece: the distance to the next one means nothing.
WITHOUT_LEADING = [bit for bit in range(64) if not 16 <= bit < 30]
BITS: dict[str, Change] = {
    **{f"instruction bit {bit}": (INSTRUCTION, instruction_bit(bit), 3) for bit in range(32)},
    **{f"operand bit {bit}": (PLAIN, operand_bit(bit), 17) for bit in WITHOUT_LEADING},
    **{f"transposed operand bit {bit}": (TRANSPOSED, operand_bit(bit), 2) for bit in range(64)},
}
POLYNOMIAL_PROBLEM = UNMASKED._replace(
    config=replace(CONFIG, keys=96, polynomial=8),
    tiles=tiles((1, 4, 16), (1, 6, 16), 96),
    heads=1,
    key_heads=1,
    scale=None,
)
POLYNOMIAL: dict[str, Change] = {
    "rounded to nearest": (r"add\.rm\.ftz", "add.rn.ftz", 7),
    "other exponent": (r"(shl\.b32\s+%r\d+, %r\d+, )23;", r"\g<1>22;", 9),
    "lower degree": (r"fma\.rn\.ftz\.f32x2 (%rd\d+), (%rd\d+), [^;]*;", r"mov.b64 \1, \2;", 19),
    "other pair": (r"(add\.rn\.ftz\.f32x2 %rd\d+, )(%rd\d+), (%rd\d+);", r"\1\2, \2;", 19),
}
ZEROS: dict[str, Change] = {"no zeros": (r"\tst\.shared\.v4\.b32\s+\[%r\d+\], \{0, 0, 0, 0\};", "", 1)}
ALL_COLUMNS = UNMASKED._replace(config=replace(CONFIG, head_dim=128), heads=1, key_heads=1)
"""All columns of tensor memory are in use, and operands have two chunks."""
MUTATIONS = {
    "main": Mutation(RUNS, CHANGES, cannot_matter, thin=8),
    "descriptors": Mutation([(ALL_COLUMNS, 0)], BITS, thin=4),
    "polynomial": Mutation([(POLYNOMIAL_PROBLEM, 0)], POLYNOMIAL),
    # So many slots that loops are entered which the compiler has unrolled.
    "slots": Mutation([(UNFILLED._replace(config=replace(CONFIG, key_stages=10), heads=2, key_heads=2), 0)], ZEROS),
}
QUICK = ("no wait for loads", "no after fence", "no commit", "no proxy fence", "accumulate", "instruction bit 17")


@pytest.mark.slow
@pytest.mark.parametrize("which", MUTATIONS)
def test_nothing_is_caught_where_nothing_is_wrong(which: str) -> None:
    assert MUTATIONS[which].caught(MUTATIONS[which].text, MUTATIONS[which].runs) is None


@pytest.mark.parametrize(
    ("which", "name"),
    [
        pytest.param(which, name, marks=() if name in QUICK else pytest.mark.slow)
        for which, mutation in MUTATIONS.items()
        for name in mutation.changes
    ],
)
def test_mutants_are_caught(which: str, name: str) -> None:
    if name in LATER and tuple(map(int, str(jit.nvrtc_version()).split("."))) < (13, 2):
        pytest.skip("the change is written for the PTX of later compilers")
    assert MUTATIONS[which].survivors(name) == []
