"""The lemmas of perfect block-sparsity: the closed form against brute force, and each lemma by itself.

Brute force takes the dense mask and applies the definition: a query tile and a key tile of one dilation group are
visited if a pair of tokens in them is kept, full if every pair is; perfect is when every visited pair of tiles is full.
"""

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from helpers import Sizes, dense_mask, one_dim_sets, random_gna

from gna_flex import GNA
from gna_flex.intervals import attends, key_interval
from gna_flex.symbolic import LEMMAS, prove
from gna_flex.symbolic.lemmas import TILINGS, Moves, cases, group_lengths, moves, perfect

SIDES = np.arange(1, 17)
SMALL = Sizes(one=14, two=7, three=4)


def first_masked(gna, q_tile, kv_tile, tiling):
    """The first ``(group, query tile, key tile)`` in row-major order that is visited but not full, by plain loops."""
    x = [np.arange(n) for n in gna.layout]
    masks = [attends(a[:, None], a, *dim) for a, dim in zip(x, gna.dims(), strict=True)]
    for group in itertools.product(*map(range, gna.dilation)):
        parts = [m[g::d, g::d] for m, g, d in zip(masks, group, gna.dilation, strict=True)]
        q_counts = [math.ceil(len(m) / t) for m, t in zip(parts, q_tile, strict=True)]
        for q_place in itertools.product(*map(range, q_counts)):
            rows = [m[p * t : (p + 1) * t] for m, p, t in zip(parts, q_place, q_tile, strict=True)]
            origins = [r.any(0).argmax() if tiling == "anchored" else 0 for r in rows]
            counts = [math.ceil((len(m) - o) / t) for m, o, t in zip(parts, origins, kv_tile, strict=True)]
            for kv_place in itertools.product(*map(range, counts)):
                pairs = np.ones(())
                for r, o, p, t in zip(rows, origins, kv_place, kv_tile, strict=True):
                    pairs = np.multiply.outer(pairs, r[:, o + p * t : o + (p + 1) * t])
                if pairs.any() and not pairs.all():
                    return group, q_place, kv_place
    return None


def brute(length, window, stride, dilation, causal, tiling, sides=SIDES):
    """Whether one dimension is perfect, ``[windows and strides, query tiles, key tiles]``; at most 64 tokens.

    The same definition as in :func:`first_masked`, with a row of the dense mask as the bits of an integer.
    """
    result = np.ones((len(window), len(sides), len(sides)), bool)
    for group in range(dilation):
        x = np.arange(group, length, dilation)
        n, shape = len(x), (-1, 1, 1)
        keep = attends(x[:, None], x, length, window.reshape(shape), stride.reshape(shape), dilation, causal)
        rows = np.where(keep, np.uint64(1) << np.arange(n, dtype=np.uint64), np.uint64(0)).sum(-1, dtype=np.uint64)
        cut = np.minimum(sides, n)
        for tq in np.unique(cut):
            some, every = (f.reduceat(rows, range(0, n, tq), 1)[..., None] for f in (np.bitwise_or, np.bitwise_and))
            tokens = np.uint64(2**n - 1)
            if tiling == "anchored":
                first = (np.frexp(some & (~some + np.uint64(1)))[1] - 1).astype(np.uint64)
                some, every, tokens = some >> first, every >> first, tokens >> first
            for tk in np.unique(cut):
                tiles = np.array([2 ** min(k + int(tk), n) - 2**k for k in range(0, n, tk)], np.uint64) & tokens
                masked = (((some & tiles) != 0) & ((every & tiles) != tiles)).any((1, 2))
                result[np.ix_(masked, cut == tq, cut == tk)] = False
    return result


