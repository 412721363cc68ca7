"""CUDA C++ to machine code at first use, with NVRTC, and a cache of the results on disk.

Nothing in the cache is executed or unpickled: an entry is a checksum, a JSON header and a cubin for the CUDA driver.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gna_flex.cuda.cache import PART, cache_folder, open_own, write_own

__all__ = [
    "CompileError",
    "Cubin",
    "Entry",
    "Usage",
    "cache_folder",
    "cached_kernels",
    "clear_cache",
    "compile",
    "headers",
    "nvrtc_version",
    "performance_warnings",
    "resource_usage",
    "source_folder",
    "spills",
]

logger = logging.getLogger("gna_flex")

MAGIC = b"GNACUBN1"
SUFFIX = ".kernel"
OPTIONS = ("-std=c++17", "-default-device", "--no-source-include", "--ptxas-options=-v")
"""Options of every kernel. Without --no-source-include, headers of the working directory could be picked up."""


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log."""


class Cubin(NamedTuple):
    """A compiled kernel. ``path`` is its place in the cache, or None where it could not be stored."""

    path: Path | None
    code: bytes
    log: str
    name: str
    arch: str
    options: tuple[str, ...]
    seconds: float


class Entry(NamedTuple):
    """One file of the cache: kernel, architecture, options, bytes on disk, seconds since it was written."""

    name: str
    arch: str
    options: tuple[str, ...]
    size: int
    age: float
    path: Path


class Usage(NamedTuple):
    """What ptxas says of one kernel. Everything but registers and barriers is in bytes."""

    kernel: str
    registers: int = 0
    barriers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0


def source_folder() -> Path:
    """The folder of the CUDA sources, of an installed wheel or of a checkout.

    >>> source_folder().name
    'csrc'
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder csrc in {package} or {package.parent}: the installation is incomplete")


def headers(kernel: str) -> dict[str, str]:
    """Headers of a kernel's folder and those that kernels share, by the name that they are included with."""
    folder = source_folder()
    paths = sorted(path for part in ("common", kernel) for path in (folder / part).glob("*.cuh"))
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def compile(
    source: str,
    *,
    arch: str = "sm_90a",
    defines: Mapping[str, int | str],
    name: str = "forward.cu",
    options: Sequence[str] = (),
    include: Mapping[str, str] | None = None,
) -> Cubin:
    """Machine code of a CUDA C++ source: from this process, else from the cache, else from NVRTC.

    ``defines`` become macros. ``include`` holds headers by name. ``options`` go to NVRTC after the usual ones. Safe to
    call from several threads and processes: they may compile the same kernel, and one result stays.

    Raises:
        ImportError: cuda-bindings or NVRTC is not installed.
        CompileError: NVRTC refused the source or an option; the message holds its log.
        ValueError: an architecture or a macro that NVRTC could misread.
    """
    include = include or {}
    flags = _flags(arch, defines, options)
    key = _key(source, include, flags, name)
    folder = cache_folder()
    found = _memo.get((folder, key))
    if found is None:
        found = _from_disk(folder, key, name, arch) or _build(folder, key, source, include, flags, name, arch)
        found = _memo.setdefault((folder, key), found)
    return found


_memo: dict[tuple[Path, str], Cubin] = {}
_warned: set[Path] = set()


def _flags(arch: str, defines: Mapping[str, int | str], options: Sequence[str]) -> tuple[str, ...]:
    if not re.fullmatch(r"sm_\d+[af]?", arch):
        raise ValueError(f"arch={arch!r}: must be a real architecture, as sm_90a")
    for macro, value in defines.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", macro, re.ASCII) or not str(value).isprintable():
            raise ValueError(f"defines: {macro!r}={value!r} is not a macro")
    macros = (f"-D{macro}={int(x) if isinstance(x, bool) else x}" for macro, x in sorted(defines.items()))
    return (f"--gpu-architecture={arch}", *OPTIONS, *macros, *options)


