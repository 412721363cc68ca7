import io
import itertools
import random
import sys

import numpy as np
import pytest
import torch
from helpers import random_gna
from rich.console import Console

from gna_flex import GNA, gna_mask
from gna_flex.presets import PRESETS, preset
from gna_flex.scene import axes_of, block_picture, key_ranges
from gna_flex.viz import draw, save_png


def drawn(gna, query=None, width=80, **tiles):
    console = Console(width=width, color_system=None, file=io.StringIO(), record=True)
    console.print(draw(gna, query, width=width, **tiles))
    return console.export_text()


@pytest.mark.parametrize("seed", range(30))
def test_key_ranges_are_the_mask(seed):
    rng = random.Random(seed)
    gna = random_gna(rng, text=(0,))
    mod = gna_mask(gna, device="cpu").mask_mod
    query = tuple(rng.randrange(n) for n in gna.layout)
    index = torch.tensor(np.ravel_multi_index(query, gna.layout))
    zero = torch.zeros((), dtype=torch.int64)
    kept = mod(zero, zero, index, torch.arange(gna.tokens)).nonzero().flatten().tolist()
    keys = [int(np.ravel_multi_index(key, gna.layout)) for key in itertools.product(*key_ranges(gna, query))]
    assert keys == kept


def test_picture_of_a_small_grid():
    lines = drawn(GNA((8, 16), window=3), (2, 1), q_tile=(2, 4)).splitlines()
    assert [line.rstrip() for line in lines[2:13]] == [
        "░░░░░░░░│░░░░░░░░│· · · · │· · · ·",
        "██████░░│░░░░░░░░│· · · · │· · · ·",
        "────────┼────────┼────────┼────────",
        "██◆ ██░░│░░░░░░░░│· · · · │· · · ·",
        "██████░░│░░░░░░░░│· · · · │· · · ·",
        "────────┼────────┼────────┼────────",
        "░░░░░░░░│░░░░░░░░│· · · · │· · · ·",
        "░░░░░░░░│░░░░░░░░│· · · · │· · · ·",
        "────────┼────────┼────────┼────────",
        "· · · · │· · · · │· · · · │· · · ·",
        "· · · · │· · · · │· · · · │· · · ·",
    ]
    # 3 x 3 keys in the window, 6 x 8 in the tiles visited.
    assert "9 of 128 keys" in lines[14]
    assert lines[15].startswith("░ 39 other keys")


def test_query_of_another_tile_moves_the_picture():
    assert drawn(GNA((6, 12), window=3), (0, 0)) != drawn(GNA((6, 12), window=3), (5, 11))


def test_axes_hold_window_and_visited_tiles():
    rows, columns = axes_of(GNA((8, 16), 3, dilation=(1, 2)), (3, 7), (2, 2), (2, 4))
    assert np.flatnonzero(rows.window).tolist() == [2, 3, 4]
    assert np.flatnonzero(rows.visited).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.flatnonzero(columns.window).tolist() == [5, 7, 9]
    # Dilation parts odd from even columns; the query tile holds columns 5 and 7, which see 3 to 9: key tiles 0 and 1.
    assert np.flatnonzero(columns.visited).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert (rows.tile, columns.tile) == (2, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_drawn_in_80_columns(name):
    text = drawn(preset(name).gna)
    assert "◆" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\n") < 75


def test_wide_terminals_get_more_slices():
    gna = GNA((9, 12, 16), 5)
    assert drawn(gna, width=80).count("slice ") == 3
    assert drawn(gna, width=140).count("slice ") == 5


@pytest.mark.parametrize("tiles", [None, ((8, 16), (8, 16)), ((4, 8), (8, 8))])
@pytest.mark.parametrize("cells", [100, 7])
def test_block_picture_is_the_mask(tiles, cells):
    gna = GNA((40, 48), 16, 8, text_last=70)
    mask = gna_mask(gna, order=tiles or "row-major", device="cpu")
    picture = block_picture(gna, tiles, cells, cells)
    visited = mask.to_dense()[0, 0].double()
    step = -(-visited.shape[0] // cells), -(-visited.shape[1] // cells)
    assert picture.cell == step
    for r, c in np.ndindex(picture.visited.shape):
        cell = visited[r * step[0] : (r + 1) * step[0], c * step[1] : (c + 1) * step[1]]
        assert picture.visited[r, c] == pytest.approx(float(cell.mean()))
    assert picture.share == pytest.approx(mask.counts.visited / mask.counts.total)
    if cells == 100:
        assert int(picture.full.sum()) == mask.counts.full


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": (8, 0)}, "outside"),
        ({"query": (1, 2, 3)}, "2 dimensions"),
        ({"kv_tile": (2, 2)}, "needs a q_tile"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        draw(GNA((8, 8), 3), **options)


@pytest.mark.parametrize(
    ("gna", "order"),
    [
        (GNA(300, 20, causal=True), "tiles"),
        (GNA((20, 32), 7, text_first=4), "row-major"),
        (GNA((9, 12, 16), 5, 2), "tiles"),
    ],
)
def test_png_shows_the_palette(tmp_path, gna, order):
    image = pytest.importorskip("matplotlib.image")
    save_png(tmp_path / "mask.png", gna, order=order)
    pixels = (255 * image.imread(tmp_path / "mask.png")[..., :3]).round().astype(int).reshape(-1, 3)
    found = {tuple(pixel) for pixel in np.unique(pixels, axis=0).tolist()}
    for color in ((0x00, 0x72, 0xB2), (0x8C, 0xC4, 0xE8), (0xE6, 0x9F, 0x00), (0xD5, 0x5E, 0x00)):
        assert color in found


def test_png_checks_its_order(tmp_path):
    with pytest.raises(ValueError, match="order='z'"):
        save_png(tmp_path / "mask.png", GNA((8, 8), 3), order="z")


def test_png_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install gna-flex\[viz\]"):
        save_png(tmp_path / "mask.png", GNA((8, 8), 3))
