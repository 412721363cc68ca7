"""Recorded GPU measurements: complete, of a commit of this project, and the ones that the README quotes."""

import json
import re
from pathlib import Path

import pytest

from gna_flex.models import model
from gna_flex.presets import preset
from gna_flex.simulate import end_to_end
from gna_flex.words import by_x

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FOLDER = ROOT / "tests/gpu/records"
MODEL_RECORDS = sorted(FOLDER.glob("models_*.json"))
RECORDS = sorted(set(FOLDER.glob("*.json")) - set(MODEL_RECORDS))


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


def quoted(cells: int) -> dict[str, list[str]]:
    """Rows of the README's tables with so many cells beside the preset's name."""
    rows = re.findall(r"^\| `([\w.-]+)` \| (.+) \|$", README, re.MULTILINE)
    return {name: text.split(" | ") for name, text in rows if len(text.split(" | ")) == cells}


def hopper() -> dict:
    return load(ROOT / "tests/gpu/records/hopper_h100.json")


def test_readme_quotes_the_forward():
    record = hopper()
    expected = {}
    for case in record["cases"]:
        gna, times = preset(case["preset"]).gna, case["milliseconds"]
        assert case["flop_speedup"] == pytest.approx(gna.tokens**2 / gna.kept_pairs(), rel=1e-4)
        if "flex-tiles" not in times:
            faster = times["dense"] / times["hopper"]
            shown = [f"{times['dense']:.1f}", f"{times['hopper']:.2f}", f"{faster:.1f}x"]
            share = f"{100 * faster / case['flop_speedup']:.0f}%"
            expected[case["preset"]] = [*shown, share, f"{case['mib']['hopper']} MiB"]
    assert quoted(5) == expected
    for fact in (record["gpu"], record["torch"], record["driver"], record["commit"][:7]):
        assert fact in README


@pytest.mark.parametrize("name", ["hopper_h100", "backward_h100"])
def test_readme_says_what_is_of_another_commit(name):
    record = load(FOLDER / f"{name}.json")
    of_others = {each["commit"] for each in (*record["cases"], *record.get("head_dims", ())) if "commit" in each}
    assert of_others
    assert all(f"are of commit {commit[:7]}" in README for commit in of_others)
    text = " ".join(README.split())
    assert any(f"are of commit {commit[:7]}, the others of one run" in text for commit in of_others)


def test_readme_quotes_what_is_beside_flexattention():
    expected = {}
    for case in hopper()["cases"]:
        times, mib = case["milliseconds"], case["mib"]
        if "flex-tiles" in times:
            dense = f"{times['dense']:.2f}" if "dense" in times else "-"
            faster = f"{times['flex-tiles'] / times['hopper']:.1f}x"
            shown = [dense, f"{times['flex-tiles']:.2f}", f"{times['hopper']:.2f}", faster]
            expected[case["preset"]] = [*shown, f"{mib['flex-tiles']} MiB", f"{mib['hopper']} MiB"]
    assert quoted(6) == expected


def test_readme_quotes_head_dims_and_the_largest_mask():
    record = hopper()
    for case in record["head_dims"]:
        dense, ours = case["milliseconds"]["dense"], case["milliseconds"]["hopper"]
        line = f"| {case['head_dim']} | {case['heads']} | {dense:.1f} | {ours:.1f} | {dense / ours:.2f}x |"
        assert line in README.splitlines()
    largest = record["largest"]
    assert preset(largest["preset"]).gna.tokens > 15e6
    assert re.search(rf"`{largest['preset']}` takes {largest['milliseconds']:.0f} ms", README)


def test_the_kernels_readme_quotes_its_limits():
    text = (ROOT / "csrc/README.md").read_text()
    for case in hopper()["limits"]["cases"]:
        names = ("tensor cores", "issue slots", "integer unit", "shared memory", "L2", "DRAM")
        assert f"| {case['case']} | " + " | ".join(f"{case[name]:.0f}" for name in names) + " |" in text.splitlines()


def test_the_kernels_readme_quotes_the_backward_on_another_gpu():
    record, text = load(FOLDER / "backward_h200.json"), " ".join((ROOT / "csrc/README.md").read_text().split())
    names = {"lm-32k-strided": "1-D", "flux-4k": "FLUX", "cosmos": "Cosmos", "hunyuan-video": "HunyuanVideo"}
    shares: dict[str, list[str]] = {"hopper": [], "hopper-deterministic": []}
    for case in record["cases"]:
        times = case["milliseconds"]
        for way, found in shares.items():
            found.append(f"{times[way] * case['flop_speedup'] / times['dense']:.2f}")
    cases = [f"{names[case['preset']]} {share}" for case, share in zip(record["cases"], shares["hopper"], strict=True)]
    assert f"commit {record['commit'][:7]}): {', '.join(cases)} fused" in text
    assert f"fused; {', '.join(shares['hopper-deterministic'])} deterministic" in text


