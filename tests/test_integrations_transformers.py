"""Real transformers models of images, tiny and with random weights: neighborhoods against dense masks."""

import copy
from typing import Any

import pytest
import torch
from helpers import dense_mask
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers_models import ALL, COMMON, MODELS, assert_close, mistral

from gna_flex import GNA

pytest.importorskip("transformers", minversion="5.23")
from transformers import AttentionInterface, ViTConfig, ViTForImageClassification, ViTModel

from gna_flex.integrations import transformers as gna_transformers
from gna_flex.integrations.transformers import configure, register, remove, report

PARAMETERS: dict[str, Any] = {"window": (3, 4), "stride": (1, 2)}


def mask_for(first: int, layout: tuple[int, int] = (6, 6), **parameters: Any) -> Tensor:
    return torch.from_numpy(dense_mask(GNA(layout, text_first=first, **(parameters or PARAMETERS))).copy())


def with_dense_masks(model: nn.Module, masks: list[Any], *args: Any, **kwargs: Any) -> Tensor:
    """The last hidden states with these masks (``None``: none) of the layers, by torch's own attention."""
    left = list(masks)

    def dense(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: Any = None, **options: Any
    ) -> Any:
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=left.pop(0), scale=scaling)
        return out.transpose(1, 2), None

    before = model.config._attn_implementation
    AttentionInterface.register("test_dense", dense)
    model.set_attn_implementation("test_dense")
    try:
        return model(*args, **kwargs).last_hidden_state
    finally:
        model.set_attn_implementation(before)
        assert not left


@ALL
@torch.no_grad()
def test_a_full_window_is_the_dense_model(build, first):
    model, image = build().eval(), torch.randn(2, 3, 48, 48)
    dense = model(image).last_hidden_state
    configure(model, window=-1)
    assert_close(model(image).last_hidden_state, dense)


@ALL
@torch.no_grad()
def test_a_window_is_the_model_with_a_dense_mask(build, first):
    model, image = build().eval(), torch.randn(2, 3, 48, 48)
    dense = model(image).last_hidden_state
    expected = with_dense_masks(model, [mask_for(first)] * 3, image)
    assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()
    configure(model, **PARAMETERS)
    assert_close(model(pixel_values=image).last_hidden_state, expected)


@ALL
@torch.no_grad()
def test_layers_differ(build, first):
    model, image = build().eval(), torch.randn(2, 3, 48, 48)
    expected = with_dense_masks(model, [mask_for(first), None, mask_for(first, window=2)], image)
    configure(model, window=2, layers={0: PARAMETERS, 2: {}})
    assert_close(model(image).last_hidden_state, expected)


def test_attention_called_without_masks_is_an_error():
    """Other versions may call attention from inside of a layer, and not pass masks on: never dense instead."""
    model = ViTModel(ViTConfig(intermediate_size=32, **COMMON))
    configure(model, window=3)
    part = model.layers[1].attention.q_proj
    q = torch.randn(1, 2, 37, 16)
    with pytest.raises(RuntimeError, match="did not get masks"):
        gna_transformers.attention(part, q, q, q, None)


@ALL
@torch.no_grad()
def test_remove_restores_everything(build, first):
    model, image = build().eval(), torch.randn(2, 3, 48, 48)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    implementation, dense = model.config._attn_implementation, model(image).last_hidden_state
    configure(model, window=3)
    once = model(image).last_hidden_state
    configure(model, window=2, layers=[1])
    assert not torch.equal(model(image).last_hidden_state, once)
    remove(model)
    assert model.config._attn_implementation == implementation
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(image).last_hidden_state, dense)
    remove(model)


@pytest.mark.parametrize("name", ["dinov2", "registers", "dinov3"])
@torch.no_grad()
def test_layouts_change(name):
    build, first = MODELS[name]
    model = build().eval()
    for size in ((4, 9), (9, 4), (6, 6)):
        image = torch.randn(1, 3, size[0] * 8 + 3 * (name == "dinov2"), size[1] * 8)
        expected = with_dense_masks(model, [mask_for(first, size)] * 3, image)
        configure(model, **PARAMETERS)
        assert_close(model(image).last_hidden_state, expected)


