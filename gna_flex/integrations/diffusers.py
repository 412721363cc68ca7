"""Diffusion transformers of ``diffusers`` on neighborhood attention: ``apply``, ``remove``, ``reset`` and ``report``.

Works through diffusers' public attention processors and two module hooks; weights and code of models stay as they are.
Before a forward the first hook finds out which tokens are where and makes the masks. The second adds them to the rotary
embedding, which the model itself hands to each of its self-attention layers: so a forward, and its recomputation by
gradient checkpointing, always sees its own masks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gna_flex.integrations.layers import TRACED, Layers, Masks, Plan, Tokens, neighborhoods
from gna_flex.integrations.processors import (
    CosmosProcessor,
    FluxProcessor,
    HunyuanVideoProcessor,
    Processor,
    Rotary,
    WanProcessor,
)
from gna_flex.integrations.summary import ModelReport, summary
from gna_flex.neighborhood import Ints, as_int

STATE = "_gna_flex"
"""The attribute of a model that :class:`Applied` is kept in."""


def flux_tokens(model: Any, inputs: dict[str, Any]) -> Tokens:
    """Height and width of the image from the position of each of its tokens, after the text.

    Raises:
        ValueError: if the tokens are not one image, line by line.
    """
    ids: Tensor = inputs["img_ids"]
    ids = (ids[0] if ids.ndim == 3 else ids).detach().cpu()
    count = inputs["hidden_states"].shape[1]
    width = max(int((ids[:, 1] == ids[0, 1]).cumprod(0).sum()), 1)
    height = count // width
    # Built as pipelines do it, and rounded to their type, which may not hold large positions exactly.
    lines, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    image = torch.stack((torch.zeros_like(lines), lines, columns), 1).to(ids.dtype)
    if len(ids) != count or ids.shape != image.shape or not torch.equal(ids, image):
        raise ValueError(
            f"img_ids {tuple(inputs['img_ids'].shape)} of {count} image tokens are not the positions (0, line, column) "
            "of one image, line by line: images side by side in a sequence have no layout"
        )
    return Tokens((height, width), text_first=inputs["encoder_hidden_states"].shape[1])


def hunyuan_video_tokens(model: Any, inputs: dict[str, Any]) -> Tokens:
    """Frames, height and width from the latent video, text after it; its mask says how much of it counts.

    Raises:
        ValueError: if the mask of the text is not one number per text token.
    """
    config, text, mask = model.config, inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
    if tuple(mask.shape) != tuple(text.shape[:2]):
        raise ValueError(
            f"encoder_attention_mask has shape {tuple(mask.shape)}, but must be [B, text tokens] = "
            f"{tuple(text.shape[:2])}, as encoder_hidden_states is {tuple(text.shape)}"
        )
    layout = patches(inputs, (config.patch_size_t, config.patch_size, config.patch_size))
    return Tokens(layout, text_last=text.shape[1], valid=mask.sum(1, dtype=torch.int32))


def video_tokens(model: Any, inputs: dict[str, Any]) -> Tokens:
    """Frames, height and width from the latent video."""
    return Tokens(patches(inputs, model.config.patch_size))


def patches(inputs: dict[str, Any], patch: Any) -> tuple[int, ...]:
    """Patches of a latent video ``[B, C, T, H, W]`` in each dimension."""
    return tuple(int(size) // p for size, p in zip(inputs["hidden_states"].shape[2:], patch, strict=True))


class Family(NamedTuple):
    """What differs between classes of models.

    Attributes:
        blocks: where a model keeps its blocks, in the order of execution.
        attention: the self-attention of a block.
        rotary: the module that makes the rotary embedding.
        dims: what the dimensions of a layout are.
        dense: the name of diffusers' own processor.
        processor: ours.
        tokens: which tokens are where, from the model and the inputs of its forward by name.
    """

    blocks: tuple[str, ...]
    attention: str
    rotary: str
    dims: tuple[str, ...]
    dense: str
    processor: type[Processor]
    tokens: Callable[[Any, dict[str, Any]], Tokens]


VIDEO = ("frames", "height", "width")
TWO_KINDS = ("transformer_blocks", "single_transformer_blocks")
FAMILIES = {
    "FluxTransformer2DModel": Family(
        TWO_KINDS, "attn", "pos_embed", ("height", "width"), "FluxAttnProcessor", FluxProcessor, flux_tokens
    ),
    "HunyuanVideoTransformer3DModel": Family(
        TWO_KINDS, "attn", "rope", VIDEO, "HunyuanVideoAttnProcessor2_0", HunyuanVideoProcessor, hunyuan_video_tokens
    ),
    "WanTransformer3DModel": Family(
        ("blocks",), "attn1", "rope", VIDEO, "WanAttnProcessor", WanProcessor, video_tokens
    ),
    "CosmosTransformer3DModel": Family(
        ("transformer_blocks",), "attn1", "rope", VIDEO, "CosmosAttnProcessor2_0", CosmosProcessor, video_tokens
    ),
}
"""Supported models, by the name of their class."""


class Steps:
    """Which forwards belong to the first steps of a generation, which stay dense.

    A timestep that is larger than the one before it begins a generation, a smaller one begins a step, and the same one
    again belongs to the same step (guidance calls a model twice in a step). With ``forwards`` each step has so many.
    """

    def __init__(self, dense: int, forwards: int | None) -> None:
        self.dense, self.forwards = dense, forwards
        self.reset()

    def reset(self) -> None:
        """The next forward begins a generation."""
        self.before: float | None = None
        self.step = self.count = 0

    def is_dense(self, timestep: Tensor) -> bool:
        """Whether the forward with this timestep is one of the first; counts it."""
        if not self.dense:
            return False
        # Models of image to video may have tokens with timesteps of their own: the clean frames' are smaller.
        now = float(timestep.max())
        if self.before is None or now > self.before:
            self.step = self.count = 0
        else:
            self.step += now < self.before
            self.count += 1
        self.before = now
        step = self.step if self.forwards is None else self.count // self.forwards
        return step < self.dense


class Applied:
    """What a model has on while neighborhoods are applied: its plan, its steps, and its hooks."""

    def __init__(self, family: Family, plan: Plan, steps: Steps) -> None:
        self.family, self.plan, self.steps = family, plan, steps
        self.hooks: list[Any] = []
        self.pending: Masks | None = None

    @torch.compiler.disable(reason=TRACED)  # type: ignore[untyped-decorator]
    def before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes the masks of a forward."""
        inputs = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        tokens = self.family.tokens(model, inputs)
        masks = self.plan.masks(tokens, inputs["hidden_states"].device)
        dense = self.steps.is_dense(inputs["timestep"])
        self.pending = (None,) * len(masks) if dense else masks

    def after_rotary(self, module: Any, args: tuple[Any, ...], output: Rotary) -> tuple[Any, ...]:
        """Hands the masks to the layers, once: no forward takes those of another."""
        masks, self.pending = self.pending, None
        if masks is None:
            raise RuntimeError("this forward has no masks: call the model itself, not its forward method")
        return (*output, masks)


