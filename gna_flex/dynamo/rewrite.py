"""FlexAttention calls of a graph, one by one: recognised, and rewritten where a route of ours pays."""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from gna_flex import kernels
from gna_flex.dynamo.graph import Body, Call, LeftAlone, bodies, read, where
from gna_flex.dynamo.lists import agree
from gna_flex.dynamo.report import CompiledCall, remember
from gna_flex.flex import route_of, stand_in
from gna_flex.intervals import ceil_div
from gna_flex.mask import GNABlockMask, gna_mask
from gna_flex.neighborhood import GNA
from gna_flex.routing import Route
from gna_flex.symbolic.listed import MOST_BLOCKS
from gna_flex.symbolic.recognise import Recognition, recognise
from gna_flex.torch_private import (
    BLOCK_TABLES,
    flex_attention_hop,
    keeps_assertions,
    known_int,
    likely_int,
    not_compiling,
    trace_graph,
    variants_left,
)

log = logging.getLogger("gna_flex")

VARIANTS_KEPT = 2
"""Of the compilations that torch allows a function, those kept for graphs with any number that masks capture."""
CHANGED = "block lists of a mask have changed since torch compiled it for gna_flex: call torch.compiler.reset()"
"""Said at a run whose block lists keep other pairs than the mask_mod."""


def rewrite(root: GraphModule) -> None:
    """Rewrites the FlexAttention calls of a graph, in place, and keeps a report.

    A call is rewritten if its mask is proved to be a GNA, the block lists it was given agree with that, and routing
    prefers our kernel or tile order for it. The graph then checks, on the device and at every run, that the block lists
    are still those. Everything else stays as it is.
    """
    if root.meta.setdefault("gna_flex", False):  # by the backend, and then by Inductor inside of recognise_masks()
        return
    root.meta["gna_flex"] = True
    begin = time.perf_counter()
    found = bodies(root)
    calls = [(body, node) for body in found for node in body.calls()]
    ours = [_routed_itself(node) for body in found for node in body.module.graph.nodes if _is_ours(node)]
    rewriter = _Rewriter(root)
    with not_compiling():
        done = [rewriter.rewrite(body, node) for body, node in calls]
        rewriter.finish(body.module for body in found)
    remember(ours + done, time.perf_counter() - begin)


def _is_ours(node: Node) -> bool:
    return node.target in (torch.ops.gna_flex.attention, torch.ops.gna_flex.attention.default)


def _routed_itself(node: Node) -> CompiledCall:
    device = node.meta["example_value"][0].device
    route = kernels.kernel_for(torch.cuda.get_device_capability(device)) if device.type == "cuda" else "reference"
    return CompiledCall(node.name, where(node), None, route, "its mask routed the call while torch traced it")


