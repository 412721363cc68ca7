"""Shapes of the kernels by measurement: the most promising ones in turns on the GPU, the choice kept on disk.

Estimates (:mod:`gna_flex.cuda.shapes`) are a few per cent off, more on masks unlike those that they were fitted to. An
entry of the cache is one small JSON file beside the compiled kernels. It only says which shapes to take, and only
shapes that this version would try itself are taken.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gna_flex import kernels, ops
from gna_flex.cuda import forward, jit, rests, shapes, skips, tables, windows
from gna_flex.cuda.cache import cache_folder, open_own, write_own
from gna_flex.cuda.config import KernelConfig
from gna_flex.cuda.forward import Plan, Request, estimated, request_on
from gna_flex.cuda.tables import KernelTiles
from gna_flex.flex import foreign_to_kernels
from gna_flex.kernels import FLOAT8
from gna_flex.mask import GNABlockMask
from gna_flex.neighborhood import GNA
from gna_flex.routing import Facts, facts_on, obstacle_to, with_verdict
from gna_flex.words import plain_text, times

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger("gna_flex")

Shapes = tuple[KernelConfig, KernelTiles]
Result = tuple[Tensor, Tensor]
"""Output and log-sum-exp."""
Progress = Callable[[int, int], object]
"""Called with (steps done, all steps)."""
Sample = Callable[[Sequence[int]], list[float]]
"""Milliseconds of the candidates with these numbers, measured in this order."""

MOST_CANDIDATES = 8
TILES_PER_CONFIG = 4
GAIN = 0.01
"""The default stays unless something is faster by more than this share: less is noise."""
SECONDS = 1.5
FEWEST_ROUNDS, MOST_ROUNDS = 5, 50
SAMPLE_MILLISECONDS = 2.0
"""Short kernels run several times between two events, which would else see the time of a launch."""
FIRST_USE_TOKENS = 1 << 20
"""Tokens, over batch and heads, of a measurement at first use: enough to keep a whole GPU busy."""

_lock = threading.Lock()
"""One measurement at a time: they would disturb each other."""


@dataclass(frozen=True)
class Measurement:
    """Shapes of the kernel, and the median time of one call with them."""

    config: KernelConfig
    tiles: KernelTiles
    milliseconds: float


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` measured. Prints as a table.

    Attributes:
        gnas: one GNA, or one per head.
        heads, head_dim, batch, dtype, device: of the call that was measured.
        measurements: every candidate whose result agreed with the default's, fastest first.
        chosen: the fastest, or the default if nothing is more than 1 % faster than that.
        default: what is taken without tuning.
    """

    gnas: tuple[GNA, ...]
    heads: int
    head_dim: int
    batch: int
    dtype: str
    device: str
    measurements: tuple[Measurement, ...]
    chosen: Measurement
    default: Measurement

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("", "query tile", "key tile"):
            table.add_column(name, no_wrap=True)
        for name in ("key rows", "query boxes", "ms", "speed-up"):
            table.add_column(name, justify="right", no_wrap=True)
        for entry in self.measurements:
            name = " ".join(role for role, one in (("*", self.chosen), ("default", self.default)) if one == entry)
            sides = entry.tiles.sides(self.gnas[0].ndim)
            numbers = (str(entry.config.keys), str(entry.config.groups), f"{entry.milliseconds:,.3f}")
            speedup = times(self.default.milliseconds / entry.milliseconds)
            table.add_row(name, *sides, *numbers, speedup, style="bold" if entry == self.chosen else "")
        mask = str(self.gnas[0]) if len(self.gnas) == 1 else f"{len(self.gnas)} masks, the first {self.gnas[0]}"
        call = f"batch {self.batch}, {self.heads} heads of {self.head_dim}, {self.dtype}, on {self.device}"
        note = "* taken from now on; speed-up over the default"
        return Group(Text(mask, "bold"), Text(call), Padding(table, (1, 0)), Text(note, "dim"))

    def __str__(self) -> str:
        return plain_text(self, width=120)


