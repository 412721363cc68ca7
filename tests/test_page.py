"""The HTML page: what it carries. In a browser: ``test_page_browser.py``."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import random_gna

from gna_flex import GNA
from gna_flex import page as page_module
from gna_flex.intervals import group_length, key_interval, leader
from gna_flex.page import page, page_data, runs, save_page
from gna_flex.presets import PRESETS, preset
from gna_flex.symbolic import prove


def expand(values, length):
    """The opposite of ``runs``."""
    steps = np.repeat(values[0::2], values[1::2])
    assert len(steps) == length
    return np.cumsum(steps).tolist()


def embedded(text):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


@pytest.mark.parametrize("seed", range(20))
def test_tables_are_the_key_intervals(seed):
    gna = random_gna(random.Random(seed))
    data = page_data(gna, q_tile=2)
    tables = [data["tables"][index] for index in data["heads"][0]["dims"]]
    for table, (length, window, stride, dilation, causal) in zip(tables, gna.dims(), strict=True):
        places = [(x // dilation, group_length(length, dilation, x % dilation)) for x in range(length)]
        intervals = [key_interval(i, size, window, stride, causal) for i, size in places]
        assert expand(table["lo"], length) == [lo for lo, _ in intervals]
        assert expand(table["hi"], length) == [hi for _, hi in intervals]
        assert expand(table["leader"], length) == [leader(i, size, stride, causal) for i, size in places]


@pytest.mark.parametrize("values", [[0], [5], [3, 3, 3], [0, 2, 4, 4, 3], [7, 0, 0]])
def test_runs_are_invertible(values):
    assert expand(runs(np.array(values)), len(values)) == values


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_small_page(name):
    text = page(preset(name).gna)
    assert len(text) < 200_000
    assert embedded(text)["tokens"] == preset(name).gna.tokens


def test_page_needs_no_other_file():
    text = page(GNA((16, 16), 8, 4), q_tile=8)
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "").replace(
        'document.createElementNS("http://www.w3.org/2000/svg"', ""
    )
    for loading in ('<link rel="stylesheet"', " src=", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert loading not in text
    assert "$" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)


def test_titles_cannot_leave_their_place():
    title = "</title></script><script>alert('1')</script>"
    text = page(GNA((16, 16), 8, 4), q_tile=8, title=title)
    assert "<script>alert" not in text
    assert text.count("</script>") == 2
    assert embedded(text)["title"] == title


def test_data_of_one_gna():
    gna = GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))
    data = page_data(gna)
    (head,) = data["heads"]
    assert head["q_tile"] == head["kv_tile"] == [2, 8, 8]
    assert (head["heads"], len(head["dims"]), len(data["tables"])) == ([0], 3, 3)
    assert head["simulations"]["static"]["visited_max"] == 81
    assert {*head["simulations"]} == {"static", "anchored", "flat"}
    assert head["proofs"] == {name: str(prove(gna, (2, 8, 8), tiling=name)) for name in ("static", "anchored")}
    assert head["witnesses"] == {"static": None, "anchored": None}
    assert data["title"] == head["label"] == "layout 30x48x80, window 18x24x24, stride 16x8x8"
    assert all(64 <= np.prod(tile) <= 256 for tile in head["tiles"])


def test_heads_share_tables_and_tile():
    wide, narrow, dilated = GNA((32, 48), 24, 8), GNA((32, 48), (24, 8), 8), GNA((32, 48), 8, dilation=2)
    data = page_data([wide, narrow, wide, dilated], title="layer 3")
    assert [head["heads"] for head in data["heads"]] == [[0, 2], [1], [3]]
    assert [head["dims"] for head in data["heads"]] == [[0, 1], [0, 2], [3, 4]]
    assert data["heads"][0]["q_tile"] == data["heads"][1]["q_tile"]
    assert data["title"] == "layer 3"


def test_a_given_tile_may_be_any_shape():
    (head,) = page_data(GNA((30, 30), 9, 3), q_tile=(3, 5), kv_tile=3)["heads"]
    assert (head["q_tile"], head["kv_tile"]) == ([3, 5], [3, 3])
    assert head["tiles"][:2] == [[3, 5], [3, 3]]


def test_save_page_writes_it(tmp_path):
    gna = GNA((16, 16), 8, 4)
    save_page(tmp_path / "mask.html", gna, q_tile=8, title="é")
    assert (tmp_path / "mask.html").read_text("utf-8") == page(gna, q_tile=8, title="é")


@pytest.mark.parametrize(
    ("gnas", "options", "message"),
    [
        ([], {}, "at least one GNA"),
        ([GNA((8, 8), 3), GNA((8, 9), 3)], {}, "same layout"),
        (GNA((8, 8), 3), {"kv_tile": 4}, "needs a q_tile"),
        (GNA((8, 8), 3), {"q_tile": (2, 2, 2)}, "2 dimensions"),
        (GNA((8, 8), 3), {"q_tile": 0}, "at least 1"),
        (GNA(page_module.LONGEST + 1, 9), {}, "at most 262,144"),
    ],
)
def test_errors(gnas, options, message):
    with pytest.raises(ValueError, match=message):
        page(gnas, **options)


def test_files_are_short():
    folder = Path(page_module.__file__).parent
    for file in folder.glob("page*"):
        lines = file.read_text("utf-8").splitlines()
        assert len(lines) < 450, file.name
        assert max(map(len, lines)) <= 120, file.name
