"""Masks as others write them, functions that call torch's flex_attention with them, and what became of the calls."""

import functools

import torch
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention, noop_mask

from gna_flex import GNA, compile_report, reference_attention
from gna_flex.dynamo.backend import gna_flex_backend


def compiled(function, inner="aot_eager", **options):
    return torch.compile(function, backend=functools.partial(gna_flex_backend, inner=inner), fullgraph=True, **options)


def tensors(tokens=64, batch=2, heads=2, kv_heads=None, **options):
    """Query, key and value as a model makes them: a view of [batch, tokens, heads, head dim]."""
    return [torch.randn(batch, tokens, h, 16, **options).transpose(1, 2) for h in (heads, *[kv_heads or heads] * 2)]


def plain(query, key, value, mask, score_mod=None, scale=None):
    return flex_attention(query, key, value, score_mod, mask, scale, enable_gqa=True)


def clamped(height, width, rows, columns):
    """Distance to a center that is kept away from the edges."""

    def mod(b, h, q_idx, kv_idx):
        y = (q_idx // width).clamp(rows // 2, height - 1 - rows // 2)
        x = (q_idx % width).clamp(columns // 2, width - 1 - columns // 2)
        return ((kv_idx // width - y).abs() <= rows // 2) & ((kv_idx % width - x).abs() <= columns // 2)

    return mod


def window_start(height, width, rows, columns):
    """``start <= key < start + window``, with a loop over dimensions."""

    def mod(b, h, q_idx, kv_idx):
        keep = q_idx >= 0
        for length, window in ((width, columns), (height, rows)):
            q, k = q_idx % length, kv_idx % length
            q_idx, kv_idx = q_idx // length, kv_idx // length
            start = torch.clamp(q - window // 2, 0, length - window)
            keep = keep & (k >= start) & (k < start + window)
        return keep

    return mod


def with_text(near, first, end):
    """Tokens before the first one of a grid, and those from its end on, see everything and are seen by everything."""

    def mod(b, h, q_idx, kv_idx):
        text = (q_idx < first) | (kv_idx < first) | (q_idx >= end) | (kv_idx >= end)
        return text | near(b, h, q_idx - first, kv_idx - first)

    return mod


def block_mask(mod, tokens=64, heads=None, **options):
    return create_block_mask(mod, None, heads, tokens, tokens, device="cpu", **{"BLOCK_SIZE": 16, **options})


STYLES = {
    "clamped": (clamped(8, 8, 3, 5), GNA((8, 8), (3, 5))),
    "window-start": (window_start(8, 8, 3, 4), GNA((8, 8), (3, 4))),
    "causal": (lambda b, h, q, k: q >= k, GNA(64, -1, causal=True)),
    "sliding": (and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < 9), GNA(64, 9, causal=True)),
    "blocks": (lambda b, h, q, k: q // 16 == k // 16, GNA(64, 16, 16)),
    "where": (lambda b, h, q, k: torch.where(q < k, False, k > q - 7), GNA(64, 7, causal=True)),
    "text-first": (with_text(clamped(7, 8, 3, 5), 8, 64), GNA((7, 8), (3, 5), text_first=8)),
    "text-around": (with_text(clamped(5, 8, 1, 5), 16, 56), GNA((5, 8), (1, 5), text_first=16, text_last=8)),
    "everything": (noop_mask, GNA(64, -1)),
}

CAUSAL = STYLES["causal"][0]
MASK = block_mask(CAUSAL)


def only():
    """The one call that was reported."""
    (call,) = compile_report().calls
    return call


def assert_right(out, qkv, mask_mod):
    torch.testing.assert_close(out, reference_attention(*qkv, mask_mod)[0])


def linear_bias(score, b, h, q, k):
    return score + 0.1 * (q - k)
