"""FlexAttention calls in the graphs that Dynamo makes: where they are, and what is known about them when compiling."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from gna_flex.torch_private import (
    BLOCK_TABLES,
    HOP_ARGUMENTS,
    FakeTensor,
    example_input,
    flex_attention_hop,
    known_int,
    likely_int,
)

DEFAULT_OPTIONS = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
}
"""Kernel options that torch's front end sets by itself."""
OUTPUT_OPTIONS = ("OUTPUT_LOGSUMEXP", "OUTPUT_MAX")
"""And those that say which statistics are wanted."""
CHECKPOINTS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")
"""Operators that run a graph of their own on their arguments."""

TRANSFORM = "it is inside of a function transform (torch.func)"


class LeftAlone(Exception):  # noqa: N818 (an answer, not an error)
    """A call that stays as it is; the message is the reason."""


@dataclass
class Body:
    """A graph with FlexAttention calls in it: the outermost one, or that of a checkpoint.

    ``outer`` maps its placeholders to what the outermost graph passes; ``obstacle`` is why calls stay as they are.
    """

    module: GraphModule
    outer: dict[Node, Any] = field(default_factory=dict)
    obstacle: str = ""

    def calls(self) -> Iterator[Node]:
        """Its FlexAttention calls."""
        return (node for node in list(self.module.graph.nodes) if is_call(node))


def is_call(node: Node) -> bool:
    """Whether a node is a FlexAttention call."""
    return node.op == "call_function" and node.target is flex_attention_hop


def bodies(root: GraphModule) -> list[Body]:
    """The graph, and all graphs inside of it that are not those of FlexAttention calls."""
    found = {id(root): Body(root)}
    waiting = list(found.values())
    while waiting:
        body = waiting.pop()
        for node in body.module.graph.nodes:
            for inner in () if is_call(node) else _graphs_of(body.module, node):
                if id(inner) in found:
                    found[id(inner)].obstacle = "its part of the graph is used several times"
                    continue
                found[id(inner)] = _inner(body, node, inner)
                waiting.append(found[id(inner)])
    return list(found.values())


def _graphs_of(module: GraphModule, node: Node) -> list[GraphModule]:
    """The graphs that an operator is called with."""
    if node.op == "call_module":
        candidates = [attribute(module, node)]
    else:
        candidates = [attribute(module, arg) for arg in node.all_input_nodes if arg.op == "get_attr"]
    return [inner for inner in candidates if isinstance(inner, GraphModule)]


def _inner(body: Body, node: Node, inner: GraphModule) -> Body:
    """The graph of an operator that is called in another graph."""
    name = getattr(node.target, "__name__", str(node.target))
    arguments = node.args[1:]
    placeholders = [p for p in inner.graph.nodes if p.op == "placeholder"]
    if body.obstacle or _in_transform(node):
        return Body(inner, obstacle=body.obstacle or TRANSFORM)
    if name not in CHECKPOINTS or len(arguments) != len(placeholders):
        return Body(inner, obstacle=f"it is inside of {name}")
    outer = {
        p: body.outer.get(a, a) if isinstance(a, Node) else a for p, a in zip(placeholders, arguments, strict=True)
    }
    return Body(inner, outer)


def _in_transform(node: Node) -> bool:
    """Whether a node is between the begin and the end of a function transform."""
    names = [str(other.target) for other in itertools.takewhile(lambda other: other is not node, node.graph.nodes)]
    return sum("_increment_nesting" in name for name in names) > sum("_decrement_nesting" in name for name in names)


def attribute(module: GraphModule, node: Node) -> Any:
    """What a node of the module takes from it."""
    value: Any = module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


@dataclass(frozen=True)
class Call:
    """What is known about an eligible FlexAttention call.

    Attributes:
        node: the call.
        query, key, value: what they look like; sizes may be symbols.
        mask_graph: the mask_mod as a graph.
        numbers: what it captures: integers, which may be symbols.
        lengths: query and key tokens.
        block: tokens per block.
        tables: block lists, as they are at the first call.
        sources: where the outermost graph has them from.
        scale: factor of the scores.
        dtype: type of the output, and so that of autocast.
        results: nodes that use output, log-sum-exp and maximum.
    """

    node: Node
    query: Tensor
    key: Tensor
    value: Tensor
    mask_graph: GraphModule
    numbers: tuple[Any, ...]
    lengths: tuple[int, int]
    block: tuple[int, int]
    tables: tuple[Tensor | None, ...]
    sources: tuple[Node | None, ...]
    scale: float
    dtype: torch.dtype
    results: tuple[tuple[Node, ...], ...]

    @property
    def needs_grad(self) -> bool:
        """Whether a backward may follow."""
        return any(x.requires_grad for x in (self.query, self.key, self.value))

    def wants(self, index: int) -> bool:
        """Whether anything is done with a result; torch leaves nodes without users in the graphs of checkpoints."""
        return any(node.users for node in self.results[index])

    @property
    def heads(self) -> int:
        """Heads of the query."""
        return int(self.query.shape[1])


