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
from gna_flex import kernels
from gna_flex.cli.arguments import add_verb, output, print_json
from gna_flex.cuda import jit
from gna_flex.cuda.tune import tuned_entries
from gna_flex.routing import ROUTES, cpp_compiler, facts_on, obstacle_to
from gna_flex.selftest.identity import identity
from gna_flex.selftest.verdict import Verdict, read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gna_flex.cli.arguments import Subparsers

ENVIRONMENT = {
    "GNA_FLEX_AUTOTUNE": "1: shapes of the CUDA kernel are measured at the first use of each mask",
    "GNA_FLEX_BACKEND": f"forces a route: {', '.join(ROUTES)}",
    "GNA_FLEX_CACHE_DIR": "folder of compiled CUDA kernels, of what was tuned, and of verdicts of self-tests",
    "GNA_FLEX_SELFTEST": "of a kernel that we never ran: off, trust (take it untested) or again; default: once",
}
EXTRAS = {
    "triton": "compiled FlexAttention on GPUs",
    "cuda-bindings": "CUDA kernels: pip install gna-flex[cuda]",
    "matplotlib": "PNG pictures: pip install gna-flex[viz]",
    "scikit-image": "the demo's photograph: pip install gna-flex[demo]",
    "natten": "comparison with NATTEN: pip install gna-flex[oracle]",
}

SHOWN_KERNELS = 8
"""Compiled kernels listed, the newest first."""


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
        if tested := device["selftest"]:
            why = f": {tested['reason']}" if tested["reason"] else ""
            console.print(Text(f"self-test: {tested['status']} ({tested['when']}){why}"))
    console.print("\n[bold]kernels[/]")
    console.print(_kernel_table(facts["kernels"], facts["tuned"]))
    console.print("\n[bold]environment[/]")
    for name, entry in facts["environment"].items():
        console.print(f"{name}={entry['value'] or ''}  [dim]{entry['meaning']}[/]")


def info() -> dict[str, Any]:
    """Versions, devices with their routes (an empty reason means yes) and self-tests, kernels, environment."""
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
        "devices": [
            {"device": device, "name": name, "routes": _routes(device), "selftest": _selftest(device)}
            for device, name in devices
        ],
        "kernels": _kernels(),
        "tuned": tuned_entries(),
        "environment": {
            name: {"value": os.environ.get(name), "meaning": meaning} for name, meaning in ENVIRONMENT.items()
        },
    }


def _kernels() -> dict[str, Any]:
    """Whether CUDA kernels can be compiled (an empty reason means yes), with what, and those compiled before."""
    cached = [
        {
            "name": entry.name,
            "arch": entry.arch,
            "macros": _macros(entry.options),
            "bytes": entry.size,
            "age": entry.age,
        }
        for entry in jit.cached_kernels()
    ]
    return {
        "missing": kernels.missing(),
        "nvrtc": jit.nvrtc_version(),
        "cache": str(jit.cache_folder()),
        "cached": cached,
    }


def _macros(options: Sequence[str]) -> dict[str, str]:
    """The macros among the options of a compiler.

    >>> _macros(("-std=c++17", "-DHEAD_DIM=128"))
    {'HEAD_DIM': '128'}
    """
    defined = (option[2:].partition("=") for option in options if option.startswith("-D"))
    return {name: value for name, _, value in defined}


def _kernel_table(facts: dict[str, Any], tuned: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    compiler = facts["nvrtc"] or Text(EXTRAS["cuda-bindings"], "yellow")
    cached = facts["cached"]
    size = sum(kernel["bytes"] for kernel in cached) / 2**20
    table.add_row("NVRTC", compiler)
    table.add_row("folder", facts["cache"])
    table.add_row("tuned masks", str(tuned))
    table.add_row("compiled", f"{len(cached)} kernels, {size:.1f} MiB")
    for kernel in cached[:SHOWN_KERNELS]:
        macros = " ".join(f"{name}={value}" for name, value in kernel["macros"].items())
        table.add_row("", Text(f"{kernel['name']} {kernel['arch']}: {macros}", "dim"))
    if len(cached) > SHOWN_KERNELS:
        table.add_row("", Text(f"and {len(cached) - SHOWN_KERNELS} older ones", "dim"))
    return table


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _routes(device: str) -> dict[str, dict[str, str]]:
    """Why a usual call (bfloat16, head dim 128) cannot take each route; empty if it can."""
    call = facts_on(torch.device(device), torch.bfloat16, head_dim=128, pairs=1 << 32)
    if kernels.kernel_for(call.capability) in kernels.UNTRIED:
        call = call._replace(untested=_untested(device))
    uses = {"inference": call, "training": call._replace(needs_grad=True)}
    return {route: {use: obstacle_to(route, facts) for use, facts in uses.items()} for route in ROUTES}


def _untested(device: str) -> str:
    """Why a kernel that we never ran is not used on a device, as far as that is known; empty if it is."""
    mode, found = os.environ.get("GNA_FLEX_SELFTEST"), _verdict(device)
    if mode == "trust":
        return ""
    return found.obstacle if found else "its self-test has not run on this machine; gna-flex selftest runs it"


def _selftest(device: str) -> dict[str, str] | None:
    """The verdict on the kernel of a device, if there is one."""
    found = _verdict(device)
    return {"status": found.status, "reason": found.reason, "when": found.when} if found else None


def _verdict(device: str) -> Verdict | None:
    where = torch.device(device)
    kernel = kernels.kernel_for(torch.cuda.get_device_capability(where)) if where.type == "cuda" else ""
    return read(identity(kernel, where)) if kernel else None
