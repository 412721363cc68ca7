"""Fails loudly when a private name of torch changes that the package relies on."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.flop_counter import FlopCounterMode

import gna_flex
from gna_flex import GNA, flex, gna_mask, reference_attention
from gna_flex.flex import RoutedTuple
from gna_flex.torch_private import (
    BLOCK_TABLES,
    HOP_ARGUMENTS,
    FakeTensor,
    constant_result,
    example_input,
    flex_attention_hop,
    has_static_value,
    inductor,
    is_identity,
    keeps_assertions,
    known_int,
    likely_int,
    not_compiling,
    pre_grad_pass,
    sliced_mask_mod,
    trace_graph,
    undisturbed,
    variants_left,
)


def test_operator_is_the_one_that_torchs_front_end_calls():
    assert flex_module.flex_attention_hop is flex_attention_hop
    assert torch.ops.higher_order.flex_attention is flex_attention_hop


def test_operator_takes_the_arguments_in_our_order():
    parameters = list(inspect.signature(type(flex_attention_hop).__call__).parameters)
    assert parameters == ["self", *HOP_ARGUMENTS, "score_mod_other_buffers", "mask_mod_other_buffers"]


class Spy:
    """Stands in for the tuple of a BlockMask; the output tells how many arguments reached it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not flex_attention_hop or kwargs:
            return func(*args, **(kwargs or {}))
        query, value = args[0], args[2]
        stats = query.new_zeros(query.shape[:-1])
        return query.new_full((*query.shape[:-1], value.shape[-1]), float(len(args))), stats, stats


class SpyMask(BlockMask):
    def as_tuple(self, flatten: bool = True) -> Any:
        return Spy()


def spy_mask() -> SpyMask:
    plain = create_block_mask(flex_module.noop_mask, None, None, 16, 16, device="cpu")
    tables = {name: getattr(plain, name) for name in BLOCK_TABLES}
    return SpyMask(seq_lengths=(16, 16), **tables, BLOCK_SIZE=(128, 128), mask_mod=plain.mask_mod)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["none", "eager", "aot_eager"])
def test_operator_dispatches_to_what_stands_for_the_tuple(compiler):
    """Nothing of ours: the protocol itself, in eager mode and in Dynamo."""
    q = torch.randn(1, 1, 16, 16)
    mask = spy_mask()

    def call(q: Tensor) -> Tensor:
        return flex_module.flex_attention(q, q, q, block_mask=mask)

    out = (call if compiler == "none" else torch.compile(call, fullgraph=True, backend=compiler))(q)
    arguments = out.unique().tolist()
    assert len(arguments) == 1, "torch's flex_attention did not reach __torch_function__"
    assert len(HOP_ARGUMENTS) <= arguments[0] <= len(HOP_ARGUMENTS) + 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["none", "eager", "aot_eager"])
def test_our_handler_takes_the_call(monkeypatch, compiler):
    """The canary of the routing: if this fails, torch's own flex_attention no longer hands GNA masks over."""
    taken = []
    eager_attention, reference = flex.eager_attention, flex.reference_attention

    def spied(function: Any) -> Any:
        def spy(*args: Any, **kwargs: Any) -> Any:
            taken.append(function.__name__)
            return function(*args, **kwargs)

        return spy

    monkeypatch.setattr("gna_flex.ops.eager_attention", spied(eager_attention))
    monkeypatch.setattr(flex, "reference_attention", spied(reference))
    mask = gna_mask(GNA((4, 4), 3), device="cpu")
    q, k, v = torch.randn(3, 1, 2, 16, 16).unbind()

    def call(q: Tensor) -> Tensor:
        return flex_module.flex_attention(q, k, v, block_mask=mask)

    out = (call if compiler == "none" else torch.compile(call, fullgraph=True, backend=compiler))(q)
    assert taken, "torch's flex_attention did not reach our handler"
    torch.testing.assert_close(out, reference_attention(q, k, v, mask.mask_mod)[0])


def test_other_functions_pass_through_our_handler():
    mask = gna_mask(GNA((4, 4), 3), device="cpu")
    routed = mask.as_tuple()
    assert isinstance(routed, RoutedTuple)
    assert RoutedTuple.__torch_function__(max, (RoutedTuple,), (3, 5)) == 5
    assert list(routed) == [routed[index] for index in range(len(routed))]


