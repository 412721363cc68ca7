"""``prove``: the verdict, its witness, its answers with symbols and its texts, against brute force."""

import contextlib
import itertools
import json
import math
import random
import re
import statistics
import time

import numpy as np
import pytest
import sympy
from helpers import Sizes, dense_mask, one_dim_sets, random_gna
from hypothesis import given
from hypothesis import strategies as st
from test_lemmas import first_masked

from gna_flex import GNA
from gna_flex.intervals import key_interval
from gna_flex.symbolic import LEMMAS, Proof, Refutation, SymbolicGNA, prove, solve
from gna_flex.symbolic.lemmas import TILINGS, perfect
from gna_flex.symbolic.neighborhood import substitute
from gna_flex.symbolic.witness import first_witness

SMALL = Sizes(one=24, two=8, three=5)
n, m, k = sympy.symbols("n m k", integer=True, positive=True)
e, o = 2 * sympy.Symbol("i", integer=True, positive=True), 2 * sympy.Symbol("j", integer=True, positive=True) - 1
z = sympy.Symbol("z", integer=True, nonnegative=True)


def random_question(rng, sizes=SMALL, text=(0, 0, 3)):
    """A neighborhood, two tiles that often fit it, and a tiling."""
    gna = random_gna(rng, sizes=sizes, text=text)
    tiles = [
        tuple(rng.choice([1, 1, 2, 3, 4, 8, s, w]) for s, w in zip(gna.stride, gna.window, strict=True))
        for _ in range(2)
    ]
    return gna, *tiles, rng.choice(TILINGS)


@pytest.mark.parametrize("block", range(4))
def test_equals_brute_force(block: int) -> None:
    rng = random.Random(block)
    verdicts = []
    for _ in range(300):
        gna, q_tile, kv_tile, tiling = random_question(rng)
        truth = first_masked(gna, q_tile, kv_tile, tiling) is None
        answer = prove(gna, q_tile, kv_tile, tiling)
        assert isinstance(answer, Proof if truth else Refutation), (gna, q_tile, kv_tile, tiling)
        assert answer.perfect == bool(answer) == truth
        verdicts.append(truth)
    assert 30 < sum(verdicts) < 270


def test_ints_arrays_expressions_and_proofs_agree() -> None:
    rng = random.Random(0)
    names = sympy.symbols("length window stride dilation q_tile kv_tile", integer=True, positive=True)
    formulas = {
        (causal, tiling): perfect(*names[:4], causal, *names[4:], tiling)
        for causal in (False, True)
        for tiling in TILINGS
    }
    for _ in range(300):
        gna, q_tile, kv_tile, tiling = random_question(rng, text=[0])
        each = []
        for (*dim, causal), tq, tk in zip(gna.dims(), q_tile, kv_tile, strict=True):
            verdict = perfect(*dim, causal, tq, tk, tiling)
            arrays = (np.array([x, x]) for x in dim), (np.array([x, x]) for x in (tq, tk))
            assert (perfect(*arrays[0], causal, *arrays[1], tiling) == verdict).all()
            expression = formulas[causal, tiling].subs(dict(zip(names, (*dim, tq, tk), strict=True)))
            assert expression in (sympy.true, sympy.false)
            assert bool(expression) == verdict
            each.append(verdict)
        assert prove(gna, q_tile, kv_tile, tiling).perfect == all(each)


@pytest.mark.parametrize(
    ("layout", "window", "stride", "q_tile", "kv_tile"),
    [
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8)),
        ((256, 256), 80, 16, (16, 16), (16, 8)),
        ((16, 44, 80), (16, 24, 16), (1, 8, 16), (8, 4, 8), (4, 4, 8)),
        (32768, 2048, 256, 128, 128),
    ],
    ids=["hunyuan", "flux", "cosmos", "1-D"],
)
def test_published_configurations(layout, window, stride, q_tile, kv_tile) -> None:
    assert prove(GNA(layout, window, stride), q_tile, kv_tile)
    assert not prove(GNA(layout, window, 1), q_tile, kv_tile)


@given(*(st.integers(1, n) for n in (20, 20, 12, 12)), st.integers(2, 6))
def test_interior_rule(w: int, s: int, tq: int, tk: int, many: int) -> None:
    # Even strides and windows, a length of whole key tiles with more than two moves.
    w, s = 2 * max(w, s), 2 * min(w, s)
    length = (w + (many + 2) * s) * tk
    assert prove(GNA(length, w, s), tq, tk).perfect == (s % tq == 0 and w % tk == 0 and (s - w) % (2 * tk) == 0)


