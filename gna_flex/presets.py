"""Named attention settings of public models: ready-made input for reports, pictures and benchmarks."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from gna_flex.neighborhood import GNA


@dataclass(frozen=True)
class Preset:
    """One attention layer of a public model.

    Attributes:
        name: what :func:`preset` looks up.
        gna: the neighborhood; the layout is in tokens, slowest dimension first.
        heads: attention heads of the layer.
        head_dim: channels of a head.
        note: what the numbers stand for, and whether the model was published with them or they are our example.
        source: where the numbers come from.
    """

    name: str
    gna: GNA
    heads: int
    head_dim: int
    note: str
    source: str


GNA_PAPER = "Generalized Neighborhood Attention, arXiv 2504.16922"
COSMOS_PREDICT2 = "cosmos-predict2, config_natten.py"
DIFFUSERS = "defaults of the model class in diffusers"
LTX_DECODER = "diffusers, ltx2_diffusion_decoder.py"
EXAMPLE = "example window of this package"


def _video_and_images() -> Iterator[Preset]:
    hunyuan = partial(Preset, heads=24, head_dim=128, source=GNA_PAPER)
    cube, window = (30, 48, 80), (18, 24, 24)
    yield hunyuan("hunyuan-video", GNA(cube, window, (16, 8, 8)), note="720p video, perfectly block-sparse")
    yield hunyuan("hunyuan-video-sliding", GNA(cube, window), note="720p video, a window per query")
    yield Preset(
        "hunyuan-video-text",
        GNA(cube, window, (16, 8, 8), text_last=256),
        24,
        128,
        "720p video with its 256 text tokens",
        f"text: {DIFFUSERS}; window: {GNA_PAPER}",
    )
    yield Preset(
        "hunyuan-video-129f",
        GNA((33, 45, 80), window, (16, 8, 8), text_last=256),
        24,
        128,
        "720p, 129 frames, with its 256 text tokens",
        f"grid: {DIFFUSERS}; window: {GNA_PAPER}",
    )
    flux = partial(Preset, heads=24, head_dim=128, source=GNA_PAPER)
    yield flux("flux-4k", GNA((256, 256), 80, 16), note="FLUX.1 at 4096 x 4096, perfectly block-sparse")
    yield flux("flux-4k-sliding", GNA((256, 256), 80), note="FLUX.1 at 4096 x 4096, a window per query")
    for name, stride, each in (("flux-4k-text", 16, ""), ("flux-4k-sliding-text", 1, ", a window per query")):
        yield Preset(
            name,
            GNA((256, 256), 80, stride, text_first=512),
            24,
            128,
            f"FLUX.1 at 4096 x 4096 with its 512 text tokens{each}",
            f"text: {DIFFUSERS}; window: {GNA_PAPER}",
        )
    cosmos = partial(Preset, heads=32, head_dim=128, source=GNA_PAPER)
    cube, window = (16, 44, 80), (16, 32, 48)
    yield cosmos("cosmos", GNA(cube, window, (1, 16, 16)), note="720p, perfectly block-sparse")
    yield cosmos("cosmos-sliding", GNA(cube, window), note="720p, a window per query")
    for name, grid, size in (("wan-480p", (21, 30, 52), "480 x 832"), ("wan-720p", (21, 45, 80), "720 x 1280")):
        yield Preset(
            name,
            GNA(grid, (12, 24, 24), (4, 8, 8)),
            40,
            128,
            f"Wan 2.1/2.2 14B, {size}, 81 frames; an example window, Wan is trained dense",
            f"grid: {DIFFUSERS}; {EXAMPLE}",
        )


def _cosmos_predict2() -> Iterator[Preset]:
    """Layer types by the share of pairs that they leave out on the base grid; the names are those of the config."""
    layers = {
        98: GNA((24, 44, 80), (-1, 4, 16), dilation=(1, 11, 5)),
        95: GNA((24, 44, 80), (-1, 12, 16), (1, 4, 1), (1, 1, 5)),
        92: GNA((24, 44, 80), (-1, 12, 24), (1, 4, 8)),
        77: GNA((24, 44, 80), (-1, 20, 40), (1, 4, 8)),
        55: GNA((24, 44, 80), (-1, 28, 56), (1, 4, 8)),
    }
    for share, gna in layers.items():
        note = f"720p, 16 frames per second: the layer type that skips {share} %; heads of the 14B model"
        yield Preset(f"cosmos-predict2-{share}", gna, 40, 128, note, COSMOS_PREDICT2)


def _ltx_decoder() -> Iterator[Preset]:
    stages = [
        ((18, 16, 24), (3, 7, 7), 32),
        ((18, 32, 48), (3, 7, 7), 16),
        ((35, 32, 48), (3, 5, 5), 8),
        ((69, 64, 96), (3, 5, 5), 8),
        ((121, 128, 192), (11, 11, 11), 4),
    ]
    for stage, (grid, window, heads) in enumerate(stages, 1):
        note = f"LTX-2.5 video decoder, stage {stage} of 5, 512 x 768, 121 frames"
        yield Preset(f"ltx-2.5-decoder-{stage}", GNA(grid, window), heads, 64, note, LTX_DECODER)
    note = "LTX-2.5 video decoder, last stage, 1088 x 1920, 121 frames: 15.8 million tokens"
    yield Preset("ltx-2.5-decoder-5-1080p", GNA((121, 272, 480), 11), 4, 64, note, LTX_DECODER)


def _text_and_vision() -> Iterator[Preset]:
    lm = partial(Preset, heads=32, head_dim=128, source=EXAMPLE)
    causal = GNA.sliding_window(32768, 2048, causal=True)
    yield lm("lm-32k", causal, note="language model, causal sliding window")
    both = GNA.sliding_window(32768, 2048)
    yield lm("lm-32k-bidirectional", both, note="encoder, sliding window to both sides")
    strided = GNA(32768, 2048, 256)
    yield lm("lm-32k-strided", strided, note="encoder, groups of 256 tokens share a window, perfectly block-sparse")
    yield lm("dense-32k", GNA.dense(32768), note="no mask at all: what a route costs where there is nothing to skip")
    vit = partial(Preset, heads=16, head_dim=64, source=f"grid: transformers; {EXAMPLE}")
    prefix = "class token and 4 registers first; an example window, the model is trained dense"
    yield vit("dinov2-518", GNA((37, 37), 15, text_first=5), note=f"ViT-L/14, 518 pixels: {prefix}")
    yield vit("dinov3-1024", GNA((64, 64), 16, 8, text_first=5), note=f"ViT-L/16, 1024 pixels: {prefix}")


PRESETS: dict[str, Preset] = {
    entry.name: entry
    for family in (_video_and_images, _cosmos_predict2, _ltx_decoder, _text_and_vision)
    for entry in family()
}
"""All presets by name."""


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: if there is none; the message lists the names that come close.

    >>> preset("hunyuan-video").gna.stride
    (16, 8, 8)
    """
    if name in PRESETS:
        return PRESETS[name]
    wanted = name.lower()
    near = [known for known in PRESETS if wanted and (wanted in known or known in wanted)]
    near += [known for known in difflib.get_close_matches(wanted, PRESETS, n=4, cutoff=0.5) if known not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else f"presets are {', '.join(PRESETS)}"
    raise ValueError(f"preset={name!r} is not known; {hint}")
