"""The Blackwell kernel as machine code, without a GPU: registers, spills, shared memory, layouts, instructions.

Nothing here shows that it computes the right thing; it has never run.
"""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from machine_code import check_layout, disassembler, kinds, layout_checks, needs_nvrtc, opcodes

from gna_flex.cuda import jit
from gna_flex.cuda.blackwell import ARCHITECTURES, FAMILY, HEAD_DIMS, POLYNOMIAL_ERROR, BlackwellConfig
from gna_flex.cuda.config import SHARED_LIMIT
from gna_flex.routing import FLOAT8_HEAD_DIMS

needs_nvrtc()

pytestmark = pytest.mark.usefixtures("kernel_cache")

REGISTERS = 128
"""Registers of a thread with which a CTA starts: all that a multiprocessor has."""
SPILLED_BYTES = 0
STEP_INSTRUCTIONS = {128: 440, 96: 340}
"""Most instructions of a softmax step without a mask, by keys of a slot: scores in, weights out, and their sum.

At head dim 128 a warp has 1024 issue slots while the tensor cores work on its step.
"""
MASK_INSTRUCTIONS = {128: 170, 96: 130}
"""Most instructions that applying a mask adds to a step: one for each score, and few more."""


def default(head_dim: int, **changes: Any) -> BlackwellConfig:
    """What B300 gets, without polynomials."""
    (config,) = BlackwellConfig.defaults(head_dim, (10, 3))
    return replace(config, **changes)


CONFIGS = [
    *(default(head_dim) for head_dim in HEAD_DIMS),
    *(default(head_dim, text=True) for head_dim in HEAD_DIMS),
    *(default(head_dim, dilated=True, text=True, map_sets=9) for head_dim in (64, 128)),
    *(default(head_dim, float16=True, dilated=True, map_sets=3) for head_dim in (64, 128)),
    *(replace(*BlackwellConfig.defaults(head_dim, (10, 0)), text=True) for head_dim in HEAD_DIMS),
    BlackwellConfig(128, keys=96, key_stages=4, text=True),
    *(default(head_dim, float8=True, text=head_dim == 128) for head_dim in FLOAT8_HEAD_DIMS),
]


def name_of(config: BlackwellConfig) -> str:
    parts = [f"d{config.head_dim}", f"k{config.keys}", *([f"m{config.map_sets}"] if config.dilated else [])]
    parts += (
        ["text"] * config.text
        + ["f16"] * config.float16
        + ["f8"] * config.float8
        + [f"p{config.polynomial}"] * (config.polynomial > 0)
    )
    return "-".join(parts)


configs = pytest.mark.parametrize("config", CONFIGS, ids=name_of)


@configs
def test_registers_and_spills(config):
    log = config.compile("sm_100a").log
    (usage,) = jit.resource_usage(log)
    assert usage.registers * config.threads <= 1 << 16
    assert usage.registers == REGISTERS
    assert usage.shared == 0, "all of it is asked for at the launch"
    assert jit.spills(log) <= SPILLED_BYTES
    assert jit.performance_warnings(log) == []
    assert config.shared_bytes <= SHARED_LIMIT


@pytest.mark.parametrize("arch", [ARCHITECTURES[10, 3], FAMILY])
@pytest.mark.parametrize(
    ("head_dim", "changes"),
    [
        *((head_dim, {"text": text}) for text in (False, True) for head_dim in HEAD_DIMS),
        (128, {"float8": True}),
    ],
    ids=str,
)
def test_all_architectures(arch, head_dim, changes):
    config = default(head_dim, **changes)
    check_layout(config, layout_checks(config), arch)
    cubin = config.compile(arch)
    (usage,) = jit.resource_usage(cubin.log)
    assert usage.registers == REGISTERS
    assert jit.spills(cubin.log) <= SPILLED_BYTES
    assert f"for '{arch}'" in cubin.log


def test_older_architectures_refuse_it():
    with pytest.raises(jit.CompileError, match="tcgen05"):
        BlackwellConfig(128).compile("sm_90a")


@configs
def test_python_and_cuda_agree(config):
    check_layout(config, layout_checks(config), "sm_100a")


def test_python_and_cuda_agree_or_it_does_not_compile():
    """The checks are no empty words."""
    config = BlackwellConfig(128)
    with pytest.raises(jit.CompileError, match=f"Python has {4 * 2 * 128}"):
        check_layout(config, layout_checks(replace(config, map_sets=2)), "sm_100a")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BlackwellConfig(40), "head dims are multiples of 32"),
        (BlackwellConfig(192), "multiples of 32 up to 128"),
        (BlackwellConfig(128, keys=112), "slots of keys have 32, 64, 96 or 128 rows"),
        (BlackwellConfig(128, keys=160), "slots of keys have 32, 64, 96 or 128 rows"),
        (BlackwellConfig(128, key_stages=1), "values and the next keys"),
        (BlackwellConfig(128, key_stages=4), "too much shared memory"),
        (BlackwellConfig(128, output_stages=0), "output leaves through shared memory"),
        (BlackwellConfig(128, polynomial=9), "a share of 8 pairs"),
        (BlackwellConfig(96, float8=True), "in 8 bits head dims are 64 and 128"),
    ],
    ids=["head-dim", "large-head", "keys", "many-keys", "stages", "memory", "outputs", "polynomial", "8-bits"],
)
def test_what_is_not_possible_does_not_compile(config, words):
    with pytest.raises(jit.CompileError, match=words):
        config.compile("sm_100a")


