# %% [markdown]
# # Neighborhoods in a diffusion transformer
#
# A video model of the `diffusers` library spends most of its time in self-attention. Here you give its layers
# neighborhoods, keep the first steps and some layers dense, see what that buys, and take everything off again. The
# model is real but tiny and has random weights, so this runs in seconds, without a GPU. For a real one hand over
# `pipe.transformer`; nothing else changes.

# %%
from unittest import SkipTest

import torch
from rich import print

from gna_flex.integrations.diffusers import apply, remove, report

try:
    from diffusers import HunyuanVideoTransformer3DModel
except ImportError:
    raise SkipTest("this tutorial needs the package diffusers: pip install 'gna-flex[diffusers]'") from None

torch.manual_seed(0)
model = HunyuanVideoTransformer3DModel(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=4,
    num_refiner_layers=1,
    guidance_embeds=False,
    text_embed_dim=32,
    pooled_projection_dim=32,
    rope_axes_dim=(4, 6, 6),
).eval()

# %% [markdown]
# ## The model as it is
#
# A latent video of 6 frames, 16 x 24 each, is cut into patches of 2 x 2: that makes 6 x 8 x 12 tokens. Text comes after
# them. The second prompt is shorter, the rest is padding.

# %%
video = torch.randn(2, 4, 6, 16, 24)
prompt = torch.randn(2, 10, 32)
used = torch.tensor([[1] * 10, [1] * 4 + [0] * 6])


@torch.no_grad()
def denoise(timestep: int) -> torch.Tensor:
    steps = torch.full((2,), timestep)
    return model(video, steps, prompt, used, torch.zeros(2, 32), return_dict=False)[0]


dense = denoise(900)
print(dense.shape)

# %% [markdown]
# ## Give its layers neighborhoods
#
# Windows are in tokens per dimension, -1 is a whole one. Nobody has to say how large the grid is, how many text tokens
# there are or where, or which of them are padding: that is found at each forward. Text sees everything, and everything
# sees the text that is not padding. A window as large as the grid gives what the model gave before, but for rounding:

# %%
apply(model, window=-1)
error = (denoise(900) - dense).abs().max()
print(f"largest difference from the dense model: {error:.1e}")
assert error < 1e-5

# %% [markdown]
# Layers are numbered in the order of execution. Here the first two stay dense, the next one has a small window and
# the others a larger one, in which groups of 2 x 4 x 4 queries share a window:


# %%
def parameters(layer):
    if layer < 2:
        return None
    return {"window": (3, 4, 4)} if layer == 2 else {"window": (4, 8, 8), "stride": (2, 4, 4)}


apply(model, layers=parameters)
local = denoise(900)
assert (local - dense).abs().max() > 1e-3

# %% [markdown]
# ## What does it buy?
#
# `report` speaks of the layout of the last forward, here six tiny frames, or of one that you never ran, such as 129
# frames in 720p:

# %%
print(report(model, layout=(33, 45, 80)))
assert [row.layers for row in report(model).rows] == [(2,), (3, 4, 5)]

# %% [markdown]
# ## Keep the first steps dense
#
# The first steps of a generation decide about the whole picture, and are often kept dense. Steps are told apart by
# their timesteps: a larger one than before begins the next generation.

# %%
apply(model, window=(3, 4, 4), dense_steps=2)
outputs = {}
for timestep in (900, 700, 500):
    outputs[timestep] = denoise(timestep)
assert torch.equal(outputs[900], dense)  # step 1 of 2
assert torch.equal(denoise(900), dense)  # the next generation begins

remove(model)
for timestep, out in outputs.items():
    print(f"timestep {timestep}: differs from the dense model by {(out - denoise(timestep)).abs().max():.1e}")

# %% [markdown]
# `remove`, just used, restores the model to the last bit:

# %%
assert torch.equal(denoise(900), dense)

# %% [markdown]
# The model may be compiled, before or after, as a whole (`torch.compile(model)`) or in blocks
# (`model.compile_repeated_blocks()`). How much a window costs in quality depends on the model: most are trained dense,
# so begin with large windows and some dense steps and layers, or fine-tune. Gradients flow.
