"""Runs the forward kernels: plans for masks and sizes, tensor maps for tensors, the launch.

Shapes: ``q`` is ``[B, H, S, D]``, ``k`` and ``v`` are ``[B, Hkv, S, D]``, any strides that tensor maps can express.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gna_flex.cuda import driver
from gna_flex.cuda.blackwell import BlackwellConfig
from gna_flex.cuda.config import Capability, KernelConfig
from gna_flex.cuda.kernel import Config
from gna_flex.cuda.rests import improved
from gna_flex.cuda.shapes import choose, cost, skipping
from gna_flex.cuda.tables import (
    BOXES,
    FREE_BOXES,
    LENGTHS,
    PLAIN,
    KernelTiles,
    Triple,
    padded_dims,
    text_item_count,
    work_records,
)
from gna_flex.cuda.windows import class_lengths, window_table
from gna_flex.intervals import ceil_div
from gna_flex.kernels import FLOAT8, kernel_for, lasting, output_type
from gna_flex.neighborhood import GNA
from gna_flex.torch_private import current_stream

Int3 = ctypes.c_int * 3
KERNELS: dict[str, type[KernelConfig]] = {config.folder: config for config in (Config, BlackwellConfig)}
"""Configurations of all kernels, by the kernel's name."""
REMEMBERED_CALLS = 256
"""Calls (tensors at the same addresses) whose maps a launcher keeps."""
SUM_COLUMNS = 32
"""Columns of a row of shared memory that holds sums, in float32."""
LOG2_E = math.log2(math.e)
FULL_WORD = (1 << 32) - 1
STEP, MOST_STEPS = 16, 2
"""Columns of a step of a mask as a product, and how many steps there may be; see ``csrc/hopper/masks.cuh``."""
SMALLEST_SCALE = 2e-38
"""Stands for a scale of 0, which would turn masked scores of minus infinity into NaN; all weights are still equal."""


class Address(ctypes.Structure):
    """``Address`` of ``csrc/common/records.cuh``."""

    _fields_ = (
        ("head_column", ctypes.c_int),
        ("head_place", ctypes.c_int),
        ("batch_place", ctypes.c_int),
        ("group_column", Int3),
    )


class Places(ctypes.Structure):
    """``Places`` of ``csrc/common/records.cuh``."""

    _fields_ = (
        ("steps", ctypes.c_int),
        ("first", Int3),
        ("others", ctypes.c_uint * 3),
        ("seen", ctypes.c_uint),
    )

    @classmethod
    def of(cls, kv_tile: Triple, kv_slots: int, hides: Sequence[bool]) -> Places:
        """For key boxes that hide keys in some dimensions, in slots of which they may leave a part.

        >>> places = Places.of((6, 4, 4), 96, (True, True, True))
        >>> places.steps, list(places.first), hex(places.others[1])
        (1, [0, 6, 10], '0xfffffc3f')
        >>> Places.of((1, 1, 128), 128, (False, False, True)).steps
        0
        """
        first, others, used = [0, 0, 0], [FULL_WORD] * 3, 0
        for axis, (side, hidden) in enumerate(zip(kv_tile, hides, strict=True)):
            if hidden:
                first[axis], others[axis] = used, FULL_WORD & ~(((1 << side) - 1) << used)
                used += side
        rest = math.prod(kv_tile) < kv_slots
        steps = ceil_div(used + rest, STEP)
        if steps > MOST_STEPS:
            return cls(0)
        seen = FULL_WORD & ~(rest << STEP * steps - 1) if steps else FULL_WORD
        return cls(steps, Int3(*first), (ctypes.c_uint * 3)(*others), seen)


@functools.lru_cache(maxsize=16)
def parameters(map_sets: int, key_shapes: int = 1) -> type[ctypes.Structure]:
    """``Params`` of ``csrc/common/records.cuh``."""

    class Params(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_void_p) for name in ("items", "windows", "counters", "lse", "text_valid", "gna_of_head")),
            ("scale_log2", ctypes.c_float),
            *((name, ctypes.c_int) for name in ("items_per_head", "text_items", "text_total", "total")),
            *((name, ctypes.c_int) for name in ("heads", "queries_per_key_head")),
            *((name, ctypes.c_int) for name in ("window_rows", "tokens")),
            *((name, Int3) for name in ("box", "beside")),
            ("keys", Int3 * key_shapes),
            ("length", Int3 * map_sets),
            ("window_row", Int3 * map_sets),
            ("token_stride", Int3),
            ("group_stride", Int3),
            ("places", Places),
            ("grid_token", ctypes.c_int),
            ("text_tokens", ctypes.c_int * 2),
            ("text_token", ctypes.c_int * 2),
            *((name, Address) for name in "qkvo"),
        )

    return Params


