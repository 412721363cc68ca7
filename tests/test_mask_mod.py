"""Generated ``mask_mod`` functions against the independent definition, in natural and tile order."""

import inspect
import math
import random
import traceback

import numpy as np
import pytest
import torch
from helpers import Sizes, dense_mask, gna_id, random_gna, random_tile, tile_places, tiled_mask
from torch.nn.attention.flex_attention import create_mask

from gna_flex import GNA, TileOrder
from gna_flex.mask_mod import mask_mod, per_head, to_natural

SMALL = Sizes(one=40, two=9, three=5)


def evaluate(mod, heads: int, q_len: int, kv_len: int) -> np.ndarray:
    """A mask_mod on all pairs ``[heads, queries, keys]``."""
    b, h = torch.zeros(1, dtype=torch.int64), torch.arange(heads)[:, None, None]
    keep = mod(b, h, torch.arange(q_len)[:, None], torch.arange(kv_len))
    assert keep.dtype == torch.bool
    return torch.broadcast_to(keep, (heads, q_len, kv_len)).numpy()


def heads_of(rng: random.Random, count: int, same_dilation: bool = False) -> tuple[GNA, ...]:
    """GNAs of one layout and text, one per head."""
    first = random_gna(rng, sizes=SMALL)
    gnas = [first]
    while len(gnas) < count:
        dilation = first.dilation if same_dilation else [min(rng.choice([1, 2, 3]), n) for n in first.layout]
        window = [rng.randint(1, n // d) for n, d in zip(first.layout, dilation, strict=True)]
        stride = [rng.randint(1, w) for w in window]
        causal = [rng.random() < 0.5 for _ in window]
        gnas.append(GNA(first.layout, window, stride, dilation, causal, first.text_first, first.text_last))
    return tuple(gnas)


@pytest.mark.parametrize("ndim", [2, 3], ids=["2d", "3d"])
@pytest.mark.parametrize("number", range(10))
def test_natural_order_of_random_grids(ndim, number):
    rng = random.Random(f"{ndim}{number}")
    for _ in range(100):
        gna = random_gna(rng, ndim, SMALL)
        found = evaluate(mask_mod((gna,)), 1, gna.tokens, gna.tokens)[0]
        assert (found == dense_mask(gna)).all(), gna


@pytest.mark.parametrize("number", range(6))
def test_tile_order_of_random_grids(number):
    rng = random.Random(number)
    for _ in range(100):
        gna = random_gna(rng, sizes=SMALL)
        q_tile, kv_tile = random_tile(rng, gna.ndim), random_tile(rng, gna.ndim)
        q, kv = TileOrder(gna, q_tile), TileOrder(gna, kv_tile)
        found = evaluate(mask_mod((gna,), q, kv), 1, q.tokens, kv.tokens)[0]
        expected = tiled_mask(dense_mask(gna), tile_places(gna, q_tile), tile_places(gna, kv_tile))
        assert (found == expected).all(), (gna, q_tile, kv_tile)


@pytest.mark.parametrize("number", range(4))
def test_one_gna_per_head(number):
    rng = random.Random(number)
    for _ in range(40):
        gnas = heads_of(rng, rng.choice([2, 3, 5]))
        found = evaluate(mask_mod(gnas), len(gnas), gnas[0].tokens, gnas[0].tokens)
        assert (found == np.stack([dense_mask(gna) for gna in gnas])).all(), gnas


@pytest.mark.parametrize("number", range(4))
def test_one_gna_per_head_in_tile_order(number):
    rng = random.Random(number)
    for _ in range(40):
        gnas = heads_of(rng, 3, same_dilation=True)
        tile = random_tile(rng, gnas[0].ndim)
        order = TileOrder(gnas[0], tile)
        places = tile_places(gnas[0], tile)
        found = evaluate(mask_mod(gnas, order, order), 3, order.tokens, order.tokens)
        assert (found == np.stack([tiled_mask(dense_mask(gna), places, places) for gna in gnas])).all(), (gnas, tile)


@pytest.mark.parametrize(
    "gna",
    [
        GNA(11, 3),
        GNA((5, 7), (3, 2), dilation=(1, 3), causal=(False, True)),
        GNA((3, 4, 3), 2, stride=2, text_first=2, text_last=1),
    ],
    ids=gna_id,
)
def test_torch_evaluates_it_on_scalars(gna):
    """torch applies a mask_mod to scalars under vmap."""
    found = create_mask(mask_mod((gna,)), None, None, gna.tokens, gna.tokens, device="cpu")[0, 0]
    assert (found.numpy() == dense_mask(gna)).all()


@pytest.mark.parametrize("number", range(4))
def test_to_natural_is_the_order(number):
    rng = random.Random(number)
    for _ in range(75):
        gna = random_gna(rng)
        tile = random_tile(rng, gna.ndim)
        order = TileOrder(gna, tile)
        places = tile_places(gna, tile)
        found = to_natural(order)(torch.arange(order.tokens)).numpy()
        real = places >= 0
        assert (found[real] == places[real]).all(), (gna, tile)
        assert ((found >= 0) & (found < gna.tokens)).all(), f"padding must stay inside: {gna}, {tile}"


def test_same_arguments_give_the_same_function():
    gna = GNA((8, 8), 3)
    order = TileOrder(gna, (2, 4))
    assert mask_mod((gna,)) is mask_mod((GNA((8, 8), (3, 3)),))
    assert mask_mod((gna,), order, order) is mask_mod((gna,), TileOrder(gna, (2, 4)), TileOrder(gna, [2, 4]))
    assert to_natural(order) is to_natural(TileOrder(gna, (2, 4)))
    assert mask_mod((gna,)) is not mask_mod((GNA((8, 8), 5),))


@pytest.mark.parametrize("text", [(0, 0), (3, 0), (2, 5)], ids=["no-text", "text-first", "text-both"])
@pytest.mark.parametrize("tiled", [False, True], ids=["natural", "tiled"])
def test_every_number_is_a_literal(tiled, text):
    """Captured integers would become symbolic sizes; ``abs`` trips a compiler bug on some GPUs."""
    gna = GNA((9, 8), (4, 3), (2, 1), (2, 1), (False, True), *text)
    order = TileOrder(gna, (2, 2)) if tiled else None
    for function in [mask_mod((gna,), order, order), *([to_natural(order)] if tiled else [])]:
        assert function.__closure__ is None
        assert not [x for x in function.__globals__.values() if isinstance(x, int | tuple | torch.Tensor)]
        source = inspect.getsource(function)
        assert source.startswith("def ")
        assert "abs(" not in source
        assert compile(source, "source", "exec")


def test_traceback_shows_the_source():
    try:
        mask_mod((GNA((9, 8), 4),))(0, 0, "no index", 0)
    except TypeError as error:
        shown = "".join(traceback.format_tb(error.__traceback__))
        assert "quotient(q, 8)" in shown
    else:
        pytest.fail("a string is no index")


@pytest.mark.parametrize("values", [(3, 5, 4), (7, 7, 7), (True, False, True), (2,)], ids=str)
def test_per_head_picks(values):
    picked = per_head(torch.arange(len(values)), values)
    assert picked.tolist() == list(values)
    assert picked.dtype == (torch.bool if isinstance(values[0], bool) else torch.int64)


def test_index_types_of_kernels():
    """Kernels pass 32-bit indices."""
    gna = GNA((6, 7), (3, 2), dilation=(2, 1), text_last=2)
    q = torch.arange(gna.tokens, dtype=torch.int32)
    keep = mask_mod((gna,))(torch.tensor(0), torch.tensor(0), q[:, None], q)
    assert (keep.numpy() == dense_mask(gna)).all()


def test_large_indices_do_not_overflow():
    gna = GNA((1210, 3600, 3680), 11)
    last = gna.tokens - 1
    assert last > 2**33
    mod = mask_mod((gna,))
    assert mod(0, 0, torch.tensor(last), torch.tensor([last, last - 1, 0, last - 11])).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert math.prod(gna.layout) == gna.tokens
