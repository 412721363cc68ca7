"""The driver layer: maps and their rules, call sequences on a stand-in for libcuda, and small kernels on a GPU."""

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gna_flex.cuda import driver, jit
from gna_flex.cuda.driver import Arguments, Driver, Kernel, TensorMap, TensorMaps, encode_tiled, launch, replace_address

KERNEL = 0x7FFF_1234_5678
CONTEXT = 0x7000_0000_0000


class FakeCuda:
    """libcuda for two devices: writes down its calls, and answers as a driver would."""

    def __init__(self, device: int | None = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails: dict[str, int] = {}
        self.stack = [] if device is None else [device]
        self.mode = 0
        special = {name: getattr(self, name) for name in driver.SIGNATURES if hasattr(self, name)}
        table = {name: self._recorded(name, special.get(name)) for name in driver.SIGNATURES}
        self.api = Driver(table)

    def _recorded(self, name: str, answer: Callable[..., int | None] | None) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            return self.fails.get(name) or (answer and answer(*arguments)) or 0

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.calls if name != "cuCtxGetDevice"]

    def cuGetErrorName(self, status: int, text: Any) -> None:  # noqa: N802
        text._obj.value = f"CUDA_ERROR_{status}".encode()

    def cuGetErrorString(self, status: int, text: Any) -> None:  # noqa: N802
        text._obj.value = b"what went wrong"

    def cuCtxGetDevice(self, device: Any) -> int:  # noqa: N802
        device._obj.value = self.stack[-1] if self.stack else 99
        return 0 if self.stack else driver.INVALID_CONTEXT

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:  # noqa: N802
        context._obj.value = CONTEXT + device

    def cuCtxPushCurrent_v2(self, context: int) -> None:  # noqa: N802
        self.stack.append(context - CONTEXT)

    def cuCtxPopCurrent_v2(self, _: Any) -> None:  # noqa: N802
        self.stack.pop()

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> None:  # noqa: N802
        self.mode, mode._obj.value = mode._obj.value, self.mode

    def cuLibraryLoadData(self, library: Any, *_: Any) -> None:  # noqa: N802
        assert self.mode == driver.CAPTURE_MODE_RELAXED
        library._obj.value = 7

    def cuLibraryGetKernel(self, kernel: Any, *_: Any) -> None:  # noqa: N802
        kernel._obj.value = KERNEL


LOADING = ["cuLibraryLoadData", "cuLibraryGetKernel"]
PREPARING = ["cuKernelSetAttribute", "cuKernelGetFunction"]
RELAXED = "cuThreadExchangeStreamCaptureMode"
PUSH, POP = "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"


def fire(kernel: Kernel, args: Arguments, device: int = 0, stream: int = 0) -> None:
    launch(kernel, (132, 2, 1), (384, 1, 1), 1000, stream, args, device)


# Launches


def test_first_launch_loads_and_later_ones_only_launch() -> None:
    fake, args = FakeCuda(), Arguments(ctypes.c_int(1))
    kernel = Kernel(b"code", "f", 1000, api=fake.api)
    assert fake.calls == []
    fire(kernel, args, stream=5)
    assert fake.names == [RELAXED, *LOADING, *PREPARING, RELAXED, "cuLaunchKernel"]
    assert fake.calls[-1] == ("cuLaunchKernel", KERNEL, 132, 2, 1, 384, 1, 1, 1000, 5, args.address, None)
    assert fake.mode == 0
    _, attribute, size, handle, device = next(call for call in fake.calls if call[0] == "cuKernelSetAttribute")
    assert (attribute, size, handle.value, device) == (8, 1000, KERNEL, 0)
    fake.calls.clear()
    fire(kernel, args)
    assert [name for name, *_ in fake.calls] == ["cuCtxGetDevice", "cuLaunchKernel"]