def _key(source: str, include: Mapping[str, str], flags: Sequence[str], name: str) -> str:
    from gna_flex import __version__  # the package may still be importing this module

    parts = [__version__, _nvrtc().nvrtcVersion()[1:], name, source, list(flags), sorted(include.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _build(
    folder: Path, key: str, source: str, include: Mapping[str, str], flags: tuple[str, ...], name: str, arch: str
) -> Cubin:
    start = time.perf_counter()
    code, log = _run_nvrtc(source, include, flags, name)
    cubin = Cubin(None, code, log, name, arch, flags, time.perf_counter() - start)
    logger.info("compiled %s for %s in %.1f s", name, arch, cubin.seconds)
    return cubin._replace(path=_to_disk(folder, key, cubin))


def _nvrtc() -> Any:
    """The bindings of NVRTC, with their library loaded."""
    wanted = "compiling CUDA kernels needs cuda-bindings and nvidia-cuda-nvrtc: pip install gna-flex[cuda]"
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # a missing library is a RuntimeError of cuda-pathfinder
        raise ImportError(f"{wanted} ({error})") from error
    return nvrtc


def nvrtc_version() -> str | None:
    """Version of the compiler, as ``13.0``; ``None`` without one."""
    try:
        _, major, minor = _nvrtc().nvrtcVersion()
    except ImportError:
        return None
    return f"{major}.{minor}"


def _run_nvrtc(source: str, include: Mapping[str, str], flags: Sequence[str], name: str) -> tuple[bytes, str]:
    nvrtc = _nvrtc()
    texts, names = [text.encode() for text in include.values()], [path.encode() for path in include]
    program = _value(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(names), texts, names))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])[0]
        log = _filled(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
        if status:
            meaning = nvrtc.nvrtcGetErrorString(status)[1].decode()
            raise CompileError(f"{name} with {' '.join(flags)}: {meaning}\n{log}")
        return _filled(nvrtc, program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _value(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    """The value of an NVRTC call, which may have none."""
    status, *values = answer
    if status:
        raise RuntimeError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if values else None


def _filled(nvrtc: Any, program: Any, what: str) -> bytes:
    """Log or code of a program: NVRTC fills a buffer of the size that it names."""
    size = _value(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    buffer = bytearray(size)
    _value(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return bytes(buffer)


def cached_kernels() -> list[Entry]:
    """Valid entries of the cache, newest first. Needs neither NVRTC nor a GPU."""
    found = ((path, _read(path)) for path in _files(cache_folder()) if path.suffix == SUFFIX)
    entries = (_entry(path, *entry) for path, entry in found if entry is not None)
    return sorted(entries, key=lambda entry: entry.age)


def _entry(path: Path, facts: dict[str, Any], code: bytes, status: os.stat_result) -> Entry:
    options = tuple(facts["options"])
    return Entry(facts["name"], facts["arch"], options, status.st_size, time.time() - status.st_mtime, path)


def clear_cache() -> int:
    """Deletes the entries of the cache, what killed processes left there, and this process's; the files deleted."""
    _memo.clear()
    paths = list(_files(cache_folder()))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def _files(folder: Path) -> Iterator[Path]:
    """Entries and unfinished entries: no other file, in case the folder has others."""
    with contextlib.suppress(OSError):  # no folder, or not readable
        yield from sorted(path for path in folder.iterdir() if path.suffix in (SUFFIX, PART))


def _path(folder: Path, key: str, name: str, arch: str) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}-{arch}-{key}{SUFFIX}"


def _from_disk(folder: Path, key: str, name: str, arch: str) -> Cubin | None:
    path = _path(folder, key, name, arch)
    found = _read(path)
    if found is None or found[0]["key"] != key:
        return None
    facts, code, _ = found
    logger.info("%s for %s from %s", name, arch, path)
    return Cubin(path, code, facts["log"], name, arch, tuple(facts["options"]), facts["seconds"])


def _read(path: Path) -> tuple[dict[str, Any], bytes, os.stat_result] | None:
    """Header, code and status of an entry; None if it is absent, damaged, or not this user's alone."""
    try:
        with open(open_own(path), "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read()
    except OSError as error:
        logger.debug("%s is not used: %s", path, error)
        return None
    start = len(MAGIC) + 32
    payload = data[start:]
    if data[:start] != MAGIC + hashlib.sha256(payload).digest():
        logger.info("%s is damaged: ignored", path)
        return None
    header, _, code = payload.partition(b"\n")
    return json.loads(header), code, status


def _to_disk(folder: Path, key: str, cubin: Cubin) -> Path | None:
    """Writes an entry, all or nothing; None (and one warning) if that fails."""
    facts = cubin._asdict() | {"key": key}
    del facts["code"], facts["path"]
    payload = json.dumps(facts).encode() + b"\n" + cubin.code
    path = _path(folder, key, cubin.name, cubin.arch)
    try:
        write_own(path, MAGIC + hashlib.sha256(payload).digest() + payload)
    except OSError as error:
        say = logger.info if folder in _warned else logger.warning
        say("no cache in %s (%s): set GNA_FLEX_CACHE_DIR to a folder of your own", folder, error)
        _warned.add(folder)
        return None
    return path


def resource_usage(log: str) -> list[Usage]:
    """What the kernels of a log need.

    >>> resource_usage('''ptxas info    : Compiling entry function 'f' for 'sm_90a'
    ... ptxas info    : Function properties for f
    ... ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
    ... ptxas info    : Used 168 registers, used 16 barriers, 1024 bytes smem''')
    [Usage(kernel='f', registers=168, barriers=16, stack=8, spill_stores=12, spill_loads=16, shared=1024)]
    """
    _, *kernels = re.split(r"Compiling entry function '([^']*)'", log)
    return [_usage(kernel, text) for kernel, text in zip(kernels[::2], kernels[1::2], strict=True)]


def _usage(kernel: str, text: str) -> Usage:
    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, text)))  # functions that were not inlined have lines of their own

    stack, stores, loads = (total(rf"(\d+) bytes {what}") for what in ("stack frame", "spill stores", "spill loads"))
    registers, barriers = total(r"Used (\d+) registers"), total(r"used (\d+) barriers")
    return Usage(kernel, registers, barriers, stack, stores, loads, total(r"(\d+) bytes smem"))


def spills(log: str) -> int:
    """Bytes that the kernels of a log spill: stores and loads together."""
    return sum(usage.spill_stores + usage.spill_loads for usage in resource_usage(log))


def performance_warnings(log: str) -> list[str]:
    """Lines of a log in which ptxas warns of slow code, such as matrix products that it had to serialise."""
    return [line.strip() for line in log.splitlines() if "Performance Loss" in line]
