"""Compilation at first use: options, errors, the cache on disk under damage, strangers and races, what ptxas says."""

import importlib
import logging
import multiprocessing
import os
import threading
import types
from pathlib import Path

import pytest

from gna_flex.cuda import jit

SCALE = 'extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }'
CODE, LOG = b"\x7fELF\n\0code", "ptxas info    : Used 8 registers"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache: on disk and in the process."""
    path = tmp_path / "cache"
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", str(path))
    monkeypatch.setattr(jit, "_memo", {})
    monkeypatch.setattr(jit, "_warned", set())
    return path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources that reached a stand-in for NVRTC, which needs no installation."""
    sources: list[str] = []

    def run(source: str, *_: object) -> tuple[bytes, str]:
        sources.append(source)
        return CODE, LOG

    monkeypatch.setattr(jit, "_nvrtc", lambda: types.SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)))
    monkeypatch.setattr(jit, "_run_nvrtc", run)
    return sources


@pytest.fixture
def nvrtc() -> None:
    try:
        jit._nvrtc()
    except ImportError as error:
        pytest.skip(str(error))


def compile_anew(source: str = SCALE, **changes: object) -> jit.Cubin:
    """As a new process would."""
    jit._memo.clear()
    return jit.compile(source, **{"defines": {"FACTOR": 2}, "include": {}, **changes})


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


# The cache


def test_second_call_comes_from_the_process_and_later_ones_from_disk(compiled: list[str], folder: Path) -> None:
    first = compile_anew()
    assert jit.compile(SCALE, defines={"FACTOR": 2}, include={}) is first
    again = compile_anew()
    assert again is not first
    assert again == first
    assert compiled == [SCALE]
    assert (again.code, again.log, again.path) == (CODE, LOG, only_file(folder))


def test_folder_and_file_are_private(compiled: list[str], folder: Path) -> None:
    old = os.umask(0)
    try:
        path = compile_anew().path
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "change",
    [
        {"source": SCALE + " "},
        {"defines": {"FACTOR": 3}},
        {"defines": {"FACTOR": 2, "MORE": "x"}},
        {"arch": "sm_100a"},
        {"name": "other.cu"},
        {"options": ("-lineinfo",)},
        {"include": {"a.cuh": "int a;"}},
    ],
    ids=lambda change: "-".join(change),
)
def test_every_input_is_part_of_the_key(compiled: list[str], change: dict[str, object]) -> None:
    compile_anew()
    compile_anew(**change)
    assert len(compiled) == 2