def read(root: GraphModule, body: Body, node: Node) -> Call:
    """What is known about a call.

    Raises:
        LeftAlone: if that is not enough, or there is something that our routes know nothing of.
    """
    if body.obstacle or _in_transform(node):
        raise LeftAlone(body.obstacle or TRANSFORM)
    arguments: list[Any] = [*node.args, *node.kwargs.values()]
    query, key, value, score_mod, parts, scale, options = arguments[: len(HOP_ARGUMENTS)]
    score_numbers, numbers = (*arguments[len(HOP_ARGUMENTS) :], (), ())[:2]
    if node.kwargs or not isinstance(parts, tuple | list):
        raise LeftAlone("torch calls its operator in a way that is not known here")
    if score_numbers or not _returns_first(attribute(body.module, score_mod)):
        raise LeftAlone("it has a score_mod")
    _check_options(options)
    query, key, value = (x.meta.get("example_value") for x in (query, key, value))
    if not all(isinstance(x, FakeTensor) and x.dim() == 4 for x in (query, key, value)):
        raise LeftAlone("query, key and value are not plain tensors")
    lengths = _known(parts[:2], "the number of tokens is dynamic")
    _check_sizes(query, key, value, lengths)
    if not isinstance(scale, int | float):
        raise LeftAlone("its scale is not known when compiling")
    numbers = tuple(x.meta.get("example_value") if isinstance(x, Node) else x for x in numbers)
    mask_graph = attribute(body.module, parts[-1])
    if any(likely_int(x) is None for x in numbers) or any(n.op == "get_attr" for n in mask_graph.graph.nodes):
        raise LeftAlone("its mask_mod captures a tensor")
    sources = tuple(None if x is None else _source(body, x) for x in parts[2 : 2 + len(BLOCK_TABLES)])
    tables = tuple(None if x is None else _table(root, x, query) for x in sources)
    sizes = {tuple(table.shape[:2]) for table in tables if table is not None}
    if any(b not in (1, known_int(query.shape[0])) or h not in (1, known_int(query.shape[1])) for b, h in sizes):
        raise LeftAlone("its block lists are for one batch size, and the batch is dynamic or another")
    users = list(node.users)
    if any(user.target is not operator.getitem or user.args[1] not in (0, 1, 2) for user in users):
        raise LeftAlone("its results are used in a way that is not known here")
    return Call(
        node=node,
        query=query,
        key=key,
        value=value,
        mask_graph=mask_graph,
        numbers=numbers,
        lengths=lengths,
        block=_known(parts[-3:-1], "its block size is dynamic"),
        tables=tables,
        sources=sources,
        scale=float(scale),
        dtype=node.meta["example_value"][0].dtype,
        results=tuple(tuple(user for user in users if user.args[1] == index) for index in range(3)),
    )


def _check_options(options: Any) -> None:
    """Refuses kernel options that somebody chose."""
    for name, value in options.items():
        if name not in OUTPUT_OPTIONS and DEFAULT_OPTIONS.get(name, "none") != value:
            raise LeftAlone(f"kernel_options ask for {name}={value}")


def _check_sizes(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, int]) -> None:
    """Refuses sizes that our routes do not know, or that are not known when compiling."""
    sizes = [tuple(known_int(size) for size in x.shape) for x in (query, key, value)]
    if any(size is None for shape in sizes for size in shape[2:]):
        raise LeftAlone("the number of tokens is dynamic")
    if any(shape[1] is None for shape in sizes):
        raise LeftAlone("the number of heads is dynamic")
    if lengths != (sizes[0][2], sizes[1][2]) or sizes[1][2] != sizes[2][2] or sizes[0][3] != sizes[1][3]:
        raise LeftAlone("the sizes of mask, query, key and value differ")
    batches = {likely_int(x.shape[0]) for x in (query, key, value)}
    if len(batches) > 1 or sizes[1][1] != sizes[2][1] or sizes[0][1] % sizes[1][1]:  # type: ignore[operator]
        raise LeftAlone("key and value broadcast over the batch, or heads do not fit each other")
    if len({x.device for x in (query, key, value)}) > 1:
        raise LeftAlone("query, key and value are on several devices")


def _known(numbers: Any, otherwise: str) -> tuple[int, int]:
    """Two numbers that are fixed."""
    first, second = (known_int(x.meta.get("example_value") if isinstance(x, Node) else x) for x in numbers)
    if first is None or second is None:
        raise LeftAlone(otherwise)
    return first, second


def _returns_first(module: GraphModule) -> bool:
    """Whether a graph returns its first input: the score_mod of a call that has none."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    output: Any = next(node.args[0] for node in module.graph.nodes if node.op == "output")
    return (output[0] if isinstance(output, tuple | list) else output) is inputs[0]


def _source(body: Body, node: Any) -> Node:
    """The node of the outermost graph that a block list comes from."""
    source = body.outer.get(node, None if body.outer else node)
    if not isinstance(source, Node) or source.op not in ("placeholder", "get_attr"):
        raise LeftAlone("its block lists are made inside of the graph: there is no mask, or it is not built beforehand")
    return source


def _table(root: GraphModule, source: Node, query: Tensor) -> Tensor:
    """A block list as it is now."""
    table = example_input(source) if source.op == "placeholder" else attribute(root, source)
    if not isinstance(table, Tensor) or isinstance(table, FakeTensor):
        raise LeftAlone("its block lists cannot be read when compiling")
    fake = source.meta.get("example_value", table)
    if any(known_int(size) is None for size in fake.shape):
        raise LeftAlone("the sizes of its block lists are dynamic")
    if table.device != query.device:
        raise LeftAlone(f"its block lists are on {table.device}, and the query on {query.device}")
    return table


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def where(node: Node) -> str:
    """File and line of the innermost frame outside of torch, as far as torch knows."""
    torchs = str(Path(torch.__file__).parent)
    frames = [(path, line) for path, line in _FRAME.findall(node.stack_trace or "") if not path.startswith(torchs)]
    return f"{Path(frames[-1][0]).name}:{frames[-1][1]}" if frames else ""
