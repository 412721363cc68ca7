"""What the tests of both CUDA kernels' machine code share: layouts that Python relies on, and instructions."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from gna_flex.cuda import forward, jit, tables
from gna_flex.cuda.config import KernelConfig, work_bytes


def needs_nvrtc() -> None:
    """Skips the test file that calls it where there is no compiler of CUDA kernels."""
    pytest.importorskip("cuda.bindings")
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}", allow_module_level=True)


def check_layout(config: KernelConfig, checks: str, arch: str = "sm_90a") -> None:
    """Has the compiler itself check assertions after a kernel's source, for which it need not generate code.

    The code that tests look at is that of the source as it is shipped, which all of them then compile once.
    """
    source, options = config.source() + checks, ("-fdevice-syntax-only",)
    jit.compile(source, arch=arch, defines=config.defines(), include=config.include(), options=options)


def layout_checks(config: KernelConfig) -> str:
    """Assertions about sizes and offsets of what the host fills in."""
    columns = tables.COLUMNS + tables.REST_COLUMNS * (config.key_shapes > 1)
    facts = {"kSharedBytes": config.shared_bytes, "sizeof(Item)": 4 * columns}
    maps = 4 * config.maps + 2 * config.map_sets * (config.key_shapes - 1)
    facts |= {"sizeof(Maps)": 128 * maps, "sizeof(Work)": work_bytes(config.key_shapes, config.skips)}
    params = forward.parameters(config.map_sets, config.key_shapes)
    for name, structure in (("Params", params), ("Address", forward.Address)):
        facts[f"sizeof({name})"] = ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            # What offsetof stands for; older versions of the compiler have no builtin for it.
            facts[f"__INTADDR__(&((({name}*)0)->{field}))"] = getattr(structure, field).offset
    return "\n" + "".join(f'static_assert({fact} == {value}, "Python has {value}");\n' for fact, value in facts.items())


@functools.cache
def disassembler() -> str | None:
    """nvdisasm: of its package, or of a CUDA toolkit."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [str(file.locate()) for file in files if file.name.startswith("nvdisasm")]
    return found[0] if found else shutil.which("nvdisasm")


def opcodes(code: bytes, folder: Path) -> list[str]:
    """Instructions in the order of the code, without predicates and operands."""
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    # Without its analysis of data flow, which only names the targets of branches.
    words = [disassembler(), "-c", "-ndf", str(path)]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", text, re.MULTILINE)


def kinds(names: list[str]) -> Counter[str]:
    return Counter(name.partition(".")[0] for name in names)
