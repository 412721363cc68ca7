"""What the tests share: an independent definition of the mask, random cases, a float64 oracle and error budgets.

Nothing here calls gna_flex, but for the ``GNA`` that describes a case.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gna_flex import GNA

ONE_DIM_LIMIT = 24


@functools.cache
def attended(length: int, window: int, stride: int, dilation: int, causal: bool) -> tuple[tuple[int, ...], ...]:
    """Keys of every query in one dimension, straight from the definition, in plain Python."""
    keys = []
    for q in range(length):
        group, i = q % dilation, q // dilation
        size = len(range(group, length, dilation))
        if causal:
            lead = min((i // stride) * stride + stride - 1, size - 1)
            lo, hi = max(lead - window + 1, 0), i + 1
        else:
            lead = min((i // stride) * stride + stride // 2, size - 1)
            lo = min(max(lead - window // 2, 0), size - window)
            hi = lo + window
        keys.append(tuple(j * dilation + group for j in range(lo, hi)))
    return tuple(keys)


@functools.cache
def dim_mask(length: int, window: int, stride: int, dilation: int, causal: bool) -> np.ndarray:
    """:func:`attended` as booleans ``[queries, keys]``."""
    mask = np.zeros((length, length), dtype=bool)
    for q, keys in enumerate(attended(length, window, stride, dilation, causal)):
        mask[q, list(keys)] = True
    mask.flags.writeable = False
    return mask


def one_dim_sets(limit: int = ONE_DIM_LIMIT) -> Iterator[tuple[int, int, int, int, bool]]:
    """Every legal ``(length, window, stride, dilation, causal)`` with ``length <= limit``."""
    for length in range(1, limit + 1):
        for dilation in range(1, length + 1):
            for window in range(1, length // dilation + 1):
                for stride in range(1, window + 1):
                    for causal in (False, True):
                        yield length, window, stride, dilation, causal


def dense_mask(gna: GNA) -> np.ndarray:
    """Booleans ``[S, S]`` in natural order, text tokens included."""
    grid = np.ones((1, 1), dtype=bool)
    for dim in gna.dims():
        mask = dim_mask(*dim)
        size = len(grid) * len(mask)
        grid = (grid[:, None, :, None] & mask[None, :, None, :]).reshape(size, size)
    keep = np.ones((gna.tokens, gna.tokens), dtype=bool)
    inside = slice(gna.text_first, gna.text_first + gna.grid_tokens)
    keep[inside, inside] = grid
    return keep


def tile_places(gna: GNA, tile: tuple[int, ...]) -> np.ndarray:
    """Natural index of the token at every place of a tile order, -1 for padding, by plain loops."""
    block = math.prod(tile)

    def text(first: int, count: int) -> list[int]:
        return [*range(first, first + count), *[-1] * (-count % block)]

    places = text(0, gna.text_first)
    tiles = [math.ceil(math.ceil(n / d) / t) for n, d, t in zip(gna.layout, gna.dilation, tile, strict=True)]
    for group in itertools.product(*map(range, gna.dilation)):
        for corner in itertools.product(*map(range, tiles)):
            for inside in itertools.product(*map(range, tile)):
                token = 0
                for axis, length in enumerate(gna.layout):
                    x = (corner[axis] * tile[axis] + inside[axis]) * gna.dilation[axis] + group[axis]
                    token = token * length + x if x < length and token >= 0 else -1
                places.append(token if token < 0 else token + gna.text_first)
    return np.array(places + text(gna.text_first + gna.grid_tokens, gna.text_last))


def tiled_mask(keep: np.ndarray, q_places: np.ndarray, kv_places: np.ndarray) -> np.ndarray:
    """A natural mask in tile order; padding neither sees nor is seen."""
    return keep[np.ix_(q_places, kv_places)] & (q_places >= 0)[:, None] & (kv_places >= 0)


def dense_blocks(keep: np.ndarray, q_block: int, kv_block: int) -> tuple[np.ndarray, np.ndarray]:
    """Partial and full blocks ``[query blocks, key blocks]`` of a mask; a block cut by the end is never full."""
    rows, columns = -(-keep.shape[0] // q_block), -(-keep.shape[1] // kv_block)
    padded = np.zeros((rows * q_block, columns * kv_block), dtype=bool)
    padded[: keep.shape[0], : keep.shape[1]] = keep
    kept = padded.reshape(rows, q_block, columns, kv_block).sum((1, 3), dtype=np.int64)
    full = kept == q_block * kv_block
    return (kept > 0) & ~full, full


def listed_blocks(counts: Any, indices: Any, columns: int) -> np.ndarray:
    """A block list as booleans ``[rows, columns]``; it must be strictly ascending."""
    counts, indices = np.asarray(counts), np.asarray(indices)
    dense = np.zeros((len(counts), columns), dtype=bool)
    for row, count in enumerate(counts):
        used = indices[row, :count]
        assert (np.diff(used) > 0).all(), f"row {row} is not ascending: {used}"
        dense[row, used] = True
    return dense


class Sizes(NamedTuple):
    """Longest side of random layouts, per number of dimensions."""

    one: int = 60
    two: int = 12
    three: int = 7


DEFAULT_SIZES = Sizes()


def random_rest(rng: random.Random, kv_tile: tuple[int, int, int], slots: int) -> tuple[int, int, int] | None:
    """A second shape of key boxes for the kernel, with as many keys, if there is one."""
    keys = math.prod(kv_tile)
    sides = [n for n in range(1, keys + 1) if keys % n == 0]
    shapes = [(a, b, keys // (a * b)) for a in sides for b in sides if keys // a % b == 0]
    fitting = [shape for shape in shapes if sum(shape) + sum(kv_tile) < slots]
    return rng.choice(fitting) if fitting else None


def random_gna(
    rng: random.Random, ndim: int | None = None, sizes: Sizes = DEFAULT_SIZES, text: Iterable[int] = (0, 0, 1, 5, 9)
) -> GNA:
    """A legal GNA: odd and even, tiny and whole windows, dilation that need not divide, causal or not, with text."""
    n = ndim or rng.choice([1, 2, 2, 3, 3])
    layout = [rng.randint(1, sizes[n - 1]) for _ in range(n)]
    dilation = [min(rng.choice([1, 1, 1, 2, 3]), length) for length in layout]
    window = [rng.randint(1, length // d) for length, d in zip(layout, dilation, strict=True)]
    stride = [rng.choice([1, rng.randint(1, w), w]) for w in window]
    causal = [rng.random() < 0.3 for _ in layout]
    first, last = rng.choice(list(text)), rng.choice(list(text))
    return GNA(layout, window, stride, dilation, causal, text_first=first, text_last=last)


def random_tile(rng: random.Random, ndim: int) -> tuple[int, ...]:
    return tuple(rng.choice([1, 2, 3, 4]) for _ in range(ndim))


def gna_id(gna: Any) -> str | None:
    """A short readable name of a case, such as ``8x12-w5x4-s2x1-d1x2-c01-t3+7``; pytest names anything else."""
    if not isinstance(gna, GNA):
        return None

    def show(values: tuple[Any, ...]) -> str:
        return "x".join(str(int(v)) for v in values)

    parts = [show(gna.layout), "w" + show(gna.window)]
    parts += ["s" + show(gna.stride)] if set(gna.stride) != {1} else []
    parts += ["d" + show(gna.dilation)] if set(gna.dilation) != {1} else []
    parts += ["c" + "".join(str(int(c)) for c in gna.causal)] if any(gna.causal) else []
    parts += [f"t{gna.text_first}+{gna.text_last}"] if gna.text_first or gna.text_last else []
    return "-".join(parts)


class Exact(NamedTuple):
    """Output, log-sum-exp and maximum of dense attention."""

    out: Tensor
    lse: Tensor
    top: Tensor


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, keep: Any, scale: float | None = None, bias: Tensor | float = 0.0
) -> Exact:
    """Explicit softmax over the kept pairs, every step in the type of the inputs; rows without any key give 0."""
    groups = query.shape[1] // key.shape[1]
    key, value = (
        torch.cat([x[:, h : h + 1] for h in range(x.shape[1]) for _ in range(groups)], 1) for x in (key, value)
    )
    keep = torch.as_tensor(np.array(keep) if isinstance(keep, np.ndarray) else keep)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale) + bias
    empty = ~keep.any(-1, keepdim=True)
    top = scores.masked_fill(~keep, -math.inf).amax(-1, keepdim=True).masked_fill(empty, 0)
    weights = (scores - top).masked_fill(~keep, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ value) / total.masked_fill(empty, 1)
    lse = top + total.masked_fill(empty, 1).log()
    return Exact(out, *(x.masked_fill(empty, -math.inf).squeeze(-1) for x in (lse, top)))


def exact_attention(query: Tensor, key: Tensor, value: Tensor, keep: Any, **options: Any) -> Exact:
    """:func:`dense_attention` in float64."""
    return dense_attention(query.double(), key.double(), value.double(), keep, **options)


class Gradients(NamedTuple):
    """Of query, key and value, and what they are computed from: log-sum-exp and delta, ``[B, H, S]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    lse: Tensor
    delta: Tensor


