"""The verdict on a kernel that we never ran: kept on disk, found out at first use, one process at a time.

It holds for one GPU model, driver, torch, compiler and version of the kernel. Only a self-test that passed lets calls
take the kernel; whatever goes wrong here means another route.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from gna_flex.cuda.cache import cache_folder, open_own, own_folder, write_own
from gna_flex.selftest.identity import Identity, identity
from gna_flex.selftest.supervisor import FAILED, LIMIT, PASSED, UNABLE, Outcome, command, supervise

try:
    import fcntl
except ImportError:  # not on this system: processes may test at the same time
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("gna_flex")

VARIABLE = "GNA_FLEX_SELFTEST"
MODES = ("", "off", "trust", "again")
"""What the variable may be: test once; test never; take the kernel untested; test anew in this process."""
PREFIX, SUFFIX = "selftest-", ".json"
PATIENCE = LIMIT + 60
"""Seconds to wait for another process that tests."""

Tester = Callable[[str, torch.device], Outcome]


@dataclass(frozen=True)
class Verdict:
    """What a self-test said, when, and of what."""

    status: str
    reason: str
    when: str
    identity: Identity

    @property
    def obstacle(self) -> str:
        """Why the kernel is not used; empty if it passed."""
        return "" if self.status == PASSED else f"its self-test failed on this machine: {self.reason}"


def obstacle(kernel: str, device: int) -> str:
    """Why a kernel is not used on a GPU; empty if its self-test passed, which runs if there is no verdict yet.

    Raises:
        ValueError: if ``GNA_FLEX_SELFTEST`` is something unknown.
    """
    mode = os.environ.get(VARIABLE, "")
    if mode not in MODES:
        raise ValueError(f"{VARIABLE}={mode!r}: known are {', '.join(MODES[1:])}")
    with _lock:
        key = (kernel, device, mode)
        if key not in _known:
            try:
                _known[key] = find_out(kernel, torch.device("cuda", device), mode)
            except Exception as error:  # attention must not fail because of what can be done without
                _known[key] = _unable(kernel, f"{type(error).__name__}: {error}")
        return _known[key]


_lock = threading.RLock()
_known: dict[tuple[str, int, str], str] = {}


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held it may not exist here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(kernel: str, device: torch.device) -> Outcome:
    """The self-test, in a process of its own."""
    return supervise(command(kernel, str(device)))


def find_out(
    kernel: str, device: torch.device, mode: str = "", tester: Tester = run, patience: float = PATIENCE
) -> str:
    """Why a kernel is not used: by the verdict that is kept, or by a new one."""
    if mode == "trust":
        return ""
    facts = identity(kernel, device)
    kept = None if mode == "again" else read(facts)
    if kept:
        _warn_of(kernel, kept)
        return kept.obstacle
    if mode == "off":
        return f"it was not tested on this machine, and {VARIABLE}=off"
    begin = time.time()
    with only_one(patience) as mine:
        if not mine:
            return _unable(kernel, "another process has been testing it for too long")
        verdict = read(facts, since=begin if mode == "again" else 0.0)  # another process was faster
        if verdict is None:
            log.warning("the %s kernel is tested before its first use on this machine, which takes a minute", kernel)
            verdict = record(tester(kernel, device), facts)
    if verdict.status == UNABLE:
        return _unable(kernel, verdict.reason)
    _warn_of(kernel, verdict)
    return verdict.obstacle


def record(outcome: Outcome, facts: Identity) -> Verdict:
    """Keeps what came of a self-test, if that is a verdict on what was asked for."""
    status, reason = outcome.status, outcome.reason
    if status == PASSED and outcome.identity != facts:
        changed = sorted(k for k in facts.keys() | outcome.identity.keys() if facts.get(k) != outcome.identity.get(k))
        status, reason = UNABLE, f"it tested something else ({', '.join(changed)})"
    verdict = Verdict(status, reason, datetime.now(timezone.utc).isoformat(timespec="seconds"), facts)
    if status != UNABLE:
        write(verdict)
    return verdict


def _warn_of(kernel: str, verdict: Verdict) -> None:
    if verdict.obstacle:
        _warn(kernel, f"{verdict.obstacle}. `gna-flex selftest` writes a report: please send it to us")


def _unable(kernel: str, reason: str) -> str:
    _warn(kernel, f"it could not be tested: {reason}. `gna-flex selftest` does it by hand")
    return f"its self-test could not run on this machine: {reason}"


def _warn(kernel: str, words: str) -> None:
    log.warning("the %s kernel is not used, and calls take another route: %s", kernel, words)


# On disk


def path_of(facts: Identity) -> Path:
    """Where a verdict is kept: named by a checksum of all that it holds for."""
    checksum = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{PREFIX}{facts['route']}-{checksum[:32]}{SUFFIX}"


def read(facts: Identity, since: float = 0.0) -> Verdict | None:
    """The verdict that is kept; ``None`` if there is none, or it is damaged, older, or not this user's alone."""
    path = path_of(facts)
    try:
        with open(open_own(path), "rb") as file:
            if os.fstat(file.fileno()).st_mtime < since:
                return None
            found = json.loads(file.read())
        verdict = Verdict(**found)
        if verdict.status not in (PASSED, FAILED) or verdict.identity != facts or not isinstance(verdict.reason, str):
            raise ValueError("it is not a verdict of this version")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        log.warning("%s is ignored: %s: %s", path, type(error).__name__, error)
        return None
    return verdict


def write(verdict: Verdict) -> None:
    """Keeps a verdict, all or nothing; a warning if that fails."""
    path = path_of(verdict.identity)
    try:
        write_own(path, json.dumps(verdict.__dict__).encode())
    except OSError as error:
        log.warning("%s is not kept (%s): set GNA_FLEX_CACHE_DIR to a folder of your own", path, error)


@contextlib.contextmanager
def only_one(patience: float) -> Iterator[bool]:
    """A block that one process of this user at a time is in; false if others were in it for too long.

    Where files cannot be locked, everybody is.
    """
    handle = None
    with contextlib.suppress(OSError):
        own_folder(cache_folder())
        handle = open_own(cache_folder() / "selftest.lock", os.O_RDWR | os.O_CREAT)
    if handle is None or fcntl is None:
        yield True
        return
    try:
        mine = _locked(handle, patience)
        yield mine
    finally:
        # Not only closed: a process that was forked meanwhile has it open, too.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _locked(handle: int, patience: float) -> bool:
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return True
        else:
            return True
