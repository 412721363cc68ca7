"""Block lists that change after torch has compiled for a mask: the GPU stops, and says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gna_flex
from gna_flex.dynamo.rewrite import CHANGED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

SCRIPT = """
import functools, sys, torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
import gna_flex
from gna_flex.dynamo.backend import gna_flex_backend

inner = None if sys.argv[1] == "inductor" else sys.argv[1]
mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 512, 512, device="cuda")
qkv = torch.randn(3, 1, 2, 512, 64, device="cuda", dtype=torch.bfloat16).unbind()
backend = functools.partial(gna_flex_backend, inner=inner)
attend = torch.compile(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask), backend=backend)
attend(*qkv, mask)
torch.cuda.synchronize()
assert gna_flex.compile_report().routed == 1, gna_flex.compile_report()
print("computed")
mask.kv_num_blocks[..., 1] = 0
attend(*qkv, mask)
torch.cuda.synchronize()
print("not stopped")
"""


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_the_gpu_says_why_it_stops(inner: str) -> None:
    """In a process of its own, as nothing runs on a GPU after that."""
    environment = os.environ | {"PYTHONPATH": str(Path(gna_flex.__file__).parent.parent)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, inner], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.split("\n")[0] == "computed", result.stderr
    assert "not stopped" not in result.stdout
    assert result.returncode != 0
    assert CHANGED in result.stderr
