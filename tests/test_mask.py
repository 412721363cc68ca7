"""``gna_mask``: equal to torch's ``create_block_mask`` of the same mask_mod, and a BlockMask in all it does."""

import copy
import gc
import io
import math
import pickle
import random
import re

import numpy as np
import pytest
import torch
from helpers import (
    Sizes,
    dense_blocks,
    dense_mask,
    gna_id,
    listed_blocks,
    random_gna,
    random_tile,
    tile_places,
    tiled_mask,
)
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from gna_flex import GNA, GNABlockMask, gna_mask, mask
from gna_flex.torch_private import BLOCK_TABLES

SMALL = Sizes(one=40, two=8, three=5)
TORCH_CROPS_RIGHT = torch.__version__ >= torch.torch_version.TorchVersion("2.15")
LISTS = [(BLOCK_TABLES[i], BLOCK_TABLES[i + 1]) for i in range(0, 8, 2)]


def torch_mask(ours: GNABlockMask, mask_mod=None) -> BlockMask:
    """torch's mask of the same mask_mod, batch, heads, lengths and blocks."""
    q_len, kv_len = ours.seq_lengths
    plan = ours.plan
    heads = plan.heads or (len(plan.gnas) if len(plan.gnas) > 1 else None)
    mod = mask_mod or ours.mask_mod
    return create_block_mask(mod, plan.batch, heads, q_len, kv_len, device="cpu", BLOCK_SIZE=ours.BLOCK_SIZE)


def assert_same_lists(ours: BlockMask, theirs: BlockMask, what: object = None) -> None:
    """The same counts, and the same indices up to each count, in all eight tables."""
    assert ours.seq_lengths == theirs.seq_lengths, what
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE, what
    for counts_name, indices_name in LISTS:
        counts, expected = getattr(ours, counts_name), getattr(theirs, counts_name)
        assert (counts is None) == (expected is None), (counts_name, what)
        if counts is None:
            continue
        assert counts.dtype == expected.dtype == torch.int32
        assert torch.equal(counts, expected), (counts_name, what)
        indices, expected_indices = getattr(ours, indices_name), getattr(theirs, indices_name)
        width = min(indices.shape[-1], expected_indices.shape[-1])
        assert counts.max() <= width, (indices_name, what)
        used = torch.arange(width) < counts[..., None]
        pairs = (torch.where(used, x[..., :width], -1) for x in (indices, expected_indices))
        assert torch.equal(*pairs), (indices_name, what)


def assert_same_tables(ours: BlockMask, theirs: BlockMask) -> None:
    """Equal to the last unused entry."""
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in BLOCK_TABLES:
        table, expected = getattr(ours, name), getattr(theirs, name)
        assert (table is None) == (expected is None), name
        assert table is None or torch.equal(table, expected), name


def random_mask(rng: random.Random, **options) -> GNABlockMask:
    """A mask in natural or tile order, with odd sizes and blocks that need not divide them."""
    gna = random_gna(rng, sizes=SMALL)
    if rng.random() < 0.5:
        q_tile = random_tile(rng, gna.ndim)
        kv_tile = q_tile if rng.random() < 0.5 else random_tile(rng, gna.ndim)
        return gna_mask(gna, order=(q_tile, kv_tile), device="cpu", **options)
    q_block, kv_block = (rng.choice([1, 2, 3, 5, 8, 16, 64]) for _ in range(2))
    return gna_mask(gna, q_block=q_block, kv_block=kv_block, device="cpu", **options)


def dense_of(ours: GNABlockMask) -> np.ndarray:
    """Kept pairs in the order of the mask, from the independent definition: ``[heads that differ, S, S]``."""
    masks = []
    for gna in ours.plan.gnas:
        keep = dense_mask(gna)
        if ours.plan.q_order is not None:
            keep = tiled_mask(keep, *(tile_places(gna, o.tile) for o in (ours.plan.q_order, ours.plan.kv_order)))
        masks.append(keep)
    return np.stack(masks)


