"""Attention kernels of others, which work on Blackwell GPUs: compiled without one, launched in the PTX interpreter.

CUTLASS's example 77 comes from the ``nvidia-cutlass`` package and needs nvcc; a kernel of ours in Triton needs Triton.
Nothing of theirs is kept.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from ptx.launch import SPANS, storage
from ptx.machine import Machine
from ptx.parse import Kernel, parse
from ptx.tma import TensorMap
from torch import Tensor

from gna_flex.kernels import FLOAT8, output_type

TRITON = "3.9.0"
"""The version whose output these tests know."""
TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", FLOAT8: "fp8e4nv"}
DATA = Path(__file__).parent / "data"
Result = tuple[Tensor, Tensor, Machine]


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one of the test processes fills, in the cache of kernels; the others wait for it."""
    at = Path(os.environ["GNA_FLEX_CACHE_DIR"]) / "third_party" / name
    done = at / "done"
    try:
        at.mkdir(parents=True)
    except FileExistsError:
        end = time.monotonic() + 600
        while not done.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"no {done}") from None
            time.sleep(0.2)
        return at
    try:
        make(at)
    finally:
        done.touch()
    return at


def _launch(
    kernel: Kernel,
    seed: int,
    arrays: dict[str, Tensor],
    rules: dict[str, bool],
    go: Callable[[Machine], None],
) -> Machine:
    machine = Machine(kernel, seed, **rules)
    for name, x in arrays.items():
        machine.memory.add(name, storage(x), at=x.untyped_storage().data_ptr())
    go(machine)
    return machine


@dataclass(frozen=True)
class Cutlass:
    """An instance of example 77: tiles of two times 128 queries, 128 keys; persistent, warps with roles."""

    head_dim: int
    float16: bool = False
    causal: bool = False
    blocks: int = 2
    broken: ClassVar[tuple[str, ...]] = ("load_waits", "store_waits", "tensor_fences")
    """Rules that it does not keep."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of its inputs."""
        return torch.float16 if self.float16 else torch.bfloat16

    def __str__(self) -> str:
        return f"cutlass-{self.head_dim}-{'f16' if self.float16 else 'bf16'}{'-causal' * self.causal}"

    @functools.cache  # noqa: B019  there are few of them
    def files(self) -> Path:
        """The folder of its host program, PTX and cubin; skips where something is missing."""
        if shutil.which("nvcc") is None:
            pytest.skip("no nvcc")
        cutlass_source()
        return made_once(str(self), self._compile)

    def _compile(self, at: Path) -> None:
        element = "half_t" if self.float16 else "bfloat16_t"
        mask = "CausalMask<true>" if self.causal else "ResidualMask"
        command = ["nvcc", "-std=c++17", "-w", "-DNDEBUG", "--expt-relaxed-constexpr", "--use_fast_math"]
        command += ["-gencode", "arch=compute_100a,code=sm_100a", "--keep", "--keep-dir", str(at)]
        command += [f"-I{cutlass_source() / path}" for path in ("include", "examples/77_blackwell_fmha")]
        command += [f"-DHEAD_DIM={self.head_dim}", f"-DELEMENT=cutlass::{element}"]
        command += [f"-DMASK=cutlass::fmha::collective::{mask}", str(DATA / "cutlass_fmha.cu"), "-o", str(at / "fmha")]
        subprocess.run(command, check=True, capture_output=True)
        for file in at.iterdir():
            if file.suffix not in ("", ".ptx", ".cubin"):
                file.unlink()

    @functools.cache  # noqa: B019
    def kernel(self) -> Kernel:
        return parse((self.files() / "cutlass_fmha.ptx").read_text())

    def run(self, q: Tensor, k: Tensor, v: Tensor, seed: int, **rules: bool) -> Result:
        """Output and log-sum-exp of ``[batch, heads, tokens, head_dim]``, of which tokens must lie outside of heads."""
        out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:3], math.nan)
        batch, heads, queries, _ = q.shape
        sizes = queries, k.shape[2], heads // k.shape[1], k.shape[1], batch, self.blocks
        pointers = [hex(x.data_ptr()) for x in (q, k, v, out, lse)]
        command = [self.files() / "fmha", *map(str, sizes), *pointers]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        *shape, parameters = text.split()
        params = bytes.fromhex(parameters)
        blocks, threads, shared = (int(number, 16) for number in shape)
        arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
        maps = {(0, at): each for at, each in kept_maps(params).items()}
        machine = _launch(
            self.kernel(), seed, arrays, rules, lambda m: m.launch(blocks, threads, shared, [params], maps)
        )
        return out, lse, machine


