"""``gna-flex report`` and ``viz``: what a mask skips, in numbers and pictures."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gna_flex.cli.arguments import (
    add_gna_arguments,
    add_tile_arguments,
    add_verb,
    gna_of,
    output,
    print_json,
    print_presets,
    sizes_of,
    tiles_of,
    working,
)

if TYPE_CHECKING:
    from gna_flex.cli.arguments import Subparsers


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
    verb.add_argument("--html", metavar="FILE", help="also write a page to explore the mask in a browser")


def run_report(args: argparse.Namespace) -> None:
    """Prints the report of a GNA, or the presets."""
    from gna_flex.page import save_page
    from gna_flex.report import report

    if args.list_presets:
        print_presets(args.json)
        return
    gna = gna_of(args)
    with working(f"counting blocks of {gna.tokens:,} tokens"):
        result = report(gna, **tiles_of(args), natural=args.natural)
        if args.html:
            save_page(args.html, gna, **tiles_of(args))
    if args.json:
        print_json(result.to_json() | {"html": args.html})
        return
    output().print(result)
    if args.html:
        output().print(f"wrote {args.html}")


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
        print_presets(args.json)
        return
    gna, tiles, query = gna_of(args), tiles_of(args), sizes_of(args, "query")
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