def dense_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    keep: Tensor,
    scale: float,
    grad_lse: Tensor | float = 0.0,
    *,
    low: bool = False,
) -> Gradients:
    """Gradients from those of output and log-sum-exp, by the formulas of FlashAttention; every query sees a key.

    In float64, but for delta, which comes from an output in the type of the inputs, as kernels have it. Or, ``low``, in
    float32 with weights, their gradients and results in the type of the inputs: what a plain run in that type loses.
    """
    dtype, work = query.dtype, torch.float32 if low else torch.float64
    groups = query.shape[1] // key.shape[1]
    q, k, v, grad = (x.detach().to(work) for x in (query, key, value, grad))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(work) if low else x

    scores = (q @ k.mT * scale).masked_fill(~keep, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    delta = ((weights @ v).to(dtype).to(work) * grad).sum(-1) - grad_lse
    of_scores = rounded(weights * (grad @ v.mT - delta[..., None]) * scale)
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (of_scores.mT @ q, rounded(weights).mT @ grad))
    return Gradients(*(rounded(x) for x in (of_scores @ k, dk, dv)), lse, delta)


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference; infinite where only one is finite or anything is NaN."""
    actual, exact = actual.detach().double(), exact.detach().double()
    difference = torch.where(actual == exact, torch.zeros_like(exact), actual - exact).abs()
    difference = difference.nan_to_num(nan=math.inf, posinf=math.inf)
    return difference.max().item(), difference.square().mean().sqrt().item()


def assert_within_budget(name: str, actual: Tensor, exact: Tensor, plain: Tensor, factor: float = 3.0) -> None:
    """``actual`` is as near to ``exact`` as ``factor`` times a plain dense run in the same type, but for rounding."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    finite = exact.where(exact.isfinite(), 0)
    sizes = errors(finite, torch.zeros_like(finite))
    # The oracle itself is float64: where the result is too, both round.
    rounding = torch.finfo(actual.dtype).eps * (32 if actual.dtype == torch.float64 else 1)
    for kind, error, of_plain, size in zip(
        ("largest", "rms"), errors(actual, exact), errors(plain, exact), sizes, strict=True
    ):
        budget = factor * of_plain + rounding * size
        assert error <= budget, f"{name}: {kind} error {error:.3e} exceeds {budget:.3e}"
