"""Starts the process that runs the problems, listens to it, ends it when it hangs, and says what came of it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gna_flex.cuda.cache import cache_folder
from gna_flex.selftest.identity import Identity

MARK = "gna-flex-selftest "
"""Begins the lines that are meant for this process; libraries may print others."""
LIMIT = 300.0
"""Seconds that all problems of a route may take."""
STALL = 120.0
"""Seconds without a word after which a process hangs."""
FROM_OUTSIDE = ("SIGINT", "SIGTERM", "SIGKILL", "SIGHUP", "SIGQUIT")
"""Signals that a process is sent by others: they say nothing of a kernel."""
SUPERVISOR = "_GNA_FLEX_SUPERVISOR"
"""Variable that tells a process the id of the one that supervises it. It is no setting."""
PASSED, FAILED, UNABLE = "passed", "failed", "unable"
"""The kernel is right, it is not, or the problems could not be run, which says nothing of it."""

PR_SET_PDEATHSIG = 1
"""Of ``prctl``: the signal that a process is sent when its parent ends."""

Event = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What came of a self-test: :data:`PASSED`, :data:`FAILED` or :data:`UNABLE`, and why not passed."""

    status: str
    reason: str
    seconds: float
    identity: Identity
    results: tuple[Event, ...] = ()
    timings: tuple[Event, ...] = ()


@dataclass
class Transcript:
    """What the process has said so far."""

    identity: Identity = field(default_factory=dict)
    steps: int = 0
    results: list[Event] = field(default_factory=list)
    timings: list[Event] = field(default_factory=list)
    at: str = ""
    unable: str = ""
    ended: bool = False

    def feed(self, line: str) -> Event | None:
        """Takes one line of the process's output; returns the event that it is, if it is one."""
        if not line.startswith(MARK):
            return None
        try:
            event = json.loads(line[len(MARK) :])
            self._take(event)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return event  # type: ignore[no-any-return]

    def _take(self, event: Event) -> None:
        kind = event["event"]
        if kind == "begin":
            self.identity = {str(name): str(value) for name, value in event["identity"].items()}
            self.steps = int(event["steps"])
        elif kind == "start":
            self.at = name_of(event)
        elif kind == "result":
            self.results.append({"reason": str(event["reason"])} | event)
            self.at = ""
        elif kind == "timing":
            self.timings.append(event)
        elif kind == "unable":
            self.unable = str(event["reason"])
        self.ended = kind == "end"

    def outcome(self, code: int, hangs: str, errors: str, seconds: float) -> Outcome:
        """The verdict, from how the process ended, why it had to be ended (if so), and the last line of its errors."""
        status, reason = self._judge(code, hangs, errors)
        return Outcome(status, reason, round(seconds, 1), self.identity, tuple(self.results), tuple(self.timings))

    def _judge(self, code: int, hangs: str, errors: str) -> tuple[str, str]:
        where = f" in {self.at}" if self.at else ""
        wrong = [result for result in self.results if result["reason"]]
        if wrong:
            first = f"first {name_of(wrong[0])}: {wrong[0]['reason']}"
            return FAILED, f"{len(wrong)} of {self.steps} problems failed, {first}"
        if self.unable:
            return UNABLE, self.unable
        if hangs:
            return (FAILED if self.steps else UNABLE), f"{hangs}{where}"
        if code < 0:
            name = signal_name(-code)
            outside = name in FROM_OUTSIDE or not self.steps
            return (UNABLE if outside else FAILED), f"the process was ended by {name}{where}"
        if not self.steps:
            return UNABLE, f"it could not begin: {errors or f'exit status {code}'}"
        if code or not self.ended or len(self.results) != self.steps:
            done = f"{len(self.results)} of {self.steps} problems were run"
            return FAILED, f"it ended early{where}, {done}: {errors or f'exit status {code}'}"
        return PASSED, ""


def name_of(event: Event) -> str:
    """The problem of an event, as people read it."""
    variant = event.get("variant")
    return f"'{event['problem']}'" + (f" ({variant})" if variant else "")


def signal_name(number: int) -> str:
    """SIGSEGV and the like."""
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def command(route: str, device: str, timing: bool = False) -> list[str]:
    """The process for a route on a device.

    Raises:
        RuntimeError: if this program is no Python that could be started with a module.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise RuntimeError("this program cannot start Python")
    words = [sys.executable, "-X", "faulthandler", "-m", "gna_flex.selftest.worker", route, device]
    return [*words, *(["--timing"] if timing else [])]


def environment() -> dict[str, str]:
    """That of the process: this package, no forced route, no tuning, no self-test within the self-test, and our id.

    Paths are absolute, because it runs in another folder.
    """
    paths = [str(Path(__file__).resolve().parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ours = {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths if path)}
    ours |= {"GNA_FLEX_CACHE_DIR": str(cache_folder())}
    ours |= {"GNA_FLEX_SELFTEST": "trust", "GNA_FLEX_AUTOTUNE": "0", "GNA_FLEX_BACKEND": ""}
    return os.environ | ours | {SUPERVISOR: str(os.getpid())}


def supervise(
    words: Sequence[str],
    *,
    limit: float = LIMIT,
    stall: float = STALL,
    listener: Callable[[Event], object] = lambda event: None,
) -> Outcome:
    """Runs a process to its end, or ends it with all that it started when it hangs or this one is interrupted."""
    transcript, begin = Transcript(), time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                words,
                cwd=folder,  # which Python puts before everything else
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return transcript.outcome(1, "", f"{type(error).__name__}: {error}", 0.0)
        try:
            hangs = _listen(process, transcript, begin + limit, stall, listener)
        finally:
            end(process)
        code = process.returncode if process.returncode is not None and not hangs else 0
        return transcript.outcome(code, hangs, _last_line(errors), time.monotonic() - begin)


def _listen(
    process: subprocess.Popen[str],
    transcript: Transcript,
    deadline: float,
    stall: float,
    listener: Callable[[Event], object],
) -> str:
    """Listens until the process ends; why it must be ended, if it must."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    assert process.stdout is not None
    reader = threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True)
    reader.start()
    heard, done = time.monotonic(), False
    while True:
        now = time.monotonic()
        if now > deadline:
            return "it took too long"
        if now > heard + stall:
            return f"nothing happened for {stall:.0f} s"
        if not done and process.poll() is not None:
            done = True
            reader.join(2.0)  # not for ever: what the process started may still hold its output open
        try:
            line = lines.get(timeout=0.0 if done else 0.1)
        except queue.Empty:
            if done:
                return ""
            continue
        if event := transcript.feed(line):
            heard = time.monotonic()
            listener(event)


def _pump(stream: IO[str], lines: queue.SimpleQueue[str]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            lines.put(line)


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it started; it may be stuck in the driver, which is not waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10.0)


def end_with_supervisor() -> None:
    """Has Linux end this process as soon as its supervisor is gone, which may be killed and then cannot :func:`end` it.

    Linux watches the thread that started this process, and that one is in :func:`supervise` until this process ends.
    No thread here has to run for it: one that waits for a kernel that hangs may hold Python's lock. Without effect in
    a process that was started by hand. One whose supervisor is gone already ends at its next word, which nobody reads.
    """
    if sys.platform == "linux" and os.environ.get(SUPERVISOR) == str(os.getppid()):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")
