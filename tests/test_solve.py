"""``solve`` and the remedies of a refutation: the values that make a neighborhood perfect, against brute force."""

import itertools
import json
import math
import random

import pytest
import sympy
from helpers import Sizes, random_gna
from test_lemmas import first_masked

from gna_flex import GNA
from gna_flex.symbolic import Proof, Refutation, Solution, SymbolicGNA, prove, solve
from gna_flex.symbolic.lemmas import TILINGS
from gna_flex.symbolic.remedies import KINDS
from gna_flex.symbolic.solve import UNKNOWNS, solve_dimension

SMALL = Sizes(one=20, two=9, three=6)
NAMES = ("layout", "window", "stride", "dilation", "causal", "q_tile", "kv_tile")


def dimensions(gna, q_tile, kv_tile) -> list[dict]:
    rows = zip(gna.dims(), q_tile, kv_tile, strict=True)
    return [dict(zip(NAMES, (*dim, tq, tk), strict=True)) for dim, tq, tk in rows]


def is_perfect(dim: dict, tiling: str) -> bool:
    """Brute force for one dimension; false for what is not legal."""
    if not 1 <= dim["stride"] <= dim["window"] <= dim["layout"] // dim["dilation"]:
        return False
    gna = GNA(*(dim[name] for name in NAMES[:5]))
    return first_masked(gna, (dim["q_tile"],), (dim["kv_tile"],), tiling) is None


