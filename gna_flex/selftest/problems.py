"""Small problems that together use everything a route can do, and what their results may differ by from float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gna_flex.kernels import FLOAT8, output_type
from gna_flex.mask import GNABlockMask, gna_mask
from gna_flex.neighborhood import GNA
from gna_flex.reference import reference_attention

LSE_TOLERANCE = 1e-5
"""Error of a log-sum-exp in float32, relative to one more than its size."""
LIFT = 2.0**8
"""The largest weight of a row in 8 bits, which is exact: 2 to the ``kLift`` of ``csrc/blackwell/softmax.cuh``."""


@dataclass(frozen=True)
class Problem:
    """A call. ``gnas`` is one GNA, or one per head; ``valid`` are text tokens that count, of each batch entry.

    ``heads_last`` and ``apart`` name operands (of q, k, v): heads come after tokens in memory; rows are no multiples of
    16 bytes apart, so that no tensor map describes them. ``small`` problems stand for all of them where a call takes
    seconds to compile.
    """

    name: str
    gnas: tuple[GNA, ...]
    head_dim: int = 64
    dtype: str = "bfloat16"
    batch: int = 1
    heads: int = 2
    key_heads: int = 0
    heads_last: str = ""
    apart: str = ""
    scale: float | None = None
    valid: tuple[tuple[int, int], ...] = ()
    small: bool = False

    @property
    def type(self) -> torch.dtype:
        """The type of query, key and value."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def mask(self, device: torch.device | str) -> GNABlockMask:
        """The mask of the call."""
        mask = gna_mask(self.gnas[0] if len(self.gnas) == 1 else self.gnas, device=device)
        if not self.valid:
            return mask
        first, last = zip(*self.valid, strict=True)
        return mask.with_valid_text(first=first, last=last)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value on the CPU, the same in every process."""
        generator = torch.Generator().manual_seed(0)
        tokens, dtype = self.gnas[0].tokens, self.type

        def make(name: str) -> Tensor:
            heads = self.heads if name == "q" else self.key_heads or self.heads
            sizes = (tokens, heads) if name in self.heads_last else (heads, tokens)
            x = torch.randn(self.batch, *sizes, self.head_dim + (name in self.apart), generator=generator).to(dtype)
            x = x.transpose(1, 2) if name in self.heads_last else x
            return x[..., : self.head_dim]

        return make("q"), make("k"), make("v")


def _one(name: str, gna: GNA, head_dim: int = 64, dtype: str = "bfloat16", **options: object) -> Problem:
    return Problem(name, (gna,), head_dim, dtype, **options)  # type: ignore[arg-type]


FLOAT8_NAME = "float8_e4m3fn"
TEXT = GNA((20, 24), (7, 9), text_first=300, text_last=77)
PROBLEMS = (
    _one("a window for each query", GNA((28, 37), (9, 12)), 128, small=True),
    _one("a window for each query, float16", GNA((28, 37), (9, 12)), 64, "float16"),
    _one("groups of queries share a window", GNA((32, 48), (16, 16), (8, 16)), 128, "float16"),
    _one("a window for each query, 3-D", GNA((7, 9, 14), (4, 5, 7)), 128),
    _one("stride, 3-D, float16", GNA((7, 9, 14), (4, 5, 7), (2, 3, 4)), 64, "float16"),
    _one("causal", GNA(700, 200, causal=True), 128),
    _one("causal in one of three", GNA((6, 10, 13), (3, 4, 5), causal=(True, False, False)), 96),
    _one("dilation", GNA((29, 31), (5, 6), (2, 1), (3, 2)), 64),
    _one("dilation and text", GNA((19, 22), (4, 6), dilation=(2, 3), text_first=5, text_last=140), 128, "float16"),
    _one("text before and after", TEXT, 64, small=True),
    _one("text before and after, float16", TEXT, 128, "float16"),
    _one("text of which some counts", TEXT, 128, batch=3, valid=((300, 77), (129, 0), (0, 5))),
    _one("grouped heads that come last", GNA((18, 23), (5, 8)), 128, batch=2, heads=4, key_heads=2, heads_last="qkv"),
    _one("values that lie otherwise than keys", GNA((18, 23), (5, 8)), 64, batch=2, heads_last="v"),
    _one("keys that have to be copied", GNA((18, 23), (5, 8)), 128, "float16", apart="k"),
    Problem("a window per head", (GNA((16, 24), 3), GNA((16, 24), (7, 12)), GNA((16, 24), -1)), 64, heads=3),
    _one("everything sees everything", GNA((37, 41), -1), 128),
    _one("large scores", GNA((28, 37), (9, 12)), 64, scale=1.0),
    _one("a scale of zero", GNA((28, 37), (9, 12)), 128, scale=0.0),
    _one("one token", GNA(1, 1), 64),
    _one("head dim 8", GNA((21, 22), (5, 6)), 8, small=True),
    _one("head dim 40", GNA((21, 22), (5, 6), dilation=(2, 1)), 40, "float16"),
    _one("head dim 96", GNA((21, 22), (5, 6)), 96, "float16"),
    _one("head dim 112", GNA((21, 22), (5, 6)), 112),
    _one("head dim 192", GNA((21, 22), (5, 6)), 192),
    _one("head dim 256", GNA((21, 22), (5, 6)), 256, "float16"),
    _one("many items", GNA(600, 64), 64, batch=4, heads=24),
    _one("many keys", GNA(4096, -1), 64, heads=1),
    _one("a window for each query, float8", GNA((28, 37), (9, 12)), 128, FLOAT8_NAME),
    _one("dilation and text, float8", GNA((19, 22), 4, dilation=(2, 3), text_first=5, text_last=140), 64, FLOAT8_NAME),
    _one("causal, grouped heads, float8", GNA(300, 120, causal=True), 64, FLOAT8_NAME, key_heads=1),
    _one("large scores, float8", GNA((28, 37), (9, 12)), 128, FLOAT8_NAME, scale=1.0),
    _one("many keys, causal", GNA(2500, 2500, causal=True), 128, heads=1),
)


class Expected(NamedTuple):
    """Output and log-sum-exp in float64, and how large errors of each row may be that are rounding."""

    out: Tensor
    lse: Tensor
    budget: Tensor
    lse_budget: Tensor


def expected(problem: Problem, rounds_queries: bool = False, exponential_error: float = 0.0) -> Expected:
    """What a problem should give, computed on the CPU.

    The budget of a row is three times what attention loses there that has weights and output in few bits and all else
    in float32 (of queries that are scaled and then rounded as well, if ``rounds_queries``), and two roundings of the
    row's largest value: where few keys count, weights and output may happen to lose nothing. In 8 bits that asks of a
    kernel not to round the largest weight, as here. Log-sum-exps may be off by roundings of float32, and by the
    relative error of exponentials.
    """
    tensors, mask = problem.tensors(), problem.mask("cpu")
    q, k, v = (x.double() for x in tensors)
    exact, exact_lse, _ = reference_attention(q, k, v, mask.mask_mod, scale=problem.factor)
    low, low_lse = _in_low_precision(problem, tensors, mask, rounds_queries)
    rounding = torch.finfo(low.dtype).eps * exact.abs().amax(-1, keepdim=True)
    budget = 3 * (low.double() - exact).abs().amax(-1, keepdim=True) + 2 * rounding
    lse_budget = LSE_TOLERANCE * (1 + exact_lse.abs()) + exponential_error
    if rounds_queries:  # at random, so that rows of one run say little of those of another
        budget = budget.amax().expand_as(budget)
        lse_budget = lse_budget + 3 * (low_lse - exact_lse).abs().amax()
    return Expected(exact, exact_lse, budget, lse_budget)


def _in_low_precision(
    problem: Problem, tensors: tuple[Tensor, Tensor, Tensor], mask: GNABlockMask, rounds_queries: bool
) -> tuple[Tensor, Tensor]:
    query, key, value = tensors
    groups = query.shape[1] // key.shape[1]
    queries = query.float() * problem.factor
    queries = queries.to(query.dtype).float() if rounds_queries else queries
    keys, values = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    place = torch.arange(query.shape[2])
    batch, head = torch.arange(query.shape[0])[:, None, None, None], torch.arange(query.shape[1])[:, None, None]
    keep = mask.mask_mod(batch, head, place[:, None], place)
    scores = (queries @ keys.mT).masked_fill(~keep, -math.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = (rounded_weights(weights, query.dtype) @ values / total).to(output_type(query.dtype))
    return out, (top + total.log()).squeeze(-1)


def rounded_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of at most 1 as kernels multiply them with values; in 8 bits times :data:`LIFT`: small ones lose bits."""
    lift = LIFT if dtype == FLOAT8 else 1.0
    return (weights * lift).to(dtype).float() / lift


class Comparison(NamedTuple):
    """The largest error of an output, and how much of their budgets errors of output and log-sum-exp take at most.

    Infinite where a result is not finite.
    """

    error: float
    share: float
    lse_share: float

    @property
    def passed(self) -> bool:
        """Whether all errors are rounding."""
        return max(self.share, self.lse_share) <= 1


def compare(out: Tensor, lse: Tensor | None, wanted: Expected) -> Comparison:
    """A result, perhaps without log-sum-exp, beside what it should be."""
    error = _error(out, wanted.out)
    lse_share = 0.0 if lse is None else (_error(lse, wanted.lse) / wanted.lse_budget).max().item()
    return Comparison(error.max().item(), (error / wanted.budget).max().item(), lse_share)


def _error(actual: Tensor, exact: Tensor) -> Tensor:
    return (actual.cpu().double() - exact).abs().nan_to_num(nan=math.inf, posinf=math.inf)
