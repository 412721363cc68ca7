"""The Hopper kernel as machine code, without a GPU: registers, spills, shared memory, layouts, instructions."""

from collections import Counter
from dataclasses import replace

import pytest
from machine_code import check_layout, disassembler, kinds, layout_checks, needs_nvrtc, opcodes

from gna_flex.cuda import jit
from gna_flex.cuda.config import SHARED_LIMIT
from gna_flex.cuda.kernel import HEAD_DIMS, Config

needs_nvrtc()

pytestmark = pytest.mark.usefixtures("kernel_cache")

REGISTERS = 1 << 16
"""Registers of a multiprocessor, which one CTA fills."""
SMALL_REGISTERS = 8
"""Registers are handed out in multiples of this."""


def fitting(config: Config) -> Config:
    """With fewer query slots if shared memory asks for it."""
    return config if config.shared_bytes <= SHARED_LIMIT else replace(config, query_stages=1)


DEFAULTS = [config for head_dim in HEAD_DIMS for config in Config.defaults(head_dim)]
TEXT = [replace(config, text=True) for head_dim in HEAD_DIMS for config in Config.defaults(head_dim, text=True)]
FIRST = [Config.defaults(head_dim)[0] for head_dim in HEAD_DIMS]
FIRST_TEXT = [replace(Config.defaults(head_dim, text=True)[0], text=True) for head_dim in HEAD_DIMS]
# Each default with text, dilation, several sets of maps and float16, but not with each choice of these: the first of a
# head dim has them one by one, the others several at a time.
CONFIGS = [
    *DEFAULTS,
    *TEXT,
    *(replace(config, dilated=True) for config in FIRST),
    *(replace(config, float16=True) for config in FIRST),
    *(replace(config, float16=True, dilated=True, map_sets=3) for config in DEFAULTS if config not in FIRST),
    *(replace(config, dilated=True, map_sets=9) for config in FIRST_TEXT),
    *(replace(config, key_shapes=2) for config in [*DEFAULTS, *TEXT] if config.may_have_rests),
    *(replace(config, key_shapes=2, dilated=True, map_sets=3) for config in DEFAULTS if config.may_have_rests),
    *(replace(config, skips=True) for config in DEFAULTS if config.may_skip),
    *(fitting(Config(128, keys=keys)) for keys in (112, 160)),
    *(fitting(Config(128, keys=keys, dilated=True, text=True, map_sets=3)) for keys in (96, 160)),
    Config(128, 112, holds_queries=True),
    Config(128, 128, holds_queries=True),
    Config(128, 112, holds_queries=True, query_stages=1, key_stages=3),
    Config(64, 96, holds_queries=True, consumers=3, query_stages=1, key_stages=3),
]


def crowded(config: Config) -> bool:
    """Whether a thread's output, scores and weights leave no registers for much else; never so by default."""
    return config.head_dim // 2 + config.keys * 3 // 4 > 176  # queries in registers leave enough, as tests show


def spill_budget(config: Config) -> int:
    """Bytes of spill stores and loads together, those of consumers included.

    Producers wait for memory most of the time. Beside three consumers they keep 32 registers, a few too few.
    """
    spilled = {80: 312, 128: 240}.get(config.keys, 160)  # of three
    return spilled if config.consumers == 3 else 128 if crowded(config) else 4 * consumer_spills(config)


def consumer_spills(config: Config) -> int:
    """Instructions that spill in the code of consumers, hardly any of them in the loop over boxes."""
    if crowded(config):
        return 32
    if config.holds_queries and config.keys == 128:
        return 11 if config.text else 8
    known = {
        (32, 128): (0, 6),
        (64, 112): (4, 7),
        (64, 128): (28, 31),
        (64, 192): (8, 11),
        (128, 64): (2, 2),
        (128, 80): (35, 35),
    }
    without, with_text = known.get((config.head_dim, config.keys), (0, 0))
    more = {(64, 112): 1, (128, 64): 2}.get((config.head_dim, config.keys), 0) if config.skips else 0
    return more + (with_text if config.text else without)


def has_mask_products(config: Config) -> bool:
    """Whether the kernel can add a mask to scores as a product."""
    return not config.float16 and config.consumers == 2