def assert_counted(ours: GNABlockMask) -> None:
    """The block lists are those counted from the dense mask, for every batch and head."""
    batch, heads = ours.plan.batch or 1, ours.plan.heads or len(ours.plan.gnas)
    dense = np.broadcast_to(dense_of(ours), (heads, *ours.seq_lengths))
    for h in range(heads):
        partial, full = dense_blocks(dense[h], *ours.BLOCK_SIZE)
        expected = (partial, full, partial.T, full.T)
        for (counts, indices), blocks in zip(LISTS, expected, strict=True):
            counts, indices = getattr(ours, counts), getattr(ours, indices)
            assert counts.shape[:2] == indices.shape[:2] == (batch, heads)
            for b in range(batch):
                assert (listed_blocks(counts[b, h], indices[b, h], blocks.shape[1]) == blocks).all(), (ours.plan, b, h)


@pytest.mark.parametrize("number", range(10))
def test_lists_of_random_masks(number):
    rng = random.Random(number)
    for _ in range(100):
        assert_counted(random_mask(rng))


@pytest.mark.parametrize("number", range(10))
def test_equal_to_create_block_mask(number):
    rng = random.Random(100 + number)
    for _ in range(30):
        ours = random_mask(rng)
        assert_same_lists(ours, torch_mask(ours), ours.plan)


def four_heads(text: int = 3) -> list[GNA]:
    return [
        GNA((6, 7), (3, 4), text_last=text),
        GNA((6, 7), (6, 7), text_last=text),
        GNA((6, 7), (2, 3), dilation=(3, 2), text_last=text),
        GNA((6, 7), (4, 5), stride=(2, 5), causal=(True, False), text_last=text),
    ]


@pytest.mark.parametrize("blocks", [(8, 8), (16, 4), (5, 3)], ids=str)
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_per_head_masks_equal_torch(blocks, batch):
    ours = gna_mask(four_heads(), q_block=blocks[0], kv_block=blocks[1], device="cpu", B=batch)
    assert ours.shape == (batch or 1, 4, 45, 45)
    assert_same_lists(ours, torch_mask(ours))
    assert ours.gna == tuple(four_heads())


def test_per_head_masks_in_tile_order_equal_torch():
    heads = [gna for gna in four_heads() if gna.dilation == (1, 1)]
    ours = gna_mask(heads, order=(2, 4), device="cpu")
    assert_same_lists(ours, torch_mask(ours))
    assert_counted(ours)


@pytest.mark.parametrize(("batch", "heads"), [(None, None), (2, None), (None, 3), (2, 3), (1, 1)])
def test_batch_and_heads_equal_torch(batch, heads):
    ours = gna_mask(GNA((6, 7), 3), q_block=8, kv_block=8, device="cpu", B=batch, H=heads)
    assert ours.shape == (batch or 1, heads or 1, 42, 42)
    assert_same_lists(ours, torch_mask(ours))


@pytest.mark.parametrize("order", ["row-major", (2, 4), ((2, 2), (4, 1)), "tiles"], ids=str)
def test_dense_mask_of_the_mask_mod(order):
    ours = gna_mask(GNA((6, 7), (3, 4), (2, 1), text_first=2, text_last=5), order=order, device="cpu")
    q_len, kv_len = ours.seq_lengths
    assert (
        create_mask(ours.mask_mod, None, None, q_len, kv_len, device="cpu")[0, 0].numpy() == dense_of(ours)[0]
    ).all()


MASKS = {
    "row-major": {"gna": GNA((7, 9), (3, 4), text_last=5), "q_block": 8, "kv_block": 8},
    "ragged": {"gna": GNA((7, 9), (3, 4), (1, 2)), "q_block": 16, "kv_block": 5},
    "tiles": {"gna": GNA((8, 9), (4, 3), dilation=(2, 1), text_first=3), "order": (2, 4)},
    "blocked": {"gna": GNA.blocked((8, 8), 4), "order": (4, 4)},
    "heads": {"gna": four_heads(), "q_block": 8, "kv_block": 4},
    "batch": {"gna": GNA(50, 7, causal=True), "q_block": 4, "kv_block": 4, "B": 2, "H": 3},
    "large": {"gna": GNA((16, 40), (5, 9)), "q_block": 8, "kv_block": 8},
    "one-block": {"gna": GNA((3, 4), 2)},
}


@pytest.fixture(params=MASKS)
def ours(request: pytest.FixtureRequest) -> GNABlockMask:
    return gna_mask(**MASKS[request.param], device="cpu")


