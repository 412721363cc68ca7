"""Every tutorial runs from top to bottom."""

import re
import runpy
from pathlib import Path

import pytest
from kernel_problems import BLACKWELL

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))


def test_there_are_tutorials():
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_the_evidence_is_there():
    """Tests that the tutorial on Blackwell names exist, and a number of problems is theirs."""
    text = (ROOT / "tutorials" / "07_blackwell.py").read_text()
    named = re.findall(r"tests/[\w/]+\.py", text)
    assert len(named) > 10
    assert all((ROOT / name).is_file() for name in named)
    assert f"{len(BLACKWELL)} problems with every feature" in " ".join(text.split("\n# "))