@dataclass(frozen=True)
class Request:
    """What a plan is made for. ``gnas`` is one GNA, or one per query head (same layout, dilation and text).

    ``capability`` is that of the device; it decides which kernel's configurations are chosen from. ``float8``:
    inputs are float8_e4m3fn; tiles are those of bfloat16.
    """

    gnas: tuple[GNA, ...]
    head_dim: int
    float16: bool
    device: int
    tiles: KernelTiles | None = None
    config: KernelConfig | None = None
    capability: Capability = (9, 0)
    float8: bool = False

    @property
    def text(self) -> bool:
        """Whether there are text tokens."""
        return any(gna.text_first or gna.text_last for gna in self.gnas)

    @property
    def kernel(self) -> type[KernelConfig]:
        """Configurations of the kernel for the device.

        Raises:
            ValueError: if there is none for it.
        """
        name = kernel_for(self.capability)
        if not name:
            raise ValueError(f"no kernel is written for compute capability {self.capability}")
        return KERNELS[name]


class Plan:
    """Everything about a launch but the tensors: kernel, tables on the device, constant parameters."""

    def __init__(self, request: Request) -> None:
        self.request = request
        gnas = list(dict.fromkeys(request.gnas))
        self.gna = gna = gnas[0]
        lengths = class_lengths(gna)
        # Without dilation, grid queries and text queries share the maps of the grid.
        classes = [c for c in range(PLAIN + 1) if lengths[c, 0] >= 0]
        if math.prod(gna.dilation) == 1:
            classes = classes[:1]
        self.lengths = [tuple(int(n) for n in lengths[c]) for c in classes]
        self.plain = [c == PLAIN for c in classes]
        self.text = (gna.text_first, gna.text_last)
        self.config, self.tiles = self._shapes(len(classes))
        if not self.config.fits(self.tiles):
            raise ValueError(f"{self.tiles} do not fit {self.config}")
        device = torch.device("cuda", request.device)
        self._load(device)
        self._tables(gnas, classes, device)
        self._launchers: dict[tuple[object, ...], Launcher] = {}

    def _load(self, device: torch.device) -> None:
        """The kernel, compiled for the device."""
        facts = torch.cuda.get_device_properties(device)
        self.processors = facts.multi_processor_count
        code = self.config.compile(self.config.arch((facts.major, facts.minor)))
        self.log = code.log
        self.kernel = driver.Kernel(code.code, f"gna_{self.config.direction}", self.config.shared_bytes)

    def _shapes(self, map_sets: int) -> tuple[KernelConfig, KernelTiles]:
        from gna_flex.cuda.tune import shapes_for  # which makes plans itself

        request = self.request
        if request.config or request.tiles:
            config, tiles = estimated(request)
        else:
            config, tiles = shapes_for(replace(request, float8=False), torch.cuda.get_device_name(request.device))
        config = replace(config, float16=request.float16, float8=request.float8)
        dilated = math.prod(self.gna.dilation) > 1
        shapes = 2 if tiles.kv_rest else 1
        config = replace(config, dilated=dilated, map_sets=map_sets, text=any(self.text))
        return replace(config, key_shapes=shapes, skips=tiles.skips), tiles

    def _parameters(self, map_sets: int) -> type[Any]:
        """The structure that the kernel takes."""
        return parameters(map_sets, self.config.key_shapes)

    def _tables(self, gnas: list[GNA], classes: list[int], device: torch.device) -> None:
        """Work records, windows and the constant part of the parameters."""
        records = [work_records(gna, self.tiles) for gna in gnas]
        place = np.zeros(PLAIN + 1, np.int32)
        place[classes] = range(len(classes))
        for table in records:
            table[:, LENGTHS] = place[table[:, LENGTHS]]
        windows = [window_table(gna) for gna in gnas]
        of_head = np.array([gnas.index(gna) for gna in self.request.gnas], np.int32)
        items = np.concatenate(records)
        arrays = items, np.concatenate([rows for rows, _ in windows]), of_head
        self.items, self.windows, heads = lasting(lambda: [torch.from_numpy(array).to(device) for array in arrays])
        self.gna_of_head = heads if len(gnas) > 1 else None
        dims = padded_dims(self.gna)
        token_strides = [math.prod(dim[0] for dim in dims[axis + 1 :]) for axis in range(3)]
        params = self._parameters(len(classes))()
        params.items, params.windows = self.items.data_ptr(), self.windows.data_ptr()
        params.gna_of_head = self.gna_of_head.data_ptr() if self.gna_of_head is not None else None
        params.items_per_head, params.window_rows = len(records[0]), len(windows[0][0])
        params.tokens = self.gna.tokens
        tiles = self.tiles
        hides = np.any(items[:, BOXES] != items[:, FREE_BOXES], axis=0)
        params.places = Places.of(tiles.kv_tile, tiles.kv_slots, hides.tolist())
        params.text_items = text_item_count(self.gna, tiles.groups, tiles.rows)
        params.box = Int3(*tiles.box)
        for shape, sides in enumerate(filter(None, (tiles.kv_tile, tiles.kv_rest))):
            params.keys[shape] = Int3(*sides)
        params.beside = Int3(*(tiles.box[axis] if axis == tiles.split else 0 for axis in range(3)))
        for row, c in enumerate(classes):
            params.length[row] = Int3(*self.lengths[row])
            params.window_row[row] = Int3(*(int(x) for x in windows[0][1][c]))
        params.token_stride = Int3(*(dim[3] * n for dim, n in zip(dims, token_strides, strict=True)))
        params.group_stride = Int3(*token_strides)
        params.grid_token = self.gna.text_first
        params.text_tokens = (ctypes.c_int * 2)(*self.text)
        params.text_token = (ctypes.c_int * 2)(0, self.gna.text_first + self.gna.grid_tokens)
        self.params, self.token_strides = params, token_strides

    def run(
        self, query: Tensor, k: Tensor, v: Tensor, scale: float, text_valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output ``[B, H, S, D]`` (strides of ``q``) and log-sum-exp ``[B, H, S]``, on the current stream.

        ``text_valid``: text tokens before and after the grid that count, int32 ``[B, 2]``; all by default.
        """
        return self.launcher(query, k, v)(query, k, v, scale, text_valid)

    def launcher(self, query: Tensor, k: Tensor, v: Tensor) -> Launcher:
        """The launcher for tensors of these shapes and strides."""
        layout = (query.shape, query.stride(), k.shape, k.stride(), v.stride())
        launcher = self._launchers.get(layout)
        if launcher is None:
            launcher = self._launchers[layout] = Launcher(self, query, k, v)
        return launcher

    def needs_no_copy(self, query: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether tensor maps can describe query, key, value and an output like the query, addresses apart."""
        exact = query.shape[-1] == self.config.head_dim
        like = torch.empty_like(query, dtype=output_type(query.dtype), device="meta")
        tensors = (query, k, v, like)
        return all(map(can_map, tensors)) and (exact or self._fills_with_zeros(tensors))

    def copies(self, *tensors: Tensor) -> list[Tensor]:
        """Copies that tensor maps can describe, where the tensors themselves cannot be."""
        head_dim = tensors[0].shape[-1]
        if head_dim != self.config.head_dim and math.prod(self.gna.dilation) > 1:
            tensors = tuple(torch.nn.functional.pad(x, (0, self.config.head_dim - head_dim)) for x in tensors)
        return [x.clone(memory_format=torch.contiguous_format) for x in tensors]

    def _fills_with_zeros(self, tensors: Sequence[Tensor]) -> bool:
        """Whether loads beyond the head dim give zeros: dimension 0 holds one head of one dilation group only."""
        return math.prod(self.gna.dilation) == 1 and all(map(is_dense, tensors))

    def arguments(
        self, tensors: Sequence[Tensor], lse: Tensor, counters: Tensor, scale: float, text_valid: Tensor | None
    ) -> driver.Arguments:
        """Tensor maps and parameters of a launch with these tensors: query, key, value and output."""
        q, k, _, _ = tensors
        sets = self.config.maps
        rests = self.config.map_sets * (self.config.key_shapes - 1)
        maps = driver.TensorMaps(4 * sets + 2 * rests)
        params = type(self.params).from_buffer_copy(self.params)
        for operand, (name, x) in enumerate(zip("qkvo", tensors, strict=True)):
            setattr(params, name, self._encode(maps, operand * sets, x, is_keys=name in "kv"))
            if rests and name in "kv":
                first = 4 * sets + rests * (name == "v")
                self._encode(maps, first, x, is_keys=True, rest=True)
        params.counters, params.lse = counters.data_ptr(), lse.data_ptr()
        params.text_valid = text_valid.data_ptr() if text_valid is not None else None
        params.scale_log2 = (scale if scale else SMALLEST_SCALE) * LOG2_E
        params.total = small("work items", params.items_per_head * q.shape[0] * q.shape[1])
        params.text_total = params.text_items * q.shape[0] * q.shape[1]
        params.heads, params.queries_per_key_head = q.shape[1], q.shape[1] // k.shape[1]
        return driver.Arguments(maps, params)

    def _encode(self, maps: driver.TensorMaps, first: int, x: Tensor, is_keys: bool, rest: bool = False) -> Address:
        """Maps of one operand (``rest``: for boxes of the second shape), and how they reach heads and groups."""
        batch, heads, _, head_dim = x.shape
        batch_stride, head_stride, token, _ = x.stride()
        places = is_dense(x)
        outer = batch * heads if places else batch
        outer_stride = head_stride if places else batch_stride
        groups = [token * n for n in self.token_strides]
        dilation = [dim[3] for dim in padded_dims(self.gna)]
        columns = head_dim + (0 if places else (heads - 1) * head_stride)
        columns = small("columns", columns + sum((d - 1) * n for d, n in zip(dilation, groups, strict=True)))
        tiles, size = self.tiles, x.element_size()
        chunk = {torch.float32: SUM_COLUMNS, FLOAT8: head_dim}.get(x.dtype, self.config.columns)
        box = (tiles.kv_rest if rest and tiles.kv_rest else tiles.kv_tile) if is_keys else tiles.box

        def encode(
            index: int, start: int, sizes: Sequence[int], steps: Sequence[int], box: Sequence[int], wide: int
        ) -> None:
            driver.encode_tiled(
                maps[first + index],
                x.data_ptr() + size * start * token,
                (wide, sizes[2], sizes[1], sizes[0], outer),
                [size * step for step in (steps[2], steps[1], steps[0], outer_stride)],
                (chunk, box[2], box[1], box[0], 1),
                dtype=str(x.dtype).removeprefix("torch."),
                swizzle=size * chunk,
            )

        for index, (lengths, plain) in enumerate(zip(self.lengths, self.plain, strict=True)):
            steps = [group * (1 if plain else d) for group, d in zip(groups, dilation, strict=True)]
            encode(index, self.text[0], lengths, steps, box, columns)
        for after, count in enumerate(() if rest else self.text):
            if count:
                start = 0 if after == 0 else self.text[0] + self.gna.grid_tokens
                text_box = (1, 1, math.prod(tiles.kv_tile) if is_keys else tiles.rows)
                wide = head_dim + (0 if places else (heads - 1) * head_stride)
                line = [groups[0], groups[1], token]
                encode(self.config.map_sets + after, start, (1, 1, count), line, text_box, wide)
        head_column, head_place, batch_place = (0, 1, heads) if places else (head_stride, 0, 1)
        return Address(head_column, head_place, batch_place, Int3(*groups))


class Launcher:
    """Launches a plan for tensors of certain shapes and strides; all that does not depend on addresses is ready."""

    def __init__(self, plan: Plan, query: Tensor, k: Tensor, v: Tensor) -> None:
        self.plan, self.direct = plan, plan.needs_no_copy(query, k, v)
        batch, heads, tokens, self.head_dim = query.shape
        self.rows, self.device, self.dtype = (batch, heads, tokens), query.device, output_type(query.dtype)
        grid = min(plan.processors, plan.params.items_per_head * batch * heads)
        self.shape = ((grid, 1, 1), (plan.config.threads, 1, 1), plan.config.shared_bytes)
        self._known = KnownCalls()

    def __call__(
        self, query: Tensor, k: Tensor, v: Tensor, scale: float, text_valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, as :meth:`Plan.run` has them."""
        plan, index = self.plan, self.plan.request.device
        q, out = query, torch.empty_like(query, dtype=self.dtype)
        lse = torch.empty(self.rows, dtype=torch.float32, device=self.device)
        result = out
        if not self.direct or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
            q, k, v = plan.copies(q, k, v)
            out = torch.empty_like(q, dtype=self.dtype, memory_format=torch.contiguous_format)
        stream = current_stream(index)
        valid = 0 if text_valid is None else text_valid.data_ptr()
        call = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), scale, stream, valid)
        capturing = torch.cuda.is_current_stream_capturing()
        arguments = None if capturing else self._known.get(call)
        if arguments is None:
            counters = launch_counters(plan, stream, capturing)
            arguments = plan.arguments((q, k, v, out), lse, counters, scale, text_valid)
            if not capturing:
                self._known.keep(call, arguments)
        driver.launch(plan.kernel, *self.shape, stream, arguments, index)
        if out is not result:
            result.copy_(out[..., : self.head_dim])
        return result, lse


class KnownCalls:
    """Arguments of recent launches, by all that they were made of; the oldest ones are forgotten."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], driver.Arguments] = {}
        self._lock = threading.Lock()
        self.get = self._known.get

    def keep(self, call: tuple[object, ...], arguments: driver.Arguments) -> None:
        """Remembers the arguments of a call."""
        with self._lock:
            if len(self._known) >= REMEMBERED_CALLS:
                del self._known[next(iter(self._known))]
            self._known[call] = arguments


def small(name: str, number: int) -> int:
    """A number that fits the 32 bits that the kernel has for it, as larger ones would wrap around.

    Raises:
        ValueError: if it does not.
    """
    if number >= 1 << 31:
        raise ValueError(f"{number} {name}: the kernel counts up to 2**31; backend('flex-tiles') takes the call")
    return number


def is_dense(x: Tensor) -> bool:
    """Whether batch and heads of ``[B, H, S, D]`` are one dimension: one stride leads from each head to the next."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def can_map(x: Tensor) -> bool:
    """Whether tensor maps reach every head of ``x`` without a copy, if its address is a multiple of 16."""
    *outer, column = x.stride()
    if column != 1 or any(stride * x.element_size() % 16 or stride <= 0 for stride in outer):
        return False
    # Else heads lie side by side in dimension 0, whose coordinates are 32 bits.
    return is_dense(x) or (x.shape[-1] % 64 == 0 and x.shape[1] * x.stride(1) < 1 << 31)


def estimated(request: Request) -> tuple[KernelConfig, KernelTiles]:
    """Configuration and tiles of the least estimated cost, where the request leaves them open."""
    gnas = tuple(dict.fromkeys(request.gnas))
    known = request.config
    configs = (known,) if known else request.kernel.defaults(request.head_dim, request.capability, request.text)
    shapes = [(config, request.tiles or tiles_for(gnas, config)) for config in configs]
    return min(shapes, key=lambda shape: cost(gnas, shape[1]) * shape[0].box_time)


@functools.lru_cache(maxsize=1024)
def tiles_for(gnas: tuple[GNA, ...], config: KernelConfig) -> KernelTiles:
    """Tiles of the least estimated cost for a configuration."""
    tiles = choose(gnas, config.keys, config.groups, config.rows)
    tiles = improved(gnas, tiles) if config.may_have_rests else tiles
    return skipping(gnas, tiles) if config.may_skip else tiles


@functools.lru_cache(maxsize=256)
def plan(request: Request) -> Plan:
    """The plan for a request; made once."""
    return Plan(request)


def plan_for(gnas: tuple[GNA, ...], query: Tensor) -> Plan:
    """The plan for masks and a query ``[B, H, S, D]`` on its GPU."""
    return plan(request_on(query.device.index, gnas, query.shape[-1], query.dtype))


def request_on(device: int, gnas: tuple[GNA, ...], head_dim: int, dtype: torch.dtype) -> Request:
    """A request for the kernel of a device."""
    capability = torch.cuda.get_device_capability(device)
    return Request(gnas, head_dim, dtype == torch.float16, device, capability=capability, float8=dtype == FLOAT8)


def launch_counters(plan: Plan, stream: int, capturing: bool) -> Tensor:
    """The two counters of a launch on a stream, zero."""
    device = plan.request.device
    if not capturing:
        return _counters(device, stream)
    # A graph reads the tables for ever, and may be replayed beside others: its launch has its own counters.
    _captured.add(plan)
    return torch.zeros(2, dtype=torch.int32, device=torch.device("cuda", device))


@functools.cache
def _counters(device: int, stream: int) -> Tensor:
    """The two counters of a stream: launches on one stream follow each other, and each leaves zeros."""
    # A copy, because that is complete when it returns, on whatever stream it was made.
    return lasting(lambda: torch.zeros(2, dtype=torch.int32).to(torch.device("cuda", device)))


_captured: set[Plan] = set()
"""Plans that CUDA graphs were captured with."""