def legal_values(dim: dict, name: str) -> range:
    size = math.ceil(dim["layout"] / dim["dilation"])
    return {
        "stride": range(1, dim["window"] + 1),
        "window": range(dim["stride"], dim["layout"] // dim["dilation"] + 1),
        "q_tile": range(1, size + 1),
        "kv_tile": range(1, size + 1),
    }[name]


def random_question(rng, ndim=None):
    gna = random_gna(rng, ndim, SMALL, text=(0, 0, 2))
    tiles = [tuple(rng.choice([1, 2, 3, 4, s]) for s in gna.stride) for _ in range(2)]
    return gna, *tiles, rng.choice(TILINGS)


@pytest.mark.parametrize("unknown", UNKNOWNS)
def test_values_are_all_of_them(unknown: str) -> None:
    rng = random.Random(0)
    sizes = set()
    for _ in range(60):
        gna, q_tile, kv_tile, tiling = random_question(rng)
        solution = solve(gna, q_tile, kv_tile, unknown=unknown, tiling=tiling)
        dims = dimensions(gna, q_tile, kv_tile)
        expected = tuple(
            tuple(v for v in legal_values(dim, unknown) if is_perfect(dim | {unknown: v}, tiling)) for dim in dims
        )
        assert solution.values == expected, (gna, q_tile, kv_tile, tiling)
        combinations = list(itertools.product(*expected))
        assert list(solution) == combinations
        assert len(solution) == len(combinations)
        assert solution.smallest == (combinations[0] if combinations else None)
        assert solution.largest == (combinations[-1] if combinations else None)
        for value in itertools.islice(itertools.product(*(legal_values(dim, unknown) for dim in dims)), 40):
            assert (value in solution) == (value in combinations) == solution.prove(value).perfect
        assert gna.ndim * (0,) not in solution
        assert list(gna.layout) not in solution
        sizes.add(min(len(solution), 3))
    assert {1, 2, 3} <= sizes


@pytest.mark.parametrize("unknown", UNKNOWNS)
def test_condition_is_membership(unknown: str) -> None:
    rng = random.Random(1)
    kinds = set()
    for _ in range(12):
        gna, q_tile, kv_tile, tiling = random_question(rng, rng.choice([1, 1, 2]))
        solution = solve(gna, q_tile, kv_tile, unknown=unknown, tiling=tiling)
        condition = solution.condition
        names = [sympy.Symbol(f"{unknown}{axis}", integer=True, positive=True) for axis in range(gna.ndim)]
        assert condition.free_symbols <= set(names)
        ranges = [legal_values(dim, unknown) for dim in dimensions(gna, q_tile, kv_tile)]
        for value in itertools.product(*ranges):
            found = condition.subs(dict(zip(names, value, strict=True)))
            assert found in (sympy.true, sympy.false), (condition, value)
            assert bool(found) == (value in solution), (str(solution), condition, value)
        kinds.add(condition if condition in (sympy.true, sympy.false) else None)
        data = json.loads(json.dumps(solution.to_json()))
        assert data["values"] == [list(choices) for choices in solution.values]
        assert data["combinations"] == len(solution)
        assert data["condition"] == str(condition)
        assert data["unknown"] == unknown
    assert len(kinds) > 1


def test_solve_dimension_is_solve() -> None:
    gna = GNA((20, 24), (6, 8), (2, 4), (1, 2))
    for unknown, tiling in itertools.product(UNKNOWNS, TILINGS):
        solution = solve(gna, (2, 4), (3, 2), unknown=unknown, tiling=tiling)
        each = [solve_dimension(unknown, *dim, tq, tk, tiling) for dim, tq, tk in zip(gna.dims(), (2, 4), (3, 2))]  # noqa: B905
        assert list(solution.values) == each


def test_golden_solutions() -> None:
    assert solve(GNA(32768, 2048), 128).smallest == (256,)
    assert solve(GNA(32768, 2048), 128).values[0] == tuple(range(256, 2049, 256))
    hunyuan = solve(GNA((30, 48, 80), (18, 24, 24)), (4, 8, 8), (2, 8, 8))
    assert hunyuan.smallest == (16, 8, 8)
    assert (16, 8, 8) in hunyuan
    # With query tiles of 2 frames a far smaller stride is perfect.
    assert solve(GNA((30, 48, 80), (18, 24, 24)), (2, 8, 8), (2, 8, 8)).smallest == (2, 8, 8)
    flux = solve(GNA((256, 256), 80), (16, 16), (16, 8))
    assert (16, 16) in flux
    assert (1, 1) not in flux
    # The unknown's own value is of no account, the key tile is the query tile if left out.
    assert solve(GNA(48, 24, 24), 8).values == solve(GNA(48, 24, 1), 8, 8).values
    assert str(solve(GNA(48, 24), 8)).startswith("strides for which layout 48, window 24 is perfectly block-sparse:\n")
    assert "8, 24" in str(solve(GNA(48, 24), 8))
    nothing = solve(GNA(8, 4, causal=True), 2)
    assert (len(nothing), nothing.smallest, nothing.largest) == (0, None, None)
    assert nothing.condition is sympy.false
    assert "none" in str(nothing)
    assert isinstance(nothing, Solution)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_tile": 0}, r"q_tile=0 for layout \(64, 64\): every side must be at least 1"),
        ({"q_tile": 8, "kv_tile": -1}, r"kv_tile=-1 for layout"),
        ({"q_tile": (8, 8, 8)}, r"q_tile=\(8, 8, 8\) has 3 values; the layout has 2 dimensions"),
        ({"q_tile": 8, "tiling": "diagonal"}, "tiling='diagonal': must be one of 'static', 'anchored'"),
        (
            {"q_tile": 8, "unknown": "layout"},
            "unknown='layout': must be one of 'stride', 'window', 'q_tile'",
        ),
    ],
)
def test_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(GNA((64, 64), 16), **arguments)


# Remedies: the nearest changes that make a refuted neighborhood perfect.


