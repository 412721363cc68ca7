"""The Hopper backward kernel as machine code, without a GPU: registers, spills, memory, layouts, instructions."""

import ctypes
import functools
from dataclasses import replace
from pathlib import Path

import pytest
from machine_code import disassembler, kinds, needs_nvrtc, opcodes

from gna_flex.cuda import jit
from gna_flex.cuda.backward import OPERANDS, BackwardConfig, backward_parameters, default_config
from gna_flex.cuda.config import SHARED_LIMIT
from gna_flex.cuda.rows import StatisticsParams
from gna_flex.cuda.sums import COPY_ROWS, FEW_BOXES, ROUND_STAGES, SumsParams
from gna_flex.cuda.tables import ROWS

needs_nvrtc()

pytestmark = pytest.mark.usefixtures("kernel_cache")

DEFAULTS = [
    default_config(head_dim, keys, fused)
    for head_dim in BackwardConfig.head_dims
    for keys, fused in ((False, False), (True, False), (True, True))
    if not (fused and head_dim % 64)  # half of the columns must be whole chunks
]
LARGEST = [config for config in DEFAULTS if config.head_dim == 128]
SMALLER = [config for config in DEFAULTS if config.head_dim < 128]
# Each with float16, and with text and dilation: one by one at the largest head dim, both at a time at the others.
CONFIGS = [
    *DEFAULTS,
    *(replace(config, float16=True) for config in LARGEST),
    *(replace(config, text=True, dilated=True, map_sets=3) for config in LARGEST),
    *(replace(config, float16=True, text=True, dilated=True, map_sets=3) for config in SMALLER),
]


def spill_budget(config: BackwardConfig) -> int:
    """Bytes of spill stores and loads together; :func:`test_instructions` sees to it that consumers have none.

    Where rows are keys, producers keep 24 registers, which is too few; they wait for memory most of the time.
    NVRTC 13.0, which comes with torch 2.11, needs 4 bytes more.
    """
    return 680 + 4 * (jit.nvrtc_version() == "13.0") if config.rows_are_keys else 80


def name_of(config: BackwardConfig) -> str:
    parts = [f"d{config.head_dim}", "fused" if config.fused else "keys" if config.rows_are_keys else "queries"]
    return "-".join([*parts, *(["text"] if config.text else []), *(["f16"] if config.float16 else [])])


configs = pytest.mark.parametrize("config", CONFIGS, ids=name_of)


@functools.cache
def built(config: BackwardConfig) -> jit.Cubin:
    """The kernel as it is shipped, plus what the compiler itself checks: sizes and offsets that Python relies on."""
    params = backward_parameters(config.map_sets)
    facts = {"kSharedBytes": config.shared_bytes, "sizeof(BackwardParams)": ctypes.sizeof(params)}
    facts |= {"kFewBoxes": FEW_BOXES, "kRoundStages": ROUND_STAGES, "kRoundRows": COPY_ROWS}
    operands = len(OPERANDS) + config.fused
    facts["sizeof(BackwardMaps)"] = 128 * operands * (config.map_sets + 2 * config.text)
    for field in ("statistics", "results", "result_strides", "rows2", "dq", "scale", "head_dim", "sums", "items", "o"):
        facts[f"__INTADDR__(&(((BackwardParams*)0)->{field}))"] = getattr(params, field).offset
    for field, *_ in SumsParams._fields_:
        facts[f"__INTADDR__(&(((Sums*)0)->{field}))"] = getattr(SumsParams, field).offset
    checks = "\n".join(f'static_assert({fact} == {value}, "Python has {value}");' for fact, value in facts.items())
    source = f"{config.source()}\n{checks}\n"
    return jit.compile(source, defines=config.defines(), name="hopper_backward.cu", include=config.include())


@configs
def test_registers_spills_and_speed(config: BackwardConfig) -> None:
    log = built(config).log
    (usage,) = jit.resource_usage(log)
    assert usage.registers == 168, "of which setmaxnreg hands out 504 for three warpgroups"
    assert usage.shared == 0, "all of it is asked for at the launch"
    assert config.shared_bytes <= SHARED_LIMIT
    assert jit.spills(log) <= spill_budget(config)
    # C7510 and its like: products that wait for each other, or for the registers of the one before.
    assert jit.performance_warnings(log) == []


@pytest.mark.skipif(not disassembler(), reason="there is no nvdisasm")
@configs
def test_instructions(config: BackwardConfig, tmp_path: Path) -> None:
    """Products, copies, stores of results; spills only where producers are, which come before the first product."""
    lines = opcodes(built(config).code, tmp_path)
    found = kinds(lines)
    scores, values = config.head_dim // 16, config.keys // 16
    # Those of queries are there twice: once in the loop, once for the last box of the consumer that leads.
    of_queries = 2 * config.consumers * ROWS // 16 * config.fused
    assert found["HGMMA"] == 2 * scores + (1 + config.rows_are_keys) * values + of_queries
    assert found["UTMALDG"] > 0
    results = [line for line in lines if line.startswith("STG.E.EF.128")]
    assert len(results) == (1 + config.rows_are_keys) * config.head_dim // 16
    assert (found["UTMAREDG"] > 0) == config.fused
    assert (found["UBLKCP"] > 0) == config.fused  # copies of lines of sums
    products = [i for i, line in enumerate(lines) if "HGMMA" in line]
    spills = [i for i, line in enumerate(lines) if line.startswith(("STL", "LDL"))]
    assert not [i for i in spills if products[0] <= i <= products[-1]]
    if config.fused and config.head_dim == 128:
        loop = products[-1 - of_queries // 2] - products[0]
        assert loop <= 650, f"{loop}: code elsewhere has made a step longer, of which 25 instructions cost 2 %"


def test_statistics_kernel() -> None:
    """The small kernel before: layout of its parameters, no spills."""
    source = (jit.source_folder() / "hopper" / "statistics.cu").read_text()
    facts = {"sizeof(Statistics)": ctypes.sizeof(StatisticsParams)}
    for field, *_ in StatisticsParams._fields_:
        facts[f"__INTADDR__(&(((Statistics*)0)->{field}))"] = getattr(StatisticsParams, field).offset
    checks = "\n".join(f'static_assert({fact} == {value}, "Python has {value}");' for fact, value in facts.items())
    for float16 in (0, 1):
        code = jit.compile(f"{source}\n{checks}\n", defines={"FLOAT16": float16}, name="statistics.cu", include={})
        assert jit.spills(code.log) == 0