@pytest.mark.parametrize("block", range(4))
def test_witness_is_the_first(block: int) -> None:
    rng = random.Random(100 + block)
    refuted = 0
    while refuted < 150:
        gna, q_tile, kv_tile, tiling = random_question(rng)
        answer = prove(gna, q_tile, kv_tile, tiling)
        if answer:
            with pytest.raises(ValueError, match="is perfectly block-sparse in query tiles"):
                first_witness(gna, q_tile, kv_tile, tiling)
            continue
        refuted += 1
        found = answer.witness
        assert (found.group, found.q_tile, found.kv_tile) == first_masked(gna, q_tile, kv_tile, tiling)
        # The kept pair is kept, the dropped one is not, both are in the tiles, and these are whole but for the edges.
        keep = dense_mask(GNA(gna.layout, gna.window, gna.stride, gna.dilation, gna.causal))
        for (query, key), expected in ((found.kept, True), (found.dropped, False)):
            q, j = (np.ravel_multi_index(end, gna.layout) for end in (query, key))
            assert keep[q, j] == expected
            assert all(x in xs for x, xs in zip((*query, *key), (*found.queries, *found.keys), strict=True))
        for axis, (length, _, _, d, _) in enumerate(gna.dims()):
            positions = range(found.group[axis], length, d)
            tokens = positions[found.q_tile[axis] * q_tile[axis] :][: q_tile[axis]]
            assert found.queries[axis] == tokens
            keys = list(found.keys[axis])
            assert set(keys) <= set(positions)
            if tiling == "static":
                assert keys == list(positions[found.kv_tile[axis] * kv_tile[axis] :][: kv_tile[axis]])
        assert json.loads(json.dumps(found.to_json()))["kept"] == [list(end) for end in found.kept]


@pytest.mark.parametrize("tiling", TILINGS)
def test_witness_is_the_first_of_everything_small(tiling: str) -> None:
    # The turns of the windows, the right edge and ragged tiles, in every combination.
    for dim in one_dim_sets(11):
        for q_tile, kv_tile in itertools.product([(1,), (2,), (3,)], repeat=2):
            answer = prove(gna := GNA(*dim), q_tile, kv_tile, tiling)
            found = None if answer else answer.witness
            place = found and (found.group, found.q_tile, found.kv_tile)
            assert place == first_masked(gna, q_tile, kv_tile, tiling), (gna, q_tile, kv_tile)


def test_cost_does_not_depend_on_the_length() -> None:
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        answer = prove(GNA(16_000_000, 160, 16, causal=False), 16, 32)
        assert answer.witness.q_tile == (5,)
        assert prove(GNA(16_000_000, 160, 32), 16, 32)
        times.append(time.perf_counter() - begin)
    assert statistics.median(times) < 0.02
    gna = GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        prove(gna, (4, 8, 8), (2, 8, 8))
        times.append(time.perf_counter() - begin)
    assert statistics.median(times) < 1e-3 * 3, "0.3 ms on a slow core"


# Symbols: an answer holds for all legal values, for none, or exactly where its conditions do.

QUESTIONS = [
    (SymbolicGNA(8 * n, 8, 8), 8, 8),
    (SymbolicGNA(8 * n, 2 * m, 2 * k), 8, 8),
    (SymbolicGNA(8 * n, w := 2 * m, w), w, 2),
    (SymbolicGNA(w + k * n, w, k), k, k),
    (SymbolicGNA(n, 16, 4), m, k),
    (SymbolicGNA(n + 40, 16, k), 4, 4),
    (SymbolicGNA(24, m, k), 4, 4),
    (SymbolicGNA(48, 24, k), e, 8),
    (SymbolicGNA(20, 6, 3, k), 3, 3),
    (SymbolicGNA(n, e, o), 1, 2),
    (SymbolicGNA(e, 1 + o, 2 * k), 2, 2),
    (SymbolicGNA(n, m, k, causal=True), 1, 1),
    (SymbolicGNA(n, m, k, causal=True), n, 1),
    (SymbolicGNA(n + 1, m, 1, causal=True), 2, 1),
    (SymbolicGNA(n + 4, 4, 2, causal=True), m, k),
    (SymbolicGNA(n, 4, 2, k), 2, 4),
    (SymbolicGNA(k * n, k, k), k, k),
    (SymbolicGNA(z + 9, 8, 1), 2, 1),
    # One move for z = 0 only: that query tile needs it.
    (SymbolicGNA(z + 8, 6, 2), 4, 2),
    (SymbolicGNA(2 * m + 2, 2 * m, 2), 4, 1),
    (SymbolicGNA(3 * k * n, k, k), k + z, 1),
    # SymPy 1.14 takes 6/(2*m + 1) for no integer, and k*(2*m + 2*n)/6 for one.
    (SymbolicGNA(6 * n + 60, 6, 3), 1, 2 * m + 1),
    (SymbolicGNA(60, 6, 3), 2 * m - 1, 2 * m + 1),
    (SymbolicGNA(k * (2 * m + 2 * n), 2, 1, 6), 1, 2),
    (SymbolicGNA(6 * (n + 1) * (n + k), n * (n + 1), 6), 6, 6),
    (SymbolicGNA(3 * m + k, m, k), 1, m + z),
    (SymbolicGNA((8 * n, 16 * n), (8, m), (8, m)), 8, 8),
    (SymbolicGNA((n, 6, 4 * n), (n, 6, 4), (1, k, 4), causal=(False, False, False)), (k, 1, 4), (n, 2, 4)),
    (SymbolicGNA((n, 4 * m), (n, 4), (k, 4), (1, m)), (m, 4), (m, 2)),
    (SymbolicGNA((n, 8), (m, 4), (1, 4), causal=(True, False)), (1, 4), (1, 4)),
]