def test_block_mask_constructor():
    parameters = list(inspect.signature(BlockMask.__init__).parameters)
    assert parameters[: 2 + len(BLOCK_TABLES)] == ["self", "seq_lengths", *BLOCK_TABLES]
    assert {"BLOCK_SIZE", "mask_mod"} <= set(parameters)
    for name in parameters[2 + len(BLOCK_TABLES) + 2 :]:
        assert inspect.signature(BlockMask.__init__).parameters[name].default is not inspect.Parameter.empty, name


def test_tuple_of_a_block_mask():
    plain = create_block_mask(flex_module.noop_mask, 2, 3, 100, 70, device="cpu", BLOCK_SIZE=(32, 16))
    flat = plain.as_tuple()
    assert flat[:2] == (100, 70)
    for table, name in zip(flat[2:10], BLOCK_TABLES, strict=True):
        assert table is getattr(plain, name), name
    assert flat[-3:-1] == (32, 16)
    assert flat[-1] is plain.mask_mod


def test_identity_is_what_the_front_end_passes(monkeypatch):
    seen = []

    class Passed(Exception):  # noqa: N818 (not an error)
        pass

    def hop(*args: Any) -> Any:
        seen.append(args[HOP_ARGUMENTS.index("score_mod")])
        raise Passed

    monkeypatch.setattr(flex_module, "flex_attention_hop", hop)
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    q = torch.randn(1, 1, 16, 16)
    with pytest.raises(Passed):
        flex_module.flex_attention(q, q, q)
    assert is_identity(seen[0])
    assert is_identity(None)
    assert not is_identity(lambda score, b, h, i, j: score)


def test_sliced_masks_refuse_to_run():
    """torch gives a slice a mask_mod that raises; slices of our masks have the same one."""
    mask = gna_mask(GNA((4, 4), 3), device="cpu")
    assert sliced_mask_mod is not None
    assert mask[0].mask_mod is sliced_mask_mod
    q = torch.randn(1, 1, 16, 16)
    with pytest.raises(RuntimeError, match=r"[Ss]lic"):
        gna_flex.flex_attention(q, q, q, block_mask=mask[0])
    with pytest.raises(RuntimeError, match=r"[Ss]lic"):
        sliced_mask_mod(*torch.zeros(4, dtype=torch.int64))


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        assert isinstance(torch.empty(2), FakeTensor)
    assert not isinstance(torch.empty(2), FakeTensor)


def test_trace_graph_traces_without_running():
    """Constants that a function captures stay real tensors; the arguments are never read."""
    table = torch.arange(10)
    graph = trace_graph(lambda x: table + x >= 3)(torch.tensor(2))
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.add.Tensor, torch.ops.aten.ge.Scalar]
    captured = [node for node in graph.graph.nodes if node.op == "get_attr"]
    assert torch.equal(getattr(graph, captured[0].target), table)


def test_operator_of_the_package_is_opaque_to_export():
    """The eager hand-over has a schema, so that torch's eager wrapper can trace it."""
    schema = torch.ops.gna_flex.eager_attention.default._schema
    assert [argument.name for argument in schema.arguments] == ["query", "key", "value", "mask", "scale", "maximum"]
    assert len(schema.returns) == 3
    assert not schema.is_mutable


class OtherTensor(Tensor):
    pass