class _Rewriter:
    """The work on one graph; equal masks in it are recognised once."""

    def __init__(self, root: GraphModule) -> None:
        self.root = root
        self.known: dict[Any, Recognition] = {}
        self.masks: dict[Any, GNABlockMask] = {}
        self.agree: dict[Any, bool] = {}
        self.used: dict[Any, None] = {}

    def rewrite(self, body: Body, node: Node) -> CompiledCall:
        """Looks at one call, and rewrites it where that is possible and pays."""
        gnas: tuple[GNA, ...] = ()
        place = where(node)
        try:
            call = read(self.root, body, node)
            gnas = self.gnas(call)
            mask, route = self.route(call, gnas)
            self.check_lists(call, gnas)
            _assume(call)
        except LeftAlone as reason:
            return CompiledCall(node.name, place, _one(gnas), "", str(reason))
        except Exception as error:  # compiling must not fail because of what can be done without
            log.warning("a FlexAttention call was left alone because of an error", exc_info=True)
            return CompiledCall(node.name, place, _one(gnas), "", f"{type(error).__name__}: {error}")
        results = self.kernel(call, mask) if route.name in kernels.KERNELS else self.tiles(body.module, call, mask)
        for users, result in zip(call.results, results, strict=True):
            for user in users:
                result.meta = dict(user.meta)
                user.replace_all_uses_with(result)
                body.module.graph.erase_node(user)
        graphs = [x for x in node.all_input_nodes if x.op == "get_attr"]
        for unused in (node, *(x for x in graphs if not set(x.users) - {node})):
            body.module.graph.erase_node(unused)
        self.used[call.sources, gnas, call.block] = None
        return CompiledCall(node.name, place, _one(gnas), route.name, route.reason)

    def gnas(self, call: Call) -> tuple[GNA, ...]:
        """The GNAs that the mask of a call is, proved; one, or one per head."""
        numbers = tuple(likely_int(number) for number in call.numbers)
        heads = max(table.shape[1] for table in call.tables if table is not None)
        key = (call.mask_graph.code, numbers, call.lengths, heads)
        if key not in self.known:

            def mask_mod(*indices: Tensor) -> Any:
                kept = call.mask_graph(*indices, *numbers)
                return kept[0] if isinstance(kept, tuple | list) else kept

            q_len, kv_len = call.lengths
            found = recognise(mask_mod, q_len=q_len, kv_len=kv_len, heads=heads if heads > 1 else None)
            self.known[key] = found
        found = self.known[key]
        if found.gna is None:
            raise LeftAlone(f"its mask is no GNA: {found.reason}")
        gnas = found.gna if isinstance(found.gna, tuple) else (found.gna,)
        if len(gnas) not in (1, call.heads):
            raise LeftAlone(f"its mask is for {len(gnas)} heads, and the query has {call.heads}")
        return gnas

    def check_lists(self, call: Call, gnas: tuple[GNA, ...]) -> None:
        """Refuses block lists that do not keep the pairs that the mask_mod keeps."""
        if not keeps_assertions():
            raise LeftAlone("Inductor is set to leave assertions out, so that block lists could change unnoticed")
        key = (call.sources, gnas, call.block)
        batch, heads = (max(x.shape[dim] for x in call.tables if x is not None) for dim in (0, 1))
        sizes = (ceil_div(length, block) for length, block in zip(call.lengths, call.block, strict=True))
        if batch * max(heads, len(gnas)) * math.prod(sizes) > MOST_BLOCKS:
            raise LeftAlone("its block lists are too long to compare at every run")
        if key not in self.agree:
            self.agree[key] = bool(agree(call.tables, gnas, *call.block))
        if not self.agree[key]:
            raise LeftAlone("its block lists keep other pairs than its mask_mod")

    def route(self, call: Call, gnas: tuple[GNA, ...]) -> tuple[GNABlockMask, Route]:
        """A mask of ours for a call, and the route of it."""
        if gnas not in self.masks:
            self.masks[gnas] = gna_mask(gnas, device=call.query.device)
        mask = self.masks[gnas]
        query, key, value = (
            stand_in([likely_int(size) or 1 for size in x.shape], call.dtype, x.device)
            for x in (call.query, call.key, call.value)
        )
        try:
            route = route_of(
                query,
                key,
                mask,
                needs_grad=call.needs_grad,
                wants_stats=call.wants(1) or call.wants(2),
                compiling=True,
                value=value,
                wants_maximum=call.wants(2),
                scale=call.scale,
            )
        except RuntimeError as error:
            raise LeftAlone(str(error)) from error
        if route.name not in (*kernels.KERNELS, "flex-tiles"):
            why = "; ".join(f"{name}: {objection}" for name, objection in route.rejected)
            raise LeftAlone(f"nothing of ours is better here ({why or route.reason})")
        return mask, route

    def kernel(self, call: Call, mask: GNABlockMask) -> list[Node]:
        """The call by our operator: output, log-sum-exp in base 2, and the maximum, which has no users."""
        graph = call.node.graph
        with graph.inserting_before(call.node):
            inputs = [_cast(graph, x, call.dtype) for x in call.node.args[:3]]
            arguments = (*inputs, *mask.lists, call.scale)
            both = _add(graph, call.node, torch.ops.gna_flex.attention.default, *arguments)
            out, lse = (_add(graph, call.node, operator.getitem, both, index) for index in (0, 1))
            lse = _add(graph, call.node, operator.mul, lse, math.log2(math.e))
            return [_in_order(graph, call, out), lse, lse]

    def tiles(self, module: GraphModule, call: Call, mask: GNABlockMask) -> list[Node]:
        """The call by FlexAttention in tile order."""
        graph, tiles, like = call.node.graph, mask.tiles, call.node.args[4][2]  # type: ignore[index]
        tracer = GraphAppendingTracer(graph)
        permute: Any = tiles.permute
        unpermute: Any = tiles.unpermute
        with graph.inserting_before(call.node):
            inputs = [_cast(graph, x, call.dtype) for x in call.node.args[:3]]
            inputs = [permute(Proxy(x, tracer), -2).node for x in inputs]
            lists = _add(graph, call.node, torch.ops.gna_flex.tiled_lists.default, like, *mask.lists, tiles.order.tile)
            tables = [_add(graph, call.node, operator.getitem, lists, index) for index in range(len(BLOCK_TABLES))]
            indices = (torch.zeros((), dtype=torch.int32, device=call.query.device) for _ in range(4))
            name = f"_gna_flex_mask_{len(self.masks)}_{call.node.name}"
            module.add_submodule(name, trace_graph(tiles.parts[-1])(*indices))
            parts = (*tiles.parts[:2], *tables, *tiles.parts[10:-1], graph.get_attr(name))
            _, _, _, score_mod, _, scale, options, *_ = call.node.args
            arguments = (*inputs, score_mod, parts, scale, options, (), ())
            tiled = _add(graph, call.node, flex_attention_hop, *arguments)
            out, *stats = (Proxy(_add(graph, call.node, operator.getitem, tiled, index), tracer) for index in range(3))
            natural = _in_order(graph, call, unpermute(out, -2).node)
            # Statistics that nobody wants may be empty.
            wanted = ((x, call.wants(index)) for index, x in enumerate(stats, 1))
            return [natural, *(unpermute(x, -1).node if used else x.node for x, used in wanted)]

    def finish(self, modules: Iterable[GraphModule]) -> None:
        """Adds the check of block lists, and makes the graphs callable again."""
        graph = self.root.graph
        begin = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(begin):
            for sources, gnas, block in self.used:
                lists = [graph.get_attr(x.target) if x and x.op == "get_attr" else x for x in sources]
                numbers = (*self.masks[gnas].lists, *block)
                agreed = graph.call_function(torch.ops.gna_flex.lists_agree.default, (lists, *numbers))
                graph.call_function(torch._assert_async, (agreed, CHANGED))
        for module in modules:
            module.graph.lint()
            module.recompile()


