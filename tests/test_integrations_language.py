"""Real transformers models of language, tiny and with random weights: sliding windows against ``"sdpa"``."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from transformers_models import assert_close, gemma, mistral

from gna_flex import GNA, GNABlockMask

pytest.importorskip("transformers", minversion="5.23")
from transformers import DynamicCache, MistralConfig, StaticCache
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
from gna_flex.integrations.transformers import register


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


@pytest.mark.parametrize(("build", "dense_layers"), [(mistral, 0), (gemma, 2)])
@torch.no_grad()
def test_compiled_language_models(build, dense_layers, fresh_compiler):
    """Prompts take our routes in the layers with a window; other lengths, which make the graph dynamic, do not."""
    model, tokens = build(), torch.randint(1, 32, (2, 40))
    expected, _ = both(model, tokens)
    function, recorder = compiled(model)
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
