"""Real diffusers models, tiny and with random weights: neighborhoods against diffusers' own code with a dense mask."""

import contextlib
import copy
import importlib
import pickle
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from helpers import dense_mask
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from gna_flex import GNA
from gna_flex.integrations.layers import Neighborhood, neighborhoods

pytest.importorskip("diffusers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import (
        CosmosTransformer3DModel,
        FluxTransformer2DModel,
        HunyuanVideoTransformer3DModel,
        SD3Transformer2DModel,
        WanTransformer3DModel,
    )

from gna_flex.integrations import diffusers as gna_diffusers
from gna_flex.integrations.diffusers import apply, remove, report, reset

TEXT = 5


class Case(NamedTuple):
    """A model, its inputs, and the GNA of its self-attention layers for the window of the tests."""

    build: Callable[..., nn.Module]
    inputs: Callable[..., dict[str, Any]]
    gna: GNA
    module: str
    layers: int


def flux(**options: Any) -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), **options,
    )  # fmt: skip


def flux_inputs(batch: int = 2, layout: tuple[int, ...] = (6, 8), step: float = 0.5) -> dict[str, Any]:
    height, width = layout
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return {
        "hidden_states": torch.randn(batch, height * width, 4),
        "encoder_hidden_states": torch.randn(batch, TEXT, 8),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": torch.full((batch,), step),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def hunyuan(**options: Any) -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False, text_embed_dim=8,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), **options,
    )  # fmt: skip


def hunyuan_inputs(
    batch: int = 2, layout: tuple[int, ...] = (3, 4, 6), step: float = 500, lengths: tuple[int, ...] | None = None
) -> dict[str, Any]:
    counts = torch.tensor(lengths or (TEXT,) * batch)
    return {
        "hidden_states": torch.randn(batch, 4, layout[0], 2 * layout[1], 2 * layout[2]),
        "timestep": torch.full((batch,), int(step)),
        "encoder_hidden_states": torch.randn(batch, TEXT, 8),
        "encoder_attention_mask": (torch.arange(TEXT) < counts[:, None]).long(),
        "pooled_projections": torch.randn(batch, 8),
    }


def wan(**options: Any) -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
        ffn_dim=16, num_layers=3, **options,
    )  # fmt: skip


def wan_inputs(batch: int = 2, layout: tuple[int, ...] = (3, 4, 6), step: float = 500) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, layout[0], 2 * layout[1], 2 * layout[2]),
        "timestep": torch.full((batch,), step),
        "encoder_hidden_states": torch.randn(batch, TEXT, 8),
    }


def cosmos(**options: Any) -> nn.Module:
    return CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=3, text_embed_dim=8,
        adaln_lora_dim=4, max_size=(8, 32, 32), concat_padding_mask=False, **options,
    )  # fmt: skip


CASES = {
    "flux": Case(flux, flux_inputs, GNA((6, 8), (3, 4), (1, 2), text_first=TEXT), "flux", 4),
    "hunyuan": Case(hunyuan, hunyuan_inputs, GNA((3, 4, 6), (2, 3, 4), (1, 3, 2), text_last=TEXT), "hunyuan_video", 4),
    "hunyuan-image": Case(
        lambda: hunyuan(image_condition_type="token_replace"),
        hunyuan_inputs,
        GNA((3, 4, 6), (2, 3, 4), (1, 3, 2), text_last=TEXT),
        "hunyuan_video",
        4,
    ),
    "wan": Case(wan, wan_inputs, GNA((3, 4, 6), (2, 2, 3), (2, 1, 1), (1, 2, 1)), "wan", 3),
    "cosmos": Case(cosmos, wan_inputs, GNA((3, 4, 6), (3, 2, 4), (1, 2, 2)), "cosmos", 3),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@contextlib.contextmanager
def masked(case: Case, masks: list[Any]) -> Iterator[None]:
    """diffusers' own processors with these masks ``[S, S]`` (``None``: as they are) of its self-attention layers."""
    module = importlib.import_module(f"diffusers.models.transformers.transformer_{case.module}")
    original, left = module.dispatch_attention_fn, list(masks)

    def dispatch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        if key.shape[1] == case.gna.tokens:
            mask = left.pop(0)
            if mask is not None:
                mask = torch.from_numpy(mask.copy())
                attn_mask = mask if attn_mask is None else attn_mask & mask
        return original(query, key, value, attn_mask=attn_mask, **options)

    module.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        module.dispatch_attention_fn = original
    assert not left


def parameters(gna: GNA) -> dict[str, Any]:
    return {"window": gna.window, "stride": gna.stride, "dilation": gna.dilation}


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def assert_close(out: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def processors(model: nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


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


BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


@ALL
@BACKENDS
@torch.no_grad()
def test_compiled_models(case, backend, fresh_compiler):
    """One graph, also with padded text and dense steps."""
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


@BACKENDS
@torch.no_grad()
def test_compiled_blocks(backend, fresh_compiler):
    """Blocks with the same neighborhood share compiled code; lengths of text are inputs of it."""
    model = hunyuan().eval()
    inputs = [hunyuan_inputs(lengths=lengths) for lengths in ((5, 2), (3, 3), (1, 4))]
    apply(model, window=2, layers=[0, 1, 2])
    expected = [run(model, each) for each in inputs]
    counter = CompileCounterWithBackend(backend)
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


@torch.no_grad()
def test_report():
    model = hunyuan()
    apply(model, layers={0: {"window": (2, 3, 4)}, 1: {"window": 2}, 3: {"window": 2}})
    with pytest.raises(ValueError, match=r"report\(model, layout=...\)"):
        report(model)
    assert [row.gna.text_last for row in report(model, (4, 8, 8)).rows] == [0, 0]
    run(model, hunyuan_inputs())
    result = report(model)
    assert [row.layers for row in result.rows] == [(0,), (1, 3)]
    assert result.dense == (2,)
    gna = GNA((3, 4, 6), 2, text_last=TEXT)
    assert result.rows[1].gna == gna
    assert result.rows[1].sparsity == pytest.approx(1 - dense_mask(gna).mean())
    assert report(model, (33, 45, 80), device="b200").rows[0].speedup > 2
    text = str(result)
    assert "1, 3" in text
    assert "window 2x2x2" in text
    assert result.to_json()["rows"][0]["gna"]["window"] == (2, 3, 4)


class Other(nn.Module):
    """Of no supported class."""


@pytest.mark.parametrize("function", [lambda m: apply(m, 2), remove, reset, report])
def test_unsupported_models(function):
    with pytest.raises(TypeError, match=r"Other is not supported; supported are Flux\w+, Hunyuan\w+, Wan\w+, Cosmos"):
        function(Other())
    with pytest.raises(TypeError, match=r"pipe.transformer"):
        function(types.SimpleNamespace(transformer=None))
    assert SD3Transformer2DModel.__name__ not in gna_diffusers.FAMILIES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "window is missing for layer 0"),
        (
            {"window": (2, 2)},
            r"window=\(2, 2\) of layer 0 has 2 values.*WanTransformer3DModel are \(frames, height, wid",
        ),
        ({"window": 2, "layers": [0, 3]}, "there is no layer 3, layers are 0 to 2"),
        ({"window": 2, "layers": slice(7, None)}, "chooses none of the 3 layers"),
        ({"window": 2, "layers": {1: {"windw": 3}}}, r"layer 1 has \['windw'\]: parameters of a layer are window, str"),
        ({"window": 2, "dense_steps": -1}, "dense_steps=-1 must be at least 0"),
        ({"window": 2, "forwards_per_step": 0}, "forwards_per_step=0 must be at least 1"),
    ],
)
def test_wrong_arguments(options, message):
    model = wan()
    with pytest.raises(ValueError, match=message):
        apply(model, **options)
    assert not any(isinstance(processor, gna_diffusers.Processor) for processor in processors(model))


