"""Real transformers models, tiny and with random weights: images with neighborhoods, language with sliding windows."""

import copy
import logging
from typing import Any

import pytest
import torch
from helpers import dense_mask
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend

from gna_flex import GNA, GNABlockMask

pytest.importorskip("transformers", minversion="5.23")
from transformers import (
    AttentionInterface,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    create_chunked_causal_mask,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from gna_flex.integrations import transformers as gna_transformers
from gna_flex.integrations.transformers import configure, register, remove, report

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
PARAMETERS: dict[str, Any] = {"window": (3, 4), "stride": (1, 2)}
TOLERANCE = 2e-6


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


def assert_close(out: Tensor, expected: Tensor) -> None:
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= TOLERANCE * expected.abs().max()


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


@ALL
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiled(build, first, backend, fresh_compiler):
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


@pytest.fixture
def taken(monkeypatch) -> list[GNA]:
    """GNAs of the calls that our routes take."""
    found: list[GNA] = []
    original = gna_transformers.flex_attention

    def counted(*args: Any, block_mask: GNABlockMask, **options: Any) -> Tensor:
        found.append(block_mask.gna)
        return original(*args, block_mask=block_mask, **options)

    monkeypatch.setattr(gna_transformers, "flex_attention", counted)
    return found


def both(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Logits with ``"sdpa"`` and with ours."""
    register()
    model.set_attn_implementation("sdpa")
    expected = model(*args, **kwargs).logits
    model.set_attn_implementation("gna_flex")
    return expected, model(*args, **kwargs).logits


@pytest.mark.parametrize(("build", "layers"), [(mistral, 2), (gemma, 2)])
@torch.no_grad()
def test_sliding_windows(build, layers, taken):
    tokens = torch.randint(1, 32, (2, 40))
    model = build()
    expected, out = both(model, tokens)
    assert_close(out, expected)
    assert taken == [GNA(40, 8, causal=True)] * layers
    wider = build(sliding_window=16)
    wider.load_state_dict(model.state_dict())
    assert (wider(tokens).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("build", [mistral, gemma])
@torch.no_grad()
def test_generation(build, taken, caplog):
    """The prompt takes our route, steps are left to sdpa, with a line that says so."""
    model, tokens = build(), torch.randint(1, 32, (1, 24))
    register()
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens, **options)
    model.set_attn_implementation("gna_flex")
    with caplog.at_level(logging.DEBUG, logger="gna_flex"):
        assert torch.equal(model.generate(tokens, **options), expected)
    assert taken == [GNA(24, 8, causal=True)] * 2
    assert "scaled_dot_product_attention instead of gna_flex: 1 queries at 24" in caplog.text


@torch.no_grad()
def test_what_is_left_to_sdpa(taken, caplog):
    model, tokens = mistral(), torch.randint(1, 32, (2, 40))
    padding = torch.ones(2, 40, dtype=torch.long)
    padding[1, :5] = 0
    packed = torch.cat([torch.arange(25), torch.arange(15)])[None].expand(2, -1)
    cases: dict[str, dict[str, Any]] = {
        "tokens are padded": {"attention_mask": padding},
        "no causal sliding window": {"position_ids": packed, "use_cache": False},
    }
    for reason, options in cases.items():
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="gna_flex"):
            expected, out = both(model, tokens, **options)
        valid = options.get("attention_mask", torch.ones(2, 40)).bool()
        assert torch.equal(out[valid], expected[valid])
        assert reason in caplog.text
    with caplog.at_level(logging.DEBUG, logger="gna_flex"):
        expected, out = both(model, tokens[:, :8])
    assert torch.equal(out, expected)
    assert "the window 8 is not smaller than the 8 tokens" in caplog.text
    expected, out = both(mistral(sliding_window=None), tokens)
    assert torch.equal(out, expected)
    assert not taken
    expected, out = both(model, tokens, attention_mask=torch.ones(2, 40))
    assert_close(out, expected)
    assert len(taken) == 2


@torch.no_grad()
def test_a_cache_that_goes_on(taken):
    """A second prompt after a first has more keys than queries."""
    model, tokens = mistral(), torch.randint(1, 32, (1, 40))
    whole = model(tokens).logits
    register()
    model.set_attn_implementation("gna_flex")
    first = model(tokens[:, :20], use_cache=True)
    second = model(tokens[:, 20:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, second.logits], 1), whole)
    assert len(taken) == 2


def test_language_models_train(taken):
    model, tokens = mistral(), torch.randint(1, 32, (2, 40))
    gradients = []
    register()
    for name in ("sdpa", "gna_flex"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    top = max(x.abs().max() for x in gradients[0])
    assert all((a - b).abs().max() <= 1e-4 * top for a, b in zip(*gradients, strict=True))
    assert len(taken) == 2


class Recorder:
    """A backend that counts the attentions of ``"sdpa"`` in the graphs that it is given."""

    def __init__(self, inner: str = "eager") -> None:
        self.inner, self.sdpa = lookup_backend(inner), []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        targets = [node.target for node in graph.graph.nodes]
        self.sdpa.append(targets.count(nn.functional.scaled_dot_product_attention))
        return self.inner(graph, inputs)


def compiled(model: nn.Module, **options: Any) -> tuple[nn.Module, Recorder]:
    recorder = Recorder(**options)
    register()
    model.set_attn_implementation("gna_flex")
    return torch.compile(model, backend=recorder, fullgraph=True), recorder


@pytest.mark.parametrize(("build", "dense_layers", "inner"), [(mistral, 0, "aot_eager"), (gemma, 2, "eager")])
@torch.no_grad()
def test_compiled_language_models(build, dense_layers, inner, fresh_compiler):
    """Prompts take our routes in the layers with a window; other lengths, which make the graph dynamic, do not."""
    model, tokens = build(), torch.randint(1, 32, (2, 40))
    expected, _ = both(model, tokens)
    function, recorder = compiled(model, inner=inner)
    assert_close(function(tokens).logits, expected)
    assert_close(function(tokens).logits, expected)
    assert recorder.sdpa == [dense_layers]
    for length in (30, 6):
        expected, _ = both(model, tokens[:, :length])
        assert_close(function(tokens[:, :length]).logits, expected)
    assert set(recorder.sdpa[1:]) == {len(model.model.layers)}


def test_compiled_language_models_train(fresh_compiler):
    model, tokens = mistral(), torch.randint(1, 32, (2, 40))
    function, recorder = compiled(model, inner="aot_eager")
    gradients = []
    for run in (model, function):
        model.set_attn_implementation("sdpa" if run is model else "gna_flex")
        model.zero_grad()
        run(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    top = max(x.abs().max() for x in gradients[0])
    assert all((a - b).abs().max() <= 1e-4 * top for a, b in zip(*gradients, strict=True))
    assert recorder.sdpa == [0]


def left_to_sdpa() -> dict[str, dict[str, Any]]:
    """Arguments with which a mask depends on values of tensors, which are not known when compiling."""
    padding = torch.ones(2, 40, dtype=torch.long)
    padding[1, :5] = 0
    packed = torch.cat([torch.arange(25), torch.arange(15)])[None].expand(2, -1)
    return {
        "padding": {"attention_mask": padding},
        "a mask without padding": {"attention_mask": torch.ones(2, 40, dtype=torch.long)},
        "packed sequences": {"position_ids": packed, "use_cache": False},
        "packed sequences are looked for": {"use_cache": False},
    }


@pytest.mark.parametrize("case", left_to_sdpa())
@torch.no_grad()
def test_what_compiled_language_models_leave_to_sdpa(case, fresh_compiler):
    model, tokens, options = mistral(), torch.randint(1, 32, (2, 40)), left_to_sdpa()[case]
    expected, _ = both(model, tokens, **options)
    function, recorder = compiled(model)
    valid = options.get("attention_mask", torch.ones(2, 40)).bool()
    assert_close(function(tokens, **options).logits[valid], expected[valid])
    assert recorder.sdpa == [2]


@torch.no_grad()
def test_compiled_caches(fresh_compiler):
    """Prompts with a static cache take our routes, later ones and steps of a generation those of sdpa."""
    model, tokens = mistral(), torch.randint(1, 32, (2, 40))
    expected, _ = both(model, tokens)
    function, recorder = compiled(model)
    for cache in (StaticCache(model.config, max_cache_len=64), DynamicCache(config=model.config)):
        recorder.sdpa.clear()
        assert_close(function(tokens[:, :30], past_key_values=cache).logits, expected[:, :30])
        assert recorder.sdpa == [0]
        assert_close(function(tokens[:, 30:39], past_key_values=cache).logits, expected[:, 30:39])
        assert_close(function(tokens[:, 39:], past_key_values=cache).logits, expected[:, 39:])
        assert set(recorder.sdpa[1:]) == {2}
        torch._dynamo.reset()


def test_compiled_chunks(fresh_compiler):
    """Attention in chunks comes with the same arguments as a window, but for the function."""
    register()
    config = MistralConfig(attention_chunk_size=8, sliding_window=8, attn_implementation="gna_flex")
    function = torch.compile(create_chunked_causal_mask, backend="eager", fullgraph=True)
    mask = function(config, torch.zeros(2, 40, 8), None, None)
    expected = [[q // 8 == k // 8 and q >= k for k in range(40)] for q in range(40)]
    assert mask.tolist() == [[expected]] * 2


@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_functions_that_are_no_sliding_window(run, fresh_compiler):
    window = sliding_window_causal_mask_function

    def others() -> list[Any]:
        return [
            None,
            causal_mask_function,
            sliding_window_bidirectional_mask_function(9),
            window(8),
            window(10),
            and_masks(window(9), window(9)),
            and_masks(window(9), causal_mask_function),
            and_masks(causal_mask_function, sliding_window_overlay(9)),
            lambda b, h, q, k: q >= k,
            lambda b, h, q, k: q - k,
            lambda b, h, q, k: True,
        ]

    def answers() -> list[bool]:
        found = [gna_transformers.is_sliding_window(other, 9) for other in others()]
        return [gna_transformers.is_sliding_window(window(9), 9), *found]

    run_it = torch.compile(answers, backend="eager", fullgraph=True) if run == "compiled" else answers
    assert run_it() == [True] + [False] * len(others())
    packed = and_masks(window(9), packed_sequence_mask_function(torch.zeros(1, 4)))
    assert not gna_transformers.is_sliding_window(packed, 9)
    assert not gna_transformers.is_sliding_window(lambda b, h, q, k: (k > q - 9) if q else (k <= q), 9)


def test_arguments_that_change_attention():
    module = nn.Module()
    q = torch.randn(1, 2, 16, 8)
    mask = gna_transformers._causal(16, 4, "cpu")
    with pytest.raises(ValueError, match="Module passes softcap, s_aux, which attention gna_flex does not take"):
        gna_transformers.attention(module, q, q, q, mask, softcap=30.0, s_aux=torch.zeros(2))
