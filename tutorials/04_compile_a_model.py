# %% [markdown]
# # Compile a model that knows nothing of this package
#
# Many models call PyTorch's `flex_attention` with a mask of their own. If that mask is a neighborhood mask, such calls
# can run on our routes: `torch.compile(model, backend="gna_flex")` finds them, proves which GNA each mask is, and
# replaces those that are faster our way. The model is not touched, and everything else goes to Inductor as usual. This
# runs in seconds, without a GPU.

# %%
import functools

import torch
from rich import print
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gna_flex import compile_report, reference_attention
from gna_flex.dynamo.backend import gna_flex_backend
from gna_flex.symbolic import recognise

# %% [markdown]
# ## A model with masks of its own
#
# Two layers on a 16 x 16 grid: one looks at a window of 5 x 5, the other at everything before it.

# %%
HEIGHT = WIDTH = 16
TOKENS = HEIGHT * WIDTH


def near(b, h, q_idx, kv_idx):
    """Keys not further than 2 from the query, or from the nearest token that has a whole window."""
    y, x = (q_idx // WIDTH).clamp(2, HEIGHT - 3), (q_idx % WIDTH).clamp(2, WIDTH - 3)
    return ((kv_idx // WIDTH - y).abs() <= 2) & ((kv_idx % WIDTH - x).abs() <= 2)


def before(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


class Attention(nn.Module):
    def __init__(self, mask_mod):
        super().__init__()
        self.mask = create_block_mask(mask_mod, None, None, TOKENS, TOKENS, device="cpu")
        self.to_qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.to_qkv(x).view(len(x), TOKENS, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return x + flex_attention(q, k, v, block_mask=self.mask).transpose(1, 2).reshape(x.shape)


torch.manual_seed(0)
model = nn.Sequential(Attention(near), Attention(before)).requires_grad_(False)
x = torch.randn(2, TOKENS, 32)

# %% [markdown]
# ## Which masks are they?
#
# The backend asks `recognise`, which compares a mask with the rule of neighborhood attention exactly. You can ask, too:

# %%
print(recognise(near, q_len=TOKENS))
print(recognise(before, q_len=TOKENS))

# %% [markdown]
# ## Compile
#
# With the package installed it is `torch.compile(model, backend="gna_flex")`; options and modes of `torch.compile` are
# those of Inductor. To keep this quick we let another backend, `aot_eager`, take Inductor's place:

# %%
backend = functools.partial(gna_flex_backend, inner="aot_eager")
compiled = torch.compile(model, backend=backend)
out = compiled(x)
print(compile_report())

# %% [markdown]
# The report lists every call: its line, the mask that it is, the route, and why. On a CPU nothing of ours beats what
# torch does with the graph, so calls are left alone. On a Hopper GPU the two calls would say `hopper`, on others
# `flex-tiles` where tile order pays. Whatever happens, the result must be that of the reference:

# %%
truth = x
for layer, mask_mod in zip(model, (near, before), strict=True):
    q, k, v = layer.to_qkv(truth).view(2, TOKENS, 3, 2, 16).permute(2, 0, 3, 1, 4)
    truth = truth + reference_attention(q, k, v, mask_mod)[0].transpose(1, 2).reshape(x.shape)
print(f"largest difference from the reference: {(out - truth).abs().max():.1e}")
assert torch.allclose(out, truth, atol=1e-5)

# %% [markdown]
# ## What is left alone
#
# Calls with a `score_mod` or kernel options of your own, masks that read tensors (documents, for example), masks built
# inside of the compiled function, and a number of tokens that changes: these stay with FlexAttention, and the report
# says which of these it was. So do masks that look like a neighborhood but are not one. Without clamping the window is
# cut at the edges, which is another mask:

# %%
print(recognise(lambda b, h, q, k: (q - k).abs() <= 2, q_len=TOKENS))

# %% [markdown]
# Block lists are compared with the mask as well, when compiling and at every run. If they are swapped for others later,
# you get an error, never another result.
#
# If you cannot name the backend, because somebody else's code calls `torch.compile`, wrap its first call:
#
# ```python
# with gna_flex.recognise_masks():
#     pipeline(prompt)
# ```