def random_template(rng):
    """A random question: sizes are numbers, symbols, multiples of symbols and of each other."""
    dims = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        w = rng.choice([1, 2, 3, 4, 6, 8, m, 2 * m, 4 * m, e, o, m + k, o + 1, z + 2, m * (m + 1), 2 * (m + k)])
        s = rng.choice([1, 2, w, w, k, 2 * k, e, 1 + z])
        d = rng.choice([1, 1, 1, 2, 3, 6, k])
        length = rng.choice(
            [24, 30 + n, 8 * n, n, d * w + s * n, d * w + z, d * w, w * n * d, 2 * w + 1, n + 11, 6 * w]
        )
        tiles = (rng.choice([1, 2, 3, 4, s, w, s, w, k, m, 2 * k, n, s + z, w + z, 2 * m + 1, 3 * k]) for _ in range(2))
        dims.append((length, w, s, d, rng.random() < 0.15, *tiles))
    *parts, q_tile, kv_tile = zip(*dims, strict=True)
    return SymbolicGNA(*parts), q_tile, kv_tile


def random_values(rng, symbols):
    def value(symbol):
        x = rng.choice([rng.randint(0, 4), rng.randint(0, 12), rng.randint(0, 40)]) + (symbol != z)
        return 2 * x if symbol.is_even else x

    return {symbol: value(symbol) for symbol in symbols}


def check_symbols(question, tiling, rng) -> tuple[str, int, float]:
    """One symbolic answer against numeric ones: which kind it is, legal substitutions checked, and its time."""
    gna, *tiles = question
    begin = time.perf_counter()
    answer = prove(gna, *tiles, tiling)
    seconds = time.perf_counter() - begin
    numbers = (gna.layout, gna.window, gna.stride, gna.dilation, answer.q_tile, answer.kv_tile)
    symbols = sorted({s for part in numbers for x in part for s in sympy.sympify(x).free_symbols}, key=str)
    conditional = isinstance(answer, Proof) and bool(answer.conditions)
    # Floats: a third of 3 must not be a little less than 1.
    rounding = [{"floor": lambda x: math.floor(x + 1e-9)}, "math"]
    holds = sympy.lambdify(symbols, answer.condition, rounding) if conditional else None
    checked = 0
    shown = [v for v in (answer.holds_for, answer.fails_for) if v] if conditional else []
    for values in [*shown, *(random_values(rng, symbols) for _ in range(400))]:
        try:
            plain = gna.subs(values)
        except ValueError:
            assert values not in shown
            continue
        truth = prove(plain, *([substitute(t, values) for t in tile] for tile in numbers[4:]), tiling)
        found = bool(holds(*values.values())) if conditional else answer.perfect
        assert found == truth.perfect, (str(answer), values)
        if conditional and checked < 4:
            # Not subs: one symbol after the other, SymPy 1.14 now and then loops in Mod.
            numeric = answer.condition.xreplace({symbol: sympy.Integer(x) for symbol, x in values.items()})
            assert bool(numeric) == found
        checked += 1
        if checked == 80:
            break
    if conditional:
        for known, expected in ((answer.holds_for, True), (answer.fails_for, False)):
            assert known is None or bool(holds(*known.values())) == expected
        assert answer.perfect is None
        with pytest.raises(TypeError, match="depends on"):
            bool(answer)
    elif isinstance(answer, Refutation) and answer.substitution is None:
        assert (answer.witness, answer.remedies) == (None, ())
        assert checked < 5, "legal values are not hard to find"
    elif isinstance(answer, Refutation):
        tiles = ([substitute(t, answer.substitution) for t in tile] for tile in numbers[4:])
        assert answer.witness == prove(gna.subs(answer.substitution), *tiles, tiling).witness
    return ("conditions" if conditional else type(answer).__name__), checked, seconds


