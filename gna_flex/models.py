"""Whole models to measure: diffusion transformers of ``diffusers`` and DINOv3 of ``transformers``, with random weights.

Nothing is downloaded: the classes are the libraries' own, at the sizes of the published models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gna_flex.neighborhood import GNA

SHARPNESS = 1.6
"""Weights of the norms of queries and keys: scores vary by 2.6, and a query looks at few keys, as in trained models.

With weights of 1 attention would be close to a mean over all keys, and hardly matter for the output.
"""

Inputs = dict[str, Any]
Noise = Callable[..., Tensor]
"""Makes a tensor of normal numbers of a shape."""


class Setting(NamedTuple):
    """A neighborhood that all self-attention layers get, and what it stands for.

    ``paper`` is the speed-up of a generation on a B200 that the GNA paper has for this window, 0 if it has none.
    """

    name: str
    window: tuple[int, ...]
    stride: tuple[int, ...]
    paper: float = 0.0


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, its size, and the neighborhoods to measure it with.

    Attributes:
        name: what :func:`model` looks up.
        class_name: the class, of ``diffusers`` or ``transformers`` as ``library`` says.
        config: arguments of the class (for ``transformers`` of its configuration) that differ from its defaults.
        blocks: classes of the blocks that most of the model consists of.
        layout: tokens in each dimension.
        text: text tokens; in the sequence (``text_first`` or ``text_last``), or only attended to by cross-attention.
        inputs: the inputs of a forward from the configuration, layout, number of text tokens and a source of noise.
        settings: the neighborhoods.
        steps: steps of a generation, 0 where there is none, and how many of them stay dense.
        tiny: what replaces attributes in the version for a CPU.
        masked: whether self-attention gets a mask of the text's padding even where nothing is padded.
    """

    name: str
    library: str
    class_name: str
    config: Mapping[str, Any]
    blocks: tuple[str, ...]
    layout: tuple[int, ...]
    text: int
    inputs: Callable[[Any, tuple[int, ...], int, Noise], Inputs]
    settings: tuple[Setting, ...]
    tiny: Mapping[str, Any]
    text_in_sequence: str = ""
    steps: int = 0
    dense_steps: int = 0
    masked: bool = False

    def gna(self, setting: Setting) -> GNA:
        """The GNA of the self-attention layers."""
        text: dict[str, Any] = {self.text_in_sequence: self.text} if self.text_in_sequence else {}
        return GNA(self.layout, setting.window, setting.stride, **text)

    def smaller(self) -> Model:
        """The version that a CPU can run: a few narrow layers, a small grid."""
        return dataclasses.replace(self, **self.tiny)

    def halved(self) -> Model:
        """The same layers on half the grid in each dimension, with half the window."""
        settings = tuple(
            s._replace(window=window, stride=tuple(map(min, s.stride, window)))
            for s in self.settings
            for window in [tuple(max(2, w // 2) for w in s.window)]
        )
        return dataclasses.replace(self, layout=tuple((n + 1) // 2 for n in self.layout), settings=settings)


def _flux(config: Any, layout: tuple[int, ...], text: int, noise: Noise) -> Inputs:
    image = noise(1, layout[0] * layout[1], config.in_channels)
    lines, columns = torch.meshgrid(*map(torch.arange, layout), indexing="ij")
    ids = torch.stack((torch.zeros_like(lines), lines, columns), -1).flatten(0, 1).float()
    inputs = {
        "hidden_states": image,
        "encoder_hidden_states": noise(1, text, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "timestep": image.new_full((1,), 0.5),
        "img_ids": ids.to(image.device),
        "txt_ids": torch.zeros(text, 3, device=image.device),
    }
    return inputs | ({"guidance": image.new_full((1,), 3.5)} if config.guidance_embeds else {})


def _video(config: Any, layout: tuple[int, ...], text: int, noise: Noise) -> Inputs:
    """A latent video and embedded text; the width of the text has another name in each class."""
    patch = config.patch_size
    patch = (config.patch_size_t, patch, patch) if isinstance(patch, int) else patch
    width = getattr(config, "text_embed_dim", None) or config.text_dim
    video = noise(1, config.in_channels, *(n * p for n, p in zip(layout, patch, strict=True)))
    step = torch.full((1,), 500, device=video.device)
    return {"hidden_states": video, "timestep": step, "encoder_hidden_states": noise(1, text, width)}


def _hunyuan_video(config: Any, layout: tuple[int, ...], text: int, noise: Noise) -> Inputs:
    inputs = _video(config, layout, text, noise)
    video: Tensor = inputs["hidden_states"]
    inputs["encoder_attention_mask"] = torch.ones(1, text, dtype=torch.long, device=video.device)
    inputs["pooled_projections"] = noise(1, config.pooled_projection_dim)
    return inputs | ({"guidance": video.new_full((1,), 6000.0)} if config.guidance_embeds else {})


def _image(config: Any, layout: tuple[int, ...], text: int, noise: Noise) -> Inputs:
    return {"pixel_values": noise(1, 3, *(n * config.patch_size for n in layout))}


NARROW = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4}
SMALL_VIDEO = {
    "layout": (4, 8, 8),
    "text": 7,
    "settings": (Setting("sliding", (2, 4, 4), (1, 1, 1)), Setting("strided", (2, 4, 4), (2, 2, 2))),
}

MODELS: dict[str, Model] = {
    entry.name: entry
    for entry in (
        Model(
            "hunyuan-video",
            "diffusers",
            "HunyuanVideoTransformer3DModel",
            {},
            ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
            (33, 45, 80),
            256,
            _hunyuan_video,
            (
                Setting("sliding", (18, 24, 24), (1, 1, 1)),
                Setting("paper's stride", (18, 24, 24), (16, 8, 8), 1.63),
                # 3 % fewer key boxes than with the paper's stride, of which 33 frames are no multiple; in both only the
                # boxes of text queries need a mask. Windows move frame by frame.
                Setting("fastest stride", (18, 24, 24), (1, 8, 16)),
            ),
            SMALL_VIDEO
            | {
                "config": NARROW
                | {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 8}
                | {"pooled_projection_dim": 8, "rope_axes_dim": (8, 12, 12)}
            },
            text_in_sequence="text_last",
            steps=50,
            dense_steps=15,
            masked=True,
        ),
        Model(
            "flux-4k",
            "diffusers",
            "FluxTransformer2DModel",
            {"guidance_embeds": True},
            ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
            (256, 256),
            512,
            _flux,
            (Setting("sliding", (80, 80), (1, 1)), Setting("paper's stride", (80, 80), (16, 16), 1.45)),
            {
                "layout": (16, 16),
                "text": 7,
                "settings": (Setting("sliding", (6, 6), (1, 1)), Setting("strided", (6, 6), (2, 2))),
                "config": {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32}
                | {"num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8}
                | {"axes_dims_rope": (8, 12, 12), "guidance_embeds": True},
            },
            text_in_sequence="text_first",
            steps=28,
            dense_steps=9,
        ),
        Model(
            "cosmos-7b",
            "diffusers",
            "CosmosTransformer3DModel",
            # The mask of padded pixels is one more channel of the input, which needs torchvision.
            {"concat_padding_mask": False},
            ("CosmosTransformerBlock",),
            (16, 44, 80),
            512,
            _video,
            (
                Setting("sliding", (16, 24, 16), (1, 1, 1)),
                Setting("strided", (16, 24, 16), (1, 8, 8)),
                Setting("paper's window", (16, 32, 48), (1, 16, 16), 1.26),
            ),
            SMALL_VIDEO
            | {
                "config": NARROW
                | {"num_layers": 2, "text_embed_dim": 8, "adaln_lora_dim": 4, "max_size": (8, 32, 32)}
                | {"concat_padding_mask": False}
            },
            steps=35,
            dense_steps=12,
        ),
        Model(
            "wan-14b",
            "diffusers",
            "WanTransformer3DModel",
            {},
            ("WanTransformerBlock",),
            (21, 45, 80),
            512,
            _video,
            (
                # An example window; groups of 7x9x4 divide the grid without a remainder.
                Setting("sliding", (12, 24, 24), (1, 1, 1)),
                Setting("strided", (12, 24, 24), (7, 9, 4)),
            ),
            SMALL_VIDEO | {"config": NARROW | {"num_layers": 2, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16}},
        ),
        Model(
            "dinov3",
            "transformers",
            "DINOv3ViTModel",
            {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
            | {"num_register_tokens": 4},
            ("DINOv3ViTLayer",),
            (128, 128),
            5,
            _image,
            (Setting("sliding", (32, 32), (1, 1)), Setting("strided", (32, 32), (16, 16))),
            {
                "layout": (16, 16),
                "settings": (Setting("sliding", (6, 6), (1, 1)), Setting("strided", (6, 6), (2, 2))),
                "config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
                | {"num_attention_heads": 2, "num_register_tokens": 4, "patch_size": 8},
            },
            text_in_sequence="text_first",
        ),
    )
}
"""All models by name."""


def model(name: str) -> Model:
    """The model of this name.

    Raises:
        ValueError: if there is none; the message says which there are.

    >>> model("flux-4k").layout
    (256, 256)
    """
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"model={name!r} is not known; {hint}models are {', '.join(MODELS)}")


def build(chosen: Model, device: str, dtype: torch.dtype) -> Any:
    """The model on its device, with random weights of its type; its buffers stay as its class makes them.

    Raises:
        ImportError: if the library is not installed.
    """
    library = importlib.import_module(chosen.library)
    with _parameters_on(device, dtype):
        if chosen.library == "transformers":
            config = getattr(library, chosen.class_name.removesuffix("Model") + "Config")(**chosen.config)
            core = getattr(library, chosen.class_name)(config)
        else:
            core = getattr(library, chosen.class_name)(**chosen.config)
    core = core.to(device).eval().requires_grad_(False)
    _fill(core, torch.Generator(device).manual_seed(0))
    if chosen.masked:
        for block in blocks_of(core, chosen):
            block.attn.register_forward_pre_hook(_unmasked, with_kwargs=True)
    return core


def make_inputs(chosen: Model, core: nn.Module, device: str, dtype: torch.dtype) -> Inputs:
    """Inputs of one forward, batch size 1."""
    generator = torch.Generator(device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    return chosen.inputs(core.config, chosen.layout, chosen.text, noise)


def block_lists(core: Any, chosen: Model) -> list[nn.ModuleList]:
    """Where the blocks are, in the order of execution."""
    lists = [module for module in core.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return [blocks for blocks in lists if type(blocks[0]).__name__ in chosen.blocks]


def blocks_of(core: Any, chosen: Model) -> Iterator[Any]:
    """All blocks in the order of execution."""
    return (block for blocks in block_lists(core, chosen) for block in blocks)


@contextlib.contextmanager
def _parameters_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Parameters made inside are on the device and of the type from the start, whatever their size."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype))

    hook = nn.modules.module.register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _fill(core: nn.Module, generator: torch.Generator) -> None:
    """Matrices keep the variance of what they multiply, norms are 1, biases 0; attention is as sharp as `SHARPNESS`."""
    for path, parameter in core.named_parameters():
        owner, _, name = path.rpartition(".")
        owner = owner.rpartition(".")[2]
        if parameter.ndim > 1:
            # Where nothing normalises queries and keys their projections do it.
            sharp = owner in ("q_proj", "k_proj")
            scale = (SHARPNESS if sharp else 1) / parameter[0].numel() ** 0.5
            parameter.normal_(0, scale, generator=generator)
        elif name == "bias":
            parameter.zero_()
        else:
            parameter.fill_(SHARPNESS if owner.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")) else 1)


def _unmasked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Inputs]:
    """Self-attention without the mask of the text's padding: nothing is padded, and dense attention is faster so."""
    return args, kwargs | {"attention_mask": None}
