"""Whole models measured: one forward with dense attention, as it is and compiled, and with neighborhoods, in one run.

Results are checked before times count. What bf16 loses is not guessed: every budget is the distance between two correct
ways to compute the same thing in the same run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import math
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gna_flex.attention import explain
from gna_flex.bench import environment, or_none, shown
from gna_flex.compare import SAMPLE, SLOW, dense, routed, time_one
from gna_flex.mask import gna_mask
from gna_flex.models import Inputs, Model, Setting, block_lists, blocks_of, build, make_inputs
from gna_flex.neighborhood import GNA
from gna_flex.routing import backend
from gna_flex.simulate import end_to_end
from gna_flex.words import by_x, percent

BASELINE = "dense compiled"
EAGER = "dense eager"
FULL = "full window eager"
LONG = 10_000.0
"""A forward of more than this many milliseconds is timed twice at most."""
TOLERANCE = 1.5
"""How many times the distance between two correct results another correct one may be away; up to 1.25 was seen."""
DEPTH = 2
"""Blocks of each kind in shallow models. The first one may get its input in other strides than all that follow."""
VARIANTS = 64
"""Versions of a block that torch.compile may make: all ways to run a model share its code. 8 is too few."""
DENSE_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Dense attention takes the first of these that can: the fastest one on the GPUs that the kernel is for."""


OTHER_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Dense attention computed in another way."""


class Row(NamedTuple):
    """One way to run the model.

    Attributes:
        name: what it is called.
        milliseconds: median of one forward.
        samples: how many forwards that is the median of.
        peak_mib: most memory of a forward, beyond weights and inputs; NaN on a CPU.
        attention: milliseconds of all self-attention in it, measured alone with random numbers.
        gna: the neighborhood of all layers, ``None`` for dense attention.
        route: the route that attention takes.
    """

    name: str
    milliseconds: float
    samples: int
    peak_mib: float
    attention: float
    gna: GNA | None = None
    route: str = "scaled_dot_product_attention"


class Check(NamedTuple):
    """A result that has to be near another one.

    Attributes:
        what: what is compared.
        error: distance from the result that it has to be near, relative to its size (root mean square).
        noise: distance between two correct results in the same run, which is what rounding loses.
        effect: distance between what neighborhoods and dense attention give: what a wrong window would change.
    """

    what: str
    error: float
    noise: float
    effect: float

    def budget(self, dtype: torch.dtype) -> float:
        """The largest error that passes: at least that of rounding the output once."""
        return max(TOLERANCE * self.noise, torch.finfo(dtype).eps / 4)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model's rows and checks, and its size."""

    model: Model
    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    parameters: int
    layers: int
    heads: int
    head_dim: int
    settings: dict[str, Any]

    def speedup(self, row: Row) -> float:
        """How many times faster than the compiled dense model a row is."""
        return next(r.milliseconds for r in self.rows if r.name == BASELINE) / row.milliseconds

    def generation(self, row: Row) -> float:
        """Speed-up of all steps of a generation, the first of which stay dense; NaN where there is none."""
        if not self.model.steps or row.gna is None or row.name == FULL:
            return math.nan
        return end_to_end(self.speedup(row), 1.0, self.model.steps, self.model.dense_steps)


