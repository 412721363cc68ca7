"""The thinnest layer over the CUDA driver: load a cubin, describe tensors to the TMA unit, launch.

ctypes on libcuda, opened at first use. A warm launch passes numbers and pointers only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "Arguments",
    "Driver",
    "Kernel",
    "TensorMap",
    "TensorMaps",
    "driver",
    "driver_version",
    "encode_tiled",
    "launch",
    "replace_address",
]

_int, _uint, _pointer = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p

SIGNATURES: dict[str, tuple[type, ...]] = {
    "cuInit": (_uint,),
    "cuGetErrorName": (_int, _pointer),
    "cuGetErrorString": (_int, _pointer),
    "cuCtxGetDevice": (_pointer,),
    "cuCtxPushCurrent_v2": (_pointer,),
    "cuCtxPopCurrent_v2": (_pointer,),
    "cuDevicePrimaryCtxRetain": (_pointer, _int),
    "cuThreadExchangeStreamCaptureMode": (_pointer,),
    "cuLibraryLoadData": (_pointer, ctypes.c_char_p, _pointer, _pointer, _uint, _pointer, _pointer, _uint),
    "cuLibraryGetKernel": (_pointer, _pointer, ctypes.c_char_p),
    "cuKernelSetAttribute": (_int, _int, _pointer, _int),
    "cuKernelGetFunction": (_pointer, _pointer),
    "cuLaunchKernel": (_pointer, *(_uint,) * 7, _pointer, _pointer, _pointer),
    "cuTensorMapEncodeTiled": (_pointer, _int, _uint, *(_pointer,) * 5, *(_int,) * 4),
    "cuTensorMapReplaceAddress": (_pointer, _pointer),
}
"""The functions of libcuda that are used, with the types of their arguments. All return a status."""

INVALID_CONTEXT, MAX_DYNAMIC_SHARED_SIZE, CAPTURE_MODE_RELAXED = 201, 8, 2


class Driver:
    """A table of driver functions, and what is asked of them together. Tests pass functions of their own."""

    def __init__(self, functions: Mapping[str, Callable[..., int]]) -> None:
        self.functions = functions
        self.launch_kernel = functions["cuLaunchKernel"]
        self.replace_address = functions["cuTensorMapReplaceAddress"]
        self._get_device = functions["cuCtxGetDevice"]
        self._contexts: dict[int, int] = {}

    def call(self, name: str, *arguments: Any, of: str = "") -> None:
        """Calls a function; a RuntimeError names it, what it was for, and the driver's reason."""
        if status := self.functions[name](*arguments):
            raise self.error(status, f"{name}{of and ' of '}{of}")

    def error(self, status: int, what: str) -> RuntimeError:
        """The error of a status other than 0."""
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            self.functions[name](status, ctypes.byref(text))
            texts.append((text.value or b"unknown").decode())
        return RuntimeError(f"{what} failed: {texts[0]} ({status}): {texts[1]}")

    def current(self) -> int:
        """Device of this thread's context, or -1: threads that torch has not used yet have none."""
        device = _int()
        status = self._get_device(ctypes.byref(device))
        if status == INVALID_CONTEXT:
            return -1
        if status:
            raise self.error(status, "cuCtxGetDevice")
        return device.value

    @contextlib.contextmanager
    def on(self, device: int) -> Iterator[None]:
        """A block with the device's primary context, which is torch's."""
        if self.current() == device:  # perhaps another context of the device: its streams need it
            yield
            return
        if device not in self._contexts:  # threads that do this at once retain it twice, which does no harm
            context = _pointer()
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device, of=f"device {device}")
            self._contexts[device] = context.value or 0
        self.call("cuCtxPushCurrent_v2", self._contexts[device])
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(_pointer()))

    @contextlib.contextmanager
    def while_capturing(self) -> Iterator[None]:
        """A block in which this thread may load code although it captures a CUDA graph."""
        mode = _int(CAPTURE_MODE_RELAXED)
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