@ALL
def test_gradients(build, first):
    model, image = build(), torch.randn(2, 3, 48, 48)

    def gradients(out: Tensor) -> list[Tensor]:
        model.zero_grad()
        out.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    if hasattr(model.config, "pos_embed_rescale"):  # DINOv3 shakes positions in training
        model.config.pos_embed_rescale = None
    expected = gradients(with_dense_masks(model, [mask_for(first)] * 3, image))
    configure(model, **PARAMETERS)
    ours = gradients(model(image).last_hidden_state)
    top = max(x.abs().max() for x in expected)
    assert all((a - b).abs().max() <= 1e-4 * top for a, b in zip(ours, expected, strict=True))
    model.gradient_checkpointing_enable()
    again = gradients(model(image).last_hidden_state)
    assert all((a - b).abs().max() <= 1e-5 * top for a, b in zip(again, ours, strict=True))


@pytest.mark.parametrize(
    ("build", "backend"),
    [*((build, "eager") for build, _ in MODELS.values()), (MODELS["vit"][0], "aot_eager")],
    ids=[*MODELS, "vit-aot"],
)
@torch.no_grad()
def test_compiled(build, backend, fresh_compiler):
    model, image = build().eval(), torch.randn(2, 3, 48, 48)
    configure(model, **PARAMETERS)
    expected = model(image).last_hidden_state
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_close(compiled(image).last_hidden_state, expected)
    assert counter.frame_count == 1
    configure(compiled, window=2)
    out = compiled(image).last_hidden_state
    assert_close(out, model(image).last_hidden_state)
    assert not torch.equal(out, expected)


@torch.no_grad()
def test_models_with_one_inside():
    model = ViTForImageClassification(ViTConfig(intermediate_size=32, num_labels=3, **COMMON)).eval()
    image = torch.randn(2, 3, 48, 48)
    dense = model(image).logits
    configure(model, window=-1)
    assert_close(model(image).logits, dense)
    configure(model, window=2)
    logits = model(image).logits
    assert not torch.allclose(logits, dense)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(image).logits, logits)
    with pytest.raises(RuntimeError, match="call the model given to configure"):
        model.vit(image)
    twin = copy.deepcopy(model)
    remove(model)
    assert torch.equal(model(image).logits, dense)
    assert torch.equal(twin(image).logits, logits)


@torch.no_grad()
def test_report():
    model = MODELS["dinov3"][0]()
    configure(model, window=2, layers=[0, 2])
    with pytest.raises(ValueError, match="layout is not known before the first forward"):
        report(model)
    model(torch.randn(1, 3, 48, 48))
    result = report(model)
    assert result.rows[0].gna == GNA((6, 6), 2, text_first=3)
    assert (result.rows[0].layers, result.dense) == ((0, 2), (1,))


def test_errors():
    model, image = MODELS["vit"][0](), torch.randn(1, 3, 48, 48)
    with pytest.raises(ValueError, match="configure first"):
        report(model)
    with pytest.raises(ValueError, match=r"window=\(2, 2, 2\) has 3 values, but layouts are \(height, width\)"):
        configure(model, window=(2, 2, 2))
    with pytest.raises(ValueError, match="there is no layer 3"):
        configure(model, window=2, layers=[3])
    with pytest.raises(TypeError, match="MistralForCausalLM is not supported; supported are ViTModel, Dinov2Model"):
        configure(mistral(), window=2)
    with pytest.raises(TypeError, match="dict is not supported"):
        configure({}, window=2)
    configure(model, window=7)
    with pytest.raises(ValueError, match=r"window=7 in dimension 0 of layout \(6, 6\).*\(layers 0-2\)"):
        model(image)
    configure(model, window=2)
    with pytest.raises(ValueError, match="attention_mask: image models"):
        model(image, attention_mask=torch.arange(37)[None] < 30)
    model = ViTModel(ViTConfig(intermediate_size=32, attention_probs_dropout_prob=0.5, **COMMON)).train()
    configure(model, window=2)
    with pytest.raises(ValueError, match=r"dropout=0\.5"):
        model(image)


@torch.no_grad()
def test_image_models_that_are_not_configured_stay_dense():
    model, image = MODELS["dinov3"][0]().eval(), torch.randn(1, 3, 48, 48)
    dense = model(image).last_hidden_state
    register()
    model.set_attn_implementation("gna_flex")
    assert torch.equal(model(image).last_hidden_state, dense)