def bench_model(
    chosen: Model,
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 3,
    compiler: str = "inductor",
    progress: Callable[[str], Any] = lambda stage: None,
) -> Measured:
    """One forward of a model, batch size 1, with dense attention and with each of its neighborhoods.

    Blocks are compiled one by one, with one graph each. Every way to run the model is a model of its own that shares
    the weights.

    Args:
        chosen: the model.
        device: where.
        dtype: type of weights and activations.
        repeats: forwards of each way, of which the median counts; slow ones have fewer.
        compiler: the backend of ``torch.compile``.
        progress: is told what is going on.

    Raises:
        AssertionError: if an output is not that of the reference, is not finite or is constant.
        ImportError: if the model's library is not installed.
    """
    _forget()
    limit = torch.compiler.config.patch(recompile_limit=VARIANTS)  # type: ignore[attr-defined]
    with torch.no_grad(), sdpa_kernel(DENSE_BACKENDS, set_priority=True), limit:
        progress("building")
        core = build(chosen, device, dtype)
        inputs = make_inputs(chosen, core, device, dtype)
        checks = [*_check_small(chosen, core, device, dtype, progress)]
        ways = _ways(chosen, core)
        for name, way in ways.items():
            if name not in (EAGER, FULL):
                for block in blocks_of(way, chosen):
                    block.compile(backend=compiler, fullgraph=True)
        checks += _check_compiled(chosen, core, ways, inputs, dtype, progress)
        first = {name: _first(name, way, inputs, device, progress) for name, way in ways.items()}
        outputs = {name: result.output for name, result in first.items()}
        strided = distance(outputs[chosen.settings[-1].name], outputs[BASELINE])
        noise = max(distance(outputs[EAGER], outputs[BASELINE]), other_attention(chosen, core, device, dtype))
        error = distance(outputs[FULL], outputs[EAGER])
        checks.append(
            _passed(Check("full window, whole model: dense attention's output", error, noise, strided), dtype)
        )
        outputs.clear()
        times = _in_turns(ways, {n: r.milliseconds for n, r in first.items()}, inputs, device, repeats, progress)
        progress("attention alone")
        heads, head_dim = _heads(core)
        layers = sum(len(blocks) for blocks in block_lists(core, chosen))
        rows = []
        for name in ways:
            gna, route, attention = _attention(chosen, name, heads, head_dim, device, dtype)
            median = statistics.median(times[name])
            peak = first[name].peak_mib
            rows.append(Row(name, median, len(times[name]), peak, attention * layers, gna, route))
    parameters = sum(p.numel() for p in core.parameters())
    settings = {"device": device, "dtype": str(dtype).removeprefix("torch."), "batch": 1, "compiler": compiler}
    return Measured(chosen, tuple(rows), tuple(checks), parameters, layers, heads, head_dim, settings)


def _forget() -> None:
    """Drops compiled code and the memory of models measured before, which compiled blocks hold in cycles."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def distance(out: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected; NaN if anything is not finite."""
    difference = (out.float() - expected.float()).norm() / expected.float().norm()
    return float(difference)


def run(way: nn.Module, inputs: Inputs) -> Tensor:
    """The output of a forward."""
    out: Tensor = way(**inputs, return_dict=False)[0]
    return out


def sane(name: str, out: Tensor) -> Tensor:
    """The output, if it is one.

    Raises:
        AssertionError: if it is not finite or constant.
    """
    if not bool(out.isfinite().all()):
        raise AssertionError(f"{name}: the output is not finite")
    if not out.float().std().item() > 0:
        raise AssertionError(f"{name}: the output is constant")
    return out


def _passed(check: Check, dtype: torch.dtype) -> Check:
    """The check, if it passed and would have seen a wrong window."""
    budget = check.budget(dtype)
    if not check.error <= budget:
        raise AssertionError(f"{check.what}: error {check.error:.2e}, budget {budget:.2e}")
    if not check.effect > budget:
        raise AssertionError(
            f"{check.what}: windows change {check.effect:.2e} only, so the budget {budget:.2e} checks nothing"
        )
    return check


def twin(core: Any) -> Any:
    """The model again, with the same tensors: what is applied to one is not applied to the other."""
    shared = [*core.parameters(), *core.buffers()]
    return copy.deepcopy(core, {id(tensor): tensor for tensor in shared})


def _applied(chosen: Model, core: Any, window: Any, stride: Any = 1) -> Any:
    """A twin with a neighborhood in every layer."""
    way = twin(core)
    integration = importlib.import_module(f"gna_flex.integrations.{chosen.library}")
    put = integration.configure if chosen.library == "transformers" else integration.apply
    put(way, window, stride)
    return way


def _ways(chosen: Model, core: Any) -> dict[str, Any]:
    """Every way to run the model by name."""
    ways = {EAGER: twin(core), BASELINE: twin(core), FULL: _applied(chosen, core, -1)}
    return ways | {s.name: _applied(chosen, core, s.window, s.stride) for s in chosen.settings}


@contextlib.contextmanager
def shallow(chosen: Model, *ways: Any) -> Iterator[None]:
    """Models with only the first blocks of each kind."""
    lists = [blocks for way in ways for blocks in block_lists(way, chosen)]
    rest = [list(blocks[DEPTH:]) for blocks in lists]
    for blocks in lists:
        del blocks[DEPTH:]
    try:
        yield
    finally:
        for blocks, more in zip(lists, rest, strict=True):
            blocks.extend(more)


