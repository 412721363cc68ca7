"""The command line: ``gna-flex info | report | viz | demo | bench``, each with ``--json``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import gna_flex
from gna_flex.neighborhood import GNA
from gna_flex.presets import PRESETS, preset
from gna_flex.routing import ROUTES, Facts, cpp_compiler, obstacle_to

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

ENVIRONMENT = {"GNA_FLEX_BACKEND": f"forces a route: {', '.join(ROUTES)}"}
EXTRAS = {
    "triton": "compiled FlexAttention on GPUs",
    "matplotlib": "PNG pictures: pip install gna-flex[viz]",
    "scikit-image": "the demo's photograph: pip install gna-flex[demo]",
    "natten": "comparison with NATTEN: pip install gna-flex[oracle]",
}
DIMENSIONS = ("window", "stride", "dilation")
"""Arguments of which one value holds for every dimension."""
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 1 for a failed check, 2 for bad input, 130 for Ctrl-C.

    >>> main(["report", "8x8", "--window", "3", "--stride", "4"])
    2
    """
    args = parser().parse_args(_protect_negative(sys.argv[1:] if argv is None else argv))
    try:
        return int(args.run(args) or 0)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        print(f"gna-flex {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gna-flex: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each verb registers itself in an ``add_<verb>`` function."""
    top = argparse.ArgumentParser(prog="gna-flex", description=gna_flex.__doc__)
    top.add_argument("--version", action="version", version=f"gna-flex {gna_flex.__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="verb")
    for add in VERBS:
        add(verbs)
    return top


def add_verb(
    verbs: Subparsers, name: str, run: Callable[[argparse.Namespace], int | None], about: str
) -> argparse.ArgumentParser:
    """A verb with ``--json``; ``run`` gets the parsed arguments and returns an exit code, or nothing for 0."""
    verb = verbs.add_parser(name, help=about, description=about)
    verb.add_argument("--json", action="store_true", help="print numbers as JSON instead")
    verb.set_defaults(run=run)
    return verb


def add_gna_arguments(verb: argparse.ArgumentParser) -> None:
    """Arguments that describe a GNA: a preset, or a layout and the rest. :func:`gna_of` reads them."""
    sizes = {"nargs": "+", "metavar": "N"}
    verb.add_argument("layout", nargs="*", metavar="N", help="grid of tokens: 30x48x80, 30,48,80 or 30 48 80")
    verb.add_argument("--preset", metavar="NAME", help="layout, window and the rest of a public model")
    verb.add_argument("--list-presets", action="store_true", help="list the presets and stop")
    verb.add_argument("--window", help="keys per dimension; -1 is a whole dimension (default: -1)", **sizes)  # type: ignore[arg-type]
    verb.add_argument("--stride", help="queries that share a window (default: 1)", **sizes)  # type: ignore[arg-type]
    verb.add_argument("--dilation", help="step between keys (default: 1)", **sizes)  # type: ignore[arg-type]
    verb.add_argument("--causal", nargs="*", metavar="0|1", help="causal in every dimension, or one 0 or 1 for each")
    verb.add_argument("--text-first", type=int, default=None, metavar="N", help="text tokens before the grid")
    verb.add_argument("--text-last", type=int, default=None, metavar="N", help="text tokens after the grid")


def add_tile_arguments(verb: argparse.ArgumentParser) -> None:
    """``--q-tile`` and ``--kv-tile``."""
    verb.add_argument("--q-tile", nargs="+", metavar="N", help="tokens of a query tile (default: the best tile)")
    verb.add_argument("--kv-tile", nargs="+", metavar="N", help="tokens of a key tile (default: as the query tile)")


def gna_of(args: argparse.Namespace) -> GNA:
    """The GNA that the arguments describe.

    Raises:
        ValueError: if they do not describe one.
    """
    given = {name: sizes(getattr(args, name), name) for name in ("layout", "window", "stride", "dilation", "causal")}
    given |= {"text_first": args.text_first, "text_last": args.text_last}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None and value != ()}
    if args.causal is not None:
        flags = given["causal"] or (1,)
        if set(flags) - {0, 1}:
            raise ValueError(f"causal={' '.join(args.causal)}: give 0 or 1 for each dimension, or nothing for all")
        options["causal"] = _one_or_all([bool(flag) for flag in flags])
    if args.preset is not None:
        if options:
            raise ValueError(f"--preset stands for everything; leave out {', '.join(options)}")
        return preset(args.preset).gna
    if "layout" not in options:
        raise ValueError("give a layout such as 30x48x80, or --preset NAME (--list-presets shows them)")
    options = {name: _one_or_all(value) if name in DIMENSIONS else value for name, value in options.items()}
    return GNA(**({"window": -1} | options))


def _one_or_all(values: Any) -> Any:
    """A single value holds for every dimension."""
    return values[0] if len(values) == 1 else values


def sizes(words: Iterable[str] | None, name: str) -> tuple[int, ...] | None:
    """Integers written ``30x48x80``, ``30,48,80`` or as several words; ``None`` stays ``None``.

    >>> sizes(["30x48x80"], "layout"), sizes(["-1,4", "16"], "window")
    ((30, 48, 80), (-1, 4, 16))
    """
    if words is None:
        return None
    words = list(words)
    if not all(re.fullmatch(r"\s*-?\d+([x,]-?\d+)*,?", word) for word in words):
        raise ValueError(f"{name}={' '.join(words)}: sizes are whole numbers such as 30x48x80, 30,48,80 or 30 48 80")
    return tuple(int(part) for word in words for part in re.findall(r"-?\d+", word))


def _protect_negative(argv: list[str]) -> list[str]:
    """Keeps argparse from taking ``-1,4,16`` for an option: a word with a space is a value."""
    return [f" {word}" if re.fullmatch(r"-\d+[,x].*", word) else word for word in argv]


def output() -> Console:
    """Where results go."""
    return Console(highlight=False)


def working(what: str) -> AbstractContextManager[Any]:
    """A spinner on the standard error stream while something takes long; nothing where that is not a terminal."""
    return Console(stderr=True).status(what)


def print_json(value: Any) -> None:
    """JSON on the standard output stream."""
    print(json.dumps(value, indent=2))


def add_info(verbs: Subparsers) -> None:
    """``info``: what is installed, and which routes there are."""
    add_verb(verbs, "info", run_info, "versions, devices, routes and why not, environment variables")


def run_info(args: argparse.Namespace) -> None:
    """Prints what is installed, and which routes there are."""
    facts = info()
    if args.json:
        print_json(facts)
        return
    console = output()
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts["versions"].items():
        table.add_row(name, value or Text("not installed", "dim"), Text(EXTRAS.get(name, ""), "dim"))
    console.print(table)
    for device in facts["devices"]:
        console.print(f"\n[bold]{device['name']}[/] ({device['device']})")
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("route", "for inference", "for training"):
            table.add_column(heading)
        for route, why in device["routes"].items():
            cells = (Text(reason, "yellow") if reason else Text("yes", "bold green") for reason in why.values())
            table.add_row(route, *cells)
        console.print(table)
    console.print("\n[bold]environment[/]")
    for name, entry in facts["environment"].items():
        console.print(f"{name}={entry['value'] or ''}  [dim]{entry['meaning']}[/]")


def info() -> dict[str, Any]:
    """Versions, devices with their routes (an empty reason means yes), and environment variables."""
    versions: dict[str, str | None] = {"gna-flex": gna_flex.__version__, "torch": torch.__version__}
    versions |= {"python": platform.python_version()}
    versions |= {name: _version(name) for name in EXTRAS} | {"C++ compiler": cpp_compiler()}
    devices = [("cpu", platform.processor() or platform.machine())]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            name = torch.cuda.get_device_name(index) if accelerator.type == "cuda" else accelerator.type
            devices.append((f"{accelerator.type}:{index}", name))
    return {
        "versions": versions,
        "devices": [{"device": device, "name": name, "routes": _routes(device)} for device, name in devices],
        "environment": {
            name: {"value": os.environ.get(name), "meaning": meaning} for name, meaning in ENVIRONMENT.items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _routes(device: str) -> dict[str, dict[str, str]]:
    """Why a usual call (bfloat16, head dim 128) cannot take each route; empty if it can."""
    call = Facts(
        device=device.split(":")[0],
        dtype=torch.bfloat16,
        head_dim=128,
        pairs=1 << 32,
        needs_grad=False,
        wants_stats=False,
        compiling=False,
        has_tiles=True,
        tiles_pay=True,
        has_compiler=cpp_compiler() is not None,
    )
    uses = {"inference": call, "training": call._replace(needs_grad=True)}
    return {route: {use: obstacle_to(route, facts) for use, facts in uses.items()} for route in ROUTES}


def add_report(verbs: Subparsers) -> None:
    """``report``: what a mask skips."""
    verb = add_verb(verbs, "report", run_report, "what a mask skips: FLOPs, and blocks in natural and in tile order")
    add_gna_arguments(verb)
    add_tile_arguments(verb)
    verb.add_argument(
        "--natural",
        action=argparse.BooleanOptionalAction,
        help="count natural order too (default: unless there are very many blocks)",
    )


def run_report(args: argparse.Namespace) -> None:
    """Prints the report of a GNA, or the presets."""
    from gna_flex.report import report

    if args.list_presets:
        _print_presets(args.json)
        return
    gna = gna_of(args)
    with working(f"counting blocks of {gna.tokens:,} tokens"):
        result = report(gna, **_tiles(args), natural=args.natural)
    if args.json:
        print_json(result.to_json())
        return
    output().print(result)


def _tiles(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value and _one_or_all(value) for name in ("q_tile", "kv_tile") for value in [_sizes_of(args, name)]}


def _sizes_of(args: argparse.Namespace, name: str) -> tuple[int, ...] | None:
    return sizes(getattr(args, name), name)


def _print_presets(as_json: bool) -> None:
    if as_json:
        entries = {
            p.name: {"gna": str(p.gna), "heads": p.heads, "head_dim": p.head_dim, "note": p.note, "source": p.source}
            for p in PRESETS.values()
        }
        print_json(entries)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("preset", no_wrap=True, style="bold")
    table.add_column("mask and model")
    for entry in PRESETS.values():
        model = Text.assemble(f"{entry.gna}, {entry.heads} heads x {entry.head_dim}\n", (entry.note, "dim"))
        table.add_row(entry.name, model)
    output().print(table)


def add_viz(verbs: Subparsers) -> None:
    """``viz``: pictures of a mask."""
    verb = add_verb(verbs, "viz", run_viz, "draw a query's window, its tiles and the block mask; PNG with --png")
    add_gna_arguments(verb)
    add_tile_arguments(verb)
    verb.add_argument("--query", nargs="+", metavar="N", help="coordinates of the query (default: the middle)")
    verb.add_argument("--png", metavar="FILE", help="write a picture (.png, .svg or .pdf) instead of drawing here")
    verb.add_argument("--order", choices=("tiles", "row-major"), default="tiles", help="block mask in the PNG")


def run_viz(args: argparse.Namespace) -> None:
    """Draws a mask in the terminal or to a file."""
    from gna_flex import scene, viz

    if args.list_presets:
        _print_presets(args.json)
        return
    gna, tiles, query = gna_of(args), _tiles(args), _sizes_of(args, "query")
    axes = scene.axes_of(gna, query, **tiles)
    if args.png:
        with working("drawing"):
            viz.save_png(args.png, gna, query, order=args.order, **tiles)
    if args.json:
        place = tuple(axis.query for axis in axes)
        keys = [{"start": r.start, "stop": r.stop, "step": r.step} for r in scene.key_ranges(gna, place)]
        q_tile, kv_tile = scene.tiles_of(gna, **tiles)
        numbers = {"gna": str(gna), "query": place, "keys": keys, "q_tile": q_tile, "kv_tile": kv_tile}
        print_json(numbers | {"png": args.png})
    elif args.png:
        output().print(f"wrote {args.png}")
    else:
        console = output()
        with working("drawing"):
            drawing = viz.draw(gna, query, **tiles, width=console.width)
        console.print(drawing)


def add_demo(verbs: Subparsers) -> None:
    """``demo``: attention on a photograph."""
    verb = add_verb(verbs, "demo", run_demo, "attention between the patches of a photograph, checked and drawn")
    verb.add_argument("--image", metavar="FILE", help="your own picture (default: an astronaut)")
    verb.add_argument("--window", nargs="+", default=["15"], metavar="N", help="keys per dimension (default: 15)")
    verb.add_argument("--stride", nargs="+", default=["1"], metavar="N", help="queries that share a window")
    verb.add_argument("--dilation", nargs="+", default=["1"], metavar="N", help="step between keys")
    verb.add_argument("--query", nargs=2, type=int, metavar="N", help="row and column of the patch that is shown")
    verb.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")
    verb.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in")
    verb.add_argument("--png", metavar="FILE", help="also write photograph, attention and output to a picture")


def run_demo(args: argparse.Namespace) -> int:
    """Runs the demo; a result outside of its error budget is exit code 1."""
    from gna_flex import demo

    shape = {name: _one_or_all(_sizes_of(args, name)) for name in DIMENSIONS}
    if args.device:
        _check_device(args.device)
    with working("attention on a photograph"):
        image = demo.load_image(args.image) if args.image else None
        query = tuple(args.query) if args.query else None
        result = demo.run_demo(image, **shape, query=query, device=args.device, dtype=getattr(torch, args.dtype))
        if args.png:
            result.save_png(args.png)
    if args.json:
        print_json(result.to_json() | {"png": args.png})
    else:
        console = output()
        console.print(result)
        if args.png:
            console.print(f"wrote {args.png}")
    return 0 if result.passed else 1


def add_bench(verbs: Subparsers) -> None:
    """``bench``: measurements."""
    verb = add_verb(verbs, "bench", run_bench, "time to build a mask, or of attention, against torch's own")
    verb.add_argument("what", choices=("mask", "attention"), help="build the block mask, or compute attention under it")
    add_gna_arguments(verb)
    verb.add_argument("--device", help="default: cpu for mask, the accelerator for attention")
    verb.add_argument("--repeats", type=_positive, metavar="N", help="measurements, of which the median counts")
    verb.add_argument("--order", choices=("row-major", "tiles"), default="row-major", help="mask: order of the tokens")
    verb.add_argument("--batch", type=_positive, default=1, metavar="N", help="attention: batch size (default: 1)")
    verb.add_argument("--heads", type=_positive, metavar="N", help="attention: heads (default: the preset's, or 24)")
    verb.add_argument("--head-dim", type=_positive, metavar="N", help="attention: default: the preset's, or 128")
    verb.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="attention: type (default: bfloat16)")
    verb.add_argument("--backward", action="store_true", help="attention: time the backward pass instead")


def run_bench(args: argparse.Namespace) -> int:
    """Measures; results that disagree are exit code 1."""
    from gna_flex import bench

    if args.list_presets:
        _print_presets(args.json)
        return 0
    gna = gna_of(args)
    device = args.device or _bench_device(args.what)
    _check_device(device)
    options: dict[str, Any] = {"device": device} | ({"repeats": args.repeats} if args.repeats else {})
    if args.what == "mask":
        options |= {"order": args.order}
    else:
        known = preset(args.preset) if args.preset else None
        options |= {
            "batch": args.batch,
            "heads": args.heads or (known.heads if known else 24),
            "head_dim": args.head_dim or (known.head_dim if known else 128),
            "dtype": getattr(torch, args.dtype),
            "backward": args.backward,
        }
    measure = bench.bench_mask if args.what == "mask" else bench.bench_attention
    try:
        with working(f"measuring {args.what}, {gna.tokens:,} tokens"):
            timings = measure(gna, **options)
    except AssertionError as error:
        print(f"gna-flex bench: {error}", file=sys.stderr)
        return 1
    if args.json:
        settings = options | ({"dtype": args.dtype} if "dtype" in options else {})
        print_json(bench.to_json(args.what, gna, settings, timings))
    else:
        output().print(bench.table(args.what, gna, options, timings))
    return 0


def _bench_device(what: str) -> str:
    """Where to measure if nothing is said."""
    if what == "mask":
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        raise ValueError("attention is measured on a GPU, and there is none; --device cpu works for small layouts")
    return accelerator.type


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return int(word)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device} cannot be used: {str(error).splitlines()[0]}") from None


VERBS: tuple[Callable[[Subparsers], None], ...] = (add_info, add_report, add_viz, add_demo, add_bench)
