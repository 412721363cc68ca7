"""Bits of the Blackwell kernel's descriptors against those that CUTLASS computes, on the host, for the same layouts."""

import functools
import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

from gna_flex.cuda import jit
from gna_flex.routing import cpp_compiler

FIRST_PIECES = {
    "nvidia-cutlass": "cute/tensor.hpp",
    "nvidia-cuda-runtime": "cuda_runtime.h",
    "nvidia-cuda-crt": "crt/host_config.h",
    "nvidia-cuda-cccl": "cuda/std/type_traits",
}
"""Packages of headers, and one header of each."""


def include_folders() -> list[Path]:
    """Where the headers of the packages are; skips where one is missing."""
    folders = []
    for package, header in FIRST_PIECES.items():
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        found = [str(file.locate()) for file in files if file.as_posix().endswith(f"include/{header}")]
        found += [str(file.locate()) for file in files if file.as_posix().endswith(f"cccl/{header}")]
        if not found:
            pytest.skip(f"no headers of {package}")
        folders.append(Path(found[0].removesuffix(header)))
    return folders


def kernel_functions() -> str:
    """The functions of the kernel that make descriptors, as plain C++."""
    text = (jit.source_folder() / "blackwell" / "ptx.cuh").read_text()
    functions = re.findall(r"^__host__ __device__ (constexpr \w+ \w+\(.*?^})", text, re.MULTILINE | re.DOTALL)
    assert len(functions) == 2
    return "\n".join(functions)


@functools.cache
def descriptors(folder: Path) -> list[tuple[str, int, int]]:
    """Name, CUTLASS's value, the kernel's value."""
    includes = include_folders()
    compiler = cpp_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "kernel_functions.h").write_text(kernel_functions())
    source, program = Path(__file__).parent / "data" / "descriptors.cpp", folder / "descriptors"
    command = [
        compiler,
        "-std=c++17",
        "-w",
        *(f"-I{path}" for path in [folder, *includes]),
        str(source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    out = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^([\w-]+) ([0-9a-f]+) ([0-9a-f]+)$", out, re.MULTILINE)
    return [(name, int(cutlass, 16), int(ours, 16)) for name, cutlass, ours in lines]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, int]]:
    return descriptors(tmp_path_factory.mktemp("descriptors"))


def test_all_bits_are_those_of_cutlass(found):
    assert len(found) > 2000
    different = {name: (hex(cutlass), hex(ours)) for name, cutlass, ours in found if cutlass != ours}
    assert different == {}


def test_known_values(found):
    values = {name: ours for name, _, ours in found}
    assert values["scores-0-128"] == 0x08200490
    assert values["values-0-128"] == 0x08210490
    assert values["values-0-64"] == 0x08110490
    assert values["keys-128-128"] == 0x4000404000010000
    assert values["values-128-128"] == 0x4000404004000000
    assert values["values-in-8-bits-1-128"] == 0x08210010
    assert values["values-in-8-bits-128-128"] == 0x4000404000000000