@pytest.mark.parametrize("block", range(4))
def test_remedies_are_proved_and_change_what_they_say(block: int) -> None:
    rng = random.Random(block)
    seen: set[tuple[str, ...]] = set()
    while len(seen) < len(KINDS) or rng.random() > 0.02:
        gna, q_tile, kv_tile, tiling = random_question(rng)
        answer = prove(gna, q_tile, kv_tile, tiling)
        if answer:
            continue
        assert isinstance(answer, Refutation)
        for remedy in answer.remedies:
            names = tuple(remedy.change)
            assert names in KINDS
            seen.add(names)
            before = {name: getattr(gna, name, None) or {"q_tile": q_tile, "kv_tile": kv_tile}[name] for name in names}
            assert remedy.before == before
            assert any(remedy.change[name] != before[name] for name in names)
            parts = {name: getattr(gna, name) for name in NAMES[:5]} | {"q_tile": q_tile, "kv_tile": kv_tile}
            parts |= remedy.change
            proof = remedy.proof
            changed = GNA(*(parts[n] for n in NAMES[:5]), text_first=gna.text_first, text_last=gna.text_last)
            assert isinstance(proof, Proof)
            assert proof
            assert (proof.gna, proof.q_tile, proof.kv_tile) == (changed, parts["q_tile"], parts["kv_tile"])
            assert proof.tiling == tiling
            assert first_masked(changed, parts["q_tile"], parts["kv_tile"], tiling) is None
            assert json.loads(json.dumps(remedy.to_json())) == {n: list(v) for n, v in remedy.change.items()}
            for name in names:
                assert "x".join(map(str, remedy.change[name])) in str(remedy)
            # Dimensions that are perfect by themselves stay as they are.
            for axis, dim in enumerate(dimensions(gna, q_tile, kv_tile)):
                if is_perfect(dim, tiling):
                    assert all(remedy.change[name][axis] == before[name][axis] for name in names)


@pytest.mark.parametrize("tiling", TILINGS)
def test_remedies_are_the_nearest(tiling: str) -> None:
    rng = random.Random(5)
    refuted = 0
    while refuted < 60:
        gna, q_tile, kv_tile, _ = random_question(rng, 1)
        answer = prove(gna, q_tile, kv_tile, tiling)
        if answer:
            continue
        refuted += 1
        (dim,) = dimensions(gna, q_tile, kv_tile)
        found = {tuple(remedy.change): remedy for remedy in answer.remedies}
        # Where there is a nearer layout, it is at most the length of whole tiles and strides: search that far.
        ranges = {name: legal_values(dim, name) for name in UNKNOWNS} | {"layout": range(dim["layout"], 90)}
        for name in ("stride", "window", "kv_tile", "q_tile", "layout"):
            now = dim[name]
            good = [v for v in ranges[name] if is_perfect(dim | {name: v}, tiling)]
            remedy = found.get((name,))
            if not good:
                assert remedy is None or name == "layout", (dim, name, tiling)
                continue
            # Of two values equally near, the larger one.
            nearest = min(good, key=lambda v: (abs(v - now), -v))
            assert remedy is not None, (dim, name, tiling)
            assert remedy.change[name] == (nearest,), (dim, name, tiling)
        for names in (("window", "stride"), ("q_tile", "kv_tile")):
            alone = any((name,) in found for name in names)
            spans = [range(1, dim["layout"] // dim["dilation"] + 1) if name in ("window", "stride") else ranges[name]
                     for name in names]  # fmt: skip
            good = [
                sum(abs(v - dim[n]) for v, n in zip(pair, names, strict=True))
                for pair in itertools.product(*spans)
                if not alone and is_perfect(dim | dict(zip(names, pair, strict=True)), tiling)
            ]
            assert (names in found) == bool(good), (dim, names, tiling)
            if good:
                change = found[names].change
                assert sum(abs(change[n][0] - dim[n]) for n in names) == min(good)


def test_remedies_of_long_layouts_and_of_symbols() -> None:
    texts = [str(remedy) for remedy in prove(GNA(16_000_000, 160), 16, 32).remedies]
    assert "stride 32 instead of 1" in texts
    n = sympy.Symbol("n", integer=True, positive=True)
    answer = prove(SymbolicGNA(128 * n, 64, 1), 128, 16)
    if isinstance(answer, Refutation):
        assert all(remedy.proof for remedy in answer.remedies)
    refuted = prove(SymbolicGNA(64 * n + 64, 64, 1), 16)
    assert isinstance(refuted, Refutation)
    assert refuted.remedies
    assert all(remedy.proof for remedy in refuted.remedies)