def tune(
    mask_or_gna: GNABlockMask | GNA,
    *,
    heads: int,
    head_dim: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | int | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Measures tile shapes of the Hopper kernel for one mask, and has the fastest taken from now on.

    Inputs are random, ``[batch, heads, tokens, head_dim]``. Every candidate's result is compared with the default's
    before it is timed. The choice is kept in the kernel cache, for this mask, head dim, type and model of GPU, whatever
    the batch and the number of heads; later processes find it there. It takes a few seconds, most of them to compile
    what was not compiled before. Other shapes add in another order, so the last bits of results change.

    Args:
        mask_or_gna: a GNA, or a mask in natural order from :func:`gna_flex.gna_mask`, which may have a GNA per head.
        heads: query heads.
        head_dim: a multiple of 8 up to 256.
        batch: batch size.
        dtype: float16 or bfloat16, whose choice float8_e4m3fn shares.
        device: the GPU; by default the current one.
        progress: called with (steps done, all steps).

    Raises:
        ValueError: if heads, batch and mask do not fit each other, or ``dtype`` is float8_e4m3fn.
        RuntimeError: if the kernel cannot run here or not on this (the message says why), or memory does not suffice.

    >>> import gna_flex
    >>> gna = gna_flex.GNA((64, 64), window=16)
    >>> print(gna_flex.tune(gna, heads=24, head_dim=128))  # doctest: +SKIP
    """
    gnas, foreign = _gnas_of(mask_or_gna)
    if min(heads, batch) < 1 or len(gnas) not in (1, heads):
        raise ValueError(f"heads={heads}, batch={batch}: at least 1 each, and as many heads as masks ({len(gnas)})")
    if dtype == FLOAT8:
        raise ValueError(f"{dtype} takes the shapes of bfloat16: tune these")
    if not torch.cuda.is_available():
        raise RuntimeError("kernels are tuned on an NVIDIA Hopper or Blackwell GPU, and there is none")
    where = torch.device("cuda" if device is None else device)
    index = torch.cuda.current_device() if where.index is None else where.index
    facts = facts_on(where, dtype, head_dim, batch * heads * gnas[0].tokens ** 2)
    require_kernel(with_verdict(facts._replace(foreign=foreign), index))
    request = request_on(index, gnas, head_dim, dtype)
    with _lock:
        tuning = measure(request, heads, batch, progress)
    write(entry_path(request, tuning.device), tuning.chosen)
    forget_plans()
    return tuning


def _gnas_of(mask_or_gna: GNABlockMask | GNA) -> tuple[tuple[GNA, ...], str]:
    """The GNAs of a mask, and what it has that the kernel knows nothing of."""
    if isinstance(mask_or_gna, GNA):
        return (mask_or_gna,), ""
    if not isinstance(mask_or_gna, GNABlockMask):
        raise TypeError(f"mask_or_gna={mask_or_gna!r}: a GNA, or a mask from gna_mask")
    return mask_or_gna.plan.gnas, foreign_to_kernels(torch.empty(0), None, mask_or_gna, None, False, None)


def require_kernel(facts: Facts) -> None:
    """Refuses what the device's kernel cannot take.

    Raises:
        RuntimeError: if there is an obstacle.
    """
    name = kernels.kernel_for(facts.capability) or kernels.KERNELS[0]
    if obstacle := obstacle_to(name, facts):
        raise RuntimeError(f"the {name} kernel cannot be tuned: {obstacle}")


def forget_plans() -> None:
    """Has plans made anew."""
    forward.plan.cache_clear()
    ops._plan.cache_clear()
    kernels.changed()


# Candidates


def candidates(request: Request) -> list[Shapes]:
    """Shapes worth measuring, all different: the default first, then the best tiles of every configuration, and so on.

    >>> request = Request((GNA((64, 64), 16),), 128, float16=False, device=0)
    >>> found = candidates(request)
    >>> found[0] == estimated(request), len(found)
    (True, 8)
    """
    gnas = tuple(dict.fromkeys(request.gnas))
    found: list[tuple[int, float, Shapes]] = []
    for config in request.kernel.variants(request.head_dim, request.capability, request.text):
        most = (TILES_PER_CONFIG, TILES_PER_CONFIG)
        best = shapes.candidates(gnas, config.groups, (config.keys,), *most, config.rows)
        if config.may_have_rests and (two := rests.best(gnas, config.keys, config.groups, config.rows)):
            both = [*best, shapes.Candidate(two, shapes.cost(gnas, two))]
            best = sorted(both, key=lambda one: one.cost)[:TILES_PER_CONFIG]
        if config.may_skip:
            skipping = [shapes.skipping(gnas, one.tiles) for one in best]
            best = [shapes.Candidate(tiles, shapes.cost(gnas, tiles)) for tiles in skipping]
        found += [(place, one.cost * config.box_time, (config, one.tiles)) for place, one in enumerate(best)]
    found.sort(key=lambda entry: entry[:2])
    return list(dict.fromkeys([estimated(request), *(entry[2] for entry in found)]))[:MOST_CANDIDATES]


# Measuring


def measure(request: Request, heads: int, batch: int, progress: Progress | None = None) -> Tuning:
    """Candidates in turns, each checked before; keeps nothing but compiled kernels.

    Raises:
        RuntimeError: if the default cannot be run, or memory does not suffice.
    """
    found = candidates(request)
    say = progress or (lambda done, total: None)
    with torch.cuda.device(request.device):
        runs = _checked_runs(request, found, heads, batch, lambda done: say(done, 2 * len(found)))
        milliseconds = race(
            _sampler(list(runs.values())),
            len(runs),
            lambda done, total: say(len(found) + len(found) * done // total, 2 * len(found)),
        )
    measured = [Measurement(*one, ms) for one, ms in zip(runs, milliseconds, strict=True)]
    return Tuning(
        request.gnas,
        heads,
        request.head_dim,
        batch,
        "float16" if request.float16 else "bfloat16",
        torch.cuda.get_device_name(request.device),
        tuple(sorted(measured, key=lambda entry: entry.milliseconds)),
        best_of(measured),
        measured[0],
    )


def _checked_runs(
    request: Request, found: Sequence[Shapes], heads: int, batch: int, progress: Callable[[int], object]
) -> dict[Shapes, Callable[[], Result]]:
    """Calls with the first shapes, and with those of the others that agree with them."""
    generator = torch.Generator(f"cuda:{request.device}").manual_seed(0)
    shape = (batch, heads, request.gnas[0].tokens, request.head_dim)
    dtype = torch.float16 if request.float16 else torch.bfloat16
    q, k, v = (torch.randn(shape, device=generator.device, dtype=dtype, generator=generator) for _ in range(3))
    runs: dict[Shapes, Callable[[], Result]] = {}
    wanted: Result | None = None
    for number, (config, tiles) in enumerate(found, 1):
        try:
            plan = Plan(replace(request, config=config, tiles=tiles))
            run = functools.partial(plan.run, q, k, v, request.head_dim**-0.5)
            torch.full_like(q, math.nan)  # the memory that the output is given next: what is not written shows
            result = run()
            wanted = wanted or result
            if not agree(result, wanted):
                raise RuntimeError("its result is not that of the default")
            runs[config, tiles] = run
        except RuntimeError as error:
            if number == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            log.warning("%s with %s is left out of tuning: %s", config, tiles, error)
        progress(number)
    return runs


def agree(result: Result, wanted: Result) -> bool:
    """Whether two outputs and log-sum-exps can be of the same attention; nothing agrees with NaN.

    Both outputs are rounded: together one eps of the largest value. Their weights are rounded as well, at random, so
    that errors grow with the root of the number of keys as random outputs do: together a third of an eps. Three times
    the sum is allowed. Log-sum-exps are float32 throughout, and show single keys that are missing.
    """
    (out, lse), (wanted_out, wanted_lse) = result, wanted
    error = (out - wanted_out).abs().amax()
    budget = 4 * torch.finfo(out.dtype).eps * wanted_out.abs().amax()
    return bool(error <= budget) and torch.allclose(lse, wanted_lse, rtol=2e-5, atol=2e-5)


def _sampler(runs: Sequence[Callable[[], object]]) -> Sample:
    """Times calls on the current CUDA stream, several of each if they are short."""

    def sample(order: Sequence[int]) -> list[float]:
        marks = []
        for number in order:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                runs[number]()
            stop.record()
            marks.append((start, stop))
        # Only now: a GPU that has to wait for the next launch would be measured with the launch.
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / calls for start, stop in marks]

    calls = 1
    calls = max(1, math.ceil(SAMPLE_MILLISECONDS / max(sample([0])[0], 1e-3)))
    return sample


def race(sample: Sample, number: int, progress: Progress | None = None, seconds: float = SECONDS) -> list[float]:
    """Median milliseconds of candidates 0 to ``number``, in about ``seconds``.

    Every round has another order, because what ran before shifts a time by up to 7 %: caches, clocks, power.

    >>> race(lambda order: [float(i + 1) for i in order], 3)
    [1.0, 2.0, 3.0]
    """
    begin = time.perf_counter()
    sample(range(number))
    taken = time.perf_counter() - begin
    rounds = min(max(int(seconds / max(taken, 1e-9)), FEWEST_ROUNDS), MOST_ROUNDS)
    shuffled = random.Random(0)
    measured: list[list[float]] = [[] for _ in range(number)]
    for done in range(1, rounds + 1):
        order = shuffled.sample(range(number), number)
        for place, milliseconds in zip(order, sample(order), strict=True):
            measured[place].append(milliseconds)
        if progress:
            progress(done, rounds)
    return [statistics.median(values) for values in measured]


def best_of(measured: Sequence[Measurement]) -> Measurement:
    """The fastest, or the first, which is the default, if nothing is clearly faster."""
    fastest, default = min(measured, key=lambda entry: entry.milliseconds), measured[0]
    return fastest if fastest.milliseconds < (1 - GAIN) * default.milliseconds else default


# The cache on disk, and what plans take from it

PREFIX, SUFFIX = "tuned-", ".json"


def at_first_use(request: Request) -> Tuning:
    """A measurement where nothing is known of batch and heads."""
    heads = len(request.gnas)
    return measure(request, heads, max(1, FIRST_USE_TOKENS // (heads * request.gnas[0].tokens)))


def shapes_for(
    request: Request,
    gpu: str,
    tuner: Callable[[Request], Tuning] = at_first_use,
    capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
) -> Shapes:
    """Shapes for a request that leaves them open: measured before, measured now if that is wanted, or estimated.

    ``gpu`` is the name of the device, ``tuner`` measures, and ``capturing`` says whether a CUDA graph is being
    captured, which a measurement would break.
    """
    path = entry_path(request, gpu)
    found = read(path, request)
    if found or os.environ.get("GNA_FLEX_AUTOTUNE", "0") in ("", "0"):
        return found or estimated(request)
    if capturing():
        log.debug("not tuned while a CUDA graph is captured: %s", request)
        return estimated(request)
    with _lock:
        if found := read(path, request):  # another thread was faster
            return found
        begin = time.perf_counter()
        try:
            chosen = tuner(request).chosen
        except RuntimeError as error:  # such as too little memory beside a model
            log.warning("not tuned: %s", error)
            return estimated(request)
        log.info("tuned %s in %.1f s", request, time.perf_counter() - begin)
        write(path, chosen)
    return chosen.config, chosen.tiles


def entry_path(request: Request, gpu: str) -> Path:
    """Where the choice for a request on a model of GPU is kept: named by a checksum of all that decides."""
    from gna_flex import __version__  # the package may still be importing this module

    gnas = request.gnas if len(set(request.gnas)) > 1 else request.gnas[:1]
    masks = [asdict(gna) for gna in gnas]
    parts = [__version__, source_digest(request.kernel), gpu, request.head_dim, request.float16, masks]
    return cache_folder() / f"{PREFIX}{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}{SUFFIX}"


@functools.cache
def source_digest(kernel: type[KernelConfig]) -> str:
    """Checksum of a kernel: its sources, and the modules that write a part of it and its tables."""
    texts = [*sorted(jit.headers(kernel.folder).items()), kernel.source()]
    files = [str(module.__file__) for module in (sys.modules[kernel.__module__], tables, skips, windows)]
    texts += [Path(file).read_text(encoding="utf-8") for file in files]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def read(path: Path, request: Request) -> Shapes | None:
    """The shapes of an entry; ``None``, and a warning, unless it is this user's alone and possible."""
    try:
        with open(open_own(path), "rb") as file:
            return _parsed(json.loads(file.read()), path, request)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        log.warning("%s is ignored: %s: %s", path, type(error).__name__, error)
        return None


def _parsed(facts: dict[str, Any], path: Path, request: Request) -> Shapes:
    """The shapes that an entry names, if this version would try them itself."""
    if facts["name"] != path.name:
        raise ValueError(f"it was written as {facts['name']!r}")
    kernel = request.kernel
    known = kernel.variants(request.head_dim, request.capability, request.text)
    config = known[known.index(kernel(**facts["config"]))]
    sides: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in facts["tiles"].items()}
    tiles = KernelTiles(**sides)
    numbers = (*tiles.box, tiles.groups, tiles.split, *tiles.kv_tile, tiles.kv_slots, tiles.rows)
    numbers += (*(tiles.kv_rest or ()), tiles.rest_axis)
    if not all(type(n) is int for n in numbers) or type(tiles.skips) is not bool:
        raise ValueError(f"{tiles}: numbers are not whole, or skips is neither true nor false")
    if not config.fits(tiles):
        raise ValueError(f"{tiles} do not fit {config}")
    return config, tiles


def write(path: Path, chosen: Measurement) -> None:
    """Keeps a choice, all or nothing; a warning if that fails."""
    try:
        write_own(path, json.dumps({"name": path.name, **asdict(chosen)}).encode())
    except OSError as error:
        log.warning("%s is not kept (%s): set GNA_FLEX_CACHE_DIR to a folder of your own", path, error)


def tuned_entries() -> int:
    """How many choices the cache has, for all models of GPU and versions together."""
    return sum(1 for _ in cache_folder().glob(f"{PREFIX}*{SUFFIX}"))
