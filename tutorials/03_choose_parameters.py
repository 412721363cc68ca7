# %% [markdown]
# # Choose window, stride and tiles
#
# You have a grid of tokens and a goal: leave out 91 % of the work. Which window, which stride, which tiles? Larger
# strides make neighborhoods coarser (queries share windows) but cheaper to compute. Here you see the trade-off, and
# what it buys in a whole model. It runs in seconds, without a GPU: times are predicted from measured constants.

# %%
from rich import print

from gna_flex import GNA
from gna_flex.predict import predict
from gna_flex.search import search
from gna_flex.simulate import end_to_end, simulate
from gna_flex.symbolic import prove

# %% [markdown]
# ## Search
#
# HunyuanVideo makes 5 seconds of 720p video from 30 x 48 x 80 tokens. All windows that leave out about 91 % of the
# pairs in about the proportions of the layout, all strides that are powers of two, all tiles of 128 tokens:

# %%
result = search((30, 48, 80), sparsity=0.91, device="h200", heads=24, head_dim=128, limit=5)
print(result)
fastest = result.candidates[0]
assert fastest.perfect

# %% [markdown]
# Rows with a star are the ones worth a thought: nothing else is both faster and closer to a sliding window (a smaller
# product of strides). Usually you know the window already, from a paper or from training. Then only strides remain:

# %%
window = (18, 24, 24)
strides = search((30, 48, 80), window=window, limit=3)
print(strides)
best = strides.candidates[0]
assert best.stride == (2, 8, 8)

# %% [markdown]
# The paper's own choice is 16 x 8 x 8. A stride of 2 x 8 x 8 keeps every visited tile full, too, and 8 times fewer
# queries share a window. Don't take the search's word for it:

# %%
gna = GNA((30, 48, 80), window, best.stride)
proof = prove(gna, best.q_tile, best.kv_tile)
print(proof)
assert proof.perfect

# %% [markdown]
# ## How much faster?
#
# Three numbers, from the optimistic to the useful. *Arithmetic* is the bound; *tiles* counts what a kernel visits (the
# worst query tile, as papers do, and the mean, which is what you pay for); *time* also knows what a partial tile and
# sorting tokens into tiles cost on a device.

# %%
tiles = simulate(gna, best.q_tile, best.kv_tile)
time = predict(gna, device="h200", heads=24, head_dim=128)
print(tiles)
print(time)
assert time.speedup < tiles.speedup <= tiles.flop_speedup * 1.001

# %% [markdown]
# Other devices are estimates from their data sheets, and say so:

# %%
print(predict(gna, device="b200", heads=24, head_dim=128))

# %% [markdown]
# ## And the whole model?
#
# Attention is 61 % of HunyuanVideo's time, and the first 15 of 50 steps stay dense:

# %%
whole = end_to_end(time.speedup, share=0.6069, steps=50, dense_steps=15)
print(f"attention {time.speedup:.1f}x faster, the model {whole:.2f}x; all attention for free would be 1.74x")
assert 1.4 < whole < end_to_end(1e9, share=0.6069, steps=50, dense_steps=15)

# %% [markdown]
# The same from a shell: `gna-flex search 30x48x80 --sparsity 0.91` and `gna-flex search --preset hunyuan-video`. To try
# all 10,368 strides instead of the powers of two add `--strides all`.