def _check_small(
    chosen: Model, core: Any, device: str, dtype: torch.dtype, progress: Callable[[str], Any]
) -> Iterator[Check]:
    """Neighborhoods against the reference, on half of the grid and with two blocks of each kind.

    What rounding loses there: dense attention by torch against the reference with a full window.
    """
    small = chosen.halved()
    inputs = make_inputs(small, core, device, dtype)
    full = _applied(small, core, -1)
    with shallow(small, core, full):
        progress("reference, half the grid")
        plain = run(core, inputs)
        with backend("reference"):
            exact = sane("reference", run(full, inputs))
    noise = distance(plain, exact)
    for setting in small.settings:
        way = _applied(small, core, setting.window, setting.stride)
        with shallow(small, way):
            out = run(way, inputs)
            with backend("reference"):
                expected = run(way, inputs)
        what = f"{setting.name}, half the grid, two blocks of each kind: the reference's output"
        yield _passed(Check(what, distance(out, expected), noise, distance(exact, expected)), dtype)


def _check_compiled(
    chosen: Model, core: Any, ways: dict[str, Any], inputs: Inputs, dtype: torch.dtype, progress: Callable[[str], Any]
) -> Iterator[Check]:
    """Compiled blocks against the same ones as they are, two of each kind on the whole grid. Compiles them."""
    outputs: dict[str, Tensor] = {}
    with shallow(chosen, core, *ways.values()):
        for name, way in ways.items():
            progress(f"{name}, compiling")
            outputs[name] = sane(name, run(way, inputs))
        plain = outputs[EAGER]
        noise = max(distance(outputs[BASELINE], plain), other_attention(chosen, core, str(plain.device), dtype))
        for setting in chosen.settings:
            way = _applied(chosen, core, setting.window, setting.stride)
            with shallow(chosen, way):
                expected = run(way, inputs)
            error, effect = distance(outputs[setting.name], expected), distance(plain, expected)
            what = f"{setting.name}, compiled, two blocks of each kind: the output without compiling"
            yield _passed(Check(what, error, noise, effect), dtype)


def other_attention(chosen: Model, core: Any, device: str, dtype: torch.dtype) -> float:
    """How far the dense model's output moves where torch computes attention in another way, on half the grid."""
    inputs = make_inputs(chosen.halved(), core, device, dtype)
    out = run(core, inputs)
    with sdpa_kernel(OTHER_BACKENDS, set_priority=True):
        return distance(run(core, inputs), out)


class First(NamedTuple):
    """The first forward of the whole model: its output, milliseconds and memory."""

    output: Tensor
    milliseconds: float
    peak_mib: float


def _first(name: str, way: nn.Module, inputs: Inputs, device: str, progress: Callable[[str], Any]) -> First:
    progress(f"{name}, first forward")
    on_gpu = torch.device(device).type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found: list[Tensor] = []
    milliseconds = time_one(lambda: found.append(run(way, inputs)), device, settle=False)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else math.nan
    return First(sane(name, found[0]), milliseconds, peak)


def _in_turns(
    ways: dict[str, Any],
    first: dict[str, float],
    inputs: Inputs,
    device: str,
    repeats: int,
    progress: Callable[[str], Any],
) -> dict[str, list[float]]:
    """Milliseconds of forwards, in rounds of another order each. Of slow ones the first forward counts already."""
    times = {name: [first[name]] if first[name] > SLOW else [] for name in ways}
    shuffled = random.Random(0)
    for turn in range(repeats):
        for name in shuffled.sample(list(ways), len(ways)):
            last = times[name][-1] if times[name] else first[name]
            # The dense model as it is and the full window are there to compare outputs with.
            wanted = 1 if name in (EAGER, FULL) else 2 if last > LONG else repeats
            if len(times[name]) < wanted:
                progress(f"{name}, round {turn + 1} of {repeats}")
                calls = math.ceil(SAMPLE / last)
                forward = functools.partial(run, ways[name], inputs)
                times[name].append(time_one(forward, device, calls, settle=last < SLOW))
    return times


def _heads(core: Any) -> tuple[int, int]:
    """Heads and their channels."""
    config = core.config
    heads = config.num_attention_heads
    width = getattr(config, "attention_head_dim", None)
    return heads, width or config.hidden_size // heads