def name_of(config: Config) -> str:
    parts = [f"d{config.head_dim}", f"k{config.keys}", *([f"m{config.map_sets}"] if config.dilated else [])]
    parts += ["two-shapes"] if config.key_shapes > 1 else []
    parts += [f"held{config.query_stages}"] if config.holds_queries else []
    parts += ["skips"] * config.skips
    return "-".join([*parts, *(["text"] if config.text else []), *(["f16"] if config.float16 else [])])


configs = pytest.mark.parametrize("config", CONFIGS, ids=name_of)


@configs
def test_registers_spills_and_speed(config):
    log = config.compile("sm_90a").log
    (usage,) = jit.resource_usage(log)
    assert usage.registers <= REGISTERS // config.threads // SMALL_REGISTERS * SMALL_REGISTERS
    assert usage.shared == 0, "all of it is asked for at the launch"
    assert jit.spills(log) <= spill_budget(config)
    # C7510 and its like: products that wait for each other, or for the registers of the one before.
    assert jit.performance_warnings(log) == []
    assert "serializ" not in log


@configs
def test_python_and_cuda_agree(config):
    check_layout(config, layout_checks(config))


def test_python_and_cuda_agree_or_it_does_not_compile():
    """The checks are no empty words."""
    config = DEFAULTS[0]
    wrong = f'static_assert(kSharedBytes == {config.shared_bytes + 16}, "Python has another number");'
    with pytest.raises(jit.CompileError, match="Python has another number"):
        check_layout(config, wrong)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(40), "head dims are multiples of 32"),
        (Config(128, keys=120), "16 keys at a time"),
        (Config(256), "too much shared memory"),
    ],
    ids=["head-dim", "keys", "memory"],
)
def test_what_is_not_possible_does_not_compile(config, words):
    with pytest.raises(jit.CompileError, match=words):
        config.compile("sm_90a")


@pytest.mark.skipif(not disassembler(), reason="there is no nvdisasm")
@configs
def test_instructions(config, tmp_path):
    names = opcodes(config.compile("sm_90a").code, tmp_path)
    products = [place for place, name in enumerate(names) if name.startswith("HGMMA")]
    # Consumers: from where they take registers to where they store the output.
    ends = [place for place, name in enumerate(names) if name.startswith(("USETMAXREG.TRY_ALLOC", "UTMASTG"))]
    consumers = kinds(names[min(ends + products) : max(ends + products)])
    assert not consumers["UTMALDG"], "the producer's code lies in between"
    assert consumers["LDL"] + consumers["STL"] <= consumer_spills(config), "consumers spill"
    assert kinds(names)["USETMAXREG"] == 2
    assert {name for name in names if name.startswith(("UTMALDG", "UTMASTG"))} >= {"UTMALDG.5D", "UTMASTG.5D"}
    assert not kinds(names)["LDGSTS"]
    # Held queries: of the first item, and of the next one. Queries, or only keys, where scores are computed again.
    again = config.head_dim // 32
    assert kinds(names)["LDSM"] == again + (2 if config.holds_queries else 1) * config.head_dim // 16
    assert kinds(names)["HMMA"] == 2 * again, "8 keys at a time, in a loop"
    # One matrix multiplication for 16 columns of the head dim, and one for 16 keys.
    kind = "" if config.float16 else ".BF16"
    shapes = Counter(names[place] for place in products)
    expected = Counter({f"HGMMA.64x{config.keys}x16.F32{kind}": config.head_dim // 16})
    expected.update({f"HGMMA.64x{config.head_dim}x16.F32{kind}": config.keys // 16})
    assert set(shapes) == set(expected)
    masks = Counter({f"HGMMA.64x{config.keys}x16.F32{kind}": 3 * has_mask_products(config)})  # one step, or two
    assert all(count % expected[name] == 0 for name, count in (shapes - masks).items())
    # An exponential for each score that a thread holds: twice with new maxima, which take one for each of two rows, and
    # once with those kept.
    exponentials = kinds([name for name in names if name.startswith("MUFU.EX2")])["MUFU"]
    assert exponentials == 3 * (config.keys // 2) + 4


def test_nothing_else_is_compiled_by_default():
    assert {config.head_dim for config in DEFAULTS} == set(HEAD_DIMS)
    assert all(config.shared_bytes <= SHARED_LIMIT for config in CONFIGS)
    assert len(set(CONFIGS)) == len(CONFIGS)
    assert not any(map(crowded, DEFAULTS))
