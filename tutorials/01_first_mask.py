# %% [markdown]
# # Your first neighborhood mask
#
# Attention lets every token look at every other token. On a grid of tokens (an image, a video) most of that is far
# away and not worth the time. Here you build a mask that keeps each token's neighborhood only, run attention with it,
# check the result, and see what the mask skips. It runs in seconds, without a GPU.

# %%
import torch
from rich import print

from gna_flex import GNA, explain, flex_attention, gna_mask, reference_attention
from gna_flex.report import report
from gna_flex.viz import draw

# %% [markdown]
# ## Say what a token may see
#
# The *layout* is the grid of tokens, the *window* is how many keys a query sees in each dimension. At the edges a
# window moves inside, so every query sees the same number of keys. Here is an image of 24 x 32 tokens:

# %%
gna = GNA(layout=(24, 32), window=(7, 9))
print(draw(gna, query=(8, 20), q_tile=(4, 8)))

# %% [markdown]
# The dark cells are the keys of the query. GPUs do not work on single tokens, though, but on *blocks* of them: the
# light cells are loaded along with the query's tile and thrown away by the mask. The pictures at the bottom are the
# whole mask, once with tokens in natural order, line by line, and once with tokens sorted into tiles.
#
# ## Run it
#
# `gna_mask` makes a mask that PyTorch's FlexAttention understands, and `flex_attention` has PyTorch's signature:
# queries, keys and values are `[batch, heads, tokens, head dim]`, tokens line by line.

# %%
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 4, gna.tokens, 64).unbind()
mask = gna_mask(gna, device="cpu")
out = flex_attention(q, k, v, block_mask=mask)
print(out.shape)

# %% [markdown]
# How was that computed? The same call takes the fastest route that fits the device; `explain` says which, and why.

# %%
print(str(explain(q, k, v, mask)))

# %% [markdown]
# ## Check it
#
# The plain reference, in double precision, must agree. And a single query can be checked by hand: cut its window out of
# the keys, and attend to that. Query (8, 20) sees rows 5 to 11 and columns 16 to 24.

# %%
truth, _, _ = reference_attention(q.double(), k.double(), v.double(), mask.mask_mod)
print(f"largest difference from the reference: {(out - truth).abs().max():.1e}")
assert torch.allclose(out.double(), truth, atol=1e-5)

keys, values = (x.double().view(1, 4, 24, 32, 64)[:, :, 5:12, 16:25].flatten(2, 3) for x in (k, v))
query = q.double().view(1, 4, 24, 32, 64)[:, :, 8, 20, None]
by_hand = torch.softmax(query @ keys.mT / 64**0.5, -1) @ values
assert torch.allclose(out.double().view(1, 4, 24, 32, 64)[:, :, 8, 20, None], by_hand, atol=1e-5)

# %% [markdown]
# ## What does it buy?
#
# `report` counts what is kept and which blocks have to be visited. A *full* block needs no mask at all, a *partial* one
# does. Small windows on a small grid waste a lot of every block:

# %%
print(report(gna))

# %% [markdown]
# Real video models have more tokens, and there is a trick: let queries *share* windows in groups, with a `stride`.
# Where groups line up with tiles every visited block is full. Here with HunyuanVideo's grid and window:

# %%
hunyuan = GNA((30, 48, 80), window=(18, 24, 24), stride=(16, 8, 8))
result = report(hunyuan)
print(result)
assert result.perfect

# %% [markdown]
# Next: try your own numbers with `gna-flex report 30x48x80 --window 18 24 24`, see `gna-flex demo` run on a photograph,
# and pass the mask to the attention layers of a model under `torch.compile`.