def _attention(
    chosen: Model, name: str, heads: int, head_dim: int, device: str, dtype: torch.dtype
) -> tuple[GNA | None, str, float]:
    """What the self-attention of a layer is: its GNA, its route and its milliseconds."""
    settings = {s.name: s for s in chosen.settings} | {
        FULL: Setting(FULL, (-1,) * len(chosen.layout), (1,) * len(chosen.layout))
    }
    setting = settings.get(name)
    gna = chosen.gna(setting or settings[FULL])
    shape = (1, gna.tokens, heads, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
    if setting is None:
        way, route = dense(q, k, v), "scaled_dot_product_attention"
    else:
        mask = gna_mask(gna, device=device)
        route = explain(q, k, v, mask).name
        way = routed(route, q, k, v, mask, backward=False)
    assert way.run is not None
    once = time_one(way.run, device)
    milliseconds = time_one(way.run, device, math.ceil(SAMPLE / once)) if once < SLOW else once
    return (gna if setting else None), route, milliseconds


def to_json(measured: Measured) -> dict[str, Any]:
    """A model's measurement with all that it was made with; what was not measured is ``None``."""
    model, dtype = measured.model, getattr(torch, measured.settings["dtype"])
    rows = [_row_json(measured, row) for row in measured.rows]
    return {
        "model": model.name,
        "class": f"{model.library}.{model.class_name}",
        "config": dict(model.config),
        "parameters": measured.parameters,
        "layers": measured.layers,
        "heads": measured.heads,
        "head_dim": measured.head_dim,
        "layout": model.layout,
        "text": model.text,
        "settings": measured.settings,
        "baseline": BASELINE,
        "generation": {"steps": model.steps, "dense_steps": model.dense_steps},
        "rows": [{name: or_none(value) for name, value in row.items()} for row in rows],
        "checks": [check._asdict() | {"budget": check.budget(dtype)} for check in measured.checks],
    }


def _row_json(measured: Measured, row: Row) -> dict[str, Any]:
    numbers = row._asdict() | {"gna": None if row.gna is None else dataclasses.asdict(row.gna)}
    sparsity = 0.0 if row.gna is None else 1 - row.gna.kept_pairs() / row.gna.tokens**2
    derived = {"sparsity": sparsity, "speedup": measured.speedup(row), "generation": measured.generation(row)}
    paper = {s.name: s.paper for s in measured.model.settings}.get(row.name) or math.nan
    return numbers | derived | {"paper": paper}


def record(measured: list[Measured], failed: dict[str, str], command: str, device: str) -> dict[str, Any]:
    """Everything that was measured, what failed and why, and the machine: what is kept as a record."""
    import datetime
    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in sorted({m.model.library for m in measured})}
    return {
        "what": "one forward of models with random weights, dense and with neighborhoods, medians, in turns",
        "command": command,
        "date": datetime.date.today().isoformat(),
        **environment(device),
        **versions,
        "cases": [to_json(one) for one in measured],
        "failed": failed,
    }


def table(measured: Measured) -> RenderableType:
    """A model's measurement to print."""
    model = measured.model
    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    rows.add_column(model.name)
    rows.add_column("attend to")
    for heading in ("left out", "forward", "of it attention", f"vs {BASELINE}", "generation", "paper", "memory added"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for row in measured.rows:
        numbers = _row_json(measured, row)
        where = "everything" if row.gna is None else f"{by_x(row.gna.window)} s{by_x(row.gna.stride)} ({row.route})"
        rows.add_row(
            row.name,
            where,
            percent(numbers["sparsity"]),
            shown(row.milliseconds, ",.1f", " ms"),
            shown(row.attention, ",.1f", " ms"),
            shown(numbers["speedup"], ".2f", "x"),
            shown(numbers["generation"], ".2f", "x"),
            shown(numbers["paper"], ".2f", "x"),
            shown(row.peak_mib / 1024, ".1f", " GiB"),
        )
    size = (
        f"{model.class_name}, {measured.parameters / 1e9:.1f} billion random parameters, {measured.layers} layers of "
        f"{measured.heads} x {measured.head_dim}, {by_x(model.layout)} tokens, {model.text} more"
    )
    dtype = getattr(torch, measured.settings["dtype"])
    checked = [
        f"checked: {check.what}: error {check.error:.1e}, budget {check.budget(dtype):.1e}, windows {check.effect:.1e}"
        for check in measured.checks
    ]
    steps = []
    if model.steps:
        steps = [f"generation: {model.steps} forwards, the first {model.dense_steps} dense; paper: on a B200"]
    return Group(size, rows, *steps, *checked)
