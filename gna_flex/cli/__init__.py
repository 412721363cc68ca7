"""The command line: ``gna-flex info``, ``report`` and the other verbs of :data:`VERBS`, each with ``--json``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import gna_flex
from gna_flex.cli.analysis import add_prove, add_search
from gna_flex.cli.arguments import protect_negative
from gna_flex.cli.info import add_info
from gna_flex.cli.masks import add_report, add_viz
from gna_flex.cli.runs import add_bench, add_demo
from gna_flex.cli.selftest import add_selftest
from gna_flex.cli.tune import add_tune


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 1 for a failed check, 2 for bad input, 130 for Ctrl-C.

    >>> main(["report", "8x8", "--window", "3", "--stride", "4"])
    2
    """
    args = parser().parse_args(protect_negative(sys.argv[1:] if argv is None else argv))
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


VERBS: tuple[Callable[..., None], ...] = (
    add_info,
    add_selftest,
    add_report,
    add_prove,
    add_search,
    add_viz,
    add_demo,
    add_bench,
    add_tune,
)
