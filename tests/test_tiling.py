"""Tile orders and tile counts against plain loops."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from helpers import dense_blocks, dense_mask, gna_id, random_gna, random_tile, tile_places, tiled_mask
from hypothesis import given
from hypothesis import strategies as st

from gna_flex import GNA, TileOrder, permute, unpermute
from gna_flex.intervals import key_interval, query_interval
from gna_flex.tiling import PARTIAL_COST, TileCounts, choose_tile, tile_counts, tile_intervals, tile_shapes

CASES = [
    (GNA(10, 3), (4,)),
    (GNA(11, 2, dilation=3, text_first=2), (2,)),
    (GNA((5, 7), (3, 2)), (2, 4)),
    (GNA((5, 7), (2, 2), dilation=(2, 3), text_first=3, text_last=9), (2, 2)),
    (GNA((3, 4, 5), 2, text_last=1), (2, 1, 4)),
    (GNA((5, 4, 6), 1, dilation=(2, 1, 4), text_first=8), (1, 2, 2)),
    (GNA((2, 2), 1), (8, 8)),
    (GNA((4, 4), 2), (1, 1)),
]


def case_id(value: object) -> str | None:
    return "t" + "x".join(map(str, value)) if isinstance(value, tuple) else gna_id(value)


all_cases = pytest.mark.parametrize(("gna", "tile"), CASES, ids=case_id)


@all_cases
def test_order_is_that_of_plain_loops(gna, tile):
    order = TileOrder(gna, tile)
    places = tile_places(gna, tile)
    assert order.tokens == len(places) == order.blocks * order.block
    assert sorted(places[places >= 0]) == list(range(gna.tokens))
    tokens = torch.arange(gna.tokens) + 1
    assert (order.permute(tokens, 0) == torch.from_numpy(places) + 1).all()
    assert (permute(tokens, gna, tile, 0) == torch.from_numpy(places) + 1).all()


@pytest.mark.parametrize("number", range(4))
def test_random_orders_and_round_trips(number):
    rng = random.Random(number)
    for _ in range(75):
        gna = random_gna(rng)
        tile = random_tile(rng, gna.ndim)
        order = TileOrder(gna, tile)
        tokens = torch.arange(gna.tokens) + 1
        there = order.permute(tokens, 0)
        assert there.tolist() == (tile_places(gna, tile) + 1).tolist(), (gna, tile)
        assert torch.equal(order.unpermute(there, 0), tokens), (gna, tile)


@all_cases
def test_text_keeps_its_end_and_padding_is_zero(gna, tile):
    order = TileOrder(gna, tile)
    there = order.permute(torch.arange(1, gna.tokens + 1), 0)
    first, last = (count * order.block for count in order.text_blocks)
    assert there[: gna.text_first].tolist() == list(range(1, gna.text_first + 1))
    assert there[gna.text_first : first].eq(0).all()
    tail = there[order.tokens - last :]
    assert tail[: gna.text_last].tolist() == list(range(gna.tokens - gna.text_last + 1, gna.tokens + 1))
    assert tail[gna.text_last :].eq(0).all()
    assert (there == 0).sum() == order.tokens - gna.tokens


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64],
    ids=str,
)
@all_cases
def test_round_trip_of_any_type(gna, tile, dtype):
    x = (torch.arange(2 * gna.tokens * 3).view(2, gna.tokens, 3) % 100 + 1).to(dtype)
    there = permute(x, gna, tile)
    assert there.dtype == dtype
    assert there.shape == (2, TileOrder(gna, tile).tokens, 3)
    assert torch.equal(unpermute(there, gna, tile), x)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3, -4])
def test_any_dimension(dim):
    gna, tile = GNA((5, 7), 2, dilation=(2, 3), text_first=3, text_last=9), (2, 2)
    shape = [2, 3, 4, 5]
    shape[dim] = gna.tokens
    x = torch.randn(shape)
    places = torch.from_numpy(tile_places(gna, tile))
    there = permute(x, gna, tile, dim)
    expected = torch.where(
        (places >= 0).view([-1 if d == dim % 4 else 1 for d in range(4)]), x.index_select(dim, places.clamp(0)), 0
    )
    assert torch.equal(there, expected)
    assert torch.equal(unpermute(there, gna, tile, dim), x)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="tokens-before-heads"),
        pytest.param(lambda x: torch.stack([x, x, x], 3)[..., 1, :], id="packed"),
        pytest.param(lambda x: x.mT.contiguous().mT, id="column-major"),
        pytest.param(lambda x: x[:, :1].expand(-1, 3, -1, -1), id="expanded"),
        pytest.param(lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]], id="cut"),
    ],
)
@all_cases
def test_strided_inputs(gna, tile, view):
    x = view(torch.randn(2, 3, gna.tokens, 4))
    assert torch.equal(permute(x, gna, tile), permute(x.contiguous(), gna, tile))
    there = view(permute(x.contiguous(), gna, tile))
    assert torch.equal(unpermute(there, gna, tile), unpermute(there.contiguous(), gna, tile))


@all_cases
def test_gradients(gna, tile):
    order = TileOrder(gna, tile)
    x = torch.randn(gna.tokens, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(order.tokens, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(order.permute, x)
    assert torch.autograd.gradcheck(order.unpermute, y)


def test_wrong_number_of_tokens_is_refused():
    order = TileOrder(GNA((4, 6), 3), (2, 4))
    with pytest.raises(ValueError, match=r"x has 23 tokens in dimension -2, .* layout 4x6.* tile \(2, 4\) has 24"):
        order.permute(torch.zeros(1, 23, 8))
    with pytest.raises(ValueError, match=r"x has 24 tokens in dimension 0, .* layout 4x6.* tile \(2, 4\) has 32"):
        order.unpermute(torch.zeros(24), 0)


@pytest.mark.parametrize(
    ("tile", "error", "words"),
    [
        ((2, 0), ValueError, r"tile=\(2, 0\) for layout \(4, 6\): every side must be at least 1"),
        ((2, -4), ValueError, r"tile=\(2, -4\)"),
        ((2, 2, 2), ValueError, r"tile=\(2, 2, 2\) has 3 values"),
        ((2, 2.0), TypeError, "tile takes integers"),
        (True, TypeError, "tile takes integers"),
    ],
    ids=str,
)
def test_bad_tiles_are_refused(tile, error, words):
    with pytest.raises(error, match=words):
        TileOrder(GNA((4, 6), 3), tile)


def test_order_is_a_value():
    gna = GNA((4, 6), 3)
    assert TileOrder(gna, 2) == TileOrder(gna, [2, 2]) == TileOrder(gna, (2, 2))
    assert len({TileOrder(gna, 2), TileOrder(gna, (2, 2)), TileOrder(gna, (2, 3))}) == 2


@pytest.mark.parametrize("number", range(6))
def test_tile_counts_of_random_cases(number):
    rng = random.Random(number)
    for _ in range(100):
        gna = random_gna(rng)
        q_tile = random_tile(rng, gna.ndim)
        kv_tile = q_tile if rng.random() < 0.4 else random_tile(rng, gna.ndim)
        keep = tiled_mask(dense_mask(gna), tile_places(gna, q_tile), tile_places(gna, kv_tile))
        partial, full = dense_blocks(keep, math.prod(q_tile), math.prod(kv_tile))
        expected = TileCounts(full=int(full.sum()), partial=int(partial.sum()), total=full.size)
        assert tile_counts(gna, q_tile, kv_tile) == expected, (gna, q_tile, kv_tile)


def test_tile_counts_sums():
    counts = TileCounts(full=3, partial=4, total=20)
    assert counts.visited == 7
    assert counts.cost == 3 + 4 * PARTIAL_COST


@st.composite
def one_dim_tilings(draw: st.DrawFn) -> tuple[tuple[int, int, int, int, bool], int, int]:
    length = draw(st.integers(1, 80))
    dilation = draw(st.integers(1, min(length, 4)))
    window = draw(st.integers(1, length // dilation))
    stride = draw(st.integers(1, window))
    return (length, window, stride, dilation, draw(st.booleans())), draw(st.integers(1, 20)), draw(st.integers(1, 20))


@pytest.mark.parametrize("interval", [key_interval, query_interval], ids=lambda f: f.__name__)
@given(case=one_dim_tilings())
def test_tile_intervals_are_unions_and_intersections(interval, case):
    (length, window, stride, dilation, causal), row_tile, col_tile = case
    found = tile_intervals(length, window, stride, dilation, causal, row_tile, col_tile, interval)
    tiles = math.ceil(math.ceil(length / dilation) / row_tile)
    for group, tile in itertools.product(range(dilation), range(tiles)):
        size = len(range(group, length, dilation))
        rows = range(tile * row_tile, min((tile + 1) * row_tile, size))
        seen = [set(range(*interval(i, size, window, stride, causal))) for i in rows]
        touched = {j // col_tile for keys in seen for j in keys}
        common = set.intersection(*seen) if seen else set()
        whole = {t for t in touched if set(range(t * col_tile, (t + 1) * col_tile)) <= common}
        whole = whole if len(rows) == row_tile else set()
        at = (group, tile)
        assert set(range(found.lo[at], found.hi[at])) == touched
        assert set(range(found.full_lo[at], found.full_hi[at])) == whole
        assert found.lo[at] <= found.hi[at]
        assert found.full_lo[at] <= found.full_hi[at]


@pytest.mark.parametrize("block", [1, 2, 16, 64, 128, 256])
@pytest.mark.parametrize(
    "gna",
    [GNA(300, 9), GNA((30, 48, 80), 9), GNA((3, 5), 2), GNA((1, 1, 1), 1), GNA((9, 64), 2, dilation=(4, 1))],
    ids=gna_id,
)
def test_tile_shapes(gna, block):
    shapes = list(tile_shapes(gna, block))
    assert shapes
    assert len(set(shapes)) == len(shapes)
    # the least power of two that holds a dilation group; the last dimension makes up for a grid smaller than a block
    room = [2 ** math.ceil(math.log2(-(-n // d))) for n, d in zip(gna.layout, gna.dilation, strict=True)]
    room[-1] = max(room[-1], block // math.prod(room[:-1]))
    powers = [2**e for e in range(block.bit_length())]
    expected = {
        shape
        for shape in itertools.product(powers, repeat=gna.ndim)
        if math.prod(shape) == block and all(side <= most for side, most in zip(shape, room, strict=True))
    }
    assert set(shapes) == expected


@pytest.mark.parametrize("block", [0, 3, 48, 100, -4])
def test_tile_shapes_want_a_power_of_two(block):
    with pytest.raises(ValueError, match=f"block={block}"):
        list(tile_shapes(GNA((8, 8), 3), block))


@pytest.mark.parametrize("number", range(4))
def test_chosen_tile_has_least_cost(number):
    rng = random.Random(number)
    for _ in range(15):
        ndim = rng.choice([1, 2, 3])
        gnas = (random_gna(rng, ndim, text=(0, 5)),)
        if rng.random() < 0.5:
            first = gnas[0]
            widest = [
                -(-n // d) if n % d == 0 else w
                for n, d, w in zip(first.layout, first.dilation, first.window, strict=True)
            ]
            gnas += (
                GNA(first.layout, widest, 1, first.dilation, text_first=first.text_first, text_last=first.text_last),
            )
        block = rng.choice([4, 8, 16])
        tile, counts = choose_tile(gnas, block)
        costs = {}
        for shape in tile_shapes(gnas[0], block):
            parts = [tile_counts(gna, shape, shape) for gna in gnas]
            costs[shape] = sum(part.full + PARTIAL_COST * part.partial for part in parts)
        assert costs[tile] == min(costs.values()), gnas
        assert counts.cost == pytest.approx(costs[tile])
        assert math.prod(tile) == block


def test_chosen_tile_of_perfectly_sparse_blocks():
    gna = GNA.blocked((32, 32), 8)
    tile, counts = choose_tile((gna,), 64)
    assert tile == (8, 8)
    assert counts == TileCounts(full=16, partial=0, total=256)


def test_tile_counts_of_a_video_model():
    """HunyuanVideo's grid: with 2x8x8 tiles every visited tile is full."""
    gna = GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))
    counts = tile_counts(gna, (2, 8, 8), (2, 8, 8))
    assert counts.partial == 0
    assert counts.visited == counts.full == np.prod([15, 6, 10]) * 9 * 3 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64], ids=str)