def test_what_disturbs_a_call():
    """Everything that the dispatcher would hand an operator to before its kernel; no tensors: only modes are asked."""
    assert undisturbed()
    with torch.no_grad():
        assert undisturbed()
    with torch.inference_mode():
        assert undisturbed()
    seen = []

    def ask(x: Tensor) -> Tensor:
        seen.append(undisturbed())
        return x + 1

    x = torch.randn(3)
    torch.func.vmap(ask)(x)
    torch.func.grad(lambda x: ask(x).sum())(x)
    trace_graph(ask)(x)
    for mode in (FlopCounterMode(display=False), torch._subclasses.FakeTensorMode(), torch.device("cpu")):
        with mode:
            ask(x if not isinstance(mode, torch._subclasses.FakeTensorMode) else torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        ask(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still there
        torch.jit.trace(ask, x, check_trace=False)
    assert seen
    assert not any(seen)
    assert undisturbed()


def test_autocast_disturbs_a_call():
    torch.set_autocast_enabled("cuda", True)
    try:
        assert not undisturbed()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert undisturbed()


def test_plain_tensors(monkeypatch):
    """The keys of a CPU tensor in place of those of a CUDA tensor, which is all that differs."""
    x = torch.randn(3)
    assert not undisturbed(x)
    with torch.inference_mode():
        inference = torch.randn(3)
    keys = tuple(torch._C._dispatch_keys(tensor) for tensor in (x, inference))
    monkeypatch.setattr(gna_flex.torch_private, "_PLAIN_TENSORS", keys)
    assert undisturbed(x, torch.nn.Parameter(x), inference)
    for other in (torch._neg_view(x), x.as_subclass(OtherTensor), x.to_sparse(), x.to("meta")):
        assert not undisturbed(x, other)


@pytest.mark.usefixtures("fresh_compiler")
def test_what_a_backend_sees():
    """Real inputs, sizes that are fixed or symbols, and how often torch will compile the function again."""
    seen = []

    def backend(graph, inputs):
        with not_compiling():
            assert not torch.compiler.is_compiling()
        (tensor,) = (x for x in graph.graph.nodes if isinstance(x.meta.get("example_value"), Tensor) and not x.args)
        rows, columns = tensor.meta["example_value"].shape
        numbers = known_int(rows), likely_int(rows), known_int(columns), likely_int(columns)
        seen.append((example_input(tensor), *numbers, variants_left()))
        return graph

    function = torch.compile(lambda x: x + 1, backend=backend)
    limit = torch._dynamo.config.recompile_limit
    inputs = [torch.zeros(rows, 3) for rows in (4, 5, 6)]
    for x in inputs:
        function(x)
    assert [one[1:] for one in seen] == [(4, 4, 3, 3, limit - 1), (None, 5, 3, 3, limit - 2)]
    assert seen[1][0] is inputs[1]
    assert variants_left() == 0
    assert known_int(7) == likely_int(7) == 7
    assert known_int(None) is likely_int(None) is None


@pytest.mark.usefixtures("fresh_compiler")
def test_sizes_that_graphs_know():
    """Asked inside of a compiled function; nothing is assumed about a size by asking."""
    seen = []

    def function(x):
        return x + (1 if has_static_value(x.shape[0]) else 2)

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    assert [compiled(torch.zeros(rows, 3)).max().item() for rows in (4, 5, 6)] == [1, 2, 2]
    assert len(seen) == 2
    assert has_static_value(7)


def test_inductor_takes_modes_and_options():
    assert inductor("max-autotune", None).config["max_autotune"] is True
    assert inductor(None, {"max_autotune": True}).config == {"max_autotune": True}
    assert inductor(None, None).config == {}


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_says_whether_it_keeps_assertions():
    folder = Path(torch._inductor.__file__).parent
    assert '"assert_indirect_indexing": config.assert_indirect_indexing' in (folder / "codegen/triton.py").read_text()
    assert keeps_assertions() is (torch.version.hip is None)
    with torch._inductor.config.patch(assert_indirect_indexing=False):
        assert not keeps_assertions()


def test_passes_before_gradients():
    """Ours comes after one that was there, sees the graph that Dynamo made, and leaves nothing behind."""
    from torch._inductor import config

    seen = []
    with config.patch(pre_grad_custom_pass=lambda graph: seen.append("before")):
        with pre_grad_pass(lambda module: seen.append(example_input(next(iter(module.graph.nodes))))):
            x = torch.zeros(3)
            torch.compile(lambda x: x + 1)(x)
        assert len(seen) == 2
        assert seen[0] == "before"
        assert seen[1] is x
        torch.compile(lambda x: x + 2)(x)
        assert seen[2:] == ["before"]


def test_marks_of_constant_results_are_those_of_torch():
    def of_torch():
        pass

    def of_ours():
        pass

    torch.compiler.assume_constant_result(of_torch)
    assert vars(constant_result(of_ours)) == vars(of_torch) != {}


@pytest.mark.parametrize("name", gna_flex.torch_private.__all__)
def test_every_private_name_is_there(name):
    assert getattr(gna_flex.torch_private, name) is not None
