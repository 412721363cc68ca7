"""Data parallel and sharded training of a model with a GNA mask: two processes on the CPU equal one."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gna_flex import GNA, flex_attention, gna_mask

NEAR = GNA((6, 5), (3, 2), text_last=3)
WORLD = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="needs gloo on Linux"),
]


class Block(nn.Module):
    """Two layers of attention with projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(16, 48) for _ in range(2)])
        self.mask = gna_mask(NEAR, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        for project in self.qkv:
            q, k, v = project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
            x = x + flex_attention(q, k, v, block_mask=self.mask).transpose(1, 2).flatten(2)
        return x


def model_and_batch() -> tuple[Block, Tensor]:
    """The same in every process."""
    generator = torch.Generator().manual_seed(0)
    block = Block()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return block, torch.randn(2 * WORLD, NEAR.tokens, 16, generator=generator)


def wrapped(block: Block, how: str) -> nn.Module:
    if how == "sharded":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
        for layer in block.qkv:
            fully_shard(layer, mesh=mesh)
        fully_shard(block, mesh=mesh)
        return block
    parallel = DistributedDataParallel(block)
    return torch.compile(parallel, backend="aot_eager") if how == "compiled" else parallel


def train(rank: int, folder: str, how: str) -> None:
    """One step on this process's part of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        block, batch = model_and_batch()
        parallel = wrapped(block, how)  # reduces gradients as long as it lives
        parallel(batch.chunk(WORLD)[rank]).square().mean().backward()
        gradients = []
        for parameter in block.parameters():
            gradient = parameter.grad
            gradients.append(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient)
        if rank == 0:
            torch.save(gradients, f"{folder}/gradients")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["parallel", "compiled", "sharded"])
def test_gradients_are_those_of_one_process(how: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train, (str(tmp_path), how), nprocs=WORLD)
    block, batch = model_and_batch()
    block(batch).square().mean().backward()
    for got, parameter in zip(torch.load(tmp_path / "gradients"), block.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)
