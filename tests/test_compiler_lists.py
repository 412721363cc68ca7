"""The backend "gna_flex": block lists, compared with the mask when torch compiles and at every run."""

import pytest
import torch
from foreign_masks import CAUSAL, MASK, STYLES, assert_right, block_mask, compiled, only, plain, tensors
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from gna_flex import GNA, gna_mask
from gna_flex.dynamo import rewrite
from gna_flex.dynamo.lists import agree
from gna_flex.torch_private import BLOCK_TABLES

pytestmark = pytest.mark.usefixtures("fresh_compiler", "no_reports")

INNER = pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


def lists(mask):
    return tuple(getattr(mask, name) for name in BLOCK_TABLES)


@pytest.mark.parametrize("style", STYLES)
def test_block_lists_agree(style):
    mod, gna = STYLES[style]
    assert agree(lists(block_mask(mod)), (gna,), 16, 16)
    assert agree(lists(block_mask(mod, BLOCK_SIZE=(24, 40))), (gna,), 24, 40)
    assert agree(lists(gna_mask(gna, device="cpu", q_block=16, kv_block=16)), (gna,), 16, 16)
    assert agree(lists(block_mask(mod)), (GNA(64, -1),), 16, 16) == (style == "everything")


@pytest.mark.parametrize("number", range(60))
def test_block_lists_that_disagree(number):
    """Any change of a list that counts is seen; the same lists in another order are the same."""
    generator = torch.Generator().manual_seed(number)
    mod, gna = STYLES["sliding"]
    mask = block_mask(mod)
    order = [[0, 1], [2, 3], [4, 5], [6, 7]][number % 4]
    tables = [table.clone() for table in lists(mask)]
    counts, indices = (tables[at] for at in order)
    row = int(torch.randint(4, (1,), generator=generator))
    if number % 3 == 0:
        counts[0, 0, row] = (counts[0, 0, row] + 1) % 4
    elif counts[0, 0, row] > 0:
        indices[0, 0, row, 0] = (indices[0, 0, row, 0] + 1 + int(torch.randint(3, (1,), generator=generator))) % 4
    same = all(torch.equal(a, b) for a, b in zip(used(tables), used(lists(mask)), strict=True))
    assert bool(agree(tuple(tables), (gna,), 16, 16)) == same


def used(tables):
    for counts, indices in zip(tables[::2], tables[1::2], strict=True):
        for n, row in zip(counts[0, 0].tolist(), indices[0, 0], strict=True):
            yield row[:n].sort().values


def test_lists_without_full_blocks_or_queries():
    _, gna = STYLES["causal"]
    partial = torch.arange(4, dtype=torch.int32)[None, None, None].expand(1, 1, 4, 4).contiguous()
    counts = torch.full((1, 1, 4), 4, dtype=torch.int32)
    every = (counts, partial, None, None, None, None, None, None)
    assert agree(every, (gna,), 16, 16)
    assert not agree((counts - 1, *every[1:]), (gna,), 16, 16)
    assert not agree((counts + 1, *every[1:]), (gna,), 16, 16)
    assert not agree((counts, partial.clamp(max=2), *every[2:]), (gna,), 16, 16)
    assert not agree((counts, partial + 1, *every[2:]), (gna,), 16, 16)
    assert not agree((counts, partial, counts, partial, *every[4:]), (gna,), 16, 16)
    assert not agree((counts[..., :3], partial[..., :3, :], *every[2:]), (gna,), 16, 16)


def some_blocks():
    """Lists that leave blocks out, on purpose, of a mask_mod that keeps them."""
    counts = torch.ones(1, 1, 4, dtype=torch.int32)
    indices = torch.arange(4, dtype=torch.int32)[None, None, :, None].expand(1, 1, 4, 4).contiguous()
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, mask_mod=noop_mask)


def test_lists_that_are_too_long_are_left_alone(route, monkeypatch):
    monkeypatch.setattr(rewrite, "MOST_BLOCKS", 15)
    qkv = tensors()
    assert_right(compiled(plain)(*qkv, MASK), qkv, CAUSAL)
    assert "too long" in only().reason


def test_lists_that_choose_blocks_are_left_alone(route):
    qkv = tensors()
    out = compiled(plain)(*qkv, some_blocks())
    torch.testing.assert_close(out, torch.compile(plain, backend="aot_eager")(*qkv, some_blocks()))
    assert "block lists keep other pairs" in only().reason


@INNER
def test_lists_that_change_later_are_an_error(route, inner):
    mod, _ = STYLES["clamped"]
    qkv = tensors()
    mask = block_mask(mod)
    function = compiled(plain, inner)
    assert_right(function(*qkv, mask), qkv, mod)
    assert_right(function(*qkv, block_mask(mod)), qkv, mod)
    mask.kv_num_blocks[..., 1] = 1
    with pytest.raises(RuntimeError, match="have changed"):
        function(*qkv, mask)