def compare(length, dilation, causal, tiling, sides=SIDES):
    """The closed form against brute force for all windows and strides: sets, perfect ones, false and missed ones."""
    counts = np.zeros(4, int)
    pairs = np.array([(w, s) for w in range(1, length // dilation + 1) for s in range(1, w + 1)])
    for part in np.array_split(pairs, math.ceil(len(pairs) / 256)):
        window, stride = part.T
        truth = brute(length, window, stride, dilation, causal, tiling, sides)
        found = perfect(
            length, window[:, None, None], stride[:, None, None], dilation, causal, sides[:, None], sides, tiling
        )
        found = np.broadcast_to(found, truth.shape)
        counts += [truth.size, truth.sum(), (found & ~truth).sum(), (truth & ~found).sum()]
    return counts


def compare_all(lengths):
    return sum(
        compare(length, dilation, causal, tiling)
        for length in lengths
        for dilation in range(1, length + 1)
        for causal in (False, True)
        for tiling in TILINGS
    )


@pytest.mark.parametrize("tiling", TILINGS)
def test_brute_force_is_the_definition(tiling: str) -> None:
    # The fast brute force with bits against the plain loops.
    for length, window, stride, dilation, causal in one_dim_sets(6):
        bits = brute(length, np.array([window]), np.array([stride]), dilation, causal, tiling, SIDES[:7])[0]
        gna = GNA(length, window, stride, dilation, causal)
        for tq, tk in itertools.product(range(1, 8), repeat=2):
            assert bits[tq - 1, tk - 1] == (first_masked(gna, (tq,), (tk,), tiling) is None), (gna, tq, tk)


def test_perfect_is_exact_on_everything_small() -> None:
    sets, good, false, missed = compare_all(range(1, 13))
    assert (sets, good, false, missed) == (574_464, 75_729, 0, 0)


@pytest.mark.slow
def test_perfect_is_exact() -> None:
    # All windows, strides and dilations, causal or not, tiles 1 .. 16, both tilings.
    sets, good, false, missed = compare_all([*range(13, 29), 37, 64])
    assert sets > 10_000_000
    assert good > 500_000
    assert (false, missed) == (0, 0)


def test_golden_count() -> None:
    # Static, not causal: NATTEN's own test at run time finds 537 fewer.
    sides = np.array([2, 4, 8, 16])
    counts = np.zeros(4, int)
    for length in range(2, 49):
        pairs = np.array([(w, s) for w in range(2, length + 1) for s in range(1, w + 1)])
        w, s = pairs.T
        truth = brute(length, w, s, 1, False, "static", sides)
        found = perfect(length, w[:, None, None], s[:, None, None], 1, False, sides[:, None], sides, "static")
        counts += [truth.size, truth.sum(), found.sum(), (found != truth).sum()]
    assert counts.tolist() == [312_832, 22_734, 22_734, 0]


# Each lemma by itself: on everything small, and for all sizes where z3 can say it.


def test_every_lemma_has_a_test() -> None:
    assert {f"test_lemma_{name.replace(' ', '_')}" for name in LEMMAS} <= globals().keys()
    for name, lemma in LEMMAS.items():
        assert name == lemma.name
        assert lemma.statement.endswith(".")
        assert lemma.latex.count("{") == lemma.latex.count("}")


def windows(limit: int) -> Iterator[tuple[int, int, int, list[int]]]:
    """Every ``(length, window, stride)`` that is not causal, and where the window of each query starts."""
    for length, window, stride, dilation, causal in one_dim_sets(limit):
        if dilation == 1 and not causal:
            yield length, window, stride, [key_interval(i, length, window, stride, False)[0] for i in range(length)]


def one_mask(length, window, stride, tiling, dilation=1, causal=False):
    return brute(length, np.array([window]), np.array([stride]), dilation, causal, tiling)[0]


class AnySize:
    """A dimension of any size for z3, linear: the multiple ``s * (i div s)`` is a ``b`` with ``b <= i < b + s``.

    Multiples of the same number are equal or at least that number apart, which is all that is used of them.
    """

    def __init__(self) -> None:
        z3 = self.z3 = pytest.importorskip("z3")
        self.length, self.window, self.stride, self.tile = L, w, s, T = z3.Ints("length window stride tile")
        self.facts = [s >= 1, s <= w, w <= L, T >= 1]
        self.multiples = {s: [z3.IntVal(0)], T: [z3.IntVal(0)]}
        self.slack, self.offset = L - w, w / 2 - s / 2
        before = self.base(self.offset, s)
        self.first, self.move = s - (self.offset - before), before + s

    def base(self, value, step):
        b = self.z3.FreshInt()
        self.facts += [b <= value, value < b + step]
        self.known(b + step, step)
        return self.known(b, step)

    def known(self, b, step):
        """Notes that ``b`` is a multiple of the step."""
        self.facts += [self.z3.Or(b == c, b + step <= c, c + step <= b) for c in self.multiples[step]]
        self.multiples[step].append(b)
        return b

    def query(self):
        i = self.z3.FreshInt()
        self.facts += [i >= 0, i < self.length]
        return i

    def smaller(self, a, b):
        return self.z3.If(a <= b, a, b)

    def clamp(self, value):
        return self.smaller(self.z3.If(value < 0, 0, value), self.slack)

    def start(self, i):
        """Where the window of query ``i`` starts, by the definition of the mask."""
        leader = self.smaller(self.base(i, self.stride) + self.stride / 2, self.length - 1)
        return self.clamp(leader - self.window / 2)

    def always(self, claim, *given) -> None:
        solver = self.z3.Solver()
        solver.set("timeout", 60_000)
        solver.add(*self.facts, *given)
        assert solver.check() == self.z3.sat, "nothing satisfies what is given"
        solver.add(self.z3.Not(claim))
        assert solver.check() == self.z3.unsat, solver.model()


def test_lemma_product() -> None:
    rng = random.Random(0)
    verdicts = set()
    for _ in range(400):
        gna = random_gna(rng, rng.choice([2, 3]), SMALL, text=[0])
        assert dense_mask(gna).any(-1).all()
        tiling = rng.choice(TILINGS)
        tiles = [tuple(rng.choice([1, 1, 2, 3]) for _ in gna.layout) for _ in range(2)]
        each = [
            first_masked(GNA(*dim), (tq,), (tk,), tiling) is None
            for dim, tq, tk in zip(gna.dims(), *tiles, strict=True)
        ]
        assert (first_masked(gna, *tiles, tiling) is None) == all(each), (gna, tiles, tiling)
        verdicts.add(all(each))
    assert verdicts == {True, False}


def test_lemma_groups() -> None:
    for length, window, stride, dilation, causal in one_dim_sets(16):
        x = np.arange(length)
        mask = attends(x[:, None], x, length, window, stride, dilation, causal)
        assert not mask[x[:, None] % dilation != x % dilation].any()
        sizes = [len(x[g::dilation]) for g in range(dilation)]
        for g, size in enumerate(sizes):
            i = np.arange(size)
            assert (mask[g::dilation, g::dilation] == attends(i[:, None], i, size, window, stride, 1, causal)).all()
        assert set(sizes) == set(group_lengths(length, dilation))
    size = AnySize()
    for d in range(1, 17):
        g = size.query()
        found = (size.length - g + d - 1) / d
        size.always(size.z3.Or(found == size.length / d, found == (size.length + d - 1) / d), g < d)


def test_lemma_shared() -> None:
    for length, window, stride, dilation, causal in one_dim_sets(9):
        x = np.arange(length)
        mask = attends(x[:, None], x, length, window, stride, dilation, causal)
        for tiling, tq, tk in itertools.product(TILINGS, range(1, 6), range(1, 6)):
            if first_masked(GNA(length, window, stride, dilation, causal), (tq,), (tk,), tiling) is None:
                tiles = (mask[g::dilation][a : a + tq] for g in range(dilation) for a in range(0, length, tq))
                assert all((rows == rows[:1]).all() for rows in tiles)
    # Two intervals that differ do so in the first or the last key of one of them.
    size = AnySize()
    lo, hi, other_lo, other_hi = size.z3.Ints("lo hi other_lo other_hi")
    ends = (lo, hi - 1, other_lo, other_hi - 1)
    differ = [size.z3.And(lo <= k, k < hi) != size.z3.And(other_lo <= k, k < other_hi) for k in ends]
    size.always(size.z3.Or(differ), lo < hi, other_lo < other_hi, size.z3.Or(lo != other_lo, hi != other_hi))


def test_lemma_starts() -> None:
    for length, window, stride, starts in windows(24):
        offset = window // 2 - stride // 2
        assert offset == moves(length, window, stride).offset
        assert starts == [min(max(i // stride * stride - offset, 0), length - window) for i in range(length)]
    size = AnySize()
    i = size.query()
    size.always(size.start(i) == size.clamp(size.base(i, size.stride) - size.offset))


def test_lemma_moves() -> None:
    for length, window, stride, starts in windows(24):
        slack, _, first, move = moves(length, window, stride)
        assert 1 <= first <= stride
        assert move % stride == 0
        if window < length:
            expected = [0 if i < move else min(first + (i - move) // stride * stride, slack) for i in range(length)]
            assert starts == expected
            assert starts[-1] == slack
    size = AnySize()
    i, moving = size.query(), size.slack > 0
    size.always(size.z3.Implies(i < size.move, size.start(i) == 0), moving)
    size.always(size.move == size.offset + size.first)
    size.always(size.z3.And(size.first > 0, size.first <= size.stride, size.move < size.length), moving)
    size.always(size.start(size.move) == size.smaller(size.first, size.slack), moving)
    size.always(size.start(size.length - 1) == size.slack, moving)
    later = size.start(i + size.stride)
    size.always(
        later == size.smaller(size.start(i) + size.stride, size.slack),
        i >= size.move,
        i + size.stride < size.length,
    )


def settled(name: str, tiling: str, limit: int = 18) -> Iterator[tuple[int, int, int, Moves, set[int], np.ndarray]]:
    """Every parameter set that the case of this name applies to, no other: where windows start, and brute force."""
    tq, tk = SIDES[:, None], SIDES
    used = 0
    for length, window, stride, starts in windows(limit):
        found = cases(length, window, stride, False, tq, tk, tiling)
        applies = [case.lemma for case in found if all(guard.holds for guard in case.guards)]
        assert len(applies) == 1
        if applies == [name]:
            truth = one_mask(length, window, stride, tiling)
            used += 1
            yield length, window, stride, moves(length, window, stride), set(starts), truth
    assert used > 10


def test_lemma_dense() -> None:
    for tiling in TILINGS:
        for length, window, _, _, starts, truth in settled("dense", tiling):
            assert (length, starts) == (window, {0})
            assert truth.all()
    size = AnySize()
    size.always(size.start(size.query()) == 0, size.window == size.length)


@pytest.mark.parametrize("tiling", TILINGS)
def test_lemma_one_move(tiling: str) -> None:
    tq, tk = SIDES[:, None], SIDES
    for length, window, _, at, starts, truth in settled("one move", tiling):
        assert starts == {0, length - window}
        whole = (window % tk == 0) & ((length % tk == 0) | (tiling == "anchored"))
        assert (truth == (whole & (at.first_move % tq == 0))).all()
    size = AnySize()
    i, other = size.query(), size.query()
    once = (size.slack > 0, size.slack <= size.first)
    size.always(size.start(i) == size.z3.If(i < size.move, 0, size.slack), *once)
    # A query tile that does not divide m has a tile with m - 1 and m in it; if it does, no tile has both.
    tile = size.base(size.move - 1, size.tile)
    size.always(size.move < tile + size.tile, *once, tile + size.tile != size.move)
    together = size.base(i, size.tile) == size.base(other, size.tile)
    size.always(size.start(i) == size.start(other), *once, tile + size.tile == size.move, together)


def test_lemma_two_moves() -> None:
    tq, tk = SIDES[:, None], SIDES
    for length, window, stride, at, starts, truth in settled("two moves", "static"):
        assert starts == {0, at.first_start, length - window}
        whole = (window % tk == 0) & (length % tk == 0) & (at.first_start % tk == 0)
        assert (truth == (whole & (stride % tq == 0))).all()
    size = AnySize()
    size.known(size.move + size.stride, size.stride)
    start = size.start(size.query())
    size.always(
        size.z3.Or(start == 0, start == size.first, start == size.slack),
        size.first < size.slack,
        size.slack <= size.first + size.stride,
    )


def test_lemma_many_moves() -> None:
    tq, tk = SIDES[:, None], SIDES
    for length, window, stride, at, starts, truth in settled("many moves", "static", 24):
        assert starts == {0, length - window, *range(at.first_start, length - window, stride)}
        whole = (window % tk == 0) & (length % tk == 0) & (stride % tk == 0) & (at.offset % tk == 0)
        assert (truth == (whole & (stride % tq == 0))).all()
    size = AnySize()
    size.known(size.move + size.stride, size.stride)
    far = size.slack > size.first + size.stride
    size.always(size.start(size.move) == size.first, far)
    size.always(size.start(size.move + size.stride) == size.first + size.stride, far)


def test_lemma_anchored_moves() -> None:
    tq, tk = SIDES[:, None], SIDES
    for _, window, stride, _, _, truth in settled("anchored moves", "anchored"):
        assert (truth == ((window % tk == 0) & (stride % tq == 0))).all()
    size = AnySize()
    far = size.slack > size.first
    second = size.known(size.move + size.stride, size.stride)
    # Necessary: windows move at m and at m + s, so the query tile divides both. Sufficient: tiles lie in stride groups.
    for turn in (size.move, second):
        size.always(size.z3.And(turn < size.length, size.start(turn - 1) < size.start(turn)), far)
    i, other = size.query(), size.query()
    groups = [size.base(x, size.stride) for x in (i, other)]
    for group in groups:
        size.known(size.known(group, size.tile) + size.stride, size.tile)
    size.always(groups[0] == groups[1], size.base(i, size.tile) == size.base(other, size.tile))


def test_lemma_single() -> None:
    for causal, tiling in itertools.product((False, True), TILINGS):
        for length in range(1, 6):
            assert one_mask(length, 1, 1, tiling, length, causal).all()
            assert perfect(length, 1, 1, length, causal, SIDES[:, None], SIDES, tiling).all()


def test_lemma_causal() -> None:
    for length, window, stride, dilation, causal in one_dim_sets(16):
        if causal and length > dilation:
            for tiling in TILINGS:
                truth = one_mask(length, window, stride, tiling, dilation, True)
                assert truth[0, 0]
                assert truth.sum() == 1
    # Every window has a key, and as it ends at the query itself, no two queries see the same.
    size = AnySize()
    i = size.query()
    leader = size.smaller(size.base(i, size.stride) + size.stride - 1, size.length - 1)
    size.always(size.z3.And(leader - size.window + 1 <= i, i >= 0))


def test_lemma_text() -> None:
    rng = random.Random(0)
    for _ in range(60):
        gna = random_gna(rng, sizes=SMALL, text=[1, 3])
        text = np.ones(gna.tokens, bool)
        text[gna.text_first : gna.text_first + gna.grid_tokens] = False
        assert dense_mask(gna)[text[:, None] | text].all()
        tiles = [tuple(rng.choice([1, 2, 3]) for _ in gna.layout) for _ in range(2)]
        plain = GNA(gna.layout, gna.window, gna.stride, gna.dilation, gna.causal)
        with_text = prove(gna, *tiles)
        assert with_text.perfect == prove(plain, *tiles).perfect
        assert LEMMAS["text"] in with_text.lemmas
