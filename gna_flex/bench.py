"""Measurements: how long a mask takes to build and a model to compile, against torch; and how measurements are shown.

Results are checked. Times are medians. Attention is measured in ``compare``.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import gna_flex
from gna_flex.dynamo.backend import gna_flex_backend
from gna_flex.dynamo.report import compile_report
from gna_flex.mask import gna_mask
from gna_flex.neighborhood import GNA

CREATE_BLOCK_MASK_PAIRS = 2e10
"""Up to this many pairs compiled create_block_mask is run beside gna_mask; it takes half a minute there on one core."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median time of one way to do a thing, and the most memory it took on top of what was there before.

    ``tiles`` are the shapes of query and key tiles that it computes with, in attention.
    """

    name: str
    milliseconds: float
    peak_mib: float
    note: str = ""
    tiles: str = ""


def bench_mask(gna: GNA, order: Any = "row-major", device: str = "cpu", repeats: int = 20) -> list[Timing]:
    """Building the BlockMask of a GNA: ``gna_mask`` and, where it can run, compiled ``create_block_mask``.

    Every way runs in a process of its own, with one thread, so that memory is its own.

    Raises:
        AssertionError: if the two disagree about the number of blocks.
    """
    jobs = [("gna_mask", repeats)]
    obstacle = _obstacle(gna, order)
    if not obstacle:
        jobs.append(("create_block_mask", 1))
    results = []
    context = multiprocessing.get_context("spawn")
    for name, count in jobs:
        with context.Pool(1) as pool:
            milliseconds, peak, counts = pool.apply(_time_mask, (name, gna, order, device, count))
        results.append((Timing(name, milliseconds, peak), counts))
    if any(counts != results[0][1] for _, counts in results):
        raise AssertionError(f"{gna}: gna_mask and create_block_mask disagree: {[counts for _, counts in results]}")
    timings = [timing for timing, _ in results]
    if obstacle:
        timings.append(Timing("create_block_mask", math.nan, math.nan, f"not run, {obstacle}"))
    return timings


def _obstacle(gna: GNA, order: Any) -> str:
    """Why create_block_mask is not run; empty if it can be. In tile order torch holds a byte for every pair."""
    pairs = float(gna.tokens) ** 2
    if pairs > CREATE_BLOCK_MASK_PAIRS:
        return f"it would test {pairs:.0e} pairs"
    if order != "row-major" and 1.2 * pairs > _available_bytes():
        return f"in tile order it needs about {1.2 * pairs / 2**30:.1f} GiB of memory"
    return ""


def _available_bytes() -> float:
    """Memory that is free; where the system does not tell, enough for small masks."""
    try:
        with open("/proc/meminfo") as lines:
            return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except OSError:
        return float(1 << 30)


def _time_mask(name: str, gna: GNA, order: Any, device: str, repeats: int) -> tuple[float, float, tuple[int, int]]:
    """Median milliseconds, peak MiB and (partial, full) block counts of one way to build a mask."""
    torch.set_num_threads(1)
    build: Callable[[], BlockMask]
    if name == "gna_mask":
        gna_mask(GNA((8, 8), 3), device=device)  # imports and first-call set-up are not the mask's cost
        _forget_masks()

        def build() -> BlockMask:
            _forget_masks()
            return gna_mask(gna, order=order, device=device)
    else:
        plan = gna_mask(gna, order=order, device=device).plan
        compiled = torch.compile(create_block_mask, dynamic=False)
        q_len, kv_len = plan.seq_lengths
        mod, block = plan.mask_mod(), (plan.q_block, plan.kv_block)

        def build() -> BlockMask:
            return compiled(mod, None, None, q_len, kv_len, device=device, BLOCK_SIZE=block)

        build()
    before = _forget_peak()
    mask = build()
    peak = _peak_mib() - before
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        mask = build()
        _synchronize(device)
        times.append((time.perf_counter() - begin) * 1e3)
    assert mask.full_kv_num_blocks is not None
    counts = (int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum()))
    return statistics.median(times), peak, counts


def _forget_masks() -> None:
    """Empties the caches that make a second mask of the same GNA cheaper."""
    from gna_flex import mask_mod, tiling

    for cached in (tiling.tile_intervals, tiling.choose_tile, mask_mod.mask_mod, mask_mod.to_natural):
        cached.cache_clear()


def _forget_peak() -> float:
    """MiB this process holds now, from which its peak is counted anew. Elsewhere than on Linux: its peak so far."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except OSError:
        return _peak_mib()
    return _status_mib("VmRSS")


