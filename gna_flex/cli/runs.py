"""``gna-flex demo`` and ``bench``: attention that runs, and how long it takes."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gna_flex.cli.arguments import (
    DIMENSIONS,
    DTYPES,
    add_gna_arguments,
    add_verb,
    check_device,
    gna_of,
    one_or_all,
    output,
    positive,
    print_json,
    print_presets,
    sizes_of,
    working,
)
from gna_flex.presets import preset

if TYPE_CHECKING:
    from gna_flex.cli.arguments import Subparsers


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

    shape = {name: one_or_all(sizes_of(args, name)) for name in DIMENSIONS}
    if args.device:
        check_device(args.device)
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
    about = "time of masks, of compiling, of attention and of whole models, against torch's own"
    verb = add_verb(verbs, "bench", run_bench, about)
    what = "build the block mask, compile a transformer with it, compute attention under it, or run whole models: "
    what += "bench model flux-4k wan-14b"
    verb.add_argument("what", choices=("mask", "compile", "attention", "model"), help=what)
    add_gna_arguments(verb)
    verb.add_argument("--tiny", action="store_true", help="model: few narrow layers and a small grid, for a CPU")
    verb.add_argument("--compiler", default="inductor", metavar="NAME", help="model: backend of torch.compile")
    verb.add_argument("--device", help="default: cpu for mask, the accelerator for the others")
    verb.add_argument("--repeats", type=positive, metavar="N", help="measurements, of which the median counts")
    verb.add_argument("--order", choices=("row-major", "tiles"), default="row-major", help="mask: order of the tokens")
    verb.add_argument("--layers", type=positive, default=4, metavar="N", help="compile: layers (default: 4)")
    verb.add_argument("--batch", type=positive, default=1, metavar="N", help="attention: batch size (default: 1)")
    verb.add_argument("--heads", type=positive, metavar="N", help="attention: heads (default: the preset's, or 24)")
    verb.add_argument("--head-dim", type=positive, metavar="N", help="attention: default: the preset's, or 128")
    verb.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="attention: type (default: bfloat16)")
    verb.add_argument("--backward", action="store_true", help="attention: time the backward pass instead")
    verb.add_argument("--ways", nargs="+", metavar="NAME", help="attention: only these beside dense, say hopper natten")


def run_bench(args: argparse.Namespace) -> int:
    """Measures; results that disagree are exit code 1."""
    from gna_flex import bench, compare

    if args.list_presets:
        print_presets(args.json)
        return 0
    if args.what == "model":
        return run_bench_models(args)
    gna = gna_of(args)
    device = args.device or _bench_device(args.what)
    check_device(device)
    options: dict[str, Any] = {"device": device} | ({"repeats": args.repeats} if args.repeats else {})
    if args.what == "mask":
        options |= {"order": args.order}
    elif args.what == "compile":
        options |= {"layers": args.layers}
    else:
        known = preset(args.preset) if args.preset else None
        options |= {
            "batch": args.batch,
            "heads": args.heads or (known.heads if known else 24),
            "head_dim": args.head_dim or (known.head_dim if known else 128),
            "dtype": getattr(torch, args.dtype),
            "backward": args.backward,
        }
        if args.ways:
            options["ways"] = tuple(args.ways)
    measure: dict[str, Callable[..., list[bench.Timing]]]
    measure = {"mask": bench.bench_mask, "compile": bench.bench_compile, "attention": compare.bench_attention}
    try:
        with working(f"measuring {args.what}, {gna.tokens:,} tokens"):
            timings = measure[args.what](gna, **options)
    except AssertionError as error:
        print(f"gna-flex bench: {error}", file=sys.stderr)
        return 1
    if args.json:
        settings = options | ({"dtype": args.dtype} if "dtype" in options else {})
        print_json(bench.to_json(args.what, gna, settings, timings))
    else:
        output().print(bench.table(args.what, gna, options, timings))
    return 0


def run_bench_models(args: argparse.Namespace) -> int:
    """Measures whole models, one after the other; if one fails the others are measured all the same."""
    from gna_flex import bench_models
    from gna_flex.models import MODELS, model

    if not args.layout:
        raise ValueError(f"give names of models: {', '.join(MODELS)}")
    if args.preset or any(getattr(args, name) is not None for name in (*DIMENSIONS, "causal")):
        raise ValueError("a model comes with its own grid and neighborhoods: give names of models only")
    chosen = [model(name).smaller() if args.tiny else model(name) for name in args.layout]
    device = args.device or _bench_device(args.what)
    check_device(device)
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, args.dtype), "compiler": args.compiler}
    options |= {"repeats": args.repeats} if args.repeats else {}
    measured, failed = [], {}
    for one in chosen:
        with working(one.name) as status:
            try:
                progress = functools.partial(_show_stage, status, one.name)
                measured.append(bench_models.bench_model(one, **options, progress=progress))
            except (AssertionError, RuntimeError) as error:
                failed[one.name] = str(error)
                print(f"gna-flex bench: {one.name}: {error}", file=sys.stderr)
        if one.name not in failed and not args.json:
            output().print(bench_models.table(measured[-1]))
    if args.json:
        command = shlex.join(["gna-flex", "bench", "model", *args.layout, *(["--tiny"] if args.tiny else [])])
        print_json(bench_models.record(measured, failed, command, device))
    return 1 if failed else 0


def _show_stage(status: Any, name: str, stage: str) -> None:
    status.update(f"{name}: {stage}")


def _bench_device(what: str) -> str:
    """Where to measure if nothing is said."""
    if what == "mask":
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None and what == "compile":
        return "cpu"
    if accelerator is None:
        small = "small layouts" if what == "attention" else "--tiny ones"
        raise ValueError(f"{what} is measured on a GPU, and there is none; --device cpu works for {small}")
    return accelerator.type
