"""``gna-flex tune``: measured shapes for the CUDA kernel."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from gna_flex.cli.arguments import (
    add_gna_arguments,
    add_verb,
    check_device,
    gna_of,
    output,
    positive,
    print_json,
    print_presets,
)
from gna_flex.presets import preset

if TYPE_CHECKING:
    from gna_flex.cli.arguments import Subparsers


def add_tune(verbs: Subparsers) -> None:
    """``tune``: shapes of the kernel, measured and kept."""
    verb = add_verb(verbs, "tune", run_tune, "measure tile shapes of the CUDA kernel for a mask, and keep the fastest")
    add_gna_arguments(verb)
    verb.add_argument("--device", help="cuda:1, ... (default: the current GPU)")
    verb.add_argument("--batch", type=positive, default=1, metavar="N", help="batch size (default: 1)")
    verb.add_argument("--heads", type=positive, metavar="N", help="heads (default: the preset's, or 24)")
    verb.add_argument("--head-dim", type=positive, metavar="N", help="default: the preset's, or 128")
    verb.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16", help="type (default: bfloat16)")


def run_tune(args: argparse.Namespace) -> None:
    """Measures, and prints what was measured."""
    from rich.console import Console
    from rich.progress import Progress

    from gna_flex.cuda.tune import tune

    if args.list_presets:
        print_presets(args.json)
        return
    gna = gna_of(args)
    known = preset(args.preset) if args.preset else None
    if args.device:
        check_device(args.device)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"measuring shapes, {gna.tokens:,} tokens")
        result = tune(
            gna,
            heads=args.heads or (known.heads if known else 24),
            head_dim=args.head_dim or (known.head_dim if known else 128),
            batch=args.batch,
            dtype=getattr(torch, args.dtype),
            device=args.device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_json(result.to_json()) if args.json else output().print(result)
