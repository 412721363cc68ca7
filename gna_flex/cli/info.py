"""``gna-flex info``: what is installed, and which routes there are."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text

import gna_flex
from gna_flex.cli.arguments import add_verb, output, print_json
from gna_flex.routing import ROUTES, Facts, cpp_compiler, obstacle_to

if TYPE_CHECKING:
    from gna_flex.cli.arguments import Subparsers

ENVIRONMENT = {"GNA_FLEX_BACKEND": f"forces a route: {', '.join(ROUTES)}"}
EXTRAS = {
    "triton": "compiled FlexAttention on GPUs",
    "matplotlib": "PNG pictures: pip install gna-flex[viz]",
    "scikit-image": "the demo's photograph: pip install gna-flex[demo]",
    "natten": "comparison with NATTEN: pip install gna-flex[oracle]",
}


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
