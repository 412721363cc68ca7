"""Tiny diffusers models with random weights, their inputs, and diffusers' own code with a dense mask."""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gna_flex import GNA

pytest.importorskip("diffusers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import (
        CosmosTransformer3DModel,
        FluxTransformer2DModel,
        HunyuanVideoTransformer3DModel,
        WanTransformer3DModel,
    )

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