@pytest.fixture(params=["wide", "narrow"])
def table_width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tables as wide as torch's, or only as wide as their longest row."""
    if request.param == "narrow":
        monkeypatch.setattr(mask, "FULL_WIDTH_ENTRIES", 1)
    return request.param


@pytest.mark.usefixtures("table_width")
class TestAgainstTorch:
    def test_lists(self, ours):
        assert_same_lists(ours, torch_mask(ours))
        assert_counted(ours)

    def test_canonical_has_the_same_tables(self, ours):
        assert_same_tables(ours.canonical(), torch_mask(ours))
        assert type(ours.canonical()) is BlockMask
        assert ours.canonical().mask_mod is ours.mask_mod

    def test_to_dense(self, ours):
        assert torch.equal(ours.to_dense(), torch_mask(ours).to_dense())
        assert ours.to_dense().dtype == torch_mask(ours).to_dense().dtype

    @pytest.mark.parametrize("grid", [(), (20,), (5,), ((4, 7),), (-1,), ((-1, 3),), (20, 1), (20, 9)], ids=str)
    def test_to_string(self, ours, grid):
        assert ours.to_string(*grid) == torch_mask(ours).to_string(*grid)

    def test_shape_and_numel(self, ours):
        theirs = torch_mask(ours)
        assert ours.shape == theirs.shape
        assert ours.numel() == theirs.numel()

    @pytest.mark.parametrize(
        "index",
        [
            0,
            -1,
            slice(None),
            slice(0, 1),
            (0, 0),
            (0, -1),
            (0, slice(None), 0),
            (0, slice(None), slice(0, 1)),
            (slice(None), 0),
            (slice(None), slice(0, 1)),
            torch.tensor([0]),
            (0, torch.tensor([0])),
        ],
        ids=str,
    )
    def test_slices(self, ours, index):
        slices = ours[index], torch_mask(ours)[index]
        assert_same_tables(*slices)
        assert type(slices[0]) is BlockMask
        assert slices[0].mask_mod.__name__ == slices[1].mask_mod.__name__

    @pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
    def test_crops(self, ours, share):
        """As torch crops its own mask; before 2.15 it refuses, or gets wrong, masks that are not causal."""
        q_len, kv_len = (max(1, int(share * n)) for n in ours.seq_lengths)
        theirs = torch_mask(ours)
        try:
            expected = theirs._adjust(q_len, kv_len)
        except IndexError as error:
            with pytest.raises(IndexError, match=re.escape(str(error))):
                ours._adjust(q_len, kv_len)
            return
        crop = ours._adjust(q_len, kv_len)
        assert type(crop) is BlockMask
        assert crop.mask_mod is ours.mask_mod
        assert_same_lists(crop, expected)
        if TORCH_CROPS_RIGHT:
            q_blocks, kv_blocks = (-(-n // block) for n, block in zip((q_len, kv_len), ours.BLOCK_SIZE, strict=True))
            assert torch.equal(crop.to_dense(), ours.to_dense()[:, :, :q_blocks, :kv_blocks])


def test_narrow_tables_are_narrower(monkeypatch):
    gna = GNA((16, 40), (5, 9))
    wide = gna_mask(gna, q_block=8, kv_block=8, device="cpu")
    monkeypatch.setattr(mask, "FULL_WIDTH_ENTRIES", 1)
    narrow = gna_mask(gna, q_block=8, kv_block=8, device="cpu")
    for side in (LISTS[:2], LISTS[2:]):
        # torch's kernels find rows of the full blocks with the strides of the partial ones, so all are equally wide.
        longest = max(1, *(int(getattr(narrow, counts).max()) for counts, _ in side))
        for _, indices in side:
            assert getattr(wide, indices).shape[-1] == 80
            assert getattr(narrow, indices).shape[-1] == longest
            assert getattr(narrow, indices).stride() == getattr(narrow, side[0][1]).stride()
    assert_same_lists(narrow, wide)


@pytest.mark.parametrize("order", ["row-major", "tiles"])
def test_tables_of_a_real_model_have_equal_strides(order):
    ours = gna_mask(GNA((30, 48, 80), (18, 24, 24), (16, 8, 8)), order=order, device="cpu")
    assert ours.full_kv_indices.stride() == ours.kv_indices.stride()
    assert ours.full_q_indices.stride() == ours.q_indices.stride()


@pytest.mark.parametrize("number", range(3))
def test_narrow_tables_of_random_masks(monkeypatch, number):
    monkeypatch.setattr(mask, "FULL_WIDTH_ENTRIES", 1)
    rng = random.Random(number)
    for _ in range(50):
        assert_counted(random_mask(rng))


def test_sparsity_is_the_share_of_skipped_blocks(ours):
    blocks = np.stack([np.logical_or(*dense_blocks(keep, *ours.BLOCK_SIZE)) for keep in dense_of(ours)])
    assert ours.sparsity() == pytest.approx(100 * (1 - blocks.mean()))
    assert ours.counts.visited == blocks.sum()
    assert ours.counts.total == blocks.size
    assert ours.counts.full == sum(dense_blocks(keep, *ours.BLOCK_SIZE)[1].sum() for keep in dense_of(ours))


@pytest.mark.parametrize("gna", [GNA((8, 16), (3, 4)), GNA.blocked((8, 16), 8)], ids=gna_id)
def test_sparsity_equals_torch_where_blocks_divide(gna):
    ours = gna_mask(gna, q_block=16, kv_block=16, device="cpu")
    assert ours.sparsity() == pytest.approx(torch_mask(ours).sparsity())


def test_perfectly_sparse_mask_has_no_partial_blocks():
    ours = gna_mask(GNA.blocked((16, 16), 4), order=(4, 4), device="cpu")
    assert ours.kv_num_blocks.sum() == 0
    assert ours.full_kv_num_blocks.unique().tolist() == [1]
    assert ours.sparsity() == 100 * 15 / 16


@pytest.mark.parametrize(
    "copier", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, copy.copy], ids=["pickle", "deepcopy", "copy"]
)
def test_copies_are_whole(ours, copier):
    other = copier(ours)
    assert type(other) is GNABlockMask
    assert other is not ours
    assert other.plan == ours.plan
    assert other.gna == ours.gna
    assert other.mask_mod is ours.mask_mod
    assert_same_tables(other, ours)
    assert repr(other) == repr(ours)


def test_copies_have_handles_of_their_own(ours):
    other = copy.deepcopy(ours)
    assert other.handle != ours.handle
    assert mask.mask_of(other.handle) is other
    assert mask.mask_of(ours.handle) is ours


def test_saves_and_loads_with_torch(ours):
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert_same_tables(torch.load(file, weights_only=False), ours)


def test_dropped_masks_are_freed():
    ours = gna_mask(GNA(16, 3), device="cpu")
    handle = ours.handle
    del ours
    gc.collect()
    with pytest.raises(KeyError):
        mask.mask_of(handle)


def test_moves_between_devices(ours):
    assert ours.to("cpu") is ours
    assert ours.to(torch.device("cpu")) is ours
    there = ours.to("meta")
    assert type(there) is GNABlockMask
    assert there.plan == ours.plan
    assert there.device.type == "meta"
    for name in BLOCK_TABLES:
        assert getattr(there, name).device.type == "meta"
        assert getattr(there, name).shape == getattr(ours, name).shape
    back = there.to("cpu")
    assert_same_tables(back, ours)


def test_default_device_is_the_accelerator_that_is_there():
    expected = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    assert gna_mask(GNA(16, 3)).device.type == expected.type


def test_is_a_block_mask(ours):
    assert isinstance(ours, BlockMask)
    flat = ours.as_tuple()
    plain = ours.plain.as_tuple()
    assert type(ours.plain) is BlockMask
    assert len(flat) == len(plain)
    assert list(flat)[:2] == list(ours.seq_lengths)
    for a, b in zip(flat, plain, strict=True):
        assert a is b or a == b
    assert flat[-1] is plain[-1] is ours.mask_mod
    assert flat[2:10] == tuple(getattr(ours, name) for name in BLOCK_TABLES)
    assert len(ours.as_tuple(flatten=False)) == len(ours.plain.as_tuple(flatten=False))


def test_carries_its_gna():
    gna = GNA((6, 7), 3)
    assert gna_mask(gna, device="cpu").gna is gna
    assert gna_mask([gna], device="cpu").gna is gna


def banned(b, h, q_idx, kv_idx):
    """A further condition that cuts through blocks and windows."""
    return (q_idx + kv_idx) % 3 != 0


AND_CASES = {
    "row-major": {"q_block": 8, "kv_block": 4},
    "tiles": {"order": (2, 4)},
    "two-tiles": {"order": ((2, 2), (1, 4))},
}


@pytest.mark.usefixtures("table_width")
@pytest.mark.parametrize("case", AND_CASES)
def test_and_mask_keeps_blocks_but_none_full(case):
    gna = GNA((6, 8), (4, 3), (4, 1), text_first=2, text_last=9)
    ours = gna_mask(gna, **AND_CASES[case], device="cpu", and_mask=banned)
    without = gna_mask(gna, **AND_CASES[case], device="cpu")
    assert without.counts.full > 0
    assert ours.counts.full == 0
    assert ours.counts.visited == without.counts.visited
    assert torch.equal(ours.to_dense(), without.to_dense())
    for counts, indices in LISTS[1::2]:
        assert getattr(ours, counts).sum() == 0
        assert getattr(ours, indices).shape == getattr(without, indices).shape
    for counts, indices in LISTS[::2]:
        for row, count in zip(getattr(ours, indices).flatten(0, 2), getattr(ours, counts).flatten(), strict=True):
            assert (row[:count].diff() > 0).all()
            assert (row[count:] == 0).all()


@pytest.mark.parametrize("case", AND_CASES)
def test_and_mask_sees_natural_indices(case):
    gna = GNA((6, 8), (4, 3), (4, 1), text_first=2, text_last=9)
    ours = gna_mask(gna, **AND_CASES[case], device="cpu", and_mask=banned)
    q_len, kv_len = ours.seq_lengths
    q, k = np.indices((gna.tokens, gna.tokens))
    expected = dense_mask(gna) & ((q + k) % 3 != 0)
    if ours.plan.q_order is not None:
        expected = tiled_mask(expected, *(tile_places(gna, o.tile) for o in (ours.plan.q_order, ours.plan.kv_order)))
    found = create_mask(ours.mask_mod, None, None, q_len, kv_len, device="cpu")[0, 0].numpy()
    assert (found == expected).all()


def test_and_mask_copies():
    ours = gna_mask(GNA((6, 8), 3), device="cpu", and_mask=banned)
    other = pickle.loads(pickle.dumps(ours))
    assert other.plan.and_mask is banned
    assert_same_tables(other, ours)


def test_repr_is_stable():
    gna = GNA((8, 16), (3, 4), text_last=2)
    assert repr(gna_mask(gna, q_block=16, kv_block=16, device="cpu")) == (
        "GNABlockMask(layout 8x16, window 3x4, 2 text tokens last; order row-major, shape (1, 1, 130, 130), "
        "blocks (16, 16), visited 41 of 81 (0 full), 49.38% skipped, cpu)"
    )
    tiled = repr(gna_mask(GNA.blocked((8, 16), 4), order=((4, 4), (4, 2)), device="cpu"))
    assert "order tiles (4, 4) and (4, 2)" in tiled
    assert "visited 16 of 128 (16 full), 87.50% skipped" in tiled
    assert "4 heads, the first with layout 6x7, window 3x4" in repr(gna_mask(four_heads(), device="cpu"))


def test_str_is_the_repr_and_a_picture(ours):
    first, picture = str(ours).split("\n", 1)
    assert first == repr(ours)
    assert picture == ours.to_string()


def test_tiles_of_a_natural_mask():
    """The same mask in tile order, which the tile route uses."""
    ours = gna_mask(GNA((8, 24), (3, 5), text_last=3), q_block=16, kv_block=16, device="cpu")
    assert ours.has_tiles()
    tiles = ours.tiles
    assert ours.tiles is tiles
    again = gna_mask(ours.gna, order=tiles.order.tile, device="cpu")
    assert_same_lists(tiles.block_mask, again)
    assert tiles.block_mask.mask_mod is again.mask_mod
    assert tiles.order.block == 128 == math.prod(tiles.order.tile)
