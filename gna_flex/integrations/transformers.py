"""Models of ``transformers`` on neighborhood attention: ``register``, and ``configure`` and ``remove`` for images.

``register()`` makes ``attn_implementation="gna_flex"`` known; language models with a causal sliding window need no
more. Image models are given a window by ``configure``: before each forward a hook finds out which tokens are where and
passes the masks on as a keyword argument, which the model hands to all of its attention layers.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from gna_flex.attention import flex_attention
from gna_flex.integrations.layers import TRACED, Layers, Plan, Tokens, neighborhoods
from gna_flex.integrations.summary import ModelReport, summary
from gna_flex.kept import fixed, keep_for_graphs, masks_of_graphs
from gna_flex.mask import GNABlockMask, gna_mask
from gna_flex.neighborhood import GNA, Ints
from gna_flex.torch_private import constant_result, has_static_value

log = logging.getLogger("gna_flex")

NAME = "gna_flex"
"""The name of the attention implementation."""
STATE = "_gna_flex"
"""The attribute of a model that :class:`Configured` is kept in."""
GROUP = "_gna_flex_group"
"""The attribute of an attention layer, and of the modules inside of it, with the number of its group."""
ARGUMENT = "gna_flex_masks"
"""The keyword argument that masks are passed on in."""
IMAGE_MODELS = {
    "ViTModel": "ViTAttention",
    "Dinov2Model": "Dinov2Attention",
    "Dinov2WithRegistersModel": "Dinov2WithRegistersAttention",
    "DINOv3ViTModel": "DINOv3ViTAttention",
}
"""Supported models of images and their attention layers, by the names of their classes."""
FOREIGN = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices", "cache")
"""Arguments that change what attention computes, which ours knows nothing of."""


def register() -> None:
    """Makes ``attn_implementation="gna_flex"`` known to transformers; again has no effect.

    Language models whose layers have a causal sliding window then run prompts (prefill) and training on our routes,
    with the results of ``"sdpa"``. All other calls go to ``"sdpa"``, and a line of the logger ``gna_flex`` at level
    DEBUG says why: steps of a generation (fewer queries than keys), padded prompts, packed sequences, windows larger
    than the prompt, and other masks.

    In compiled models values of tensors are not known. There ``"sdpa"`` is also taken if an ``attention_mask`` is
    given, with ``use_cache=False`` (transformers then looks for packed sequences), and if the number of tokens is
    dynamic, as torch makes it when a second length comes, unless it compiles with ``dynamic=False``.

    >>> from transformers import MistralConfig, MistralModel
    >>> register()
    >>> config = MistralConfig(vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=4, num_key_value_heads=2, sliding_window=8, attn_implementation="gna_flex")
    >>> MistralModel(config)(torch.arange(16)[None]).last_hidden_state.shape
    torch.Size([1, 16, 32])
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function: ``[B, H, S, D]`` queries, keys and values give ``[B, S, H, D]``.

    Raises:
        ValueError: if a neighborhood comes together with dropout, another mask or something else that it does not know.
        RuntimeError: if the model did not pass the masks on.
    """
    masks = options.pop(ARGUMENT, None)
    group: int | None = getattr(module, GROUP, None)
    if isinstance(attention_mask, GNABlockMask):
        mask: GNABlockMask | None = attention_mask
    elif group is None:
        mask = None
    elif masks is None:
        raise RuntimeError(
            "the model did not get masks, or does not pass them on: call the model given to configure, and have "
            "transformers >= 5.23"
        )
    elif attention_mask is not None:
        raise ValueError("attention_mask: image models with neighborhoods take no further mask")
    else:
        mask = masks[group]
    if mask is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if foreign := [name for name in FOREIGN if options.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} passes {', '.join(foreign)}, which attention gna_flex does not take")
    if dropout:
        raise ValueError(f"dropout={dropout} of attention weights is not supported: set it to 0 in the model's config")
    gqa = query.shape[1] != key.shape[1]
    out: Tensor = flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **options: Any,
) -> Any:
    """The mask function: a GNA mask where a causal sliding window is asked for, else the mask of ``"sdpa"``."""
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    everything = mask_function is bidirectional_mask_function and options.get("local_size") is None
    if everything and attention_mask is None and options.get("allow_is_bidirectional_skip"):
        return None  # as in eager code; in graphs of older versions of torch "sdpa" makes a mask that masks nothing
    window: Any = options.get("local_size")
    reason = _obstacle(q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, options)
    if not reason:
        return (_causal_in_graph if torch.compiler.is_compiling() else _causal)(q_length, window, device)
    if not torch.compiler.is_compiling():
        log.debug("scaled_dot_product_attention instead of gna_flex: %s", reason)
    arguments = {} if mask_function is None else {"mask_function": mask_function}
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        device=device,
        **arguments,
        **options,
    )


def _obstacle(
    q_length: int,
    kv_length: int,
    q_offset: Any,
    kv_offset: Any,
    mask_function: Any,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> str:
    """Why a mask is not, or not surely, that of a causal sliding window; empty if it is."""
    if torch.compiler.is_compiling():
        # Values of tensors are not known in a graph. transformers says that there are none in the mask_function by the
        # first option, but for chunks, which it has where the config has their size.
        chunks = getattr(options.get("config"), "attention_chunk_size", None)
        if attention_mask is not None or chunks is not None or not options.get("allow_is_causal_skip"):
            return "the mask depends on tensors"
        for number in (q_length, kv_length, q_offset, kv_offset):
            if isinstance(number, Tensor) or not has_static_value(number):
                return "the tokens are not known when compiling"
    window = fixed(options.get("local_size"))
    if window is None or not is_sliding_window(mask_function, window):
        return "the mask is no causal sliding window"
    if (q_length, q_offset, kv_offset) != (kv_length, 0, 0):
        return f"{q_length} queries at {q_offset} and {kv_length} keys at {kv_offset} are not the same tokens"
    if window >= q_length:
        return f"the window {window} is not smaller than the {q_length} tokens"
    if attention_mask is not None and not (attention_mask.shape[-1] == kv_length and bool(attention_mask.all())):
        return "tokens are padded"
    return ""


_kept: dict[tuple[int, int, torch.device], GNABlockMask] = {}


def _causal(tokens: int, window: int, device: Any) -> GNABlockMask:
    """The mask of a causal sliding window; that of the last prompt is kept, for all layers and batches like it."""
    key = tokens, window, torch.device(device)
    mask = _kept.get(key)
    if mask is None:
        mask = gna_mask(GNA.sliding_window(tokens, window, causal=True), device=device)
        _kept.clear()
        _kept[key] = mask
    return mask


def _causal_in_graph(tokens: int, window: int, device: Any) -> GNABlockMask:
    """The mask of a causal sliding window in a compiled model."""
    mask: GNABlockMask = getattr(masks_of_graphs, _name_in_graphs(fixed(tokens), fixed(window), device))
    return mask


@constant_result
def _name_in_graphs(tokens: int, window: int, device: Any) -> str:
    """Where a graph finds its mask. It is called while torch compiles, and its answer becomes part of the graph."""
    return keep_for_graphs(GNA.sliding_window(tokens, window, causal=True), torch.empty(0, device=device).device)


class _Written:
    """An index, or what a mask function computes from it, written down; the few operations that a window needs.

    It works in graphs, too, where functions cannot be looked into and tensors have no values.
    """

    device = None

    def __init__(self, text: Any) -> None:
        self.text = text

    def __sub__(self, other: Any) -> _Written:
        return _Written(("-", self.text, _text(other)))

    def __gt__(self, other: Any) -> _Written:
        return _Written((">", self.text, _text(other)))

    def __le__(self, other: Any) -> _Written:
        return _Written(("<=", self.text, _text(other)))

    def __and__(self, other: Any) -> _Written:
        return _Written(("&", self.text, _text(other)))

    def __bool__(self) -> bool:
        raise TypeError("a mask function that decides by the value of an index")

    def new_ones(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Written:
        """What conditions are combined with."""
        return _Written(("ones", shape, dtype))

    def to(self, device: Any) -> _Written:
        """Itself."""
        return self


def _text(value: Any) -> Any:
    return value.text if isinstance(value, _Written) else value


def is_sliding_window(mask_function: Any, window: int) -> bool:
    """Whether a mask function computes what transformers' own of a causal sliding window does.

    Whatever is combined with the window (packed sequences, blocks of an image) makes it another function.
    """
    from transformers.masking_utils import sliding_window_causal_mask_function

    if mask_function is None:
        return False
    indices = [_Written(name) for name in ("b", "h", "q", "k")]
    try:
        found = mask_function(*indices).text
    except Exception:  # it does something else with indices
        return False
    return bool(found == sliding_window_causal_mask_function(window)(*indices).text)


class Configured:
    """What a model of images has on while neighborhoods are configured."""

    def __init__(self, plan: Plan, config: Any, implementation: str) -> None:
        self.plan, self.config, self.implementation = plan, config, implementation
        self.hook: Any = None

    @torch.compiler.disable(reason=TRACED)  # type: ignore[untyped-decorator]
    def before_forward(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Adds the masks of a forward to its arguments."""
        pixels = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments["pixel_values"]
        patch = self.config.patch_size
        patch = (patch, patch) if isinstance(patch, int) else patch
        layout = tuple(int(size) // p for size, p in zip(pixels.shape[-2:], patch, strict=True))
        tokens = Tokens(layout, text_first=1 + getattr(self.config, "num_register_tokens", 0))
        return args, kwargs | {ARGUMENT: self.plan.masks(tokens, pixels.device)}


def configure(
    model: nn.Module,
    window: Ints | None = None,
    stride: Ints = 1,
    dilation: Ints = 1,
    *,
    layers: Layers = None,
    clamp: bool = False,
) -> None:
    """Layers of a model of images attend to neighborhoods of patches from now on.

    The layout, height and width in patches, is found at each forward. Class and register tokens, which come first, see
    everything, and everything sees them. Configuring again replaces what was configured. The model may be compiled,
    before or after; a function that calls it has a graph break there, which with ``fullgraph=True`` is an error.

    Args:
        model: a ViT, DINOv2 (with or without registers) or DINOv3 model, or one with such a model inside, like
            ``ViTForImageClassification``.
        window: keys that a query sees in a dimension, as in :class:`gna_flex.GNA`, in patches; -1 is a whole dimension.
        stride: queries that share a window.
        dilation: step between the keys of a window.
        layers: which layers, numbered from the first; see :func:`gna_flex.integrations.layers.neighborhoods`. The
            others stay dense.
        clamp: shrink windows to layouts smaller than they are, instead of refusing them at the forward.

    Raises:
        TypeError: if there is no supported model.
        ValueError: if parameters or layers do not fit the model. At a forward, if a window does not fit the layout.

    >>> from transformers import ViTConfig, ViTModel
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    ...     image_size=64, patch_size=8))
    >>> configure(model, window=3)
    >>> model(torch.randn(1, 3, 64, 64)).last_hidden_state.shape
    torch.Size([1, 65, 32])
    >>> str(report(model).rows[0].gna)
    'layout 8x8, window 3x3, 1 text tokens first'
    """
    core = inner(model)
    base = _base(core)
    attentions = _attentions(base)
    plan = Plan(neighborhoods(len(attentions), layers, window, stride, dilation), clamp)
    for entry in plan.groups:
        for name, value in entry._asdict().items():
            if isinstance(value, tuple) and len(value) != 2:
                raise ValueError(
                    f"{name}={value} has {len(value)} values, but layouts are (height, width): give 1 or 2"
                )
    remove(core)
    register()
    configured = Configured(plan, base.config, base.config._attn_implementation)
    core.set_attn_implementation(NAME)
    for layer, attention_layer in enumerate(attentions):
        for module in attention_layer.modules():  # older versions call attention from a module inside of the layer
            setattr(module, GROUP, plan.group(layer))
    configured.hook = core.register_forward_pre_hook(configured.before_forward, with_kwargs=True)
    setattr(core, STATE, configured)


def remove(model: nn.Module) -> None:
    """Takes off what :func:`configure` put on: the model is as it was. Without effect on other models.

    Raises:
        TypeError: if there is no supported model.
    """
    core = inner(model)
    base = _base(core)
    configured: Configured | None = vars(core).get(STATE)
    if configured is None:
        return
    configured.hook.remove()
    for attention_layer in _attentions(base):
        for module in attention_layer.modules():
            delattr(module, GROUP)
    core.set_attn_implementation(configured.implementation)
    delattr(core, STATE)


def report(model: nn.Module, layout: Ints | None = None, *, device: str = "h200") -> ModelReport:
    """What the configured neighborhoods skip, and what that buys; see :func:`gna_flex.integrations.diffusers.report`.

    Raises:
        TypeError: if there is no supported model.
        ValueError: if nothing is configured, a neighborhood does not fit the layout, or there is none yet.
    """
    core = inner(model)
    config = _base(core).config
    configured: Configured | None = vars(core).get(STATE)
    if configured is None:
        raise ValueError(f"no neighborhoods are configured for this {type(core).__name__}: call configure first")
    heads = config.num_attention_heads
    return summary(configured.plan, layout, device=device, heads=heads, head_dim=config.hidden_size // heads)


def inner(model: Any) -> Any:
    """The model in what ``torch.compile(model)`` returned, or itself."""
    return getattr(model, "_orig_mod", model)


def _base(model: Any) -> Any:
    """The supported model in a model."""
    found = [m for m in model.modules() if type(m).__name__ in IMAGE_MODELS] if isinstance(model, nn.Module) else []
    if len(found) != 1 or not hasattr(model, "set_attn_implementation"):
        raise TypeError(
            f"a model of class {type(model).__name__} is not supported; supported are {', '.join(IMAGE_MODELS)}, and "
            "models with one of them inside (language models need register() only)"
        )
    return found[0]


def _attentions(base: Any) -> list[Any]:
    """Attention layers in the order of execution."""
    return [module for module in base.modules() if type(module).__name__ == IMAGE_MODELS[type(base).__name__]]
