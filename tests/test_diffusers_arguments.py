"""What is said about diffusers models with neighborhoods, and what is refused."""

import types
import warnings
from typing import Any

import pytest
import torch
from diffusers_models import TEXT, flux, flux_inputs, hunyuan, hunyuan_inputs, processors, run, wan, wan_inputs
from helpers import dense_mask
from torch import nn

from gna_flex import GNA
from gna_flex.integrations import diffusers as gna_diffusers
from gna_flex.integrations.diffusers import apply, remove, report, reset
from gna_flex.integrations.layers import Neighborhood, neighborhoods

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import SD3Transformer2DModel


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