@pytest.mark.skipif(not disassembler(), reason="there is no nvdisasm")
@configs
def test_instructions(config, tmp_path):
    names = opcodes(config.compile("sm_100a").code, tmp_path)
    count = kinds(names)
    assert {name for name in names if name.startswith(("UTMALDG", "UTMASTG"))} == {"UTMALDG.5D", "UTMASTG.5D"}
    assert not count["LDGSTS"] + count["HMMA"]
    assert not count["LDL"] + count["STL"], "something spills"
    # Softmax takes registers, correction and the others give some: in this order, once each.
    turns = [name for name in names if name.startswith("USETMAXREG")]
    assert [name.split(".")[1] for name in turns] == ["TRY_ALLOC", "DEALLOC", "DEALLOC"]
    first, second, third = (i for i, name in enumerate(names) if name.startswith("USETMAXREG"))
    softmax, correction, others = names[first:second], names[second:third], names[third:]
    # Per box and tile: one multiplication for 16 columns of the head dim (also of the first box), one for 16 keys; in 8
    # bits for 32.
    product, summed = ("UTCQMMA", 32) if config.float8 else ("UTCHMMA", 16)
    assert kinds(others)[product] == 2 * (2 * config.head_dim // summed + config.keys // summed)
    assert not kinds(softmax + correction)[product]
    assert kinds(others)["ELECT"] < 5, "a loop over threads around what one thread does"
    assert kinds(softmax)["LDTM"] == kinds(softmax)["STTM"] == config.keys // 32
    # Output: read and written to rescale it, and read at the end; the compiler may copy these loops over the two tiles.
    fragments, written = config.head_dim // 32, kinds(correction)["STTM"]
    assert written in (fragments, 2 * fragments)
    assert kinds(correction)["LDTM"] - written in (fragments, 2 * fragments)
    assert not kinds(others)["LDTM"] + kinds(others)["STTM"]
    # Exponentials: of each score but the polynomial's, and of the change of the maximum.
    by_polynomial = (config.keys // 32 - 2) * 4 * config.polynomial
    exponentials = Counter(softmax)["MUFU.EX2"]
    assert exponentials == config.keys + 1 - by_polynomial
    # One step: from the scores that come in to the last weight or sum.
    step = softmax[next(i for i, name in enumerate(softmax) if name.startswith("LDTM")) :]
    step = step[: max(i for i, name in enumerate(step) if name.startswith(("STTM", "FADD2"))) + 1]
    masks = kinds(step)["SEL"] + kinds(step)["FSEL"] + kinds(step)["R2P"] + kinds(step)["LOP3"]
    polynomial = by_polynomial * 6
    assert config.keys <= masks <= MASK_INSTRUCTIONS[config.keys]
    assert len(step) - masks - polynomial <= STEP_INSTRUCTIONS[config.keys]
    assert kinds(step)["FFMA2"] >= config.keys // 2, "two scores at a time"
    assert kinds(step)["FMNMX3"] >= config.keys // 2 - 2, "three at a time"


def test_exponentials_by_polynomial():
    """The kernel's formula, with its constants, in float32, is far more exact than 16-bit floats."""
    text = (jit.source_folder() / "blackwell" / "softmax.cuh").read_text()
    body = text[text.index("void exp2_polynomial") : text.index("// Running maximum")]
    constants = [np.float32(x) for x in re.findall(r"pair\(([-\d.]+)f, \1f\)", body)]
    shift, unshift, minus, *cubic = constants
    assert (unshift, minus) == (-shift, -1)
    x = np.concatenate([np.linspace(-20, 8, 100_001), np.arange(-126, 9)]).astype(np.float32)
    # Rounding down: the sum is a whole number of float32's steps, which are 1 here.
    shifted = (np.floor(x.astype(np.float64)) + shift).astype(np.float32)
    rest = x - (shifted + unshift)
    assert rest.min() >= 0
    assert rest.max() < 1
    value = cubic[0]
    for c in cubic[1:]:
        value = value * rest + c
    bits = (shifted.view(np.int32) << 23) + value.astype(np.float32).view(np.int32)
    exact = np.exp2(x.astype(np.float64))
    error = np.abs(bits.view(np.float32) - exact) / exact
    assert error.max() < POLYNOMIAL_ERROR
    assert len(cubic) == 4


def test_no_two_configurations_are_the_same():
    assert len(set(CONFIGS)) == len(CONFIGS)
    assert {config.head_dim for config in CONFIGS} == set(HEAD_DIMS)
    assert [default(head_dim).key_stages for head_dim in HEAD_DIMS] == [6, 6, 6, 3]
    for capability, polynomial in (((10, 0), 2), ((10, 3), 0), ((10, 7), 0)):
        assert {BlackwellConfig.defaults(d, capability)[0].polynomial for d in (8, *HEAD_DIMS)} == {polynomial}
    assert replace(CONFIGS[0], bounded_waits=1 << 20).defines()["BOUNDED_WAITS"] == 1 << 20
