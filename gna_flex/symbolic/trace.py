"""A ``mask_mod`` as an expression: traced by ``torch.fx``, then turned into a small tree of integer operators.

The tree has exactly the operators whose value on integers is the same in eager mode and in every compiled kernel.
Anything else (values read by Python, random numbers, unknown operators) is refused with its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gna_flex.torch_private import trace_graph

INPUTS = ("b", "h", "q", "k")
"""Names of the four arguments of a mask_mod: batch, head, query index, key index."""

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
FLOATS = (torch.float32, torch.float64)


class Refused(Exception):  # noqa: N818 (an answer, not an error)
    """A mask that cannot be traced or decided; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Node:
    """One operator of an expression.

    Attributes:
        op: one of :data:`INPUTS`, ``const``, ``leaf``, ``lookup``, or the name of an operator.
        args: the operands, all of one type where the operator computes with them.
        dtype: type of the result.
        value: the number of a constant, the table of a lookup, or the values of a leaf for every token.
        uses: which of the inputs it depends on.
    """

    op: str
    args: tuple[Node, ...] = ()
    dtype: torch.dtype = torch.bool
    value: Any = None
    uses: frozenset[str] = field(default=frozenset())

    def __str__(self) -> str:
        return render(self)


def make(op: str, args: Iterable[Node] = (), dtype: torch.dtype = torch.bool, value: Any = None) -> Node:
    """A node that depends on what its operands depend on."""
    operands = tuple(args)
    return Node(op, operands, dtype, value, frozenset().union(*(arg.uses for arg in operands)))


def constant(value: Any, dtype: torch.dtype = torch.bool) -> Node:
    """A number of this type."""
    if dtype == torch.bool:
        return make("const", value=bool(value))
    return make("const", (), dtype, float(value) if dtype in FLOATS else int(value))


def nodes_of(root: Node, leaves: tuple[str, ...] = ()) -> list[Node]:
    """Every node once, operands before what uses them; operands of operations in ``leaves`` are left out.

    Iterative, because long masks make deep trees.
    """
    done: dict[Node, None] = {}
    stack = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if ready or node.op in leaves:
            done[node] = None
        else:
            stack.append((node, True))
            stack += [(arg, False) for arg in reversed(node.args) if arg not in done]
    return list(done)


def trace(mask_mod: Callable[..., Any], device: torch.device | str = "cpu") -> Node:
    """The expression of a ``mask_mod``: what it computes from ``b``, ``h``, ``q`` and ``k``.

    Raises:
        Refused: if it does something that is not an exact function of its arguments.

    >>> print(trace(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx // 8 == kv_idx // 8)))
    (k <= q) & (q // 8 == k // 8)
    """

    def call(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Any:
        with ElementIndexing():
            return mask_mod(b, h, q_idx, kv_idx)

    inputs = [torch.zeros((), dtype=torch.int32, device=device) for _ in INPUTS]
    try:
        graph = trace_graph(call)(*inputs)
        return _Converter(graph).convert()
    except Refused:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise Refused(f"the mask_mod cannot be traced: {type(error).__name__}: {first}") from error


_READS = {
    "__bool__": "a Python condition on a tensor",
    "__int__": "int() of a tensor",
    "__float__": "float() of a tensor",
    "__index__": "a tensor used as a Python index",
    "__len__": "len() of a tensor",
    "__contains__": "`in` on a tensor",
    "item": "item()",
    "tolist": "tolist()",
    "numpy": "numpy()",
    "nonzero": "nonzero()",
    "set_": "set_()",
}


class ElementIndexing(TorchFunctionMode):
    """Makes ``table[index]`` a lookup for 0-d indices, as FlexAttention does, and refuses what reads a value.

    Args:
        reading: allow reading, for calls that are not traced.
    """

    def __init__(self, reading: bool = False) -> None:
        super().__init__()
        self.reading = reading

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if func is Tensor.__getitem__ and isinstance(args[0], Tensor):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(index, Tensor) for index in indices) and all(map(_is_element, indices)):
                table = args[0]
                tensors = [index if isinstance(index, Tensor) else torch.tensor(index) for index in indices]
                return torch.ops.aten.index(table, tensors)
        if name in _READS and not self.reading:
            raise Refused(f"the mask_mod depends on the value of a tensor: {_READS[name]}")
        return func(*args, **(kwargs or {}))