@pytest.mark.parametrize("tiling", TILINGS)
def test_symbols(tiling: str) -> None:
    rng = random.Random(0)
    kinds, checked, seconds = zip(*(check_symbols(question, tiling, rng) for question in QUESTIONS), strict=True)
    assert set(kinds) == {"Proof", "Refutation", "conditions"}
    assert sum(checked) > 1000
    assert statistics.median(seconds) < 0.5


@pytest.mark.slow
def test_random_symbols() -> None:
    rng = random.Random(1)
    results = []
    while sum(checked for _, checked, _ in results) < 2_000:
        try:
            question = random_template(rng)
        except ValueError:  # such as a window of n tokens in a layout of n - 1
            continue
        results.append(check_symbols(question, rng.choice(TILINGS), rng))
    kinds, _, seconds = zip(*results, strict=True)
    assert set(kinds) == {"Proof", "Refutation", "conditions"}
    assert statistics.median(seconds) < 0.5


def test_declared_parity_is_not_left_to_sympy() -> None:
    # SymPy 1.14 takes e/6 of an even e for an integer, and e/3 for none: refused, or right.
    even = sympy.Symbol("even", even=True, positive=True)
    for gna, tile in (((12 * even, even, even), 6), ((12 * even, even, even), 3), ((even, 2, 1, 6), 1)):
        with contextlib.suppress(ValueError):
            assert check_symbols((SymbolicGNA(*gna), tile, 2), "anchored", random.Random(0))[0] == "conditions"


def test_samples_reach_the_numbers_of_the_question() -> None:
    # Windows of 2,048 in layouts of any length; floors that floats get wrong.
    refuted = prove(SymbolicGNA(n, 2048, 1, causal=True), 16)
    assert isinstance(refuted, Refutation)
    assert refuted.substitution[n] >= 2048
    assert refuted.witness
    assert refuted.remedies
    answer = prove(SymbolicGNA(n, 2048, 1), 16)
    assert answer.conditions
    assert answer.holds_for == {n: 2048}
    assert answer.fails_for[n] > 2048
    for divisor in (3, 7, 49):
        answer = prove(SymbolicGNA((n + 1) // divisor + 5, 5, 5), 5)
        for values, expected in ((answer.holds_for, True), (answer.fails_for, False)):
            assert prove(answer.gna.subs(values), 5).perfect == expected


def test_always_true_has_no_conditions() -> None:
    assert prove(SymbolicGNA(8 * n, 8, 8), 8).conditions == ()
    assert prove(SymbolicGNA(n, n, k), m, z + 1).perfect
    assert prove(SymbolicGNA((8 * n, 16 * m, 4 * k), (8, 16, 4), (8, 16, 2), (n, m, k)), (n, m, k), (m, k, n)).perfect
    # All of few values are checked: the proof says how many, and for which it holds.
    few = prove(SymbolicGNA(48, 24, k), 8)
    assert few.values == ({k: 8}, {k: 24})
    assert few.checked == 24
    assert "The symbols have 24 legal values; each was checked." in str(few)
    windows = prove(SymbolicGNA(48, m, 8), 8)
    assert windows.values == tuple({m: w} for (w,) in solve(GNA(48, 8, 8), 8, unknown="window"))
    assert {m: 48} in windows.values
    both = prove(SymbolicGNA((24, 16), (12, 8), (k, m)), 4)
    assert both.values == tuple({k: a, m: b} for a, b in solve(GNA((24, 16), (12, 8)), 4))


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        (lambda: prove(GNA(64, 16), 8, 8, "diagonal"), ValueError, "tiling='diagonal': must be one of 'static', 'anch"),
        (lambda: prove(GNA(64, 16), 0), ValueError, r"q_tile=0 for layout \(64,\): every side must be at least 1"),
        (lambda: prove(GNA(64, 16), 8, -2), ValueError, "kv_tile=-2 for layout"),
        (lambda: prove(GNA((64, 64), 16), (8, 8), (8,)), ValueError, r"kv_tile=\(8,\) has 1 values; the layout has 2"),
        (lambda: prove(GNA(64, 16), (8, 8)), ValueError, r"q_tile=\(8, 8\) has 2 values; the layout has 1"),
        (lambda: prove(GNA(64, 16), -n), ValueError, "every side must be at least 1"),
        (lambda: prove(GNA(64, 16), 8.5), TypeError, "q_tile takes integers"),
        (lambda: prove(GNA(64, 16), None), TypeError, "q_tile takes integers"),
        (lambda: prove(GNA(64, 16), sympy.Symbol("x", positive=True)), ValueError, "q_tile=x: not known to be an int"),
        (lambda: SymbolicGNA(sympy.Symbol("x"), 1), ValueError, "layout=x: not known to be an integer"),
        (lambda: SymbolicGNA(sympy.Symbol("x", integer=True), 1), ValueError, "declare the symbol x positive=True"),
        (lambda: SymbolicGNA(n, m, m + k), ValueError, "no value of the symbols is legal"),
        (lambda: SymbolicGNA(n, n + 1), ValueError, "no value of the symbols is legal"),
        (lambda: SymbolicGNA((n, n), (1, 1, 1)), ValueError, r"has 3 values; the layout has 2 dimensions"),
        (lambda: SymbolicGNA((n, n), 1, causal=(True,)), ValueError, "causal"),
        (lambda: SymbolicGNA((n,) * 4, 1), ValueError, "has 4 dimensions"),
        (lambda: prove(SymbolicGNA(10, 4 * k, 3, m), 1 + n), None, ""),
        (lambda: prove(SymbolicGNA(10, 5 * k + 1, 3, 1 + m), n), ValueError, "legal"),
    ],
)
def test_errors(question, error, message) -> None:
    if error is None:
        question()
        return
    with pytest.raises(error, match=message):
        question()


