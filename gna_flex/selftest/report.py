"""What came of self-tests, as a report that can be given away: nothing in it names people, machines or folders."""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gna_flex.selftest.supervisor import Event, Outcome

FORMAT = 1
"""Version of the report's fields."""
KEPT = ("variant", "problem", "reason", "error", "share", "lse_share", "seconds")
"""Fields of a result."""


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Outcomes of several routes, as JSON takes them."""
    return {
        "gna_flex_selftest": FORMAT,
        "routes": [
            {
                "status": outcome.status,
                "reason": outcome.reason,
                "seconds": outcome.seconds,
                "versions": outcome.identity,
                "results": [_fields(result, KEPT) for result in outcome.results],
                "timings": [_fields(timing, ("name", "milliseconds", "dense")) for timing in outcome.timings],
            }
            for outcome in outcomes
        ],
    }


def _fields(event: Event, names: Sequence[str]) -> Event:
    return {name: event[name] for name in names if name in event}


def write_report(path: Path, facts: dict[str, Any]) -> None:
    """Writes a report, without anything private.

    Raises:
        OSError: if that is not possible.
    """
    path.write_text(json.dumps(scrubbed(facts), indent=1) + "\n", encoding="utf-8")


def scrubbed(value: Any) -> Any:
    """The same facts without folders, the user and the machine.

    >>> scrubbed({"reason": "no file /home/someone/x/forward.cu"})
    {'reason': 'no file .../forward.cu'}
    """
    if isinstance(value, dict):
        return {name: scrubbed(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(part) for part in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(?:[A-Za-z]:)?[/\\](?:[^\s/\\:'\",]+[/\\])+", ".../", value)
    for name in _private():
        value = re.sub(rf"\b{re.escape(name)}\b", "...", value)
    return value


def _private() -> list[str]:
    """Names of the machine and of the user, unless they are words that say nothing."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user without a name
        names.append(getpass.getuser())
    return [name for name in names if len(name) > 2 and name not in ("root", "user", "localhost")]