def _is_element(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.dim() == 0 and index.dtype in INTEGERS
    return isinstance(index, int) and not isinstance(index, bool)


_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge"}
_LOGICAL = {"logical_and": "and", "logical_or": "or", "logical_xor": "xor", "logical_not": "not"}
_BITWISE = {"bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor", "bitwise_not": "not"}
_BITWISE |= {"__and__": "and", "__or__": "or", "__xor__": "xor"}
_ARITHMETIC = {"add": "add", "sub": "sub", "mul": "mul", "neg": "neg", "abs": "abs", "minimum": "min", "maximum": "max"}
_ARITHMETIC |= {"floor_divide": "floordiv", "remainder": "mod", "fmod": "fmod", "floor": "floor", "ceil": "ceil"}
_ARITHMETIC |= {"trunc": "trunc", "__lshift__": "shl", "__rshift__": "shr"}
_ARITHMETIC |= {"bitwise_left_shift": "shl", "bitwise_right_shift": "shr"}
_ON_BOOL = {"add": "or", "mul": "and", "min": "and", "max": "or"}
_COPIES = {"lift_fresh", "lift_fresh_copy", "clone", "contiguous"}
_VIEWS = {"alias", "detach", "view", "reshape", "expand", "squeeze", "_unsafe_view"}
_FILLS = {"ones_like": 1, "zeros_like": 0, "new_ones": 1, "new_zeros": 0}


class _Converter:
    """From an ATen graph to a :class:`Node`; what does not depend on the inputs is computed by torch itself."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self.graph = graph
        self.values: dict[torch.fx.Node, Any] = {}
        self.mutates = self.has_views = False

    def convert(self) -> Node:
        """The result of the graph."""
        names = iter(INPUTS)
        for fx_node in self.graph.graph.nodes:
            if fx_node.op == "placeholder":
                name = next(names)
                self.values[fx_node] = Node(name, (), torch.int32, None, frozenset(name))
            elif fx_node.op == "get_attr":
                self.values[fx_node] = getattr(self.graph, fx_node.target)
            elif fx_node.op == "call_function":
                self.values[fx_node] = self.call(fx_node)
            elif fx_node.op == "output":
                result = self.known(fx_node.args[0])
        if self.mutates and self.has_views:
            raise Refused("the mask_mod changes a tensor in place and also takes views")
        root = self.node(result, "the result")
        if root.dtype != torch.bool:
            raise Refused(f"the mask_mod returns {root.dtype}, not torch.bool")
        return root

    def known(self, value: Any) -> Any:
        """The value of an argument of the graph: a node, a constant tensor, a number, or a list of them."""
        if isinstance(value, torch.fx.Node):
            return self.values[value]
        if isinstance(value, list | tuple):
            return type(value)(self.known(item) for item in value)
        return value

    def call(self, fx_node: torch.fx.Node) -> Any:
        """One operator."""
        args = self.known(fx_node.args)
        kwargs = {name: self.known(value) for name, value in fx_node.kwargs.items()}
        target: Any = fx_node.target
        name = target.overloadpacket.__name__ if hasattr(target, "overloadpacket") else str(target)
        if not hasattr(target, "overloadpacket") or target.namespace != "aten":
            raise Refused(f"operator {target} is not supported")
        if torch.Tag.nondeterministic_seeded in target.tags or "empty" in name:
            raise Refused(f"operator {target} does not give the same value every time")
        if name.endswith("_") and not name.endswith("__"):
            if not (isinstance(args[0], Node) and args[0].op not in INPUTS):
                raise Refused(f"operator {target} changes a tensor in place that the mask_mod was given")
            name, self.mutates = name[:-1], True
        self.has_views |= name in _VIEWS
        flat = [x for arg in (*args, *kwargs.values()) for x in (arg if isinstance(arg, list | tuple) else [arg])]
        if not any(isinstance(x, Node) for x in flat):
            if torch.Tag.data_dependent_output in target.tags or name == "nonzero":
                raise Refused(f"operator {target} reads the value of a tensor")
            return target(*args, **kwargs)
        if name == "index":
            return self.lookup(*args)
        result = fx_node.meta.get("val")
        if not isinstance(result, Tensor) or result.dim() != 0:
            raise Refused(f"operator {target} does not work on one pair at a time")
        return self.operator(name, str(target), args, kwargs, result.dtype)

    def operator(self, name: str, target: str, args: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> Node:
        """A node of the operators that compute with one pair."""
        if dtype not in INTEGERS and dtype not in FLOATS and dtype != torch.bool:
            raise Refused(f"operator {target} gives {dtype}, which is not exact enough")
        if name in _FILLS or name in ("full_like", "new_full"):
            return constant(_FILLS[name] if name in _FILLS else args[-1], dtype)
        if name in _COPIES or name in _VIEWS:
            # A view as another type is not a conversion: it reads the bits.
            if not isinstance(args[0], Node) or args[0].dtype != dtype:
                raise Refused(f"operator {target} to {dtype} is not supported")
            return self.node(args[0], target)
        if name == "_to_copy" or (name in ("any", "all") and len(args) < 2):
            return cast(self.node(args[0], target), dtype)
        if kwargs.get("alpha", 1) != 1 or set(kwargs) - {"alpha", "rounding_mode", "min", "max"}:
            raise Refused(f"operator {target} with {kwargs} is not supported")
        if name in ("clamp", "clamp_min", "clamp_max", "clip"):
            return self.clamp(name, args, kwargs, dtype)
        if name == "where" and len(args) == 3:
            condition, *branches = (self.node(arg, target) for arg in args)
            if condition.dtype != torch.bool:
                raise Refused(f"operator {target} with a condition of {condition.dtype} is not supported")
            return make("where", (condition, *(cast(branch, dtype) for branch in branches)), dtype)
        if name in ("square", "pow") and (name == "square" or args[1] == 2) and isinstance(args[0], Node):
            return make("mul", (cast(args[0], dtype),) * 2, dtype)
        if name in ("div", "true_divide", "divide"):
            mode = kwargs.get("rounding_mode")
            if mode is not None and dtype in FLOATS:
                raise Refused(f"operator {target} rounds a quotient of floating-point numbers")
            op = {None: "truediv", "floor": "floordiv", "trunc": "truncdiv"}[mode]
            return make(op, (cast(self.node(arg, target), dtype) for arg in args), dtype)
        if name == "rsub":
            args, name = (args[1], args[0]), "sub"
        return self.elementwise(name, target, args, dtype)

    def elementwise(self, name: str, target: str, args: Any, dtype: torch.dtype) -> Node:
        """Comparisons, logic and arithmetic, with operands of one type."""
        operands = [self.node(arg, target) for arg in args]
        if name in _COMPARE:
            common = _common_type(args)
            return compare(name, *(cast(operand, common) for operand in operands))
        if name in _LOGICAL:
            return make(_LOGICAL[name], (cast(operand, torch.bool) for operand in operands))
        op = (_BITWISE | _ARITHMETIC).get(name)
        if op is None or (dtype in FLOATS and op in ("floordiv", "mod", "fmod", "shl", "shr")):
            of = " of floating-point numbers" if op else ""
            raise Refused(f"operator {target}{of} is not supported")
        if op in ("floor", "ceil", "trunc") and dtype in INTEGERS:
            return operands[0]
        if dtype == torch.bool and op not in ("and", "or", "xor", "not"):
            op = _ON_BOOL[op]
        return make(op, (cast(operand, dtype) for operand in operands), dtype)

    def clamp(self, name: str, args: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> Node:
        """``min(max(x, low), high)``, as torch defines it also where ``low`` is above ``high``."""
        low, high = (*args[1:], None, None)[:2] if name != "clamp_max" else (None, args[1])
        result = cast(self.node(args[0], name), dtype)
        for op, bound in (("max", kwargs.get("min", low)), ("min", kwargs.get("max", high))):
            if bound is not None:
                result = make(op, (result, cast(self.node(bound, name), dtype)), dtype)
        return result

    def lookup(self, table: Any, indices: Any) -> Node:
        """An element of a captured tensor, or a part of one that is indexed again."""
        if isinstance(table, Node):
            if table.op != "lookup" or len(table.args) == table.value.ndim:
                raise Refused("the mask_mod indexes a value that it computed")
            indices, table = [*table.args, *indices], table.value
        elif isinstance(table, Tensor) and (table.dtype in INTEGERS or table.dtype in (torch.bool, torch.float32)):
            table = table.detach().cpu().numpy().copy()
        else:
            raise Refused("the mask_mod indexes a tensor of numbers that are not exact")
        nodes = [self.node(index, "index") for index in indices]
        if len(nodes) > table.ndim or not all(node.dtype in INTEGERS for node in nodes):
            raise Refused(f"the mask_mod indexes a tensor of shape {table.shape} in a way that is not supported")
        return make("lookup", nodes, getattr(torch, str(table.dtype)), table)

    def node(self, value: Any, where: str) -> Node:
        """A value as a node; numbers become constants of the type that torch gives them."""
        if isinstance(value, Node):
            if value.op == "lookup" and len(value.args) < value.value.ndim:
                raise Refused(f"{where} works on a whole row of a captured tensor")
            return value
        if isinstance(value, Tensor):
            if value.dim():
                raise Refused(f"{where} works on a captured tensor of shape {tuple(value.shape)} without indexing it")
            if value.dtype not in INTEGERS and value.dtype not in FLOATS and value.dtype != torch.bool:
                raise Refused(f"{where} works on a captured {value.dtype}, which is not exact enough")
            return constant(value.item(), value.dtype)
        if isinstance(value, bool):
            return constant(value)
        if isinstance(value, int):
            return constant(value, torch.int64)
        if isinstance(value, float) and math.isfinite(value):
            return constant(value, torch.float64)
        raise Refused(f"{where} works on {value!r}, which is not a finite number known when tracing")


def _common_type(args: Any) -> torch.dtype:
    """The type in which torch compares: tensors count before Python numbers."""
    operands = [torch.zeros((), dtype=arg.dtype) if isinstance(arg, Node) else arg for arg in args]
    return torch.result_type(*operands)


def cast(node: Node, dtype: torch.dtype) -> Node:
    """The value as another type."""
    if node.dtype == dtype:
        return node
    if node.op == "const" and not (node.dtype in FLOATS and dtype in INTEGERS):
        return constant(node.value, dtype)
    if dtype == torch.bool:
        return make("ne", (node, constant(0, node.dtype)))
    return make("cast", (node,), dtype)


def compare(name: str, a: Node, b: Node) -> Node:
    """A comparison as one of ``lt``, ``le``, ``eq`` and ``ne``."""
    if name in ("gt", "ge"):
        return make({"gt": "lt", "ge": "le"}[name], (b, a))
    return make(name, (a, b))


_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": "/", "shl": "<<", "shr": ">>"}
_SYMBOLS |= {"and": "&", "or": "|", "xor": "^", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_LEVEL = {"or": 0, "xor": 1, "and": 2, "lt": 3, "le": 3, "eq": 3, "ne": 3, "shl": 4, "shr": 4, "add": 5, "sub": 5}
_LEVEL |= {"mul": 6, "floordiv": 6, "mod": 6, "truediv": 6}


def render(root: Node, limit: int = 400) -> str:
    """An expression as text, cut in the middle where it is longer than ``limit``."""
    texts: dict[Node, tuple[str, int]] = {}
    for node in nodes_of(root):
        text, level = _render_one(node, [texts[arg] for arg in node.args])
        texts[node] = (_shorten(text, limit), level)
    return texts[root][0]


def _render_one(node: Node, args: list[tuple[str, int]]) -> tuple[str, int]:
    """Text of a node, and how tightly its outermost operator binds."""
    plain = [text for text, _ in args]
    if node.op in INPUTS:
        return node.op, 9
    if node.op == "const":
        return str(node.value), 9
    if node.op in ("leaf", "cast"):
        return args[0]
    if node.op == "lookup":
        return f"table[{', '.join(plain)}]", 9
    if node.op in _SYMBOLS:
        level = _LEVEL[node.op]
        # Comparisons inside of & and | are written in parentheses, as Python needs them.
        needs = [4 if level < 3 and child != level else level for _, child in args]
        needs[1] += node.op in ("sub", "floordiv", "mod", "truediv", "shl", "shr", "lt", "le", "eq", "ne")
        sides = [f"({text})" if own < need else text for (text, own), need in zip(args, needs, strict=True)]
        return f"{sides[0]} {_SYMBOLS[node.op]} {sides[1]}", level
    if node.op in ("not", "neg"):
        return f"{'~' if node.op == 'not' else '-'}({plain[0]})", 8
    return f"{node.op}({', '.join(plain)})", 9


def _shorten(text: str, limit: int) -> str:
    half = (limit - 5) // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"
