"""Data parallel and sharded training of a model with a GNA mask: gradients of two processes are those of one.

This file is also the program that each process runs, ``python test_distributed.py RANK FOLDER``, which leaves its
gradients in the folder.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gna_flex
from gna_flex import GNA, flex_attention, gna_mask

NEAR = GNA((6, 5), (3, 2), text_last=3)
WORLD = 2
HOW = ("parallel", "parallel, compiled", "sharded", "sharded, compiled")
TIME_LIMIT = 240
"""Seconds, ten times what it takes on a busy machine: nothing but a hang takes as long."""

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
    if how.startswith("sharded"):
        from torch.distributed.fsdp import fully_shard

        for layer in (*block.qkv, block):
            fully_shard(layer)
        parallel: nn.Module = block
    else:
        parallel = DistributedDataParallel(block)
    return torch.compile(parallel, backend="aot_eager") if how.endswith("compiled") else parallel


def gradients(model: nn.Module) -> list[Tensor]:
    """Whole gradients, also of parameters that are in parts."""
    found = [parameter.grad for parameter in model.parameters()]
    return [x.full_tensor() if isinstance(x, dist.tensor.DTensor) else x for x in found]


def train(rank: int, folder: Path) -> None:
    """One step on this process's part of the batch, in every way. Ends the process."""
    import torch.distributed.fsdp
    import torch.distributed.tensor

    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIME_LIMIT))
    results, alive = {}, []
    for how in HOW:
        block, batch = model_and_batch()
        parallel = wrapped(block, how)
        parallel(batch.chunk(WORLD)[rank]).square().mean().backward()
        results[how] = gradients(block)
        alive.append(parallel)
        print(f"{how}: done", flush=True)
    torch.save(results, folder / f"gradients{rank}")
    # Whoever ends first would break the connections of the other one.
    store.set(f"done{rank}", "")
    store.wait([f"done{other}" for other in range(WORLD)])
    # Nothing is destroyed: gloo's destructor waits, with Python's lock, for a thread that may be waiting for that lock.
    os._exit(0)


def run_together(commands: list[list[str]], folder: Path, limit: float) -> None:
    """Runs commands at the same time, and fails with what they printed if one fails or they take too long.

    Nothing is left of them: not even processes that they started.
    """
    settings = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | settings | {"PYTHONPATH": str(Path(gna_flex.__file__).parents[1])}
    logs = [folder / f"log{number}" for number in range(len(commands))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("wb") as file:  # a pipe would be held open by what a process leaves behind
                options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
                processes.append(subprocess.Popen(command, env=environment, start_new_session=True, **options))
        end = time.monotonic() + limit
        codes: list[int | None] = [None]
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    printed = "\n".join(f"process {number}:\n{log.read_text(errors='replace')}" for number, log in enumerate(logs))
    if codes != [0] * len(commands):
        pytest.fail(f"exit codes {codes} (None: still running, {limit} s at most)\n{printed}")


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    run_together([[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(WORLD)], tmp_path, TIME_LIMIT)
    block, batch = model_and_batch()
    block(batch).square().mean().backward()
    expected = gradients(block)
    for rank in range(WORLD):
        results = torch.load(tmp_path / f"gradients{rank}")
        assert tuple(results) == HOW
        for how, found in results.items():
            for got, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(got, wanted, msg=lambda text, how=how: f"{how}: {text}")


def running(pid: int) -> bool:
    """Whether a process is there, and not just its exit code."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_text())
    except OSError:
        return False


def test_a_hang_is_a_failure(tmp_path: Path) -> None:
    """Of processes that hang, and of what they started, nothing is left, and what they printed is shown."""
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    hang, fail = [sys.executable, "-c", code], [sys.executable, "-c", "raise SystemExit(3)"]
    begin = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"exit codes \[None, None\]") as caught:
        run_together([hang, hang], tmp_path, limit=3)
    with pytest.raises(pytest.fail.Exception, match=r"exit codes \[None, 3\]"):
        run_together([hang, fail], tmp_path, limit=100)
    started = [int(line) for line in str(caught.value).splitlines() if line.isdigit()]
    assert len(started) == 2
    while any(map(running, started)) and time.monotonic() - begin < 60:
        time.sleep(0.1)
    assert time.monotonic() - begin < 60


if __name__ == "__main__":
    train(int(sys.argv[1]), Path(sys.argv[2]))
