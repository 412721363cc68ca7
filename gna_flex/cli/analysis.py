"""``gna-flex prove`` and ``search``: is a mask perfectly block-sparse, and which parameters to choose."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gna_flex.cli.arguments import (
    add_gna_arguments,
    add_tile_arguments,
    add_verb,
    gna_of,
    output,
    positive,
    print_json,
    print_presets,
    sizes,
    tiles_of,
)
from gna_flex.presets import preset
from gna_flex.tiling import choose_tile

if TYPE_CHECKING:
    from gna_flex.cli.arguments import Subparsers


def add_prove(verbs: Subparsers) -> None:
    """``prove``: is a mask perfectly block-sparse, and why."""
    verb = add_verb(verbs, "prove", run_prove, "prove or refute that no visited tile needs a mask; nearest remedies")
    add_gna_arguments(verb)
    add_tile_arguments(verb)
    verb.add_argument("--tiling", choices=("static", "anchored"), default="static", help="where key tiles start")
    verb.add_argument(
        "--solve", choices=("stride", "window", "q_tile", "kv_tile"), help="list all values that would do"
    )
    verb.add_argument("--latex", action="store_true", help="print the derivation in LaTeX")


def run_prove(args: argparse.Namespace) -> int:
    """Prints a proof, a refutation (exit code 1), or all values of one argument that make it perfect."""
    from gna_flex.symbolic import prove, solve

    if args.list_presets:
        print_presets(args.json)
        return 0
    gna, chosen = gna_of(args), tiles_of(args)
    if chosen["q_tile"] is None:
        if chosen["kv_tile"] is not None:
            raise ValueError("--kv-tile needs a --q-tile")
        chosen["q_tile"] = choose_tile((gna,))[0]
    if args.solve:
        solution = solve(gna, chosen["q_tile"], chosen["kv_tile"], unknown=args.solve, tiling=args.tiling)
        print_json(solution.to_json()) if args.json else output().print(str(solution))
        return 0
    answer = prove(gna, chosen["q_tile"], chosen["kv_tile"], args.tiling)
    if args.json:
        print_json(answer.to_json())
    else:
        output().print(answer.latex() if args.latex else answer, soft_wrap=args.latex, markup=False)
    return 0 if answer else 1


def add_search(verbs: Subparsers) -> None:
    """``search``: windows, strides and tiles for a goal."""
    verb = add_verb(verbs, "search", run_search, "rank windows, strides and tiles by predicted time, for a goal")
    add_gna_arguments(verb)
    verb.add_argument("--sparsity", type=float, metavar="SHARE", help="share of the pairs to leave out, such as 0.9")
    verb.add_argument("--speedup", type=float, metavar="X", help="arithmetic of dense attention over the wanted one")
    verb.add_argument("--tiling", choices=("static", "anchored"), default="static", help="where key tiles start")
    verb.add_argument("--strides", choices=("powers", "all"), default="powers", help="powers of two (default), or all")
    verb.add_argument("--prune", action="store_true", help="leave out strides that a smaller one matches")
    verb.add_argument(
        "--q-tokens", nargs="+", default=["128"], metavar="N", help="tokens of a query tile: 128, 256, ..."
    )
    verb.add_argument("--kv-tokens", nargs="+", default=["128"], metavar="N", help="tokens of a key tile")
    verb.add_argument("--gpu", default="h200", metavar="NAME", help="for the predicted times (default: h200)")
    verb.add_argument("--heads", type=positive, metavar="N", help="heads (default: the preset's, or 24)")
    verb.add_argument("--head-dim", type=positive, metavar="N", help="default: the preset's, or 128")
    verb.add_argument("--backward", action="store_true", help="predict the backward pass instead")
    verb.add_argument("--limit", type=positive, default=12, metavar="N", help="rows to show (default: 12)")


def run_search(args: argparse.Namespace) -> None:
    """Prints ranked parameters, and the trade of speed for stride."""
    from rich.console import Console
    from rich.progress import Progress

    from gna_flex.search import search

    if args.list_presets:
        print_presets(args.json)
        return
    if args.stride is not None:
        raise ValueError("stride: search looks for strides; leave --stride out")
    gna = gna_of(args)
    known = preset(args.preset) if args.preset else None
    wanted: dict[str, Any] = {name: getattr(args, name) for name in ("sparsity", "speedup")}
    if args.window is not None or (known and not any(value is not None for value in wanted.values())):
        wanted["window"] = gna.window
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"windows of {gna.tokens:,} tokens")
        result = search(
            gna.layout,
            **wanted,
            strides=args.strides,
            prune=args.prune,
            q_tokens=sizes(args.q_tokens, "q_tokens") or (),
            kv_tokens=sizes(args.kv_tokens, "kv_tokens") or (),
            tiling=args.tiling,
            dilation=gna.dilation,
            causal=gna.causal,
            text_first=gna.text_first,
            text_last=gna.text_last,
            limit=args.limit,
            device=args.gpu,
            heads=args.heads or (known.heads if known else 24),
            head_dim=args.head_dim or (known.head_dim if known else 128),
            backward=args.backward,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_json(result.to_json()) if args.json else output().print(result)
