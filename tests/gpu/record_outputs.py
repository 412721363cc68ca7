"""Records what the Hopper kernel computes on a GPU, for the interpreter to be compared with.

``PYTHONPATH=. python tests/gpu/record_outputs.py FILE.npz``, then copy the file to ``tests/data/hopper_outputs.npz``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernel_problems import HOPPER, Problem

from gna_flex.bench import environment
from gna_flex.cuda.forward import Plan, Request

RECORDED = (
    "2-D",
    "3-D, stride, float16",
    "text, some of it valid",
    "dilation and text",
    "two shapes, text, queries held",
    "causal in one of two, float16, head dim 128",
    "grouped heads",
    "a window per head",
    "three chunks of columns",
    "masks of several words",
    "large scores and masks",
)
"""Problems of ``tests/kernel_problems.py`` that are recorded; some 50 KB each."""


def bits(x: Tensor) -> np.ndarray:
    """16-bit floats as integers, which NumPy can store."""
    return x.cpu().contiguous().view(torch.int16).numpy()


def record(problem: Problem) -> dict[str, np.ndarray]:
    """Inputs, output and log-sum-exp of one launch."""
    q, k, v = problem.tensors()
    gnas = (problem.gnas,) if not isinstance(problem.gnas, tuple) else problem.gnas
    plan = Plan(Request(gnas, q.shape[-1], q.dtype == torch.float16, 0, problem.tiles, problem.config))
    valid = torch.tensor(problem.valid, dtype=torch.int32, device="cuda") if problem.valid else None
    scale = q.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    out, lse = plan.run(q.cuda(), k.cuda(), v.cuda(), scale, valid)
    return {"q": bits(q), "k": bits(k), "v": bits(v), "out": bits(out), "lse": lse.cpu().numpy()}


if __name__ == "__main__":
    arrays = {f"{name}/{key}": x for name in RECORDED for key, x in record(HOPPER[name]).items()}
    np.savez_compressed(sys.argv[1], machine=json.dumps(environment("cuda")), **arrays)