def test_wrong_kinds():
    with pytest.raises(TypeError, match="layers takes integers"):
        apply(wan(), 2, layers="first")
    with pytest.raises(TypeError, match="dense_steps takes integers"):
        apply(wan(), 2, dense_steps=0.5)


@torch.no_grad()
def test_windows_larger_than_the_layout():
    model, inputs = wan().eval(), wan_inputs()
    apply(model, window=(2, 5, 2), layers=[1, 2])
    with pytest.raises(ValueError, match=r"window=5 in dimension 1 of layout \(3, 4, 6\).*\(layers 1-2\)"):
        run(model, inputs)
    apply(model, window=(2, 5, 2), layers=[1, 2], clamp=True)
    out = run(model, inputs)
    apply(model, window=(2, 4, 2), layers=[1, 2])
    assert torch.equal(run(model, inputs), out)


@torch.no_grad()
def test_masks_of_text_of_a_wrong_shape():
    model, inputs = hunyuan(), hunyuan_inputs()
    apply(model, window=2)
    with pytest.raises(ValueError, match=r"encoder_attention_mask has shape \(2, 4\), but must be .* \(2, 5\)"):
        run(model, inputs | {"encoder_attention_mask": torch.ones(2, 4)})


@torch.no_grad()
def test_images_that_are_no_grid():
    model, inputs = flux(), flux_inputs()
    apply(model, window=2)
    ids = inputs["img_ids"]
    two = torch.cat([ids[:24], ids[:24] + torch.tensor([1.0, 0, 0])])
    for wrong in (two, ids.flip(0), ids[:40], torch.cat([ids[:24], ids[:24]]), torch.zeros(48, 3)[:, [0, 1, 2]] + 1):
        with pytest.raises(ValueError, match="img_ids"):
            run(model, inputs | {"img_ids": wrong})
    out = run(model, inputs)
    assert torch.equal(run(model, inputs | {"img_ids": ids[None]}), out)


def test_positions_that_the_type_rounds():
    model = flux()
    inputs = flux_inputs(1, (2, 300))
    tokens = gna_diffusers.flux_tokens(model, inputs | {"img_ids": inputs["img_ids"].bfloat16()})
    assert tokens.layout == (2, 300)


def test_foreign_processors_are_refused():
    model = wan()

    class Mine:
        def __call__(self, *args: Any) -> Any: ...

    model.blocks[1].attn1.set_processor(Mine())
    with pytest.raises(ValueError, match="layer 1 has the processor Mine, in whose place only WanAttnProcessor"):
        apply(model, 2)
    model = wan()
    apply(model, 2)
    mine = Mine()
    model.blocks[1].attn1.set_processor(mine)
    remove(model)
    assert model.blocks[1].attn1.processor is mine


def test_parallel_models_are_refused():
    model = wan()
    model._parallel_config = object()
    with pytest.raises(ValueError, match="runs in parallel"):
        apply(model, 2)


def test_nothing_applied():
    with pytest.raises(ValueError, match="call apply first"):
        report(wan())
    with pytest.raises(ValueError, match="call apply first"):
        reset(wan())


def test_numbers_of_layers():
    near = Neighborhood(2, 1, 1)
    assert neighborhoods(4, slice(1, None, 2), 2, 1, 1) == [None, near, None, near]
    assert neighborhoods(3, iter([-1]), 2, 1, 1) == [None, None, near]
    assert neighborhoods(2, {0: None, 1: {"stride": [2, 1]}}, 2, 1, 1) == [None, Neighborhood(2, (2, 1), 1)]