def test_version_of_package_and_nvrtc_are_part_of_the_key(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_anew()
    monkeypatch.setattr("gna_flex.__version__", "999")
    compile_anew()
    monkeypatch.setattr(jit, "_nvrtc", lambda: types.SimpleNamespace(nvrtcVersion=lambda: (0, 13, 5)))
    compile_anew()
    assert len(compiled) == 3


def test_order_of_macros_and_headers_does_not_matter(compiled: list[str]) -> None:
    compile_anew(defines={"A": 1, "B": True}, include={"a.cuh": "", "b.cuh": ""})
    compile_anew(defines={"B": 1, "A": "1"}, include={"b.cuh": "", "a.cuh": ""})
    assert len(compiled) == 1


@pytest.mark.parametrize("size", [0, 5, 39, 40, 60, -1])
def test_truncated_entries_are_compiled_again(compiled: list[str], folder: Path, size: int) -> None:
    compile_anew()
    path = only_file(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    assert compile_anew().code == CODE
    assert len(compiled) == 2
    assert jit._read(path) is not None


def test_any_changed_byte_is_seen(compiled: list[str], folder: Path) -> None:
    compile_anew()
    path = only_file(folder)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert jit._read(path) is None
        assert jit.cached_kernels() == []


def test_an_entry_under_another_name_is_not_used(compiled: list[str], folder: Path) -> None:
    compile_anew()
    first = only_file(folder)
    other = compile_anew(defines={"FACTOR": 3}).path
    assert other is not None
    first.replace(other)
    compile_anew(defines={"FACTOR": 3})
    assert len(compiled) == 3


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_entries_that_others_may_write_are_replaced(compiled: list[str], folder: Path, mode: int) -> None:
    compile_anew()
    only_file(folder).chmod(mode)
    compile_anew()
    assert len(compiled) == 2
    assert only_file(folder).stat().st_mode & 0o777 == 0o600


def test_entries_of_other_users_are_not_used(
    compiled: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compile_anew()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert compile_anew().path is None
    assert len(compiled) == 2
    assert len(warnings_in(caplog)) == 1


def test_links_are_not_followed(compiled: list[str], folder: Path, tmp_path: Path) -> None:
    compile_anew()
    path = only_file(folder)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    compile_anew()
    assert len(compiled) == 2
    assert not path.is_symlink()


def test_a_folder_that_others_may_write_is_not_used_and_warned_of_once(
    compiled: list[str], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    assert compile_anew().path is None
    assert compile_anew(defines={"FACTOR": 3}).code == CODE
    assert list(folder.iterdir()) == []
    (warning,) = warnings_in(caplog)
    assert str(folder) in warning.getMessage()
    assert "GNA_FLEX_CACHE_DIR" in warning.getMessage()


def test_no_place_for_the_folder(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    first = compile_anew()
    assert (first.code, first.path) == (CODE, None)
    assert jit.compile(SCALE, defines={"FACTOR": 2}, include={}) is first
    assert len(warnings_in(caplog)) == 1
    assert jit.cached_kernels() == []


def test_a_full_disk_leaves_nothing_behind(
    compiled: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert compile_anew().code == CODE
    assert list(folder.iterdir()) == []
    assert len(warnings_in(caplog)) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_can_only_be_read(compiled: list[str], folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    compile_anew()
    folder.chmod(0o500)
    assert compile_anew().path is not None
    assert compile_anew(defines={"FACTOR": 3}).path is None
    folder.chmod(0o700)
    assert len(compiled) == 2
    assert len(warnings_in(caplog)) == 1


def test_cached_kernels_and_clear_cache(compiled: list[str], folder: Path) -> None:
    compile_anew(name="a.cu")
    compile_anew(name="b.cu", arch="sm_100a")
    (folder / "kept.txt").write_text("not of the cache")
    (folder / ".x.kernel-part").write_text("of a process that was killed")
    old, new = sorted(jit.cached_kernels())
    assert (old.name, old.arch, new.name, new.arch) == ("a.cu", "sm_90a", "b.cu", "sm_100a")
    assert old.size == old.path.stat().st_size
    assert 0 <= old.age < 600
    assert "-DFACTOR=2" in old.options
    assert jit.clear_cache() == 3
    assert [path.name for path in folder.iterdir()] == ["kept.txt"]
    assert jit.cached_kernels() == []
    jit.compile(SCALE, defines={"FACTOR": 2}, include={}, name="a.cu")
    assert len(compiled) == 3


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert jit.cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", "~/here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert jit.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("GNA_FLEX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert jit.cache_folder() == tmp_path / "xdg" / "gna_flex"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert jit.cache_folder() == tmp_path / ".cache" / "gna_flex"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert jit.cache_folder().is_absolute()


def test_threads_share_one_result(compiled: list[str], folder: Path) -> None:
    barrier, results = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        results.append(jit.compile(SCALE, defines={"FACTOR": 2}, include={}))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(result) for result in results}) == 1
    assert only_file(folder) == results[0].path


def _hammer(
    rounds: int, start: "multiprocessing.synchronize.Barrier", answers: "multiprocessing.Queue[object]"
) -> None:
    """In a process of its own: compiles the same few kernels again and again while others delete them."""
    big = bytes(range(256)) * 500
    jit._run_nvrtc = lambda source, *_: (source.encode() + big, LOG)
    start.wait()
    good = True
    for i in range(rounds):
        source = f"kernel {i % 3}"
        good &= compile_anew(source).code == source.encode() + big
        if i % 10 == 9:
            jit.clear_cache()
    answers.put(good)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_processes_never_see_half_an_entry(compiled: list[str], folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_hammer, args=(60, start, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [True] * 4
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert all(path.suffix == jit.SUFFIX for path in folder.iterdir())


# Arguments and messages


@pytest.mark.parametrize("arch", ["compute_90a", "90a", "sm_90a -G", "sm_"])
def test_architecture_must_be_real(compiled: list[str], arch: str) -> None:
    with pytest.raises(ValueError, match="arch="):
        jit.compile(SCALE, arch=arch, defines={})


@pytest.mark.parametrize("defines", [{"A B": 1}, {"": 1}, {"1A": 1}, {"A": "1\n-G"}, {"A=1": 2}], ids=repr)
def test_macros_must_be_macros(compiled: list[str], defines: dict[str, int | str]) -> None:
    with pytest.raises(ValueError, match="is not a macro"):
        jit.compile(SCALE, defines=defines)


@pytest.mark.parametrize("error", [ImportError("No module named 'cuda'"), RuntimeError("libnvrtc not found")])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def absent(_: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"cuda-bindings and nvidia-cuda-nvrtc: pip install gna-flex\[cuda\]"):
        jit.compile(SCALE, defines={}, include={})


def test_sources_are_found() -> None:
    assert (jit.source_folder() / "README.md").is_file()
    for kernel in ("hopper", "blackwell"):
        found = jit.headers(kernel)
        assert {Path(name).parent.name for name in found} == {"common", kernel}
        for name, text in found.items():
            assert (jit.source_folder() / name).read_text() == text


def test_sources_of_a_wheel_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = tmp_path / "gna_flex" / "cuda" / "jit.py"
    monkeypatch.setattr(jit, "__file__", str(module))
    with pytest.raises(FileNotFoundError, match="incomplete"):
        jit.source_folder()
    (tmp_path / "csrc").mkdir()
    assert jit.source_folder() == tmp_path / "csrc"
    nested = tmp_path / "gna_flex" / "csrc" / "common"
    nested.mkdir(parents=True)
    (nested / "x.cuh").write_text("int x;")
    assert jit.source_folder() == tmp_path / "gna_flex" / "csrc"
    assert jit.headers("hopper") == {"common/x.cuh": "int x;"}


# What ptxas says


def test_resource_usage_of_several_kernels() -> None:
    log = """ptxas info    : 56 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 8 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Function properties for helper
ptxas         .     4 bytes stack frame, 1 bytes spill stores, 1 bytes spill loads"""
    assert jit.resource_usage(log) == [jit.Usage("one", 32), jit.Usage("two", 168, 16, 12, 13, 17, 1024)]
    assert jit.spills(log) == 30
    assert jit.resource_usage("") == []
    assert jit.spills("") == 0


def test_performance_warnings() -> None:
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert jit.performance_warnings(f"a\n{line}\nb") == [line]
    assert jit.performance_warnings("a\nb") == []


# With NVRTC


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("options", [(), ("--maxrregcount=32", "-lineinfo")], ids=["plain", "options"])
def test_nvrtc_compiles_to_machine_code(options: tuple[str, ...]) -> None:
    cubin = compile_anew(options=options)
    assert cubin.code[:4] == b"\x7fELF"
    assert b"scale" in cubin.code
    (usage,) = jit.resource_usage(cubin.log)
    assert usage.kernel == "scale"
    assert 0 < usage.registers <= 32
    assert jit.spills(cubin.log) == 0
    assert compile_anew(options=options) == cubin


@pytest.mark.usefixtures("nvrtc")
def test_nvrtc_includes_headers_by_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    include = {"common/a.cuh": '#pragma once\n#include "common/b.cuh"\n', "common/b.cuh": "int b() { return 1; }"}
    source = '#include "common/a.cuh"\nextern "C" __global__ void f(int* x) { *x = b(); }'
    assert compile_anew(source, include=include).code
    (tmp_path / "stray.cuh").write_text("int stray;")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(jit.CompileError, match=r"stray\.cuh"):
        compile_anew('#include "stray.cuh"')


@pytest.mark.usefixtures("nvrtc")
def test_nvrtc_errors_show_lines_name_and_options(folder: Path) -> None:
    with pytest.raises(jit.CompileError, match="unknown") as error:
        compile_anew("\n\n__global__ void f() { unknown(); }", name="broken.cu")
    for part in ("broken.cu(3): error", "-DFACTOR=2", "sm_90a", "NVRTC_ERROR_COMPILATION"):
        assert part in str(error.value)
    with pytest.raises(jit.CompileError, match="-no-such"):
        compile_anew(options=("-no-such",))
    assert not folder.exists()