def _peak_mib() -> float:
    """Most MiB this process has held since :func:`_forget_peak`."""
    try:
        return _status_mib("VmHWM")
    except OSError:
        import resource

        scale = 1 << (20 if sys.platform == "darwin" else 10)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _status_mib(name: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


class _Layer(nn.Module):
    """A layer of a transformer that calls torch's flex_attention, four heads of 64."""

    def __init__(self, mask: BlockMask) -> None:
        super().__init__()
        self.mask = mask
        self.before, self.qkv, self.out = nn.LayerNorm(256), nn.Linear(256, 768), nn.Linear(256, 256)
        self.mlp = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, 256]`` to the same."""
        parts = self.qkv(self.before(x)).unflatten(-1, (3, 4, 64)).transpose(1, 3).unbind(2)
        # Norms as models have them; on a CPU, Inductor takes neither parts of a tensor nor what comes from a product.
        query, key, value = (nn.functional.rms_norm(part, (64,)) for part in parts)
        attended: Any = flex_attention(query, key, value, block_mask=self.mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return torch.add(x, self.mlp(x))


def bench_compile(gna: GNA, layers: int = 4, device: str = "cpu", repeats: int = 3) -> list[Timing]:
    """Compiling a transformer whose masks are not ours: by Inductor, and by the backend ``"gna_flex"``.

    Every measurement is in a process of its own and with empty caches. The time is that of the first call less that of
    the second. ``recognising`` is the part that the backend adds: finding calls, recognising masks, rewriting.

    Raises:
        AssertionError: if a mask is not recognised.
    """
    measured: dict[str, list[tuple[float, float]]] = {"inductor": [], "gna_flex": []}
    for name in list(measured) * repeats:
        # Unlike a Pool it lets its process end in its own time, which has processes of Inductor to end.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            measured[name].append(process.submit(_time_compile, name, gna, layers, device).result())
    inductor, ours = (statistics.median(total for total, _ in runs) for runs in measured.values())
    added = statistics.median(part for _, part in measured["gna_flex"])
    note = f"{added / inductor:.1%} of Inductor's time"
    return [
        Timing("inductor", inductor, math.nan),
        Timing("gna_flex", ours, math.nan),
        Timing("recognising", added, math.nan, note),
    ]


def _time_compile(name: str, gna: GNA, layers: int, device: str) -> tuple[float, float]:
    """Milliseconds that compiling takes, and those of it that are spent on masks."""
    mask = gna_mask(gna, device=device).canonical()
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    model = nn.Sequential(*(_Layer(mask) for _ in range(layers))).to(device, dtype).eval()
    x = torch.randn(1, gna.tokens, 256, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        torch.compile(torch.sin)(x)  # imports and first-call set-up are not the model's cost
        compiled = torch.compile(model, backend="inductor" if name == "inductor" else gna_flex_backend)
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            compiled(x)
            _synchronize(device)
            times.append((time.perf_counter() - begin) * 1e3)
    report = compile_report()
    found = [call.gna for call in report.calls]
    if name == "gna_flex" and found != [gna] * layers:
        raise AssertionError(f"{gna}: recognised as {found}")
    return times[0] - times[1], report.seconds * 1e3


def environment(device: str) -> dict[str, Any]:
    """What a recorded measurement was made with."""
    facts: dict[str, Any] = {
        "gna_flex": gna_flex.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor_name(),
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver"] = _driver_version()
    return facts


def _processor_name() -> str:
    """The model of the CPU where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _driver_version() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


BASELINES = {"mask": "create_block_mask", "compile": "inductor", "attention": "dense"}
"""What the other timings of a measurement are compared with."""


def speedups(what: str, timings: list[Timing]) -> list[float]:
    """How many times faster than the baseline each timing is; NaN where that did not run."""
    base = next(timing.milliseconds for timing in timings if timing.name == BASELINES[what])
    return [base / timing.milliseconds for timing in timings]


def of_ideal(what: str, gna: GNA, timings: list[Timing]) -> list[float]:
    """Share of the ideal speed, at which time is in proportion to the pairs of query and key; NaN where unknown."""
    if what != "attention":
        return [math.nan] * len(timings)
    flops = gna.tokens**2 / gna.kept_pairs()
    shares = [ratio / flops for ratio in speedups(what, timings)]
    return [math.nan if timing.name == BASELINES[what] else s for timing, s in zip(timings, shares, strict=True)]


def to_json(what: str, gna: GNA, settings: dict[str, Any], timings: list[Timing]) -> dict[str, Any]:
    """A measurement with all that it was made with; what was not measured is ``None``."""
    ratios = zip(timings, speedups(what, timings), of_ideal(what, gna, timings), strict=True)
    measured = [dataclasses.asdict(timing) | {"speedup": ratio, "of_ideal": share} for timing, ratio, share in ratios]
    rows = [{name: or_none(value) for name, value in row.items()} for row in measured]
    described: dict[str, Any] = {
        "what": what,
        "gna": dataclasses.asdict(gna),
        "settings": settings,
        "baseline": BASELINES[what],
    }
    described["flop_speedup"] = gna.tokens**2 / gna.kept_pairs()
    return described | {"timings": rows, "environment": environment(settings["device"])}


def table(what: str, gna: GNA, settings: dict[str, Any], timings: list[Timing]) -> RenderableType:
    """A measurement to print."""
    columns = _columns(what, gna, timings)
    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in columns:
        rows.add_column(heading, justify="left" if heading in (what, "tiles") else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        rows.add_row(*cells)
    facts = environment(settings["device"])
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    machine = f"torch {facts['torch']}, {facts.get('gpu', facts['processor'])}"
    notes = [f"{timing.name}: {timing.note}" for timing in timings if timing.note]
    return Group(str(gna), f"{chosen}; {machine}", rows, *notes)


def _columns(what: str, gna: GNA, timings: list[Timing]) -> dict[str, list[str]]:
    """Columns of a table by heading; those without any number are left out."""
    columns = {
        "median time": [shown(timing.milliseconds, ",.2f", " ms") for timing in timings],
        f"vs {BASELINES[what]}": [shown(ratio, ",.2f", "x") for ratio in speedups(what, timings)],
        "of ideal": [shown(share, ".0%", "") for share in of_ideal(what, gna, timings)],
        "memory added": [shown(timing.peak_mib, ",.0f", " MiB") for timing in timings],
        "tiles": [timing.tiles or "-" for timing in timings],
    }
    known = {heading: cells for heading, cells in columns.items() if set(cells) != {"-"}}
    return {what: [timing.name for timing in timings]} | known


def or_none(value: Any) -> Any:
    """``None`` in place of NaN, which JSON has no word for."""
    return None if isinstance(value, float) and math.isnan(value) else value


def shown(value: float, form: str, unit: str) -> str:
    """A number with its unit; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:{form}}{unit}"
