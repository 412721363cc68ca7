"""Arguments that several commands share, and where results go."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gna_flex.neighborhood import GNA
from gna_flex.presets import PRESETS, preset

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DIMENSIONS = ("window", "stride", "dilation")
"""Arguments of which one value holds for every dimension."""
DTYPES = ("float32", "float16", "bfloat16")


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
        options["causal"] = one_or_all([bool(flag) for flag in flags])
    if args.preset is not None:
        if options:
            raise ValueError(f"--preset stands for everything; leave out {', '.join(options)}")
        return preset(args.preset).gna
    if "layout" not in options:
        raise ValueError("give a layout such as 30x48x80, or --preset NAME (--list-presets shows them)")
    options = {name: one_or_all(value) if name in DIMENSIONS else value for name, value in options.items()}
    return GNA(**({"window": -1} | options))


def tiles_of(args: argparse.Namespace) -> dict[str, Any]:
    """``q_tile`` and ``kv_tile`` as given; ``None`` where not."""
    return {name: value and one_or_all(value) for name in ("q_tile", "kv_tile") for value in [sizes_of(args, name)]}


def one_or_all(values: Any) -> Any:
    """A single value holds for every dimension."""
    return values[0] if len(values) == 1 else values


def sizes_of(args: argparse.Namespace, name: str) -> tuple[int, ...] | None:
    """The sizes given for an argument; ``None`` where not."""
    return sizes(getattr(args, name), name)


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


def protect_negative(argv: list[str]) -> list[str]:
    """Keeps argparse from taking ``-1,4,16`` for an option: a word with a space is a value."""
    return [f" {word}" if re.fullmatch(r"-\d+[,x].*", word) else word for word in argv]


def positive(word: str) -> int:
    """A whole number above 0, for argparse."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return int(word)


def check_device(device: str) -> None:
    """Refuses a device that torch cannot use."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device} cannot be used: {str(error).splitlines()[0]}") from None


def output() -> Console:
    """Where results go."""
    return Console(highlight=False)


def working(what: str) -> AbstractContextManager[Any]:
    """A spinner on the standard error stream while something takes long; nothing where that is not a terminal."""
    return Console(stderr=True).status(what)


def print_json(value: Any) -> None:
    """JSON on the standard output stream."""
    print(json.dumps(value, indent=2))


def print_presets(as_json: bool) -> None:
    """The presets, as a table or as JSON."""
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