@functools.cache
def driver() -> Driver:
    """The driver of this machine.

    Raises:
        RuntimeError: there is none, it is older than CUDA 12.0, or it finds no device.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"no CUDA driver on this machine: {error}") from error
    functions = {}
    for name, types in SIGNATURES.items():
        if not hasattr(library, name):
            raise RuntimeError(f"the CUDA driver has no {name}: CUDA 12.0 or newer is needed")
        functions[name] = getattr(library, name)
        functions[name].argtypes = types
    found = Driver(functions)
    found.call("cuInit", 0)
    return found


MODULE = Path("/proc/driver/nvidia/version")
"""Where the kernel module says what it is."""


@functools.cache
def driver_version() -> str:
    """Version of the NVIDIA driver, as ``580.82.07``; empty where nothing tells.

    Asks NVML, which needs no context, and else the kernel module.
    """
    text = ctypes.create_string_buffer(96)
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() == 0:
            status = library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
            library.nvmlShutdown()
            if status == 0:
                return text.value.decode(errors="replace")
    with contextlib.suppress(OSError):
        found = re.search(r"  (\d+\.[\d.]+)  ", MODULE.read_text())
        return found[1] if found else ""
    return ""


class Kernel:
    """One kernel of a cubin, loaded at its first launch on each device; never unloaded.

    ``shared`` is the dynamic shared memory that launches may ask for, in bytes. Safe to use from several threads.
    """

    def __init__(self, code: bytes, name: str, shared: int = 0, *, api: Driver | None = None) -> None:
        self.name, self.shared = name, shared
        self._code, self._api = code, api
        self._library, self._handle, self._lock = _pointer(), _pointer(), threading.Lock()
        self.ready: dict[int, tuple[Driver, int]] = {}

    def prepare(self, device: int) -> tuple[Driver, int]:
        """The driver and the kernel's handle, ready for launches on a device.

        Raises:
            RuntimeError: no driver, or it refuses the code, its name or its shared memory.
        """
        api = self._api or driver()
        with self._lock:
            if device not in self.ready:
                with api.while_capturing(), api.on(device):
                    self._load(api, device)
                self.ready[device] = api, self._handle.value or 0
        return self.ready[device]

    def _load(self, api: Driver, device: int) -> None:
        # Libraries, unlike modules, belong to no context: one handle serves all devices.
        if not self._library:
            nothing = (None, None, 0, None, None, 0)
            api.call("cuLibraryLoadData", ctypes.byref(self._library), self._code, *nothing, of=self.name)
        if not self._handle:
            name = self.name.encode()
            api.call("cuLibraryGetKernel", ctypes.byref(self._handle), self._library, name, of=self.name)
        if self.shared:
            what = f"{self.name} with {self.shared} bytes of shared memory"
            api.call("cuKernelSetAttribute", MAX_DYNAMIC_SHARED_SIZE, self.shared, self._handle, device, of=what)
        # Loads the code now, rather than in the middle of the first launch.
        api.call("cuKernelGetFunction", ctypes.byref(_pointer()), self._handle, of=f"{self.name} on device {device}")


class Arguments:
    """Pointers to by-value arguments of a kernel, which they keep alive: ctypes values, structs and TensorMaps.

    >>> scale = ctypes.c_float(1.0)
    >>> len(Arguments(TensorMaps(3), scale))
    2
    """

    __slots__ = ("_pointers", "address", "values")

    def __init__(self, *values: Any) -> None:
        self.values = values
        addresses = (value.address if isinstance(value, TensorMaps) else ctypes.addressof(value) for value in values)
        self._pointers = (_pointer * max(len(values), 1))(*addresses)
        self.address = ctypes.addressof(self._pointers)

    def __len__(self) -> int:
        return len(self.values)


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared: int,
    stream: int,
    args: Arguments,
    device: int,
) -> None:
    """Launches a kernel on a stream (``torch.cuda.Stream.cuda_stream``) of a device. The driver copies ``args`` here.

    Raises:
        RuntimeError: the driver refuses the launch, or the kernel cannot be loaded.
    """
    api, handle = kernel.ready.get(device) or kernel.prepare(device)
    if api.current() == device:
        status = api.launch_kernel(handle, *grid, *block, shared, stream, args.address, None)
    else:
        with api.on(device):
            status = api.launch_kernel(handle, *grid, *block, shared, stream, args.address, None)
    if status:
        shape = f"grid {grid}, block {block}, {shared} bytes of shared memory, device {device}"
        raise api.error(status, f"cuLaunchKernel of {kernel.name} ({shape})")


class TensorMaps:
    """Tensor maps of the TMA unit, side by side in memory, as a kernel's struct of maps holds them.

    >>> maps = TensorMaps(2)
    >>> maps.address % 64, maps[1].address - maps.address, len(bytes(maps))
    (0, 128, 256)
    """

    SIZE, ALIGNMENT = 128, 64

    __slots__ = ("_buffer", "address", "count")

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count={count}: at least one map")
        self.count = count
        self._buffer: Any = ctypes.create_string_buffer(count * self.SIZE + self.ALIGNMENT)
        self.address = -(-ctypes.addressof(self._buffer) // self.ALIGNMENT) * self.ALIGNMENT

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> TensorMap:
        if not 0 <= index < self.count:
            raise IndexError(f"map {index} of {self.count}")
        view = TensorMap.__new__(TensorMap)
        view.count, view._buffer, view.address = 1, self._buffer, self.address + index * self.SIZE
        return view

    def __bytes__(self) -> bytes:
        return ctypes.string_at(self.address, self.count * self.SIZE)

    def copy(self) -> TensorMaps:
        """The same maps elsewhere: a thread can change the addresses of its copy."""
        other = TensorMaps(self.count)
        ctypes.memmove(other.address, self.address, self.count * self.SIZE)
        return other


class TensorMap(TensorMaps):
    """One tensor map: 128 bytes, aligned to 64."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(1)


