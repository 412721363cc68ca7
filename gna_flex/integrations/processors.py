"""Self-attention layers of diffusers models with a mask: one processor per family of models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gna_flex.attention import flex_attention
from gna_flex.mask import GNABlockMask

Rotary = tuple[Tensor, Tensor]
QKV = tuple[Tensor, Tensor, Tensor]


class Processor:
    """Self-attention of one layer of one family of models; ``dense`` is the processor in whose place it is.

    Tensors are ``[B, tokens, H, D]`` until they are attended to. The rotary embedding that it is called with ends with
    the masks of all groups of layers.
    """

    def __init__(self, dense: Any, group: int | None) -> None:
        self.dense, self.group = dense, group

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Any, ...] | None = None,
    ) -> Any:
        """The attention layer ``attn`` of ``[B, tokens, channels]``; what is returned depends on the model."""
        if image_rotary_emb is None or len(image_rotary_emb) != 3:
            raise RuntimeError("the hook that hands masks to the layers is gone: remove(model), then apply again")
        cos, sin, masks = image_rotary_emb
        mask = None if self.group is None else masks[self.group]
        if mask is None:
            return self.dense(attn, hidden_states, encoder_hidden_states, attention_mask, (cos, sin))
        return self.attend(attn, hidden_states, encoder_hidden_states, (cos, sin), mask)

    def attend(self, attn: Any, x: Tensor, text: Tensor | None, rotary: Rotary, mask: GNABlockMask) -> Any:
        """The layer with a mask."""
        raise NotImplementedError


class FluxProcessor(Processor):
    """Text first; rotary embedding on everything. Single blocks get text and image as one sequence."""

    def attend(self, attn: Any, x: Tensor, text: Tensor | None, rotary: Rotary, mask: GNABlockMask) -> Any:
        """See :class:`Processor`."""
        fused = attn.fused_projections
        parts = attn.to_qkv(x).chunk(3, -1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        q, k, v = normed(parts, (-1, attn.head_dim), attn.norm_q, attn.norm_k)
        if text is not None:
            if fused:
                parts = attn.to_added_qkv(text).chunk(3, -1)
            else:
                parts = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
            added = normed(parts, (-1, attn.head_dim), attn.norm_added_q, attn.norm_added_k)
            q, k, v = (torch.cat(pair, 1) for pair in zip(added, (q, k, v), strict=True))
        out = attended(rotated(q, *rotary), rotated(k, *rotary), v, mask)
        if text is None:
            return out
        text_out, image_out = out.split([text.shape[1], x.shape[1]], 1)
        return projected_out(attn, image_out), attn.to_add_out(text_out)


class HunyuanVideoProcessor(Processor):
    """Text last, without rotary embedding; masks know which of it is padding. Single blocks have one set of weights."""

    def attend(self, attn: Any, x: Tensor, text: Tensor | None, rotary: Rotary, mask: GNABlockMask) -> Any:
        """See :class:`Processor`."""
        if text is None:
            raise RuntimeError("HunyuanVideo's layers attend to video and text, but got no text")
        heads = attn.heads, -1
        q, k, v = normed((attn.to_q(x), attn.to_k(x), attn.to_v(x)), heads, attn.norm_q, attn.norm_k)
        if attn.add_q_proj is None:
            parts = attn.to_q(text), attn.to_k(text), attn.to_v(text)
            added = normed(parts, heads, attn.norm_q, attn.norm_k)
        else:
            parts = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
            added = normed(parts, heads, attn.norm_added_q, attn.norm_added_k)
        video = rotated(q, *rotary), rotated(k, *rotary), v
        q, k, v = (torch.cat(pair, 1) for pair in zip(video, added, strict=True))
        out = attended(q, k, v, mask)
        video_out, text_out = out.split([x.shape[1], text.shape[1]], 1)
        if attn.to_out is not None:
            video_out = projected_out(attn, video_out)
        if attn.to_add_out is not None:
            text_out = attn.to_add_out(text_out)
        return video_out, text_out


class WanProcessor(Processor):
    """No text in the sequence; queries and keys are normalised over all heads at once."""

    def attend(self, attn: Any, x: Tensor, text: Tensor | None, rotary: Rotary, mask: GNABlockMask) -> Any:
        """See :class:`Processor`."""
        parts = attn.to_qkv(x).chunk(3, -1) if attn.fused_projections else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        flat = attn.norm_q(parts[0]), attn.norm_k(parts[1]), parts[2]
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in flat)
        return projected_out(attn, attended(rotated(q, *rotary), rotated(k, *rotary), v, mask))


class CosmosProcessor(Processor):
    """No text in the sequence; the rotary embedding pairs the two halves of the channels."""

    def attend(self, attn: Any, x: Tensor, text: Tensor | None, rotary: Rotary, mask: GNABlockMask) -> Any:
        """See :class:`Processor`."""
        heads = attn.heads, -1
        q, k, v = normed((attn.to_q(x), attn.to_k(x), attn.to_v(x)), heads, attn.norm_q, attn.norm_k)
        q, k = (rotated(part, *rotary, halves=True) for part in (q, k))
        return projected_out(attn, attended(q, k, v, mask))


def normed(parts: Any, heads: tuple[int, int], norm_q: Any, norm_k: Any) -> QKV:
    """Projections ``[B, tokens, H * D]`` as ``[B, tokens, H, D]`` (one is -1), queries and keys normalised per head."""
    q, k, v = (part.unflatten(-1, heads) for part in parts)
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


def rotated(x: Tensor, cos: Tensor, sin: Tensor, halves: bool = False) -> Tensor:
    """``[B, tokens, H, D]`` turned in pairs of channels, neighbours or (``halves``) one of each half, in float32.

    Cosine and sine are ``[tokens, D]`` or ``[1, tokens, 1, D]``, equal for the two channels of a pair.
    """
    if cos.ndim == 2:
        cos, sin = cos[:, None], sin[:, None]
    if halves:
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), -1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: GNABlockMask) -> Tensor:
    """Attention of ``[B, tokens, H, D]`` as ``[B, tokens, H * D]``."""
    out: Tensor = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
    return out.transpose(1, 2).flatten(2).to(q.dtype)


def projected_out(attn: Any, x: Tensor) -> Tensor:
    """The output projection and its dropout."""
    return attn.to_out[1](attn.to_out[0](x))  # type: ignore[no-any-return]
