"""The FlexAttention routes: tile order, calls through torch's own front end, one compiled function per plan."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from gna_flex import kernels
from gna_flex.direct import remember
from gna_flex.intervals import ceil_div
from gna_flex.reference import ScoreMod, reference_attention
from gna_flex.routing import Facts, Route, choose_route, cpp_compiler, cpu_fault, forced, with_verdict
from gna_flex.tiling import TileOrder
from gna_flex.torch_private import BLOCK_TABLES, HOP_ARGUMENTS, flex_attention_hop, is_identity, transforming
from gna_flex.transforms import TransformedAttention

if TYPE_CHECKING:
    from gna_flex.mask import GNABlockMask

log = logging.getLogger("gna_flex")

Attention = tuple[Tensor, Tensor | None, Tensor | None]
"""Output, log-sum-exp and maximum of the scores; the statistics where asked for."""

COMPILED_LIMIT = 256
"""Compiled functions kept, the least recently used dropped; a warning comes at half of it."""
EAGER_HOP_PAIRS = 1 << 31
"""torch's eager FlexAttention holds all pairs in memory several times; beyond this many it is refused."""


class Tiles(NamedTuple):
    """A mask in tile order: the order, its BlockMask, that as the tuple torch's operator takes, and literal functions.

    ``permute`` and ``unpermute`` take a tensor and a dimension, ``to_natural`` an index.
    """

    order: TileOrder
    block_mask: BlockMask
    parts: tuple[Any, ...]
    permute: Callable[[Tensor, int], Tensor]
    unpermute: Callable[[Tensor, int], Tensor]
    to_natural: Callable[[Tensor], Tensor]


def in_tile_order(score_mod: ScoreMod | None, to_natural: Callable[[Tensor], Tensor]) -> ScoreMod | None:
    """A score_mod for tokens in tile order that hands natural indices to ``score_mod``."""
    if score_mod is None or is_identity(score_mod):
        return score_mod

    def tiled_score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, to_natural(q_idx), to_natural(kv_idx))

    return tiled_score_mod


def stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor to ask for a route with: of any shape, with memory for one number."""
    return torch.empty(1, dtype=dtype, device=device).expand(*shape)


def route_of(
    query: Tensor,
    key: Tensor,
    mask: GNABlockMask,
    *,
    needs_grad: bool,
    wants_stats: bool = False,
    kernel_options: dict[str, Any] | None = None,
    compiling: bool = False,
    value: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    wants_maximum: bool = False,
    scale: float | None = None,
) -> Route:
    """The route of a call with a GNA mask."""
    on_cpu = query.device.type == "cpu" and not compiling
    facts = Facts(
        device=query.device.type,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        pairs=_pairs(query, key),
        needs_grad=needs_grad,
        wants_stats=wants_stats,
        compiling=compiling,
        has_tiles=mask.has_tiles(compiling),
        tiles_pay=mask.tiles_pay(compiling),
        backend=(kernel_options or {}).get("BACKEND", "AUTO"),
        has_compiler=not on_cpu or cpp_compiler() is not None,
        cpu_fault=cpu_fault(query.shape[-1], key.shape[2], mask.plan.kv_block) if on_cpu else "",
        capability=mask.capability,
        missing=kernels.missing(),
        foreign=foreign_to_kernels(query, value, mask, score_mod, wants_maximum, scale),
    )
    return choose_route(with_verdict(facts, query.device.index))


def foreign_to_kernels(
    query: Tensor,
    value: Tensor | None,
    mask: GNABlockMask,
    score_mod: ScoreMod | None,
    wants_maximum: bool,
    scale: float | None,
) -> str:
    """What a call has that our kernels know nothing of; empty if there is nothing."""
    plan = mask.plan
    if not is_identity(score_mod):
        return "it takes no score_mod"
    if plan.and_mask is not None:
        return "the mask has a further condition (and_mask)"
    if plan.q_order is not None or plan.kv_order is not None:
        return "it takes tokens in natural order, and the mask is for another one"
    if len({gna.dilation for gna in plan.gnas}) > 1:
        return "the heads differ in dilation"
    if value is not None and value.shape[-1] != query.shape[-1]:
        return f"it takes values of the head dim of queries, not {value.shape[-1]} and {query.shape[-1]}"
    if wants_maximum:
        return "it returns no maximum of the scores"
    if scale is not None and scale < 0:
        return f"it takes no negative scale ({scale})"
    return ""


def kernel_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: GNABlockMask, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by the CUDA kernel."""
    numbers = (*mask.lists, query.shape[-1] ** -0.5 if scale is None else scale)
    if not torch.compiler.is_compiling() and transforming():
        return TransformedAttention.apply(query, key, value, *numbers, mask.valid_text)  # type: ignore[no-any-return]
    return torch.ops.gna_flex.attention(query, key, value, *numbers, mask.valid_text)  # type: ignore[no-any-return]


def _pairs(query: Tensor, key: Tensor) -> int:
    """Pairs of query and key over batch and heads."""
    return query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]


