"""Runs the Hopper backward kernel: one fused pass; or two, for gradients of queries, and for those of keys and values.

All are one kernel, ``csrc/hopper/backward.cu``, whose rows are queries or keys. Plans, records and tensor maps are
those of the forward; where rows are keys they are built for the exchanged neighborhood,
:class:`gna_flex.cuda.tables.Transposed`. Two passes repeat in every bit. A fused one computes five products instead of
seven, and adds gradients of queries up in an order that differs from run to run.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gna_flex.cuda import driver, rows
from gna_flex.cuda.config import WORK_BYTES, KernelConfig
from gna_flex.cuda.forward import (
    LOG2_E,
    SMALLEST_SCALE,
    Address,
    KnownCalls,
    Plan,
    Request,
    can_map,
    launch_counters,
    parameters,
    small,
)
from gna_flex.cuda.kernel import Config, multiply_shared
from gna_flex.cuda.shapes import choose
from gna_flex.cuda.sums import ROUND_STAGES, Meetings, Ring, Sums, SumsParams, rows_of_slices
from gna_flex.cuda.tables import ROWS, KernelTiles, Transposed, count
from gna_flex.kernels import lasting
from gna_flex.neighborhood import GNA
from gna_flex.torch_private import current_stream

log = logging.getLogger("gna_flex")

OPERANDS = ("rows1", "rows2", "inner1", "inner2")
"""Inputs of one pass: those of rows, and those that stream by."""


@dataclass(frozen=True)
class BackwardConfig(Config):
    """A configuration of one pass of the backward kernel; see ``csrc/hopper/backward.cu``.

    Attributes:
        keys: rows of a slot of what streams by.
        rows_are_keys: the pass for gradients of keys and values, instead of that for queries.
        query_stages: slots of rows.
        key_stages: slots of what streams by.
        fused: the pass for keys and values adds up those for queries, too.
    """

    rows_are_keys: bool = False
    fused: bool = False

    direction: ClassVar[str] = "backward"
    most_key_shapes: ClassVar[int] = 1
    head_dims: ClassVar[tuple[int, ...]] = (32, 64, 96, 128)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one CTA, as the kernel lays it out.

        >>> BackwardConfig(128, 96, query_stages=1, key_stages=3).shared_bytes
        218152
        """
        slots, ring = 2 * self.query_stages * self.consumers * ROWS, 2 * self.key_stages * self.keys
        tables = (self.keys + 5) * 16 * -(-self.keys // 128) + self.consumers * ROWS * 24
        tables += 8 * self.keys * self.key_stages * self.rows_are_keys + 2 * WORK_BYTES + 16 * self.key_stages
        shared = (2 * 3 * ROWS * self.keys + 4 * self.keys * self.head_dim) * self.fused
        barriers = 2 * 2 + 4 * self.query_stages + 2 * self.key_stages + 1 + self.consumers
        barriers += (2 + (2 + ROUND_STAGES) * self.consumers) * self.fused
        return (slots + ring) * self.head_dim * 2 + shared + tables + 8 * barriers

    def defines(self) -> dict[str, int]:
        """Macros of the kernel's source."""
        return super().defines() | {"ROWS_ARE_KEYS": int(self.rows_are_keys), "FUSED": int(self.fused)}

    def generated_header(self) -> str:
        """``hopper/generated.cuh``, with the products of a fused pass whose operands are transposed."""
        kind, header = "f16" if self.float16 else "bf16", super().generated_header()
        if self.fused:
            header += multiply_shared("mma_dq", self.head_dim // 2, kind, (True, True))
            header += multiply_shared("mma_dk", self.head_dim, kind, (False, True))
        return header


def default_config(head_dim: int, rows_are_keys: bool, fused: bool = False) -> BackwardConfig:
    """The configuration of a pass for a head dim."""
    padded = BackwardConfig.padded(head_dim)
    if fused:
        keys, rows, stages = (64, 1, 3) if padded > 64 else (64, 2, 3)
    elif padded > 64:
        keys, rows, stages = (64, 1, 4) if rows_are_keys else (96, 1, 3)
    else:
        keys, rows, stages = (96, 2, 4) if rows_are_keys else (128, 2, 3)
    return BackwardConfig(padded, keys, query_stages=rows, key_stages=stages, rows_are_keys=rows_are_keys, fused=fused)


@functools.lru_cache(maxsize=16)
def backward_parameters(map_sets: int) -> type[ctypes.Structure]:
    """``BackwardParams`` of ``csrc/common/records.cuh``."""

    class BackwardParams(parameters(map_sets)):  # type: ignore[misc]
        _fields_ = (
            ("statistics", ctypes.c_void_p),
            ("results", ctypes.c_void_p * 2),
            ("result_strides", ctypes.c_longlong * 3),
            ("rows2", Address),
            ("dq", Address),
            ("scale", ctypes.c_float),
            ("head_dim", ctypes.c_int),
            ("sums", SumsParams),
        )

    return BackwardParams


class Pass(Plan):
    """One pass of backward: everything about its launch but the tensors."""

    config: BackwardConfig

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._known = KnownCalls()
        self._meetings: dict[int, tuple[int, list[Tensor]]] = {}

    def _parameters(self, map_sets: int) -> type[Any]:
        return backward_parameters(map_sets)

    def _shapes(self, map_sets: int) -> tuple[KernelConfig, KernelTiles]:
        request, gnas, config = self.request, tuple(dict.fromkeys(self.request.gnas)), self.request.config
        assert isinstance(config, BackwardConfig)
        tiles = request.tiles or choose(gnas, config.keys, config.groups)
        dilated, text = max(self.gna.dilation) > 1, any(self.text)
        return replace(config, float16=request.float16, dilated=dilated, map_sets=map_sets, text=text), tiles

    def launch(
        self,
        tensors: Sequence[Tensor],
        results: Sequence[Tensor],
        statistics: Tensor,
        scale: float,
        text_valid: Tensor | None,
        sums: Sums | None = None,
    ) -> None:
        """Launches the pass on the current stream; see :meth:`pass_arguments`."""
        index = self.request.device
        stream, capturing = current_stream(index), torch.cuda.is_current_stream_capturing()
        valid = 0 if text_valid is None else text_valid.data_ptr()
        layouts = [(x.data_ptr(), x.shape, x.stride()) for x in (*tensors, *results)]
        of_sums = None if sums is None else (sums.ring, sums.sums.data_ptr(), sums.to.data_ptr(), sums.to.stride())
        call = (*layouts, statistics.data_ptr(), scale, stream, valid, of_sums)
        arguments = None if capturing else self._known.get(call)
        if arguments is None:
            counters = launch_counters(self, stream, capturing)
            arguments = self.pass_arguments(tensors, results, statistics, counters, scale, text_valid, sums)
            if not capturing:
                self._known.keep(call, arguments)
        grid = (min(self.processors, arguments.values[1].total), 1, 1)
        block, shared = (self.config.threads, 1, 1), self.config.shared_bytes
        driver.launch(self.kernel, grid, block, shared, stream, arguments, index)

    @functools.cached_property
    def boxes(self) -> int:
        """Boxes that the items of a head visit, for one head of what streams by."""
        gnas = set(self.request.gnas)
        return sum(count(gna, self.tiles).boxes for gna in gnas) // len(gnas)

    def ring(self, query: Tensor, key: Tensor) -> Ring:
        """How a fused pass keeps the sums of a query's gradients."""
        (batch, heads, tokens, _), groups = query.shape, key.shape[0] * key.shape[1]
        items, processors = self.params.items_per_head, self.processors
        slice_rows = rows_of_slices(batch * heads * tokens, processors)
        # Items of text come first, of all groups.
        behind = groups * items if any(self.text) else self.meetings(slice_rows)[0]
        return Ring.of(groups, tokens, items, self.boxes, processors, slice_rows, behind)

    def sums(self, query: Tensor, key: Tensor, to: Tensor) -> Sums:
        """Sums for a fused pass, which become the gradients ``to`` of a query."""
        return Sums.zeros(self.ring(query, key), to, self.config.head_dim, self.params.items_per_head)

    def meetings(self, slice_rows: int) -> tuple[int, list[Tensor]]:
        """:meth:`Meetings.behind` of a fused pass's items and slices, and its tables on the device; made once."""
        known = self._meetings.get(slice_rows)
        if known is None:
            items = self.params.items_per_head
            if any(self.text) or len(set(self.request.gnas)) > 1:
                tables = Meetings.all(self.gna.tokens, slice_rows, items)
            else:
                tables = Meetings.of(self.gna, self.tiles, slice_rows)
            on_device = lasting(lambda: [torch.from_numpy(table).to(self.items.device) for table in tables])
            known = self._meetings[slice_rows] = tables.behind(items, self.boxes, self.processors), on_device
        return known

    def pass_arguments(
        self,
        tensors: Sequence[Tensor],
        results: Sequence[Tensor],
        statistics: Tensor,
        counters: Tensor,
        scale: float,
        text_valid: Tensor | None,
        sums: Sums | None = None,
    ) -> driver.Arguments:
        """Tensor maps and parameters of a launch with these tensors, in the order of :data:`OPERANDS`.

        ``results``: gradients of queries; or of keys and of values, with the same strides. ``statistics``: float32
        ``[B, H, S, 2]`` of all queries. ``sums``: of the queries' gradients, for a fused pass.
        """
        outer, inner = tensors[0], tensors[2]
        sets = self.config.maps
        maps = driver.TensorMaps((len(OPERANDS) + self.config.fused) * sets)
        params = type(self.params).from_buffer_copy(self.params)
        places = {"rows1": "q", "rows2": "rows2", "inner1": "k", "inner2": "v"}
        for operand, (name, x) in enumerate(zip(OPERANDS, tensors, strict=True)):
            setattr(params, places[name], self._encode(maps, operand * sets, x, is_keys=name.startswith("inner")))
        params.counters, params.statistics = counters.data_ptr(), statistics.data_ptr()
        for i, result in enumerate(results):
            params.results[i] = result.data_ptr()
        params.result_strides, params.head_dim = (ctypes.c_longlong * 3)(*results[0].stride()[:3]), outer.shape[-1]
        if sums is not None:
            params.dq = self._encode(maps, len(OPERANDS) * sets, sums.sums, is_keys=True)
            params.sums = sums.params(*self.meetings(sums.ring.slice_rows)[1])
        params.text_valid = text_valid.data_ptr() if text_valid is not None else None
        params.scale, params.scale_log2 = scale, (scale if scale else SMALLEST_SCALE) * LOG2_E
        params.total = small("work items", params.items_per_head * outer.shape[0] * outer.shape[1])
        params.text_total = params.text_items * outer.shape[0] * outer.shape[1]
        heads = sorted((outer.shape[1], inner.shape[1]))
        params.heads, params.queries_per_key_head = outer.shape[1], heads[1] // heads[0]
        return driver.Arguments(maps, params)


@functools.lru_cache(maxsize=256)
def pass_for(request: Request, rows_are_keys: bool, fused: bool = False) -> Pass:
    """A pass for a request; made once."""
    gnas = tuple(Transposed.of(gna) for gna in request.gnas) if rows_are_keys else request.gnas
    return Pass(replace(request, gnas=gnas, config=default_config(request.head_dim, rows_are_keys, fused)))


def fuses(head_dim: int) -> bool:
    """Whether a fused pass is the quicker one. At head dim 64 two passes take as long (measured), and repeat.

    >>> fuses(128), fuses(64)
    (True, False)
    """
    return BackwardConfig.padded(head_dim) == 128


def backward(
    gnas: tuple[GNA, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    text_valid: Tensor | None = None,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query ``[B, H, S, D]``, key and value ``[B, Hkv, S, D]``, on the current stream.

    ``lse`` is the log-sum-exp ``[B, H, S]`` (natural logarithm), and ``grad_lse`` its gradient, if it has one; ``gnas``
    is one GNA, or one per query head; ``text_valid`` are the lengths of text, int32 ``[B, 2]``, that the forward had.
    ``deterministic``: results repeat in every bit, by default if ``torch.use_deterministic_algorithms`` says so; else
    what is quicker, and fits in memory.
    """
    head_dim, float16, device = query.shape[-1], query.dtype == torch.float16, query.device
    if len(set(gnas)) > 1 and key.shape[1] != query.shape[1]:
        # Heads of keys whose queries have different windows: gradients for each head of queries first.
        groups = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (key, value))
        call = (gnas, query, keys, values, out, lse, grad_out, grad_lse, scale, text_valid, deterministic)
        dq, *grads = backward(*call)
        dk, dv = (x.unflatten(1, (-1, groups)).sum(2, dtype=torch.float32).to(x.dtype) for x in grads)
        return dq, dk, dv
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    fused = fuses(head_dim) and not deterministic
    request = Request(gnas, head_dim, float16, device.index)
    of_keys = pass_for(request, rows_are_keys=True, fused=fused)
    q, k, v, grad = operands(of_keys, query, key, value, grad_out)
    out = out if _has_rows(out) else out.contiguous()
    statistics = rows.statistics(out, grad_out if _has_rows(grad_out) else grad, lse, grad_lse, scale)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
    sums = None
    if fused:
        try:
            sums = of_keys.sums(q, k, dq)
        except torch.OutOfMemoryError as error:
            log.info("the backward takes two passes, which need less memory than a fused one: %s", error)
            of_keys = pass_for(request, rows_are_keys=True)
    of_keys.launch((k, v, q, grad), (dk, dv), statistics, scale, text_valid, sums)
    if sums is None:
        pass_for(request, rows_are_keys=False).launch((q, grad, k, v), (dq,), statistics, scale, text_valid)
    return dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim]


def operands(plan: Plan, *tensors: Tensor) -> Sequence[Tensor]:
    """Query, key, value and gradient, or copies of them, such that tensor maps can describe them."""
    exact = tensors[0].shape[-1] == plan.config.head_dim
    likes = [torch.empty_like(x, device="meta") for x in tensors[:2]]
    direct = all(map(can_map, (*tensors, *likes))) and (exact or plan._fills_with_zeros((*tensors, *likes)))
    if direct and not any(x.data_ptr() % 16 for x in tensors):
        return tensors
    return plan.copies(*tensors)


def _has_rows(x: Tensor) -> bool:
    """Whether the kernel of statistics can read rows: columns side by side, at multiples of 16 bytes."""
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
