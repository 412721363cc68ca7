"""Recorded GPU measurements: complete, of a commit of this project, and the ones that the README quotes."""

import json
import re
from pathlib import Path

import pytest

from gna_flex.presets import preset

ROOT = Path(__file__).parent.parent
RECORDS = sorted((ROOT / "tests/gpu/records").glob("*.json"))


def load(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_record_says_where_it_comes_from(path):
    record = load(path)
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    for name in ("what", "command", "gpu", "driver", "torch", "gna_flex"):
        assert record[name]
    assert record["tests"]["passed"] > 0
    assert record["tests"]["failed"] == 0
    for case in record["cases"]:
        known = preset(case["preset"])
        assert (case["heads"], case["head_dim"]) == (known.heads, known.head_dim)
        assert all(value > 0 for value in case["milliseconds"].values())


def test_readme_quotes_the_record():
    record = load(ROOT / "tests/gpu/records/flex_routes_h200.json")
    times = {(case["preset"], case["pass"]): case["milliseconds"] for case in record["cases"]}
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `([\w.-]+)` \| (.+) \|$", readme, re.MULTILINE)
    quoted = {name: cells.split(" | ") for name, cells in rows if (name, "forward") in times}
    assert len(quoted) == len(times) // 2
    for name, cells in quoted.items():
        expected = []
        for direction in ("forward", "backward"):
            dense, flex, tiles = (times[name, direction][way] for way in ("dense", "flex", "flex-tiles"))
            expected += [f"{dense:.1f}", f"{flex:.1f}", f"{tiles:.1f}", f"{dense / min(flex, tiles):.1f}x"]
        assert cells == expected, name
    for fact in (record["gpu"], record["torch"], record["driver"], record["commit"][:7]):
        assert fact in readme