DTYPES = {"bfloat16": (9, 2), "float16": (6, 2), "float32": (7, 4), "float8_e4m3fn": (0, 1)}
"""Number of the driver and bytes of an element; it has no floats of 8 bits, and copies bytes."""
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}


def encode_tiled(
    map: TensorMap,
    pointer: int,
    dims: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int] | None = None,
    dtype: str = "bfloat16",
    swizzle: int = 128,
    l2_promotion: int = 256,
    *,
    api: Driver | None = None,
) -> None:
    """Describes a tensor in device memory: its boxes are what TMA loads and stores. Elements outside read as 0.

    The dimension of stride 1 comes first; ``strides_bytes`` are those of the others. ``swizzle`` is the bytes over
    which 16-byte chunks are permuted in shared memory, or 0.

    Raises:
        ValueError: an argument breaks a rule of the TMA unit.
        RuntimeError: the driver refuses the map.
    """
    element_strides = [1] * len(dims) if element_strides is None else element_strides
    _check_lengths(dims, strides_bytes, box, element_strides)
    _check_choices(dtype, swizzle, l2_promotion)
    _check_values(dims, strides_bytes, box, element_strides)
    code, size = DTYPES[dtype]
    _check_bytes(pointer, box[0] * size, swizzle)
    rank, wide, narrow = len(dims), ctypes.c_uint64 * len(dims), ctypes.c_uint32 * len(dims)
    tensor = (pointer, wide(*dims), wide(*strides_bytes), narrow(*box), narrow(*element_strides))
    modes = (0, SWIZZLES[swizzle], PROMOTIONS[l2_promotion], 0)  # not interleaved; zeros outside
    (api or driver()).call("cuTensorMapEncodeTiled", map.address, code, rank, *tensor, *modes)


def replace_address(map: TensorMap, pointer: int, *, api: Driver | None = None) -> None:
    """Points a map at another tensor of the same layout: faster than encoding it again."""
    api = api or driver()
    _require(pointer > 0 and pointer % 16 == 0, "pointer", pointer, "must be a multiple of 16")
    if status := api.replace_address(map.address, pointer):
        raise api.error(status, "cuTensorMapReplaceAddress")


def _require(good: bool, name: str, value: object, rule: str) -> None:
    if not good:
        raise ValueError(f"{name}={value}: {rule}")


def _check_lengths(dims: Sequence[int], strides: Sequence[int], box: Sequence[int], steps: Sequence[int]) -> None:
    rank = len(dims)
    _require(1 <= rank <= 5, "dims", tuple(dims), "must be 1 to 5 numbers")
    _require(len(strides) == rank - 1, "strides_bytes", tuple(strides), "must be one number less than dims")
    _require(len(box) == rank, "box", tuple(box), "must be as many numbers as dims")
    _require(len(steps) == rank, "element_strides", tuple(steps), "must be as many numbers as dims")


def _check_choices(dtype: str, swizzle: int, l2_promotion: int) -> None:
    _require(dtype in DTYPES, "dtype", dtype, f"must be one of {', '.join(DTYPES)}")
    _require(swizzle in SWIZZLES, "swizzle", swizzle, f"must be one of {tuple(SWIZZLES)}")
    _require(l2_promotion in PROMOTIONS, "l2_promotion", l2_promotion, f"must be one of {tuple(PROMOTIONS)}")


def _check_values(dims: Sequence[int], strides: Sequence[int], box: Sequence[int], steps: Sequence[int]) -> None:
    for i, size in enumerate(dims):
        _require(1 <= size <= 1 << 32, f"dims[{i}]", size, "must be 1 to 2**32")
        _require(1 <= box[i] <= 256, f"box[{i}]", box[i], "must be 1 to 256")
        _require(1 <= steps[i] <= 8, f"element_strides[{i}]", steps[i], "must be 1 to 8")
    for i, stride in enumerate(strides):
        good = stride % 16 == 0 and 0 <= stride < 1 << 40
        _require(good, f"strides_bytes[{i}]", stride, "must be a multiple of 16 below 2**40")


def _check_bytes(pointer: int, inner: int, swizzle: int) -> None:
    _require(pointer > 0 and pointer % 16 == 0, "pointer", hex(pointer), "must be a multiple of 16")
    _require(inner % 16 == 0, "box[0]", f"{inner} bytes", "must be a multiple of 16 bytes")
    _require(inner <= (swizzle or inner), "box[0]", f"{inner} bytes", f"must be at most the swizzle's {swizzle} bytes")