def _one(gnas: tuple[GNA, ...]) -> Any:
    return gnas[0] if len(gnas) == 1 else gnas or None


def _assume(call: Call) -> None:
    """Has torch compile again where the rewritten call would be wrong: for other numbers in the mask than now, and
    where keys and values broadcast over the batch.
    """
    symbols = [number for number in call.numbers if known_int(number) is None]
    if symbols and variants_left() < VARIANTS_KEPT:
        raise LeftAlone("torch has compiled this function for many masks, and this variant takes any number")
    fixed = all(int(number) == likely_int(number) for number in symbols)
    batch = call.query.shape[0]
    if not fixed or call.key.shape[0] != batch or call.value.shape[0] != batch:
        raise LeftAlone("the numbers that its mask_mod captures, or its batch sizes, are not known when compiling")


def _add(graph: Graph, like: Node, target: Any, *arguments: Any) -> Node:
    """A node that comes from the same line of the program as another one."""
    node = graph.call_function(target, arguments)
    node.stack_trace = like.stack_trace
    return node


def _cast(graph: Graph, node: Any, dtype: torch.dtype) -> Node:
    """A tensor in the type of the output, which is that of autocast where it is on."""
    return node if node.meta["example_value"].dtype == dtype else graph.call_method("to", (node, dtype))


def _in_order(graph: Graph, call: Call, out: Node) -> Node:
    """The output with its dimensions in memory in the order that torch's operator has, which the graph may rely on."""
    strides = [likely_int(stride) or 0 for stride in call.node.meta["example_value"][0].stride()]
    order = sorted(range(4), key=lambda dim: -strides[dim])
    if order == [0, 1, 2, 3]:
        return graph.call_method("contiguous", (out,))
    out = graph.call_method("contiguous", (graph.call_method("permute", (out, *order)),))
    return graph.call_method("permute", (out, *(order.index(dim) for dim in range(4))))
