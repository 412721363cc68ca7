"""``gna-flex selftest``: whether routes compute the right thing on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gna_flex import kernels
from gna_flex.cli.arguments import add_verb, check_device, output, print_json
from gna_flex.routing import ROUTES, facts_on, obstacle_to
from gna_flex.words import times

if TYPE_CHECKING:
    from gna_flex.cli.arguments import Subparsers
    from gna_flex.selftest.supervisor import Outcome

REPORT = "gna-flex-selftest.json"


def add_selftest(verbs: Subparsers) -> None:
    """``selftest``: small problems on every route, against float64."""
    about = "check routes on this machine against float64, and write a report"
    verb = add_verb(verbs, "selftest", run_selftest, about)
    verb.add_argument("--route", nargs="+", choices=ROUTES, metavar="NAME", help="only these (default: all there are)")
    verb.add_argument("--device", help="cuda:1, cpu, ... (default: the current GPU, or the CPU)")
    verb.add_argument("--report", type=Path, metavar="FILE", help=f"where the report goes (default: {REPORT})")


def run_selftest(args: argparse.Namespace) -> int:
    """Tests routes one after the other, each in a process of its own; 1 if one fails."""
    from gna_flex.selftest.report import report, scrubbed, write_report
    from gna_flex.selftest.supervisor import PASSED

    if args.device:
        check_device(args.device)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    outcomes = []
    for route in routes_on(device, args.route):
        outcomes.append(tested(route, device))
        if not args.json:
            show(route, outcomes[-1])
    facts = report(outcomes)
    path = args.report or (None if args.json else Path(REPORT))
    if path:
        write_report(path, facts)
    if args.json:
        print_json(scrubbed(facts))
    else:
        output().print(f"report, without names and folders: {path}", soft_wrap=True)
    return int(any(outcome.status != PASSED for outcome in outcomes))


def routes_on(device: torch.device, wanted: Sequence[str] | None) -> list[str]:
    """The routes that are asked for, or all that a device has.

    Raises:
        RuntimeError: if one that is asked for is not possible there.
    """
    facts = facts_on(device, torch.bfloat16, head_dim=128, pairs=1 << 20)
    obstacles = {route: obstacle_to(route, facts) for route in ROUTES}
    for route in wanted or ():
        if obstacles[route]:
            raise RuntimeError(f"{route} cannot be tested: {obstacles[route]}")
    return list(wanted or (route for route, obstacle in obstacles.items() if not obstacle))


def tested(route: str, device: torch.device) -> Outcome:
    """The outcome of one route; that of a kernel is kept as its verdict."""
    from rich.progress import Progress

    from gna_flex.selftest import verdict
    from gna_flex.selftest.identity import identity
    from gna_flex.selftest.supervisor import UNABLE, Event, command, supervise

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{route}: starting", total=None)

        def listener(event: Event) -> None:
            if event["event"] == "begin":
                bar.update(task, total=event["steps"])
            elif event["event"] == "start":
                bar.update(task, description=f"{route}: {event['problem']}")
            elif event["event"] == "result":
                bar.advance(task)

        outcome = supervise(command(route, str(device), timing=True), listener=listener)
    if route in kernels.KERNELS and outcome.status != UNABLE:
        verdict.record(outcome, identity(route, device))
    return outcome


def show(route: str, outcome: Outcome) -> None:
    """Prints what came of one route."""
    from gna_flex.selftest.supervisor import PASSED

    console = output()
    style = "bold green" if outcome.status == PASSED else "bold red"
    where = outcome.identity.get("gpu") or outcome.identity.get("system", "this machine")
    said = (outcome.status, style)
    console.print(Text.assemble((route, "bold"), f" on {where}: ", said, f", {outcome.seconds:.0f} s"))
    if outcome.reason:
        console.print(Text(outcome.reason, "red"))
    problems = _table("problem", "largest error", "of its budget", "s")
    for result in outcome.results:
        numbers = (number(result.get("error"), ".1e"), number(result.get("share"), ".0%"), f"{result['seconds']:.2f}")
        variant = f" ({result['variant']})" if result["variant"] else ""
        problems.add_row(result["problem"] + variant, *numbers, style="red" if result["reason"] else "")
    console.print(problems)
    speeds = _table("time", route, "dense", "")
    for timing in outcome.timings:
        mine, dense = timing["milliseconds"], timing["dense"]
        speeds.add_row(timing["name"], f"{mine:.2f} ms", f"{dense:.2f} ms", times(dense / mine))
    console.print(speeds if outcome.timings else "")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def number(value: float | None, form: str) -> str:
    """A number, or what stands for one that is not finite.

    >>> number(0.5, ".0%"), number(None, ".0%")
    ('50%', '-')
    """
    return "-" if value is None else format(value, form)