def kept_maps(params: bytes) -> dict[int, TensorMap]:
    """The tensor maps in the parameters that ``cutlass_fmha.cu`` has kept, by their places."""
    magic, found = struct.pack("<Q", 0x70616D20726F736E), {}
    at = params.find(magic)
    while at >= 0:
        fields = struct.unpack_from("<11Q5H5B5B", params, at)
        address, dims, strides, box, steps = fields[1], fields[2:7], fields[7:11], fields[11:16], fields[16:21]
        rank, kind, interleave, swizzle, fill = fields[21:]
        assert kind in (6, 9), "16-bit floats, or bfloat16"
        assert not interleave
        assert not fill
        found[at] = TensorMap(address, dims[:rank], strides[: rank - 1], box[:rank], SPANS[swizzle], steps[:rank])
        at = params.find(magic, at + 1)
    return found


def cutlass_source() -> Path:
    """The folder of CUTLASS's sources; skips without them."""
    try:
        files = importlib.metadata.files("nvidia-cutlass") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file for file in files if file.as_posix().endswith("source/include/cute/tensor.hpp")]
    if not found:
        pytest.skip("no nvidia-cutlass")
    return Path(str(found[0].locate())).parents[2]


@dataclass(frozen=True)
class Triton:
    """Our kernel in Triton, ``data/triton_attention.py``. ``roles``: whether warps have roles."""

    head_dim: int
    keys: int = 128
    dtype: torch.dtype = torch.bfloat16
    roles: bool = False
    rows: ClassVar[int] = 128
    causal: ClassVar[bool] = False

    @property
    def broken(self) -> tuple[str, ...]:
        """Rules that it does not keep."""
        rules = ("barrier_fences", "load_waits", "tensor_fences")
        if self.roles or self.keys == 64:
            rules += ("overwrite_fences",)
        return (*rules, "equal_writes") if self.roles else rules

    def __str__(self) -> str:
        return f"triton-{self.head_dim}-{self.keys}-{TRITON_TYPES[self.dtype]}{'-roles' * self.roles}"

    @functools.cache  # noqa: B019
    def compiled(self) -> dict[str, int | str]:
        """PTX and launch; skips without Triton."""
        try:
            version = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        if version != TRITON:
            pytest.skip(f"the version of triton is {version} instead of {TRITON}")
        arguments = str(self.head_dim), str(self.keys), TRITON_TYPES[self.dtype], str(int(self.roles))
        command = [sys.executable, DATA / "triton_attention.py", *arguments]
        cache = {"TRITON_CACHE_DIR": str(Path(os.environ["GNA_FLEX_CACHE_DIR"]) / "triton")}
        cache["PYTHONPATH"] = os.pathsep.join(sys.path)
        text = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | cache).stdout
        return json.loads(text)

    @functools.cache  # noqa: B019
    def kernel(self) -> Kernel:
        return parse(str(self.compiled()["ptx"]))

    def run(self, q: Tensor, k: Tensor, v: Tensor, seed: int, **rules: bool) -> Result:
        """Output and log-sum-exp of one head, ``[1, 1, tokens, head_dim]``."""
        out = torch.full_like(q, math.nan, dtype=output_type(q.dtype))
        lse = torch.full(q.shape[:3], math.nan)
        facts, width = self.compiled(), self.head_dim
        arguments: list[bytes] = []
        maps: dict[tuple[int, int], TensorMap] = {}
        for x, side in ((q, self.rows), (k, self.keys), (v, self.keys), (out, self.rows)):
            # The map, and what a kernel may ask about the tensor: sizes and strides.
            tokens, size = x.shape[2], x.itemsize
            columns = min(width, 128 // size)
            maps[len(arguments), 0] = TensorMap(
                x.data_ptr(), (width, tokens), (size * width,), (columns, side), size * columns, size=size
            )
            arguments += [bytes(128), *(struct.pack("<i", n) for n in (tokens, width))]
            arguments += [struct.pack("<q", n) for n in (width, 1)]
        arguments += [struct.pack("<Q", lse.data_ptr()), struct.pack("<f", width**-0.5 * math.log2(math.e))]
        arguments += [struct.pack("<i", x.shape[2]) for x in (q, k)]
        arguments += [bytes(8), bytes(8)]  # scratch memory, of which it asks for none
        arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
        blocks, threads, shared = -(-q.shape[2] // self.rows), int(facts["threads"]), int(facts["shared"])
        machine = _launch(
            self.kernel(), seed, arrays, rules, lambda m: m.launch(blocks, threads, shared, arguments, maps)
        )
        return out, lse * math.log(2), machine
