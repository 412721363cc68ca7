# %% [markdown]
# # Is this mask perfectly block-sparse?
#
# A kernel works on tiles: boxes of queries against boxes of keys. A tile of which every pair is kept runs at full
# speed, a tile of which some pairs are kept computes all of them and throws the rest away. A mask is *perfectly
# block-sparse* when no tile of the second kind is left. Here you ask whether yours is, get a proof or the reason why
# not, and learn what would change that. It runs in seconds, without a GPU.

# %%
import sympy
from rich import print

from gna_flex import GNA, gna_mask
from gna_flex.page import save_page
from gna_flex.simulate import simulate
from gna_flex.symbolic import SymbolicGNA, prove, recognise, solve

# %% [markdown]
# ## Start with the report
#
# Every mask has one. This is FLUX at 4096 x 4096 pixels: an image of 256 x 256 tokens, each of which sees 80 x 80.

# %%
gna = GNA((256, 256), window=80)
mask = gna_mask(gna, device="cpu")
result = mask.report(q_tile=(16, 8), kv_tile=(16, 8))
print(result)
assert not result.perfect

# %% [markdown]
# Half of the visited blocks are partial, and in the worst place a query tile visits far more keys than it needs. The
# table in the middle compares three ways to cut keys into tiles: stretches of the natural order, boxes on a fixed grid
# (*static*), and boxes that start where the window starts (*anchored*).
#
# ## Ask why

# %%
answer = prove(gna, (16, 16), (16, 8))
print(answer)
assert not answer

# %% [markdown]
# The answer is exact, and it does not come from trying all tiles: it is arithmetic on a few numbers per dimension, and
# takes as long for a million tokens as for ten. A refutation names the first tile that needs a mask, with a pair in it
# that is kept and one that is dropped, and the nearest changes that would do. Each of them has a proof of its own:

# %%
remedy = answer.remedies[0]
print(str(remedy))
better = remedy.proof.gna
assert remedy.proof.perfect
assert simulate(better, (16, 16), (16, 8)).partial == 0

# %% [markdown]
# A stride of 16 makes groups of 16 x 16 queries share one window. All strides that work, and the smallest of them:

# %%
solution = solve(gna, (16, 16), (16, 8), unknown="stride")
print(str(solution))
assert solution.smallest == (16, 16)

# %% [markdown]
# ## Ask for all sizes at once
#
# Any number may be a symbol. For which widths is an image of `16 h x 8 w` tokens fine with that stride?

# %%
h, w = sympy.symbols("h w", integer=True, positive=True)
general = prove(SymbolicGNA((16 * h + 80, 8 * w + 80), window=80, stride=16), (16, 16), (16, 8))
print(general)
assert general.perfect

# %% [markdown]
# For all of them. Where the answer depends on the symbols, it is the condition that remains, as a SymPy expression:

# %%
T = sympy.Symbol("T", integer=True, positive=True)
condition = prove(better, 16, T).condition
print(condition)
assert condition.subs(T, 16) == True  # noqa: E712  (a SymPy truth value)
assert condition.subs(T, 32) == False  # noqa: E712

# %% [markdown]
# ## Bring your own mask
#
# You may have a `mask_mod` already. If it is a GNA mask, `recognise` finds out which one and proves it; it never
# guesses. This one clamps the centre of the window to the image by hand:


# %%
def neighbors(b, h, q_idx, kv_idx):
    row, column = q_idx // 32, q_idx % 32
    key_row, key_column = kv_idx // 32, kv_idx % 32
    near_row = (key_row - row.clamp(3, 24 - 4)).abs() <= 3
    near_column = (key_column - column.clamp(4, 32 - 5)).abs() <= 4
    return near_row & near_column


found = recognise(neighbors, layout=(24, 32))
print(found.gna)
assert found.gna == GNA((24, 32), window=(7, 9))

# %% [markdown]
# Without the clamping, windows at the edges are cut off instead of moved inside. That is not GNA; you are told where:


# %%
def cut_off(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx).abs() <= 3


refused = recognise(cut_off, layout=24)
print(refused.reason)
assert refused.gna is None

# %% [markdown]
# ## Look at it
#
# One HTML file, without network or server: drag the query, change tiles, see what is visited.

# %%
save_page("sparsity.html", gna, q_tile=(16, 8))
print("open sparsity.html in a browser")

# %% [markdown]
# The same from a shell: `gna-flex report 256x256 --window 80 --html sparsity.html`,
# `gna-flex prove 256x256 --window 80 --q-tile 16 --kv-tile 16 8`. Next: let the machine choose the parameters.
