"""Our forward kernels in the interpreter, launched by the package's own host code, but for the driver."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from gna_flex import GNA
from gna_flex.cuda import driver, forward, jit
from gna_flex.cuda.config import KernelConfig
from gna_flex.cuda.tables import KernelTiles
from gna_flex.kernels import FLOAT8, output_type
from ptx.machine import Machine
from ptx.parse import Kernel, parse
from ptx.tma import TensorMap

SIZES = dict(driver.DTYPES.values())
"""Bytes of each type, by the driver's numbers."""
SPANS = (0, 32, 64, 128)
"""Bytes of each swizzle, by the driver's numbers."""


@functools.cache
def ptx(config: KernelConfig) -> str:
    """The PTX of the kernel that a configuration is for, from NVRTC; of the Blackwell kernel for B200.

    Raises:
        ImportError: cuda-bindings or NVRTC is not installed.
    """
    nvrtc = jit._nvrtc()
    source, include = config.source(), config.include()
    architecture = config.arch((10, 0)).replace("sm_", "compute_")
    _, *flags = jit._flags("sm_100a", config.defines(), ())
    flags = [f"--gpu-architecture={architecture}", *(flag for flag in flags if not flag.startswith("--ptxas"))]
    texts, names = [text.encode() for text in include.values()], [name.encode() for name in include]
    program = jit._value(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"forward.cu", len(names), texts, names))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])[0]
        if status:
            raise jit.CompileError(jit._filled(nvrtc, program, "ProgramLog").decode())
        return jit._filled(nvrtc, program, "PTX").rstrip(b"\0").decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.cache
def kernel(config: KernelConfig) -> Kernel:
    return parse(ptx(config))


class HostPlan(forward.Plan):
    """A plan whose tables are in CPU memory, and whose kernel is not compiled for a GPU."""

    def __init__(
        self,
        gnas: Sequence[GNA],
        config: KernelConfig,
        tiles: KernelTiles,
        head_dim: int,
        float16: bool,
        float8: bool = False,
    ) -> None:
        super().__init__(forward.Request(tuple(gnas), head_dim, float16, 0, tiles, config, float8=float8))

    def _load(self, device: torch.device) -> None:
        self.processors = 1

    def _tables(self, gnas: list[GNA], classes: list[int], device: torch.device) -> None:
        super()._tables(gnas, classes, torch.device("cpu"))


class Recorder:
    """Stands for the driver: keeps the tensor maps that it is asked to encode, by the address of their 128 bytes."""

    def __init__(self) -> None:
        self.maps: dict[int, TensorMap] = {}

    def call(self, name: str, at: int, code: int, rank: int, *values: Any) -> None:
        pointer, dims, strides, box, steps, _, swizzle, _, _ = values
        self.maps[at] = TensorMap(
            pointer, tuple(dims), tuple(strides)[: rank - 1], tuple(box), SPANS[swizzle], tuple(steps), SIZES[code]
        )


def run(
    gnas: GNA | Sequence[GNA],
    tensors: tuple[Tensor, Tensor, Tensor],
    config: KernelConfig,
    tiles: KernelTiles,
    seed: int = 0,
    *,
    blocks: int = 1,
    scale: float | None = None,
    text_valid: Tensor | None = None,
    change: Callable[[str], str] | None = None,
    **rules: Any,
) -> tuple[Tensor, Tensor, Machine]:
    """Output, log-sum-exp and the machine after a launch of ``blocks`` blocks.

    ``change`` edits the PTX before; ``rules`` are options of the machine.

    Raises:
        PtxError: a fault of the kernel.
        AssertionError: its counters are not zero afterwards, as the next launch needs them.
    """
    q, k, v = tensors
    gnas = (gnas,) if isinstance(gnas, GNA) else tuple(gnas)
    plan = HostPlan(gnas, config, tiles, q.shape[-1], q.dtype == torch.float16, q.dtype == FLOAT8)
    out, lse = torch.full_like(q, torch.nan, dtype=output_type(q.dtype)), torch.full(q.shape[:3], torch.nan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    machine = launch(
        plan,
        lambda counters: plan.arguments((q, k, v, out), lse, counters, scale, text_valid),
        {"q": q, "k": k, "v": v, "out": out, "lse": lse},
        Machine(parse(change(ptx(plan.config))) if change else kernel(plan.config), seed, **rules),
        blocks=blocks,
        text_valid=text_valid,
    )
    return out, lse, machine


def launch(
    plan: HostPlan,
    arguments: Callable[[Tensor], driver.Arguments],
    arrays: dict[str, Tensor],
    machine: Machine,
    *,
    blocks: int,
    text_valid: Tensor | None,
) -> Machine:
    """The machine after a launch of a plan on ``arrays`` and its tables; ``arguments`` are those for given counters.

    Raises:
        PtxError: a fault of the kernel.
        AssertionError: its counters are not zero afterwards, as the next launch needs them.
    """
    counters, recorder = torch.zeros(2, dtype=torch.int32), Recorder()
    with mock.patch.object(driver, "driver", return_value=recorder):
        maps, params = arguments(counters).values
    arrays = arrays | {"counters": counters, "items": plan.items, "windows": plan.windows}
    arrays |= {"gna_of_head": plan.gna_of_head} if plan.gna_of_head is not None else {}
    arrays |= {"text_valid": text_valid} if text_valid is not None else {}
    for name, x in arrays.items():
        machine.memory.add(name, storage(x), at=x.untyped_storage().data_ptr())
    places = {(0, at - maps.address): each for at, each in recorder.maps.items()}
    machine.launch(blocks, plan.config.threads, plan.config.shared_bytes, [bytes(maps), bytes(params)], places)
    assert not counters.any(), f"counters {counters.tolist()} after the launch"
    return machine


def storage(x: Tensor) -> np.ndarray:
    """All bytes behind a tensor, shared with it."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy()