@pytest.mark.parametrize("current", [None, 1], ids=["thread-without-context", "other-device"])
def test_launch_on_a_device_that_is_not_current(current: int | None) -> None:
    fake, args = FakeCuda(current), Arguments()
    kernel = Kernel(b"code", "f", api=fake.api)
    fire(kernel, args)
    retain = "cuDevicePrimaryCtxRetain"
    assert fake.names[:3] == [RELAXED, retain, PUSH]
    assert fake.names[-5:] == [POP, RELAXED, PUSH, "cuLaunchKernel", POP]
    assert fake.stack == ([] if current is None else [current])
    fake.calls.clear()
    fire(kernel, args)
    assert fake.names == [PUSH, "cuLaunchKernel", POP]


def test_each_device_is_prepared_once_and_the_code_loaded_once() -> None:
    fake, args = FakeCuda(), Arguments()
    kernel = Kernel(b"code", "f", 1000, api=fake.api)
    for device in (0, 1, 0, 1):
        fire(kernel, args, device)
    assert fake.names.count("cuLibraryLoadData") == 1
    assert [call[-1] for call in fake.calls if call[0] == "cuKernelSetAttribute"] == [0, 1]
    assert fake.names.count("cuLaunchKernel") == 4


def test_threads_load_once() -> None:
    fake, args = FakeCuda(), Arguments()
    kernel, start = Kernel(b"code", "f", api=fake.api), threading.Barrier(8)

    def work() -> None:
        start.wait()
        fire(kernel, args)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.names.count("cuLibraryLoadData") == 1
    assert fake.names.count("cuLaunchKernel") == 8


@pytest.mark.parametrize("name", [*LOADING, *PREPARING, "cuLaunchKernel", PUSH, "cuDevicePrimaryCtxRetain"])
def test_errors_name_call_and_reason_and_leave_the_thread_as_it_was(name: str) -> None:
    fake = FakeCuda(1)
    kernel = Kernel(b"code", "gna_forward", 1000, api=fake.api)
    fake.fails[name] = 700
    with pytest.raises(RuntimeError, match=rf"{name}.* failed: CUDA_ERROR_700 \(700\): what went wrong"):
        fire(kernel, Arguments())
    assert (fake.stack, fake.mode) == ([1], 0)
    fake.fails.clear()
    fire(kernel, Arguments())
    assert fake.names.count("cuLibraryLoadData") <= 1 + (name == "cuLibraryLoadData")


def test_launch_errors_show_the_shape() -> None:
    fake = FakeCuda()
    fake.fails["cuLaunchKernel"] = 1
    with pytest.raises(RuntimeError, match=r"gna_forward \(grid \(132, 2, 1\), block \(384, 1, 1\), 1000 bytes"):
        fire(Kernel(b"code", "gna_forward", api=fake.api), Arguments())


def test_a_broken_context_is_not_taken_for_none() -> None:
    fake = FakeCuda()
    fake.fails["cuCtxGetDevice"] = 4
    with pytest.raises(RuntimeError, match="cuCtxGetDevice failed"):
        fake.api.current()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_no_driver_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(RuntimeError, match=r"no CUDA driver on this machine: libcuda\.so\.1"):
        driver.driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    with pytest.raises(RuntimeError, match=r"has no cuInit: CUDA 12\.0 or newer"):
        driver.driver()


# Arguments and maps


def test_arguments_point_at_their_values() -> None:
    maps, number, single = TensorMaps(2), ctypes.c_int(42), TensorMap()
    args = Arguments(maps, number, single)
    pointers = ctypes.cast(args.address, ctypes.POINTER(ctypes.c_void_p * 3)).contents
    assert list(pointers) == [maps.address, ctypes.addressof(number), single.address]
    number.value = 43
    assert ctypes.c_int.from_address(pointers[1]).value == 43


