"""The interpreter against a GPU: the Hopper kernel's outputs, recorded on an H100, on the same inputs.

``tests/gpu/record_outputs.py`` made the file. Weights and outputs have 16 bits, and the GPU's ``ex2`` is not rounded as
ours: where a weight falls on the other side of a rounding, an output may. All else must be equal, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from machine_code import needs_nvrtc
from torch import Tensor

needs_nvrtc()

from kernel_problems import HOPPER, launched  # noqa: E402

FILE = np.load(Path(__file__).parent / "data" / "hopper_outputs.npz")
NAMES = sorted({name.rpartition("/")[0] for name in FILE if "/" in name})
LEAST_EQUAL = 0.995
"""Share of outputs that are equal in every bit; 0.9981 is the least that was seen."""


def test_recorded_on_a_gpu() -> None:
    machine = json.loads(str(FILE["machine"]))
    assert machine["gpu"] == "NVIDIA H100 80GB HBM3"
    assert len(NAMES) == 11


@pytest.mark.parametrize("name", NAMES)
def test_interpreter_computes_what_the_gpu_did(name: str) -> None:
    problem = HOPPER[name]

    def recorded(key: str) -> Tensor:
        return torch.from_numpy(FILE[f"{name}/{key}"]).view(problem.dtype)

    inputs = recorded("q"), recorded("k"), recorded("v")
    out, lse, _ = launched(problem, inputs=inputs)
    expected = recorded("out")
    assert out.isfinite().all()
    assert (out == expected).double().mean() >= LEAST_EQUAL
    rounding = torch.finfo(problem.dtype).eps * expected.double().abs().amax(-1, keepdim=True)
    assert ((out.double() - expected.double()).abs() <= rounding).all()
    torch.testing.assert_close(lse, torch.from_numpy(FILE[f"{name}/lse"]), atol=1e-6, rtol=3e-7)
