"""The folder on disk where compiled kernels, tuned shapes and verdicts of self-tests are kept, for this user alone."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

PART = ".kernel-part"
"""Ending of files that are being written."""


def cache_folder() -> Path:
    """``GNA_FLEX_CACHE_DIR``, else ``gna_flex`` in ``XDG_CACHE_HOME``, else in ``~/.cache``."""
    if chosen := os.environ.get("GNA_FLEX_CACHE_DIR"):
        return Path(os.path.expanduser(chosen)).absolute()
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if not os.path.isabs(home):  # a relative path is void, and some containers have users without a home
        return Path(tempfile.gettempdir()) / f"gna_flex-{getattr(os, 'getuid', int)()}"
    return Path(home) / "gna_flex"


def open_own(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file that nobody else could have written, in a folder of that kind.

    Raises:
        OSError: if there is none, or it is not this user's alone.
    """
    require_own(os.stat(path.parent))
    # A link could point at a file of somebody else.
    handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        require_own(os.fstat(handle))
    except OSError:
        os.close(handle)
        raise
    return handle


def write_own(path: Path, data: bytes) -> None:
    """Writes a file, and its folder if need be: readers in all processes see the old file or the whole new one.

    Raises:
        OSError: if that is not possible, or the folder is not this user's alone.
    """
    own_folder(path.parent)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=PART)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def own_folder(folder: Path) -> None:
    """Makes the folder.

    Raises:
        OSError: if that is not possible, or it is not this user's alone.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_own(os.stat(folder))


def require_own(status: os.stat_result) -> None:
    """Code that somebody else could have written must not run.

    Raises:
        PermissionError: if somebody else could have.
    """
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError("owned by another user, or others may write to it")