def test_maps_are_aligned_side_by_side_and_copied() -> None:
    for count in range(1, 9):
        maps = TensorMaps(count)
        assert maps.address % 64 == 0
        assert [one.address - maps.address for one in maps] == [128 * i for i in range(count)]
        assert all(isinstance(one, TensorMap) and len(one) == 1 for one in maps)
        assert bytes(maps) == bytes(128 * count)
    ctypes.memset(maps[1].address, 5, 128)
    other = maps.copy()
    ctypes.memset(maps.address, 9, 128)
    assert bytes(other) == bytes(128) + b"\5" * 128 + bytes(128 * 6)
    view = TensorMaps(2)[1]  # outlives the maps
    assert bytes(view) == bytes(128)
    with pytest.raises(IndexError, match="map 8 of 8"):
        maps[8]
    with pytest.raises(ValueError, match="count=0"):
        TensorMaps(0)


GOOD: dict[str, Any] = {
    "pointer": 0x7F00_0000_1000,
    "dims": (128, 80, 48),
    "strides_bytes": (256, 256 * 80),
    "box": (64, 7, 2),
}


def test_encoding_passes_everything_on() -> None:
    fake, one = FakeCuda(), TensorMap()
    encode_tiled(one, **GOOD, element_strides=(1, 2, 1), dtype="float16", swizzle=128, l2_promotion=128, api=fake.api)
    ((_, address, dtype, rank, pointer, dims, strides, box, steps, *modes),) = fake.calls
    assert (address, dtype, rank, pointer, modes) == (one.address, 6, 3, GOOD["pointer"], [0, 3, 2, 0])
    assert (list(dims), list(strides)[:2], list(box), list(steps)) == (
        [128, 80, 48],
        [256, 20480],
        [64, 7, 2],
        [1, 2, 1],
    )


def test_largest_values_are_allowed() -> None:
    fake = FakeCuda()
    dims, strides = (1 << 32,) * 5, ((1 << 40) - 16,) * 4
    encode_tiled(TensorMap(), 16, dims, strides, (64, *[256] * 4), (8,) * 5, api=fake.api)
    encode_tiled(TensorMap(), 16, (1,), (), (256,), dtype="float32", swizzle=0, l2_promotion=0, api=fake.api)
    assert len(fake.calls) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pointer": 8}, r"pointer=0x8: must be a multiple of 16"),
        ({"pointer": 0}, r"pointer=0x0: "),
        ({"dims": ()}, r"dims=\(\): must be 1 to 5 numbers"),
        ({"dims": (1,) * 6}, r"dims=.*1 to 5"),
        ({"dims": (128, 0, 48)}, r"dims\[1\]=0: must be 1 to 2\*\*32"),
        ({"dims": (128, 80, (1 << 32) + 1)}, r"dims\[2\]=4294967297: "),
        ({"strides_bytes": (256,)}, r"strides_bytes=\(256,\): must be one number less"),
        ({"strides_bytes": (256, 24)}, r"strides_bytes\[1\]=24: must be a multiple of 16 below 2\*\*40"),
        ({"strides_bytes": (1 << 40, 256)}, r"strides_bytes\[0\]=1099511627776: "),
        ({"strides_bytes": (-16, 256)}, r"strides_bytes\[0\]=-16: "),
        ({"box": (64, 7)}, r"box=\(64, 7\): must be as many"),
        ({"box": (64, 257, 1)}, r"box\[1\]=257: must be 1 to 256"),
        ({"box": (64, 0, 1)}, r"box\[1\]=0: "),
        ({"box": (65, 1, 1)}, r"box\[0\]=130 bytes: must be a multiple of 16"),
        ({"box": (72, 1, 1)}, r"box\[0\]=144 bytes: must be at most the swizzle's 128 bytes"),
        ({"swizzle": 64}, r"box\[0\]=128 bytes: must be at most the swizzle's 64 bytes"),
        ({"element_strides": (1, 1)}, r"element_strides=\(1, 1\): must be as many"),
        ({"element_strides": (1, 9, 1)}, r"element_strides\[1\]=9: must be 1 to 8"),
        ({"dtype": "int8"}, r"dtype=int8: must be one of bfloat16, float16"),
        ({"swizzle": 96}, r"swizzle=96: must be one of"),
        ({"l2_promotion": 512}, r"l2_promotion=512: must be one of"),
    ],
    ids=lambda value: "" if isinstance(value, str) else repr(value).replace(" ", "").strip("{}"),
)
def test_rules_of_the_tma_unit(change: dict[str, Any], message: str) -> None:
    fake = FakeCuda()
    with pytest.raises(ValueError, match=message):
        encode_tiled(TensorMap(), **(GOOD | change), api=fake.api)
    assert fake.calls == []


