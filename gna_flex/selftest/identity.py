"""What a verdict holds for: versions, GPU, driver and the kernel's sources."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import torch

import gna_flex
from gna_flex import kernels
from gna_flex.cuda import driver, forward, jit

Identity = dict[str, str]


def identity(route: str, device: torch.device) -> Identity:
    """Everything that a verdict of a route on a device depends on, as words."""
    facts = {
        "gna-flex": gna_flex.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "route": route,
        "device": device.type,
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts |= {"gpu": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
        facts |= {"driver": driver.driver_version()}
    if route in kernels.KERNELS:
        facts |= {"nvrtc": jit.nvrtc_version() or "", "kernel": digest(route)}
    return facts


def digest(kernel: str) -> str:
    """Checksum of a kernel's sources, and of the host code that launches it."""
    config = forward.KERNELS[kernel]
    files = sorted(Path(str(forward.__file__)).parent.glob("*.py"))
    texts = [config.source(), sorted(jit.headers(config.folder).items())]
    texts += [path.read_text(encoding="utf-8") for path in files]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
