"""Plans without a GPU: kernels for capabilities, and what each kernel is told of boxes and of text."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from ptx.launch import HostPlan, Recorder

from gna_flex import GNA
from gna_flex.cuda import driver, forward, jit
from gna_flex.cuda.blackwell import BlackwellConfig
from gna_flex.cuda.config import SHARED_LIMIT, KernelConfig
from gna_flex.cuda.forward import Plan, Request, estimated
from gna_flex.cuda.kernel import Config
from gna_flex.cuda.tables import KernelTiles, work_records

CASES = {
    "hopper": (Config(64, 32), KernelTiles((1, 4, 8), 2, 1, (1, 4, 8), 32)),
    "blackwell": (BlackwellConfig(64, 32), KernelTiles((1, 8, 8), 2, 1, (1, 4, 8), 32, rows=128)),
}
cases = pytest.mark.parametrize(("config", "tiles"), CASES.values(), ids=list(CASES))
GRID_WITH_TEXT = GNA((18, 20), (5, 7), text_first=130, text_last=300)


@cases
def test_maps_have_the_boxes_of_the_kernel(config: KernelConfig, tiles: KernelTiles) -> None:
    gna = GRID_WITH_TEXT
    plan = HostPlan([gna], config, tiles, 64, False)
    tensors = tuple(torch.zeros(1, 2, gna.tokens, 64, dtype=torch.bfloat16) for _ in range(4))
    recorder, counters = Recorder(), torch.zeros(2, dtype=torch.int32)
    with mock.patch.object(driver, "driver", return_value=recorder):
        plan.arguments(tensors, torch.zeros(1, 2, gna.tokens), counters, 1.0, None)
    # Of every operand: the grid, text before and text after it; queries, keys, values, output.
    boxes = [recorder.maps[at].box for at in sorted(recorder.maps)]
    queries = [(64, 8, tiles.box[1], 1, 1)] + [(64, config.rows, 1, 1, 1)] * 2
    keys = [(64, 8, 4, 1, 1)] + [(64, 32, 1, 1, 1)] * 2
    assert boxes == [*queries, *keys, *keys, *queries]


def test_boxes_of_the_second_shape_have_maps_of_their_own() -> None:
    gna = GRID_WITH_TEXT
    tiles = KernelTiles((1, 4, 8), 2, 1, (1, 4, 8), 32, kv_rest=(1, 8, 4), rest_axis=2)
    plan = HostPlan([gna], Config(64, 32), tiles, 64, False)
    tensors = tuple(torch.zeros(1, 2, gna.tokens, 64, dtype=torch.bfloat16) for _ in range(4))
    recorder, counters = Recorder(), torch.zeros(2, dtype=torch.int32)
    with mock.patch.object(driver, "driver", return_value=recorder):
        plan.arguments(tensors, torch.zeros(1, 2, gna.tokens), counters, 1.0, None)
    maps = [recorder.maps[at] for at in sorted(recorder.maps)]
    assert plan.config.key_shapes == 2
    assert [list(keys) for keys in plan.params.keys] == [[1, 4, 8], [1, 8, 4]]
    # After those of all operands, of keys and of values, which start where the grid does.
    assert [m.box for m in maps[12:]] == [(64, 4, 8, 1, 1)] * 2
    assert [m.address for m in maps[12:]] == [maps[3].address, maps[6].address]


@cases
def test_text_items_are_counted_in_the_kernels_boxes(config: KernelConfig, tiles: KernelTiles) -> None:
    plan = HostPlan([GRID_WITH_TEXT], config, tiles, 64, False)
    records = work_records(GRID_WITH_TEXT, tiles)
    assert plan.params.items_per_head == len(records)
    assert plan.params.text_items == (records[:, 19] > 0).sum()
    assert plan.params.text_items == sum(math.ceil(n / (2 * config.rows)) for n in (130, 300))


@pytest.mark.parametrize(
    ("capability", "kernel", "arch"),
    [
        ((9, 0), Config, "sm_90a"),
        ((10, 0), BlackwellConfig, "sm_100a"),
        ((10, 3), BlackwellConfig, "sm_103a"),
        ((10, 7), BlackwellConfig, "sm_100f"),
    ],
)
def test_the_kernel_of_a_gpu(capability: tuple[int, int], kernel: type[KernelConfig], arch: str) -> None:
    request = Request((GNA((24, 40), (9, 12)),), 128, False, 0, capability=capability)
    assert request.kernel is kernel
    assert kernel.arch(capability) == arch
    config, tiles = estimated(request)
    assert isinstance(config, kernel)
    assert config.fits(tiles)
    assert config.shared_bytes <= SHARED_LIMIT


@pytest.mark.parametrize("capability", [(8, 9), (11, 0), (12, 0)])
def test_other_gpus_have_no_kernel(capability: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no kernel is written for compute capability"):
        _ = Request((GNA(8, 3),), 64, False, 0, capability=capability).kernel


@pytest.mark.parametrize("change", [{"groups": 1}, {"kv_slots": 48}, {"rows": 64}, {"kv_rest": (1, 8, 4)}])
def test_tiles_must_fit_the_kernel(change: dict[str, Any]) -> None:
    sides = {"box": (1, 8, 8), "groups": 2, "split": 1, "kv_tile": (1, 4, 8), "kv_slots": 32, "rows": 128}
    with pytest.raises(ValueError, match="do not fit"):
        HostPlan([GNA((16, 16), 3)], BlackwellConfig(64, 32), KernelTiles(**(sides | change)), 64, False)


def test_kernels_have_headers_of_their_own() -> None:
    assert set(forward.KERNELS) == {"hopper", "blackwell"}
    hopper, blackwell = Config(64).include(), BlackwellConfig(64).include()
    assert set(hopper) & set(blackwell) == {name for name in jit.headers("common") if name.startswith("common/")}
    assert not any("blackwell" in text for text in hopper.values())


def test_a_plan_compiles_for_its_device() -> None:
    """Without a GPU: what the compiler and the driver are asked for."""
    facts = mock.Mock(multi_processor_count=148, major=10, minor=3)
    request = Request((GNA((24, 40), (9, 12)),), 128, True, 0, config=BlackwellConfig(128))
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=facts),
        mock.patch.object(jit, "compile", return_value=mock.Mock(log="", code=b"")) as compiled,
        mock.patch.object(Plan, "_tables"),
    ):
        plan = Plan(request)
    (source,), options = compiled.call_args
    assert "Blackwell" in source
    assert options["arch"] == "sm_103a"
    assert options["name"] == "blackwell_forward.cu"
    assert options["defines"]["FLOAT16"] == 1
    assert plan.processors == 148
    assert plan.kernel.shared == BlackwellConfig(128).shared_bytes