def test_addresses_are_replaced() -> None:
    fake, one = FakeCuda(), TensorMap()
    replace_address(one, 0x2000, api=fake.api)
    assert fake.calls == [("cuTensorMapReplaceAddress", one.address, 0x2000)]
    with pytest.raises(ValueError, match="multiple of 16"):
        replace_address(one, 0x2008, api=fake.api)
    for name, call in (("cuTensorMapReplaceAddress", replace_address), ("cuTensorMapEncodeTiled", encode_tiled)):
        fake.fails[name] = 1
        arguments = GOOD if call is encode_tiled else {"pointer": 16}
        with pytest.raises(RuntimeError, match=name):
            call(one, **arguments, api=fake.api)


# On a GPU

SUM = """extern "C" __global__ void sum(const float* a, const float* b, float* out, int n) {
  extern __shared__ float shared[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) shared[threadIdx.x] = a[i] + b[i];
  if (i < n) out[i] = shared[threadIdx.x];
}"""

COPY = """struct alignas(64) Map { unsigned long long words[16]; };
struct Maps { Map from, to; };
extern "C" __global__ void copy(const __grid_constant__ Maps maps) {
  __shared__ alignas(128) unsigned short tile[256];
  __shared__ alignas(8) unsigned long long barrier;
  unsigned data = (unsigned)__cvta_generic_to_shared(tile), full = (unsigned)__cvta_generic_to_shared(&barrier);
  int first = blockIdx.x * 256;
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full) : "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 512;" ::"r"(full) : "memory");
  asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%2}], [%3];"
               ::"r"(data), "l"(&maps.from), "r"(first), "r"(full) : "memory");
  unsigned done = 0;
  while (!done)
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(full) : "memory");
  asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.tile.bulk_group [%0, {%1}], [%2];"
               ::"l"(&maps.to), "r"(first), "r"(data) : "memory");
  asm volatile("cp.async.bulk.commit_group;\\ncp.async.bulk.wait_group 0;" ::: "memory");
}"""


