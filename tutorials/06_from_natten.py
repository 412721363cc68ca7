# %% [markdown]
# # From NATTEN to gna_flex
#
# You have a program that calls `natten.na2d`, or a model made of `NeighborhoodAttention2D`. Here you change one import,
# load a checkpoint, check that results are the same, and see what you can do next. It runs in seconds, without a GPU
# and without NATTEN.

# %%
import torch
from rich import print

from gna_flex import GNA, explain, flex_attention, gna_mask, reference_attention
from gna_flex.natten import NeighborhoodAttention2D, na2d, na3d  # was: from natten import ...
from gna_flex.report import report

# %% [markdown]
# ## Operations
#
# Tensors have the heads last, and all arguments have NATTEN's names. Arguments about its kernels (`backend`, tile
# shapes and so on) may stay: they have no effect, because gna_flex chooses by itself how to compute.

# %%
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 24, 32, 4, 64).unbind()  # [batch, height, width, heads, head dim]
out = na2d(q, k, v, kernel_size=(7, 9), stride=(1, 3), dilation=(2, 1), backend="hopper-fna")
print(out.shape)

# %% [markdown]
# The same in gna_flex's own words: `kernel_size` is the *window*, heads come before tokens, and the mask is an object
# that you keep.

# %%
gna = GNA(layout=(24, 32), window=(7, 9), stride=(1, 3), dilation=(2, 1))
mask = gna_mask(gna, device="cpu")
heads_first = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
same = flex_attention(*heads_first, block_mask=mask)
assert torch.equal(same.transpose(1, 2).unflatten(1, (24, 32)), out)

truth, _, _ = reference_attention(*(x.double() for x in heads_first), mask.mask_mod)
print(f"largest difference from the reference: {(same - truth).abs().max():.1e}")
assert torch.allclose(same.double(), truth, atol=1e-5)

# %% [markdown]
# `na2d` makes that mask at its first call and keeps it, so there is nothing to prepare, even under `torch.compile`.
#
# ## Additional keys
#
# Keys that every token sees, such as those of a prompt, are given as in NATTEN. Gradients reach them, and those of the
# log-sum-exp are right, too.

# %%
video = torch.randn(1, 4, 6, 8, 2, 32, requires_grad=True)
prompt = torch.randn(1, 7, 2, 32, requires_grad=True)
out, lse = na3d(video, video, video, kernel_size=3, additional_keys=prompt, additional_values=prompt, return_lse=True)
(out.square().mean() + lse.mean()).backward()
print(out.shape, lse.shape, prompt.grad.norm())
assert prompt.grad.isfinite().all()

# %% [markdown]
# In models whose prompt tokens attend to the video as well (joint attention), put both into one sequence instead:
# `GNA(..., text_last=7)`.
#
# ## Modules and checkpoints
#
# Modules have the same parameters, so that a checkpoint loads as it is. Let this be one of NATTEN's:

# %%
checkpoint = {
    "qkv.weight": torch.randn(3 * 64, 64) / 8,
    "qkv.bias": torch.zeros(3 * 64),
    "proj.weight": torch.randn(64, 64) / 8,
    "proj.bias": torch.zeros(64),
}
layer = NeighborhoodAttention2D(embed_dim=64, num_heads=4, kernel_size=7, dilation=2)
print(layer.load_state_dict(checkpoint))
image = torch.randn(1, 24, 32, 64)
result = layer(image)

compiled = torch.compile(layer, fullgraph=True, backend="eager")  # on a GPU leave the backend out
assert torch.allclose(compiled(image), result, atol=1e-5)

# %% [markdown]
# ## What differs
#
# - Windows of one token, and `-1` for a whole dimension, are allowed. Windows that do not fit the layout are refused
#   as in NATTEN, and the message says why:

# %%
try:
    na2d(q, k, v, kernel_size=(7, 17), dilation=2)
except ValueError as error:
    print(error)

# %% [markdown]
# - `scale=0.0` means 0.0. NATTEN takes its default then.
# - `na3d` takes videos only, not also images.
# - Training works on a CPU, and in double precision.
#
# ## What you gain
#
# You can ask which route a call takes, and what a mask buys before you run it on a GPU:

# %%
print(str(explain(*heads_first, mask)))
print(report(GNA((256, 256), window=80, stride=16)))