@pytest.mark.parametrize("text", [(0, 0), (3, 5)], ids=["grid", "text"])
def test_operators_equal_the_order(text, dtype):
    """The operators of compiled code: same tokens, new memory, inverse as gradient, valid for torch.compile."""
    gna = GNA((5, 8), (2, 4), dilation=(2, 1), text_first=text[0], text_last=text[1])
    order = TileOrder(gna, (2, 4))
    permute, unpermute = order.literal_permutations()
    wide = torch.arange(2 * gna.tokens * 16).reshape(2, gna.tokens, 16).to(dtype)
    for x in (wide, wide[..., :7], wide.transpose(0, 1).contiguous().transpose(0, 1), wide[..., 1:]):
        tiled = permute(x, -2)
        assert torch.equal(tiled, order.permute(x))
        assert torch.equal(unpermute(tiled, -2), x)
    if dtype == torch.float32:
        x = torch.randn(2, gna.tokens, 4, requires_grad=True)
        arguments = order._geometry()
        torch.library.opcheck(torch.ops.gna_flex.to_tiles.default, (x, 1, *map(list, arguments)))
        tiled = torch.randn(2, order.tokens, 4, requires_grad=True)
        torch.library.opcheck(torch.ops.gna_flex.from_tiles.default, (tiled, 1, *map(list, arguments)))


def test_operators_never_alias_their_input():
    gna = GNA(16, 4)
    permute, unpermute = TileOrder(gna, (4,)).literal_permutations()
    x = torch.randn(1, 16, 8)
    for function in (permute, unpermute):
        assert torch.equal(function(x, -2), x)
        assert function(x, -2).data_ptr() != x.data_ptr()