def apply(
    model: nn.Module,
    window: Ints | None = None,
    stride: Ints = 1,
    dilation: Ints = 1,
    *,
    layers: Layers = None,
    dense_steps: int = 0,
    forwards_per_step: int | None = None,
    clamp: bool = False,
) -> None:
    """Self-attention layers of a diffusion transformer attend to neighborhoods from now on.

    The layout, frames (except FLUX), height and width in tokens (patches of the latent), and the number of text tokens
    are found at each forward. Text tokens see everything, everything sees them; padding stays hidden. Cross-attention
    stays as it is. Applying again replaces what was applied.

    Models may be compiled, as a whole or in blocks (``model.compile_repeated_blocks()``), before or after. A function
    that calls the model has a graph break there; with ``fullgraph=True`` that is an error.

    Args:
        model: the transformer of a pipeline, such as ``pipe.transformer``: a ``FluxTransformer2DModel``,
            ``HunyuanVideoTransformer3DModel``, ``WanTransformer3DModel`` or ``CosmosTransformer3DModel``.
        window: keys that a query sees in a dimension, as in :class:`gna_flex.GNA`, in tokens; -1 is a whole dimension.
        stride: queries that share a window.
        dilation: step between the keys of a window.
        layers: which layers, numbered in the order of execution (double blocks of FLUX and HunyuanVideo before single
            ones); see :func:`gna_flex.integrations.layers.neighborhoods`. The others stay dense.
        dense_steps: so many steps at the beginning of each generation stay dense. A timestep larger than the one before
            begins a generation, every smaller one a step; :func:`reset` begins one by hand.
        forwards_per_step: count so many forwards as a step instead. Needed where timesteps are of a type too coarse to
            tell steps apart.
        clamp: shrink windows to layouts smaller than they are, instead of refusing them at the forward.

    Raises:
        TypeError: if the class of the model is not supported.
        ValueError: if parameters or layers do not fit the model, its processors are not diffusers' own, or it runs in
            parallel over a sequence. At a forward, if a window does not fit the layout or tokens are no grid.

    >>> from diffusers import WanTransformer3DModel
    >>> model = WanTransformer3DModel(
    ...     num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
    ...     ffn_dim=16, num_layers=2)
    >>> apply(model, window=(-1, 4, 4), layers=[1])
    >>> video, step, text = torch.randn(1, 4, 2, 16, 24), torch.tensor([500]), torch.randn(1, 5, 8)
    >>> model(video, step, text).sample.shape
    torch.Size([1, 4, 2, 16, 24])
    >>> report(model).rows[0].gna
    GNA(layout=(2, 8, 12), window=(2, 4, 4), stride=(1, 1, 1), dilation=(1, 1, 1), causal=(False, False, False), \
text_first=0, text_last=0)
    """
    core = inner(model)
    family = _family(core)
    if getattr(core, "_parallel_config", None) is not None:
        raise ValueError(f"{type(core).__name__} runs in parallel (enable_parallelism), which is not supported")
    attentions = _attentions(core, family)
    plan = Plan(neighborhoods(len(attentions), layers, window, stride, dilation), clamp)
    for group, entry in enumerate(plan.groups):
        for name, value in entry._asdict().items():
            if isinstance(value, tuple) and len(value) != len(family.dims):
                raise ValueError(
                    f"{name}={value} of layer {plan.members(group)[0]} has {len(value)} values, but layouts of "
                    f"{type(core).__name__} are ({', '.join(family.dims)}): give one value, or {len(family.dims)}"
                )
    steps = Steps(_at_least("dense_steps", dense_steps, 0), forwards_per_step)
    if forwards_per_step is not None:
        _at_least("forwards_per_step", forwards_per_step, 1)
    for layer, attn in enumerate(attentions):
        own = type(_dense(attn)).__name__
        if own != family.dense:
            raise ValueError(f"layer {layer} has the processor {own}, in whose place only {family.dense} is known")
    remove(model)
    applied = Applied(family, plan, steps)
    for layer, attn in enumerate(attentions):
        attn.set_processor(family.processor(attn.processor, plan.group(layer)))
    applied.hooks = [
        core.register_forward_pre_hook(applied.before_forward, with_kwargs=True),
        getattr(core, family.rotary).register_forward_hook(applied.after_rotary),
    ]
    setattr(core, STATE, applied)