def test_texts_and_data() -> None:
    rng = random.Random(7)
    answers = [prove(*random_question(rng)) for _ in range(80)]
    answers += [prove(*question, tiling) for question in QUESTIONS for tiling in TILINGS]
    for answer in answers:
        text, latex, data = str(answer), answer.latex(), answer.to_json()
        head = "Refuted: " if isinstance(answer, Refutation) else "Proved: "
        assert text.startswith("Perfectly block-sparse if and only if: " if answer.perfect is None else head)
        assert answer.question in text
        assert all(f"[{lemma.name}] {lemma.statement}" in text for lemma in answer.lemmas)
        assert latex.startswith("\\begin{aligned}\n")
        assert latex.endswith("\n\\end{aligned}")
        depths = list(itertools.accumulate((c == "{") - (c == "}") for c in re.sub(r"\\[{}]", "", latex)))
        assert min(depths) == depths[-1] == 0
        assert {line.count("&") for line in latex.split("\n")[1:-1]} == {2}
        assert json.loads(json.dumps(data)) == data
        assert data["perfect"] is answer.perfect
        assert data["lemmas"].keys() == {lemma.name for lemma in answer.lemmas}
        again = prove(answer.gna, answer.q_tile, answer.kv_tile, answer.tiling)
        assert answer == again
        assert hash(answer) == hash(again)
    assert len(set(answers)) > 80
    general = {"shared", "starts", "moves"}
    assert {lemma.name for answer in answers for lemma in answer.lemmas} == LEMMAS.keys() - general


def test_ragged_key_tiles() -> None:
    # Key tiles of a proof that stick out of the grid, from the tiles themselves.
    rng = random.Random(3)
    seen = set()
    while len(seen) < 4:
        gna, q_tile, kv_tile, tiling = random_question(rng)
        answer = prove(gna, q_tile, kv_tile, tiling)
        if answer:
            expected = []
            for axis, ((length, w, s, d, causal), tk) in enumerate(zip(gna.dims(), kv_tile, strict=True)):
                for size in {len(range(g, length, d)) for g in range(d)}:
                    intervals = {key_interval(i, size, w, s, causal) for i in range(size)}
                    origins = {(lo if tiling == "anchored" else 0, hi) for lo, hi in intervals}
                    if any(lo + math.ceil((hi - lo) / tk) * tk > size for lo, hi in origins):
                        expected.append(axis)
            assert answer.ragged == tuple(dict.fromkeys(expected)), (gna, q_tile, kv_tile, tiling)
            seen.add((tiling, bool(expected)))


def test_holds_asks_again_with_numbers():
    proof = prove(SymbolicGNA(n + 30, 2 * m - 1, k, 2), 2 * m + 1, k)
    values = {n: 1, m: 3, k: 1}
    assert proof.holds(values) == bool(prove(GNA(31, 5, 1, 2), 7, 1))
    assert not proof.holds(values)
    assert prove(GNA(48, 24, 8), k).holds({k: 8})