def test_readme_quotes_the_backward():
    record = load(ROOT / "tests/gpu/records/backward_h100.json")
    expected = {}
    for case in record["cases"]:
        gna, times = preset(case["preset"]).gna, case["milliseconds"]
        assert case["flop_speedup"] == pytest.approx(gna.tokens**2 / gna.kept_pairs(), rel=1e-4)
        tiles = f"{times['flex-tiles']:.1f}" if "flex-tiles" in times else "-"
        ours = f"{times['hopper']:.1f} ({times['dense'] / times['hopper']:.1f}x)"
        expected[case["preset"]] = [f"{times['dense']:.1f}", tiles, f"{times['hopper-deterministic']:.1f}", ours]
    assert quoted(4) == expected
    assert record["commit"][:7] in README


def model_rows(record: dict) -> list[str]:
    """Rows of the README's table of models: all that a record of ``gna-flex bench model NAME ... --json`` has."""
    rows = []
    for case in record["cases"]:
        steps = case["generation"]["steps"]
        dense, compiled, _, *ours = case["rows"]
        for row in ours:
            window = f"{by_x(row['gna']['window'])}, stride {by_x(row['gna']['stride'])}"
            times = [f"{each['milliseconds']:,.0f}" for each in (dense, compiled, row)]
            generation = f"{row['generation']:.2f}x" if steps else "-"
            paper = f"{row['paper']:.2f}x" if row["paper"] else "-"
            cells = [f"`{case['model']}`", window, *times, f"{row['speedup']:.2f}x", generation, paper]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def libraries(record: dict) -> set[str]:
    return {case["class"].partition(".")[0] for case in record["cases"]}


@pytest.mark.parametrize("path", MODEL_RECORDS, ids=lambda path: path.stem)
def test_record_of_models(path):
    """It is what the command prints as JSON, and the commit."""
    record = load(path)
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    for name in ("what", "command", "gpu", "driver", "torch", "gna_flex", *libraries(record)):
        assert record[name]
    assert record["failed"] == {}
    for case in record["cases"]:
        known, generation = model(case["model"]), case["generation"]
        assert tuple(case["layout"]) == known.layout
        assert (case["settings"]["dtype"], case["settings"]["compiler"]) == ("bfloat16", "inductor")
        gnas = [known.gna(setting) for setting in known.settings]
        names = ["dense eager", "dense compiled", "full window eager", *(setting.name for setting in known.settings)]
        assert [row["name"] for row in case["rows"]] == names
        baseline = case["rows"][1]["milliseconds"]
        for row, gna in zip(case["rows"][3:], gnas, strict=True):
            assert tuple(row["gna"]["window"]) == gna.window
            assert tuple(row["gna"]["stride"]) == gna.stride
            assert row["route"] == "hopper"
            assert row["sparsity"] == pytest.approx(1 - gna.kept_pairs() / gna.tokens**2)
            assert row["speedup"] == pytest.approx(baseline / row["milliseconds"])
            if generation["steps"]:
                expected = end_to_end(row["speedup"], 1.0, generation["steps"], generation["dense_steps"])
                assert row["generation"] == pytest.approx(expected)
        assert len(case["checks"]) == 2 * len(gnas) + 1
        assert all(check["error"] <= check["budget"] < check["effect"] for check in case["checks"])


def test_readme_begins_with_a_measurement():
    case = next(case for case in load(FOLDER / "models_h100.json")["cases"] if case["model"] == "hunyuan-video")
    _, dense, _, _, ours, _ = case["rows"]
    seconds, before = (row["milliseconds"] / 1000 for row in (ours, dense))
    said = f"takes {seconds:.1f} s with windows that keep {1 - ours['sparsity']:.0%} of the pairs, and {before:.1f} s"
    assert said.replace("%", " %") in README


@pytest.mark.parametrize("path", MODEL_RECORDS, ids=lambda path: path.stem)
def test_readme_quotes_the_models(path):
    record = load(path)
    missing = [row for row in model_rows(record) if row not in README.splitlines()]
    assert not missing, "rows that the README's table of models lacks:\n" + "\n".join(missing)
    names = "|".join(case["model"] for case in record["cases"])
    assert len(re.findall(rf"^\| `(?:{names})` \| [^|]*, stride ", README, re.MULTILINE)) == len(model_rows(record))
    for fact in ("gpu", "torch", *libraries(record)):
        assert record[fact] in README
    assert record["commit"][:7] in README
