"""Real diffusers models, tiny and with random weights: neighborhoods against diffusers' own code with a dense mask."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_models import (
    ALL,
    CASES,
    TEXT,
    assert_close,
    flux,
    flux_inputs,
    hunyuan,
    hunyuan_inputs,
    masked,
    parameters,
    processors,
    run,
    wan,
    wan_inputs,
)
from functorch.compile import make_boxed_func
from helpers import dense_mask
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from gna_flex import GNA, attention, flex
from gna_flex.integrations import diffusers as gna_diffusers
from gna_flex.integrations.diffusers import apply, remove, reset
from gna_flex.routing import Route


@ALL
@torch.no_grad()
def test_a_full_window_is_the_dense_model(case):
    model, inputs = case.build().eval(), case.inputs()
    dense = run(model, inputs)
    apply(model, window=-1)
    out = run(model, inputs)
    assert_close(out, dense)
    assert not torch.equal(out, torch.zeros_like(out))


@ALL
@torch.no_grad()
def test_a_window_is_the_model_with_a_dense_mask(case):
    model, inputs = case.build().eval(), case.inputs()
    dense = run(model, inputs)
    with masked(case, [dense_mask(case.gna)] * case.layers):
        expected = run(model, inputs)
    assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()
    apply(model, **parameters(case.gna))
    assert_close(run(model, inputs), expected)


@ALL
@torch.no_grad()
def test_layers_differ(case):
    model, inputs = case.build().eval(), case.inputs()
    other = GNA(case.gna.layout, 2, text_first=case.gna.text_first, text_last=case.gna.text_last)
    apply(model, layers={0: parameters(case.gna), -1: {"window": 2}})
    masks = [dense_mask(case.gna), *[None] * (case.layers - 2), dense_mask(other)]
    out = run(model, inputs)
    remove(model)
    with masked(case, masks):
        assert_close(out, run(model, inputs))
    apply(model, window=2, layers=lambda layer: parameters(case.gna) if layer == 0 else None if layer == 1 else {})
    out = run(model, inputs)
    remove(model)
    with masked(case, [dense_mask(case.gna), None, *[dense_mask(other)] * (case.layers - 2)]):
        assert_close(out, run(model, inputs))


@ALL
@torch.no_grad()
def test_remove_restores_everything(case):
    model, inputs = case.build().eval(), case.inputs()
    before, attributes = processors(model), set(vars(model))
    dense = run(model, inputs)
    apply(model, window=2)
    run(model, inputs)
    apply(model, window=3, layers=[1])
    run(model, inputs)
    remove(model)
    assert all(a is b for a, b in zip(processors(model), before, strict=True))
    assert set(vars(model)) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(run(model, inputs), dense)
    remove(model)


@ALL
@torch.no_grad()
def test_applying_again_replaces(case):
    model, inputs = case.build().eval(), case.inputs()
    apply(model, **parameters(case.gna))
    once = run(model, inputs)
    apply(model, window=2, layers=[0])
    assert (run(model, inputs) - once).abs().max() > 0
    apply(model, **parameters(case.gna))
    assert torch.equal(run(model, inputs), once)


@torch.no_grad()
def test_only_self_attention_is_replaced():
    model = wan()
    apply(model, window=2)
    ours = [isinstance(processor, gna_diffusers.Processor) for processor in processors(model)]
    assert ours == [True, False] * 3


@pytest.mark.parametrize("lengths", [(5, 2), (1, 3), (4, 1)])
@torch.no_grad()
def test_padding_of_the_text_stays_hidden(lengths):
    case = CASES["hunyuan"]
    model, inputs = hunyuan().eval(), hunyuan_inputs(lengths=lengths)
    dense = run(model, inputs)
    apply(model, window=-1)
    assert_close(run(model, inputs), dense)
    remove(model)
    with masked(case, [dense_mask(case.gna)] * case.layers):
        expected = run(model, inputs)
    apply(model, **parameters(case.gna))
    assert_close(run(model, inputs), expected)
    longer = inputs | {"encoder_attention_mask": torch.ones(2, TEXT)}
    assert (run(model, longer) - expected).abs().max() > 1e-3 * expected.abs().max()


@ALL
@torch.no_grad()
def test_layouts_change_between_forwards(case):
    """Also for the same number of tokens."""
    model = case.build().eval()
    apply(model, window=2)
    for layout in (case.gna.layout, case.gna.layout[::-1], case.gna.layout):
        gna = GNA(layout, 2, text_first=case.gna.text_first, text_last=case.gna.text_last)
        inputs = case.inputs(layout=layout)
        out = run(model, inputs)
        remove(model)
        with masked(case, [dense_mask(gna)] * case.layers):
            assert_close(out, run(model, inputs))
        apply(model, window=2)


@torch.no_grad()
def test_masks_are_kept_by_layout():
    model = wan()
    apply(model, window=2)
    kept = model._gna_flex.plan._masks
    for layout in ((3, 4, 6), (6, 4, 3), (3, 4, 6)):
        run(model, wan_inputs(layout=layout))
    assert len(kept) == 2


@pytest.mark.parametrize("name", ["flux", "wan"])
@torch.no_grad()
def test_fused_projections(name):
    case = CASES[name]
    model, inputs = case.build().eval(), case.inputs()
    apply(model, **parameters(case.gna))
    out = run(model, inputs)
    model.fuse_qkv_projections()
    assert_close(run(model, inputs), out)


@torch.no_grad()
def test_half_precision():
    case = CASES["hunyuan"]
    model, inputs = hunyuan().eval().bfloat16(), hunyuan_inputs()
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    with masked(case, [dense_mask(case.gna)] * case.layers):
        expected = run(model, inputs)
    apply(model, **parameters(case.gna))
    out = run(model, inputs)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected.float(), 0.03)


def gradients(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    run(model, inputs).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@ALL
def test_gradients(case):
    model, inputs = case.build(), case.inputs()
    with masked(case, [dense_mask(case.gna)] * case.layers):
        expected = gradients(model, inputs)
    apply(model, **parameters(case.gna))
    ours = gradients(model, inputs)
    top = max(x.abs().max() for x in expected)
    assert len(ours) == len(expected)
    assert all((a - b).abs().max() <= 1e-5 * top for a, b in zip(ours, expected, strict=True))


def test_gradient_checkpointing_takes_the_masks_of_its_own_forward():
    """Recomputation happens after another forward with other lengths of text, and another layout."""
    model = hunyuan()
    apply(model, window=2)
    first, second = hunyuan_inputs(lengths=(5, 2)), hunyuan_inputs(layout=(6, 4, 3), lengths=(1, 4))

    def both() -> list[Tensor]:
        model.zero_grad()
        losses = [run(model, inputs).square().mean() for inputs in (first, second)]
        sum(losses).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = both()
    model.enable_gradient_checkpointing()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(both(), expected, strict=True))


def dense_forwards(model: nn.Module, steps: list[float], build: Callable[..., Any] = wan_inputs) -> list[bool]:
    """Which of these forwards are dense."""
    found = []
    for step in steps:
        inputs = build(step=step)
        out = run(model, inputs)
        twin = copy.deepcopy(model)
        remove(twin)
        found.append(torch.equal(out, run(twin, inputs)))
    return found


@torch.no_grad()
def test_dense_steps():
    model = wan().eval()
    apply(model, window=2, dense_steps=2)
    # Two forwards per step (guidance), two generations; the second begins with a larger timestep.
    steps = [999.0, 999.0, 900.0, 900.0, 500.0, 500.0, 100.0, 980.0, 400.0, 300.0]
    yes, no = True, False
    assert dense_forwards(model, steps) == [yes, yes, yes, yes, no, no, no, yes, yes, no]
    assert dense_forwards(model, [200.0]) == [no]
    reset(model)
    assert dense_forwards(model, [100.0, 50.0, 20.0]) == [yes, yes, no]
    apply(model, window=2, dense_steps=1, forwards_per_step=2)
    assert dense_forwards(model, [900.0, 900.0, 900.0, 100.0, 950.0]) == [yes, yes, no, no, yes]
    apply(model, window=2)
    assert dense_forwards(model, [900.0, 950.0]) == [no, no]


@torch.no_grad()
def test_dense_steps_of_other_models():
    model = flux().eval()
    apply(model, window=2, dense_steps=1)
    assert dense_forwards(model, [1.0, 0.9, 0.5, 1.0], flux_inputs) == [True, False, False, True]
    model = hunyuan().eval()
    apply(model, window=2, dense_steps=1)
    assert dense_forwards(model, [1000, 900], hunyuan_inputs) == [True, False]


@torch.no_grad()
def test_timesteps_per_token():
    """Clean frames of image to video have the timestep 0."""
    model, inputs = wan().eval(), wan_inputs()
    apply(model, window=-1, dense_steps=1)
    for step in (900.0, 500.0):
        steps = torch.full((2, 72), step)
        steps[:, :24] = 0
        run(model, inputs | {"timestep": steps})
    assert model._gna_flex.steps.step == 1


@torch.no_grad()
def test_copies_stand_alone():
    case = CASES["wan"]
    model, inputs = wan().eval(), wan_inputs()
    apply(model, **parameters(case.gna))
    out = run(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        remove(model)
        assert torch.equal(run(twin, inputs), out)
        assert (run(model, inputs) - out).abs().max() > 0
        remove(twin)
        assert not torch.equal(run(twin, inputs), out)
        apply(model, **parameters(case.gna))


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "eager") for case in CASES.values()), (CASES["flux"], "aot_eager")],
    ids=[*CASES, "flux-aot"],
)
@torch.no_grad()
def test_compiled_models(case, backend, fresh_compiler):
    """One graph, also with padded text and dense steps; AOTAutograd takes those of all models in a test of copies."""
    model, inputs = case.build().eval(), case.inputs()
    apply(model, **parameters(case.gna))
    expected = run(model, inputs)
    remove(model)
    dense = run(model, inputs)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    apply(compiled, **parameters(case.gna), dense_steps=1)
    assert_close(run(compiled, inputs), dense)
    later = inputs | {"timestep": inputs["timestep"] / 2 if case.gna.ndim == 2 else inputs["timestep"] - 1}
    remove(model)
    apply(model, **parameters(case.gna))
    expected_later = run(model, later)
    apply(compiled, **parameters(case.gna))
    assert_close(run(compiled, inputs), expected)
    frames = counter.frame_count
    assert_close(run(compiled, later), expected_later)
    assert counter.frame_count == frames


@torch.no_grad()
def test_compiled_blocks(fresh_compiler):
    """Blocks with the same neighborhood share compiled code; lengths of text are inputs of it."""
    model = hunyuan().eval()
    inputs = [hunyuan_inputs(lengths=lengths) for lengths in ((5, 2), (3, 3), (1, 4))]
    apply(model, window=2, layers=[0, 1, 2])
    expected = [run(model, each) for each in inputs]
    counter = CompileCounterWithBackend("aot_eager")
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend=counter, fullgraph=True)
    outputs = [run(model, each) for each in inputs]
    for out, wanted in zip(outputs, expected, strict=True):
        assert_close(out, wanted)
    assert counter.frame_count == 3
    inputs = hunyuan_inputs(layout=(6, 4, 3))
    out = run(model, inputs)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block._compiled_call_impl = None
    assert_close(out, run(model, inputs))


@torch.no_grad()
def test_models_compiled_in_place(fresh_compiler):
    """The order of compiling and applying does not matter."""
    model, inputs = wan().eval(), wan_inputs()
    apply(model, window=2)
    expected = run(model, inputs)
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter, fullgraph=True)
    assert_close(run(model, inputs), expected)
    assert counter.frame_count == 1
    apply(model, window=2, layers=[0])
    out = run(model, inputs)
    model._compiled_call_impl = None
    assert_close(out, run(model, inputs))


@torch.no_grad()
def test_a_compiled_caller_breaks_the_graph(fresh_compiler):
    model, inputs = wan().eval(), wan_inputs()
    apply(model, window=2)
    expected = run(model, inputs)
    assert_close(torch.compile(lambda: run(model, inputs) * 2, backend="eager")(), expected * 2)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model or its blocks"):
        torch.compile(lambda: run(model, inputs) * 2, backend="eager", fullgraph=True)()


def test_compiled_blocks_train(fresh_compiler):
    model, inputs = wan(), wan_inputs()
    apply(model, window=2)
    expected = gradients(model, inputs)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(model, inputs), expected, strict=True))


@torch.no_grad()
def test_no_forward_takes_the_masks_of_another():
    model, inputs = wan().eval(), wan_inputs()
    apply(model, window=2)
    run(model, inputs)
    with pytest.raises(RuntimeError, match="call the model itself"):
        model.forward(**inputs)


@ALL
@torch.no_grad()
def test_no_copies_around_the_kernel(case, monkeypatch, fresh_compiler):
    """In compiled blocks queries, keys and values reach it as ``[B, S, H, D]``, and so does its output go on."""
    for module in (flex, attention):
        monkeypatch.setattr(module, "route_of", lambda *arguments, **options: Route("hopper", "for a test", ()))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    model, inputs = case.build().eval(), case.inputs()
    apply(model, **parameters(case.gna))
    expected = run(model, inputs)
    model.compile(backend=aot_autograd(fw_compiler=keep, inference_compiler=keep), fullgraph=True)
    assert_close(run(model, inputs), expected)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.gna_flex.attention.default]
    assert len(calls) == case.layers
    for call in calls:
        assert all(strides_of(x)[1:] == by_token(x) for x in call.args[:3])
        (out,) = [user for user in call.users if user.args[1] == 0]
        (transposed,) = out.users
        assert [strides_of(out)[1:], transposed.target] == [by_token(out), torch.ops.aten.transpose.int]
        assert {user.target for user in transposed.users} == {torch.ops.aten.view.default}


def strides_of(node: torch.fx.Node) -> tuple[int, ...]:
    return node.meta["val"].stride()


def by_token(node: torch.fx.Node) -> tuple[int, ...]:
    """Strides of heads, tokens and channels where tokens come first in memory."""
    _, heads, _, head_dim = node.meta["val"].shape
    return head_dim, heads * head_dim, 1