def wants_grad(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a backward pass through the call can follow."""
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs in autocast's type where autocast is on, as torch's own operator does it."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


class RoutedTuple:
    """What a GNA mask hands to torch in place of its tuple: behaves like it, and takes the call over.

    torch's front end passes this object to the FlexAttention operator, which dispatches to it by the
    ``__torch_function__`` protocol, in eager mode and while tracing.
    """

    def __init__(self, mask: GNABlockMask, parts: tuple[Any, ...], eager: bool) -> None:
        self.mask, self.parts, self.eager = mask, parts, eager

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        return self.parts[index]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not flex_attention_hop:
            return func(*args, **(kwargs or {}))
        query, key, value, score_mod, routed, scale, options = args[: len(HOP_ARGUMENTS)]
        mask, rest = routed.mask, args[len(HOP_ARGUMENTS) :]
        mask.check_batch(query.shape[0])
        if options.get("BACKEND", "AUTO") != "AUTO":
            return func(query, key, value, score_mod, routed.parts, scale, options, *rest)
        wants_maximum = options.get("OUTPUT_MAX", False)
        if routed.eager:
            if is_identity(score_mod):
                return torch.ops.gna_flex.eager_attention(query, key, value, mask.handle, scale, wants_maximum)
            _refuse_dense(query, key)
            return func(query, key, value, score_mod, routed.parts, scale, options, *rest)
        route = route_of(
            query,
            key,
            mask,
            needs_grad=wants_grad(query, key, value),
            compiling=True,
            value=value,
            score_mod=score_mod,
            wants_maximum=wants_maximum,
            scale=scale,
        )
        if route.name in kernels.KERNELS:
            out, lse = kernel_attention(*autocast(query, key, value), mask, scale)
            return out, lse * math.log2(math.e), lse.new_empty(0)
        if route.name == "flex":
            return func(query, key, value, score_mod, routed.parts, scale, options, *rest)
        if route.name == "flex-tiles":
            tiles = mask.tiles
            mod = in_tile_order(score_mod, tiles.to_natural)
            permuted = [tiles.permute(x, -2) for x in (query, key, value)]
            out, lse, top = func(*permuted, mod, tiles.parts, scale, options, *rest)
            stats = [tiles.unpermute(x, -1) if x.numel() else x for x in (lse, top)]
            return tiles.unpermute(out, -2), *stats
        mod = None if is_identity(score_mod) else score_mod
        return to_base_2(*reference(*autocast(query, key, value), mask, mod, scale))


def to_base_2(out: Tensor, lse: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics as the FlexAttention operator returns them."""
    return out, lse * math.log2(math.e), top * math.log2(math.e)


def _refuse_dense(query: Tensor, key: Tensor) -> None:
    pairs = _pairs(query, key)
    if pairs > EAGER_HOP_PAIRS:
        raise RuntimeError(
            f"torch's flex_attention, called without torch.compile and with a score_mod, would hold all {pairs:.1e} "
            "scores in memory; call gna_flex.flex_attention (same arguments) or compile the caller"
        )


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: GNABlockMask,
    *,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    lse: bool = False,
    top: bool = False,
    kernel_options: dict[str, Any] | None = None,
) -> Attention:
    """Attention outside of any graph: the reference, or a function compiled once for this plan."""
    query, key, value = autocast(query, key, value)
    grad = wants_grad(query, key, value)
    # Tensors that a score_mod captures may want gradients, which the CPU kernel would drop without a word.
    grad = grad or (score_mod is not None and query.device.type == "cpu" and torch.is_grad_enabled())
    ask = functools.partial(
        route_of,
        query,
        key,
        mask,
        needs_grad=grad,
        wants_stats=lse or top,
        kernel_options=kernel_options,
        value=value,
        score_mod=score_mod,
        wants_maximum=top,
        scale=scale,
    )
    route = ask()
    if route.name in kernels.KERNELS:
        try:
            result = kernel_attention(query, key, value, mask, scale)
            if not (grad or kernel_options):
                remember(mask, (query, key, value), scale, enable_gqa)
            return (*result, None)
        except (RuntimeError, ImportError) as error:
            # Memory may be there next time; a forced route must not change; a CUDA graph wants a call before it.
            capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
            if isinstance(error, torch.OutOfMemoryError) or forced() or capturing:
                raise
            kernels.give_up(error)
            route = ask()
    if route.name == "reference":
        return reference(query, key, value, mask, score_mod, scale)
    tiles = mask.tiles if route.name == "flex-tiles" else None
    on_cpu = query.device.type == "cpu"
    statics = Statics(
        scale=scale,
        enable_gqa=enable_gqa,
        lse=lse,
        top=top,
        kernel_options=tuple(sorted((kernel_options or {}).items())),
    )
    if not on_cpu:
        function = compiled(statics, mask, tiles, query, key, value, grad, score_mod)
        return function(statics, query, key, value, mask.plain, score_mod, tiles)
    # The CPU kernel neither fuses with permutations nor takes views of one tensor or tensors that want gradients.
    if tiles:
        query, key, value = (tiles.order.permute(x) for x in (query, key, value))
        score_mod = in_tile_order(score_mod, tiles.to_natural)
    query, key, value = (x.detach().contiguous() for x in (query, key, value))
    function = compiled(statics, mask, tiles, query, key, value, grad, score_mod)
    block_mask = tiles.block_mask if tiles else mask.plain
    if block_mask.kv_indices.shape[-1] * block_mask.BLOCK_SIZE[1] < block_mask.seq_lengths[1]:
        block_mask = full_width(block_mask)
    out, _, _ = function(statics, query, key, value, block_mask, score_mod, None)
    return (tiles.order.unpermute(out) if tiles else out), None, None


