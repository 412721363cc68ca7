"""What the README says is true: its examples run, its commands parse, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

import gna_flex
from gna_flex import GNA, cli, reference_attention

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = sorted((ROOT / "gna_flex").glob("**/*.py"))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Lines of shell blocks, of consoles (after the prompt), and commands between backticks."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += re.findall(r"^\$ (.*)$", README, re.MULTILINE) + re.findall(r"`(gna-flex [a-z][^`]*)`", README)
    return [part.strip() for line in lines for part in line.split("&&")]


def test_begins_with_a_picture_and_an_example():
    assert README.index("![") < README.index("```python") < README.index("\n## ")
    assert len(list(filter(None, blocks("python")[0].splitlines()))) == 5


def test_the_first_example_is_right():
    names: dict[str, object] = {}
    exec(blocks("python")[0], names)
    q, k, v, mask, out = (names[name] for name in ("q", "k", "v", "mask", "out"))
    assert mask.gna == GNA((48, 64), 24)
    exact = reference_attention(q.double(), k.double(), v.double(), mask.mask_mod)[0]
    assert (out - exact).abs().max() < 1e-5


def test_all_examples_run():
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["out"].shape == (1, 8, 48 * 64, 64)


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("gna-flex")])
def test_commands_parse(line):
    assert cli.parser().parse_args(shlex.split(line)[1:]).run


def test_every_verb_is_shown():
    shown = {line.split()[1] for line in commands() if line.startswith("gna-flex")}
    assert shown == {add.__name__.removeprefix("add_") for add in cli.VERBS}


def test_the_report_is_real(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command, shown = re.search(r"```console\n\$ gna-flex (.*?)\n(.*?)```", README, re.DOTALL).groups()
    assert cli.main(shlex.split(command)) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()


def test_ci_runs_the_two_commands():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    shown = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("pip install")]
    assert len(shown) == 2
    for line in shown:
        assert line in ci


def test_environment_variables_are_listed():
    used = {name for path in SOURCES for name in re.findall(r"\bGNA_FLEX_[A-Z_]+\b", path.read_text())}
    assert used == set(cli.info.ENVIRONMENT)
    for name in used:
        assert f"| `{name}` |" in README


def test_modules_are_listed():
    table = README.split("\n## Inside\n")[1]
    listed = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert listed == {path.stem for path in SOURCES if path.parent.name == "gna_flex" and "__" not in path.stem} | {
        path.parent.name for path in SOURCES if path.parent.parent.name == "gna_flex"
    }


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert "tutorials/first_mask.png" in links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_extras_exist():
    toml = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert re.search(rf"^{extra} = \[", toml, re.MULTILINE), extra


def test_the_version_is_in_the_changelog():
    assert f"## [{gna_flex.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