def remove(model: nn.Module) -> None:
    """Takes off what :func:`apply` put on: the model is as it was. Without effect on other models.

    Raises:
        TypeError: if the class of the model is not supported.
    """
    core = inner(model)
    family = _family(core)
    applied: Applied | None = vars(core).get(STATE)
    if applied is None:
        return
    for hook in applied.hooks:
        hook.remove()
    for attn in _attentions(core, family):
        # Processors that someone else has set meanwhile stay.
        if isinstance(attn.processor, Processor):
            attn.set_processor(attn.processor.dense)
    delattr(core, STATE)


def reset(model: nn.Module) -> None:
    """The next forward begins a generation: counts ``dense_steps`` anew.

    Only needed where timesteps do not tell, as where they grow (inversion) or a generation that was broken off goes on.

    Raises:
        TypeError: if the class of the model is not supported.
        ValueError: if nothing is applied to it.
    """
    _applied(model).steps.reset()


def report(model: nn.Module, layout: Ints | None = None, *, device: str = "h200") -> ModelReport:
    """What the applied neighborhoods skip, and what that buys: a row for each group of layers with the same one.

    Args:
        model: the model.
        layout: tokens in each dimension; by default those of the last forward, which also knows the text tokens.
        device: which GPU speed-ups are predicted for, as in :func:`gna_flex.predict.predict`.

    Raises:
        TypeError: if the class of the model is not supported.
        ValueError: if nothing is applied, a neighborhood does not fit the layout, or there is none yet.
    """
    applied, config = _applied(model), inner(model).config
    return summary(
        applied.plan, layout, device=device, heads=config.num_attention_heads, head_dim=config.attention_head_dim
    )


def inner(model: Any) -> Any:
    """The model in what ``torch.compile(model)`` returned, or itself."""
    return getattr(model, "_orig_mod", model)


def _family(model: Any) -> Family:
    for base in type(model).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    raise TypeError(
        f"a model of class {type(model).__name__} is not supported; supported are {', '.join(FAMILIES)} (of a pipeline "
        "hand over pipe.transformer)"
    )


def _attentions(model: Any, family: Family) -> list[Any]:
    """Self-attention layers in the order of execution."""
    return [getattr(block, family.attention) for name in family.blocks for block in getattr(model, name)]


def _dense(attn: Any) -> Any:
    """The processor that a layer has without us."""
    return attn.processor.dense if isinstance(attn.processor, Processor) else attn.processor


def _applied(model: Any) -> Applied:
    core = inner(model)
    _family(core)
    applied: Applied | None = vars(core).get(STATE)
    if applied is None:
        raise ValueError(f"no neighborhoods are applied to this {type(core).__name__}: call apply first")
    return applied


def _at_least(name: str, value: Any, least: int) -> int:
    number = as_int(name, value)
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}")
    return number