def full_width(mask: BlockMask) -> BlockMask:
    """The mask as ``create_block_mask`` lays it out: tables as wide as the mask, unused entries filled.

    torch's CPU kernel needs that, and so do some methods of BlockMask.
    """
    columns = ceil_div(mask.seq_lengths[1], mask.BLOCK_SIZE[1])
    visited = [
        _dense(getattr(mask, kind + "_num_blocks"), getattr(mask, kind + "_indices"), columns)
        for kind in ("kv", "full_kv")
    ]
    tables = [table for blocks in (*visited, *(x.mT for x in visited)) for table in _ordered(blocks)]
    named: dict[str, Any] = dict(zip(BLOCK_TABLES, tables, strict=True))
    return BlockMask(mask.seq_lengths, **named, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask.mask_mod)


def _dense(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """A list of blocks as booleans ``[B, H, rows, columns]``."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    dense = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter_(-1, torch.where(used, indices, columns).long(), True)[..., :columns]


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Booleans ``[B, H, rows, columns]`` as counts and indices, set ones first; every row lists every column."""
    indices = dense.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), indices.to(torch.int32)


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: GNABlockMask, score_mod: ScoreMod | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference under a GNA mask."""
    return reference_attention(query, key, value, mask.mask_mod, score_mod=score_mod, scale=scale)


class Statics(NamedTuple):
    """Arguments of a call that are compiled in."""

    scale: float | None
    enable_gqa: bool
    lse: bool
    top: bool
    kernel_options: tuple[tuple[str, Any], ...]


def attend(
    statics: Statics,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    score_mod: ScoreMod | None,
    tiles: Tiles | None,
) -> Attention:
    """Torch's FlexAttention: with the block mask on the tokens as given, or in tile order."""
    if tiles is not None:
        query, key, value = tiles.permute(query, -2), tiles.permute(key, -2), tiles.permute(value, -2)
        score_mod, block_mask = in_tile_order(score_mod, tiles.to_natural), tiles.block_mask
    options = dict(statics.kernel_options) or None
    result = torch_flex_attention(
        query,
        key,
        value,
        score_mod,
        block_mask,
        statics.scale,
        statics.enable_gqa,
        kernel_options=options,  # type: ignore[arg-type]
        return_aux=AuxRequest(lse=statics.lse, max_scores=statics.top),
    )
    out, aux = result
    lse, top = aux.lse, aux.max_scores
    if tiles is None:
        return out, lse, top
    return (
        tiles.unpermute(out, -2),
        None if lse is None else tiles.unpermute(lse, -1),
        None if top is None else tiles.unpermute(top, -1),
    )


_compiled: OrderedDict[Any, Callable[..., Attention]] = OrderedDict()
_lock = threading.Lock()


def compiled(
    statics: Statics,
    mask: GNABlockMask,
    tiles: Tiles | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: bool,
    score_mod: ScoreMod | None,
) -> Callable[..., Attention]:
    """:func:`attend` compiled for one plan: mask, sizes, types and options; only the batch size may vary.

    torch.compile gives up on a function after a few variants and then runs FlexAttention densely. Every plan therefore
    gets a function object, and a code object, of its own.
    """
    signature = tuple((x.shape[1:], x.dtype, x.device) for x in (query, key, value))
    plan = (statics, mask.plan, tiles is None, signature, grad, identity_of(score_mod))
    with _lock:
        if plan in _compiled:
            _compiled.move_to_end(plan)
            return _compiled[plan]
        function = torch.compile(_own_code(attend), fullgraph=True)
        _compiled[plan] = function
        count = len(_compiled)
        if count > COMPILED_LIMIT:
            _compiled.popitem(last=False)
    if count == COMPILED_LIMIT // 2:
        log.warning(
            "compiled FlexAttention for %d different combinations of mask, sizes and options, seconds each; beyond %d "
            "the oldest are dropped and compile again. Reuse masks and sizes, or pad inputs to a few sizes.",
            count,
            COMPILED_LIMIT,
        )
    return function


def identity_of(value: Any) -> Any:
    """What a compiled function depends on in a score_mod: code, captured numbers, and likewise captured functions.

    Everything else that it captures (tensors, say) is an input or is guarded by torch.compile.
    """
    if isinstance(value, int | float | str | bool | None):
        return value
    code = getattr(value, "__code__", None)
    if code is None:
        return type(value)
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    return code, tuple(identity_of(inner) for inner in (*cells, *(value.__defaults__ or ())))


_serial = itertools.count()


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function with a code object and name of its own: torch.compile keeps its variants per code object."""
    name = f"{function.__name__}_{next(_serial)}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