class FakeNvml:
    """libnvidia-ml: answers, or fails at a step."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "nvmlSystemGetDriverVersion" and self.fails != name:
                arguments[0].value = b"580.82.07"
            return 999 if name == self.fails else 0

        return call


@pytest.mark.parametrize(
    ("fails", "file", "version"),
    [
        ("", "", "580.82.07"),
        ("nvmlInit_v2", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.1.2  Release Build\n", "570.1.2"),
        ("nvmlSystemGetDriverVersion", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\n", "550.54.15"),
        ("nvmlInit_v2", "nothing known\n", ""),
        ("no library", "", ""),
    ],
    ids=["nvml", "module", "open-module", "neither", "nothing"],
)
def test_version_of_the_driver(
    fails: str, file: str, version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(name: str) -> FakeNvml:
        if fails == "no library":
            raise OSError(name)
        return nvml

    nvml, module = FakeNvml(fails), tmp_path / "version"
    if file:
        module.write_text(file)
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(driver, "MODULE", module)
    assert driver.driver_version.__wrapped__() == version
    assert "nvmlShutdown" in nvml.calls or fails in ("no library", "nvmlInit_v2")


SHARED = 100_000  # more than a launch may have without asking


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("source", [SUM, COPY], ids=["sum", "copy"])
def test_kernels_of_these_tests_compile(source: str) -> None:
    pytest.importorskip("cuda.bindings")
    cubin = jit.compile(source, defines={}, include={})
    assert jit.spills(cubin.log) == 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", str(tmp_path))


def sum_kernel() -> Kernel:
    pytest.importorskip("cuda.bindings")
    major, minor = torch.cuda.get_device_capability()
    cubin = jit.compile(SUM, arch=f"sm_{major}{minor}", defines={}, name="sum.cu", include={})
    return Kernel(cubin.code, "sum", SHARED)


class Addition:
    """Operands on a device, and how to launch their sum."""

    def __init__(self, device: int = 0, size: int = 1000) -> None:
        with torch.cuda.device(device):
            self.a, self.b = torch.randn(2, size, device="cuda")
            self.out = torch.zeros(size, device="cuda")
            torch.cuda.synchronize()
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (self.a, self.b, self.out))
        self.args, self.blocks, self.device = Arguments(*pointers, ctypes.c_int(size)), -(-size // 256), device

    def launch(self, kernel: Kernel, stream: torch.cuda.Stream | None = None) -> None:
        stream = stream or torch.cuda.current_stream(self.device)
        launch(kernel, (self.blocks, 1, 1), (256, 1, 1), SHARED, stream.cuda_stream, self.args, self.device)

    def check(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.testing.assert_close(self.out, self.a + self.b, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("cache")
def test_gpu_sum_on_current_and_side_streams() -> None:
    kernel = sum_kernel()
    for stream in (None, torch.cuda.Stream(), torch.cuda.Stream()):
        work = Addition()
        work.launch(kernel, stream)
        work.check()


@pytest.mark.gpu
@pytest.mark.usefixtures("cache")
def test_gpu_threads_without_a_context_and_first_use_at_once() -> None:
    kernel, works, start, errors = sum_kernel(), [Addition() for _ in range(8)], threading.Barrier(8), []

    def run(work: Addition) -> None:
        try:
            start.wait()
            work.launch(kernel)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for work in works:
        work.check()


@pytest.mark.gpu
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("warm", [False, True], ids=["first-use", "warm"])
def test_gpu_graph_capture(warm: bool) -> None:
    kernel, work = sum_kernel(), Addition()
    if warm:
        kernel.prepare(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work.launch(kernel)
    work.a.add_(1)
    graph.replay()
    work.check()


@pytest.mark.gpu
@pytest.mark.usefixtures("cache")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_gpu_other_device() -> None:
    kernel = sum_kernel()
    for device in (1, 0):
        work = Addition(device)
        work.launch(kernel)
        work.check()
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("cache")
def test_gpu_copies_through_tensor_maps() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    pytest.importorskip("cuda.bindings")
    kernel = Kernel(jit.compile(COPY, defines={}, name="copy.cu", include={}).code, "copy")
    size = 1000  # the last box is only partly inside
    tensors = [torch.randn(2, size, device="cuda").bfloat16() for _ in range(2)]
    maps = TensorMaps(2)
    for one, x in zip(maps, tensors, strict=True):
        encode_tiled(one, x.data_ptr(), (size,), (), (256,), swizzle=0)
    stream = torch.cuda.current_stream().cuda_stream
    for row in range(2):
        for one, x in zip(maps, tensors, strict=True):
            replace_address(one, x[row].data_ptr())
        launch(kernel, (4, 1, 1), (1, 1, 1), 0, stream, Arguments(maps), 0)
    torch.testing.assert_close(tensors[1], tensors[0], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("cache")
def test_gpu_errors_are_the_drivers() -> None:
    kernel, work = sum_kernel(), Addition()
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        launch(kernel, (1, 1, 1), (5000, 1, 1), 0, 0, work.args, 0)
    with pytest.raises(RuntimeError, match="cuLibraryGetKernel of no_such failed: CUDA_ERROR_NOT_FOUND"):
        Kernel(kernel._code, "no_such").prepare(0)
    with pytest.raises(RuntimeError, match="cuKernelSetAttribute of sum with 1000000 bytes"):
        Kernel(kernel._code, "sum", 1_000_000).prepare(0)
    work.launch(kernel)
    work.check()
