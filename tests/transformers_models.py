"""Tiny transformers models with random weights: images, and language with sliding windows."""

from typing import Any

import pytest
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.23")
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    ViTConfig,
    ViTModel,
)

COMMON: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 48, "patch_size": 8
}  # fmt: skip
MODELS = {
    "vit": (lambda: ViTModel(ViTConfig(intermediate_size=32, **COMMON)), 1),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(mlp_ratio=1, **COMMON)), 1),
    "registers": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(mlp_ratio=1, **COMMON)), 5),
    "dinov3": (
        lambda: DINOv3ViTModel(DINOv3ViTConfig(intermediate_size=32, num_register_tokens=2, **COMMON)),
        3,
    ),
}
ALL = pytest.mark.parametrize(("build", "first"), MODELS.values(), ids=MODELS)
TOLERANCE = 2e-6


def mistral(**options: Any) -> nn.Module:
    config = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "sliding_window": 8, "pad_token_id": 0,
    }  # fmt: skip
    return MistralForCausalLM(MistralConfig(**config | options)).eval()


def gemma(**options: Any) -> nn.Module:
    config = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "pad_token_id": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    return Gemma3ForCausalLM(Gemma3TextConfig(**config | options)).eval()


def assert_close(out: Tensor, expected: Tensor) -> None:
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= TOLERANCE * expected.abs().max()
