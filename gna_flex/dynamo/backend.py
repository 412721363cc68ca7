"""The backend ``"gna_flex"`` of torch.compile, and the same for graphs that go to Inductor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule

import gna_flex.attention  # noqa: F401 (registers the operators, where torch imports this module alone)
from gna_flex.dynamo.rewrite import rewrite
from gna_flex.torch_private import example_input, inductor, pre_grad_pass


def gna_flex_backend(
    graph: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    inner: str | Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A backend of torch.compile: FlexAttention calls whose mask is a GNA take our routes, the rest goes to Inductor.

    Installed under the name ``"gna_flex"``: ``torch.compile(model, backend="gna_flex")``. Masks may be anybody's: see
    :func:`gna_flex.symbolic.recognise.recognise`. Left alone are calls with a ``score_mod``, with kernel options, with
    a mask that captures tensors or is built inside of the compiled function, with a dynamic number of tokens, and those
    that nothing of ours is better for. :func:`gna_flex.compile_report` lists all calls, with reasons.

    Block lists of rewritten calls are compared at every run with those recognised when compiling, without waiting for
    the device; if they differ, that is an error. On a GPU that is a device-side assertion, whose text on the standard
    error stream says so, and PyTorch's ``RuntimeError`` at a later operation.

    Args:
        graph: from torch.
        example_inputs: from torch.
        mode: as in ``torch.compile``, for Inductor.
        options: likewise.
        inner: another backend for the rewritten graph, by name or as a function.

    >>> import functools
    >>> compiled = torch.compile(torch.sin, backend=functools.partial(gna_flex_backend, inner="eager"))
    >>> compiled(torch.zeros(2))
    tensor([0., 0.])
    """
    rewrite(graph)
    if inner is None:
        return inductor(mode, options)(graph, example_inputs)  # type: ignore[no-any-return]
    function = torch._dynamo.lookup_backend(inner) if isinstance(inner, str) else inner
    given = {name: value for name, value in (("mode", mode), ("options", options)) if value is not None}
    return function(graph, example_inputs, **given)


@contextlib.contextmanager
def recognise_masks() -> Iterator[None]:
    """Inside of a ``with`` block, torch.compile with its default backend does what the backend ``"gna_flex"`` does.

    What counts is when torch compiles, which is at the first call of a compiled function. Functions that were compiled
    before, or are compiled later, are not affected. A ``pre_grad_custom_pass`` of Inductor that is set already runs
    first.

    >>> with recognise_masks():
    ...     pass
    """
    with pre_grad_pass(_rewrite_outermost):
        yield


def _rewrite_outermost(graph: GraphModule) -> None:
    """Inductor calls passes for inner graphs as well, but their calls are seen from the outermost one."""
    if any(example_input(node) is not None for node in graph.graph.nodes if node.op == "placeholder"):
        rewrite(graph)
