"""Work records against what a kernel does with them, pair by pair, on the mask of ``helpers``."""

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from helpers import attended, dense_mask, random_gna, random_rest
from hypothesis import given
from hypothesis import strategies as st

from gna_flex import GNA
from gna_flex.cuda.tables import (
    BOXES,
    COLUMNS,
    FIRST_SHAPE,
    FREE_BOXES,
    GROUP,
    KEY_START,
    KIND,
    LENGTHS,
    MASKED,
    PLAIN,
    REST_BOXES,
    REST_COLUMNS,
    REST_FREE_BOXES,
    SECOND_SHAPE,
    SKIPS,
    START,
    Dim,
    KernelTiles,
    Transposed,
    boxes_of,
    count,
    count_with_skips,
    key_boxes,
    padded_dims,
    query_spans,
    work_records,
)
from gna_flex.cuda.windows import class_lengths, window_table

TEXT = (0, 0, 1, 9, 130)


def random_box(rng: random.Random, most: int) -> tuple[int, int, int]:
    """Any sides whose product is at most ``most``, sometimes exactly."""
    a = rng.choice([1, 1, 2, rng.randint(1, min(most, 9))])
    b = rng.choice([1, 2, 3, rng.randint(1, min(most // a, 9))]) if a * 3 <= most else 1
    c = rng.choice([most // (a * b), rng.randint(1, most // (a * b))])
    sides = [a, b, c]
    rng.shuffle(sides)
    return tuple(sides)


def random_tiles(rng: random.Random, rows: int = 64) -> KernelTiles:
    slots = rng.choice([16, 32, 48, 64, 96, 128, 160])
    box = rng.choice([(1, 1, 61), (1, 6, 7), (3, 3, 7), *(random_box(rng, rng.choice([rows, 8])) for _ in range(5))])
    kv_tile = random_box(rng, slots)
    rest = random_rest(rng, kv_tile, slots) if rng.random() < 0.6 else None
    return KernelTiles(box, rng.randint(1, 4), rng.randint(0, 2), kv_tile, slots, rows, rest, rng.randint(0, 2))


def product(*axes: np.ndarray) -> np.ndarray:
    """All combinations, ``[n, 3]``, the last fastest."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


class Kernel:
    """Walks records as the CUDA kernel does, and counts how often each query meets each key of the grid."""

    def __init__(self, gna: GNA, tiles: KernelTiles) -> None:
        self.gna, self.tiles = gna, tiles
        self.layout = np.array([dim[0] for dim in padded_dims(gna)])
        self.dilation = np.array([dim[3] for dim in padded_dims(gna)])
        self.windows, self.offsets = window_table(gna)
        self.lengths = class_lengths(gna)
        self.queries = np.zeros(gna.tokens, int)
        self.met = np.zeros((gna.tokens, gna.grid_tokens), int)
        self.records = work_records(gna, tiles)
        for record in self.records:
            self.run(record)

    def run(self, record: np.ndarray) -> None:
        rows, tokens = self.text_rows(record) if record[KIND] else self.grid_rows(record)
        assert len(rows), "an item without queries"
        keys, free = self.key_places(record)
        lengths = self.lengths[record[LENGTHS]]
        window = self.windows[self.offsets[record[LENGTHS]] + np.minimum(rows, lengths - 1)]  # [queries, 3, 2]
        seen = (window[:, None, :, 0] <= keys) & (keys < window[:, None, :, 1])
        kept = (seen.all(-1) | free) & self.not_skipped(record, rows)
        inside = ((keys >= 0) & (keys < lengths)).all(-1)
        assert not kept[:, ~inside].any(), "a place outside the group is kept"
        assert record[MASKED] == (not free.all())
        dilation = 1 if record[LENGTHS] == PLAIN else self.dilation
        columns = self.index(keys[inside] * dilation + record[GROUP])
        self.queries[tokens] += 1
        self.met[np.ix_(tokens, columns)] += kept[:, inside]

    def not_skipped(self, record: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Which places the warpgroup of each row meets, ``[queries, places]``."""
        boxes, keys = int(boxes_of(record[None])[0]), math.prod(self.tiles.kv_tile)
        if not self.tiles.skips or record[KIND]:
            assert not record[SKIPS].any() or self.tiles.kv_rest
            return np.ones((1, 1), bool)
        skips = self.skips_of(record, rows)
        first, last = skips & 0xFFFF, skips >> 16
        assert (first + last < boxes).all(), "a warpgroup without key boxes"
        place = np.arange(boxes * keys) // keys
        return (first[:, None] <= place) & (place < boxes - last[:, None])

    def skips_of(self, record: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What the warpgroup of each row skips."""
        skips: np.ndarray = record[SKIPS][(rows[:, 2] - record[START][2]) // self.tiles.box[2]]
        return skips

    def index(self, x: np.ndarray) -> np.ndarray:
        return np.ravel_multi_index(tuple(x.T), tuple(self.layout))

    def grid_rows(self, record: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the queries that exist, ``[n, 3]``, and their tokens."""
        group = record[GROUP]
        sizes = [len(range(g, n, d)) for g, n, d in zip(group, self.layout, self.dilation, strict=True)]
        assert sizes == self.lengths[record[LENGTHS]].tolist()
        beside = np.eye(3, dtype=int)[self.tiles.split] * self.tiles.box[self.tiles.split]
        box = product(*map(np.arange, self.tiles.box))
        rows = np.concatenate([record[START] + warpgroup * beside + box for warpgroup in range(self.tiles.groups)])
        rows = rows[(rows < sizes).all(1)]
        return rows, self.gna.text_first + self.index(rows * self.dilation + group)

    def text_rows(self, record: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = record[KIND] == 1
        place = record[2] + np.arange(self.tiles.rows * self.tiles.groups)
        place = place[place < (self.gna.text_first if first else self.gna.text_last)]
        rows = np.stack([0 * place, 0 * place, place], axis=1)
        return rows, place + (0 if first else self.gna.text_first + self.gna.grid_tokens)

    def key_places(self, record: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of all places of all key boxes, ``[m, 3]``, and whether their box is free of masked pairs."""
        grids = [self.grid_places(record, self.tiles.kv_tile, *FIRST_SHAPE)]
        if self.tiles.kv_rest:
            grids.append(self.grid_places(record, self.tiles.kv_rest, *SECOND_SHAPE))
        keys, free = zip(*grids, strict=True)
        return np.concatenate(keys), np.concatenate(free)

    def grid_places(
        self, record: np.ndarray, tile: tuple[int, int, int], start: slice, boxes: slice, first: slice, number: slice
    ) -> tuple[np.ndarray, np.ndarray]:
        box = product(*(np.arange(n) for n in record[boxes]))
        free = ((record[first] <= box) & (box < record[first] + record[number])).all(1)
        assert not free.any() or self.tiles.fills_slots
        inside = product(*map(np.arange, tile))
        keys = record[start] + box[:, None] * tile + inside
        return keys.reshape(-1, 3), np.repeat(free, len(inside))


def assert_exact(gna: GNA, tiles: KernelTiles) -> Kernel:
    kernel = Kernel(gna, tiles)
    assert (kernel.queries == 1).all()
    mask = dense_mask(gna)
    keep = (mask.T if isinstance(gna, Transposed) else mask)[:, gna.text_first : gna.text_first + gna.grid_tokens]
    np.testing.assert_array_equal(kernel.met, keep, err_msg=f"{gna}, {tiles}")
    return kernel


@pytest.mark.parametrize("seed", range(12))
def test_every_pair_is_met_exactly_once(seed):
    rng = random.Random(seed)
    for _ in range(40):
        assert_exact(random_gna(rng, text=TEXT), random_tiles(rng))


@pytest.mark.parametrize("seed", range(6))
def test_every_pair_is_met_exactly_once_where_warpgroups_skip_boxes(seed):
    rng = random.Random(200 + seed)
    for _ in range(40):
        gna = random_gna(rng, 1, (400,), TEXT)
        groups, box, keys = rng.randint(1, 3), rng.randint(8, 64), rng.choice([16, 32, 32, 64])
        tiles = KernelTiles((1, 1, box), groups, 2, (1, 1, rng.choice([keys, keys, keys - 3])), keys, skips=True)
        assert_first_keys_are_seen(assert_exact(gna, tiles))


def assert_first_keys_are_seen(kernel: Kernel) -> None:
    """The kernel asks for a row's first key in the first box of its warpgroup, and in boxes that need a mask."""
    tiles = kernel.tiles
    for record in kernel.records:
        if not record[KIND] and record[MASKED]:
            rows, _ = kernel.grid_rows(record)
            keys, free = kernel.key_places(record)
            window = kernel.windows[kernel.offsets[record[LENGTHS]][2] + rows[:, 2]]
            seen = (window[:, :1] <= keys[:, 2]) & (keys[:, 2] < window[:, 1:]) & kernel.not_skipped(record, rows)
            box = seen.argmax(axis=1) // tiles.kv_tile[2]
            first = box == kernel.skips_of(record, rows) & 0xFFFF
            assert (first | ~free[:: tiles.kv_tile[2]][box]).all()


def test_skips_are_counted():
    tiles = KernelTiles((1, 1, 64), 3, 2, (1, 1, 64), 64, skips=True)
    assert count_with_skips(GNA(3072, 1024, 256), tiles) == (16 * 16.0, 0), "all that a group of 256 sees, unmasked"
    boxes, masked = count_with_skips(GNA(3072, 1024), tiles)
    plain = count(GNA(3072, 1024), replace(tiles, skips=False))
    assert boxes < plain.boxes
    assert masked > plain.masked
    assert count_with_skips(GNA.dense(3072), tiles) == (16 * 48.0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 4},
        {"split": 1},
        {"box": (1, 2, 32)},
        {"kv_tile": (2, 1, 32)},
        {"kv_rest": (1, 32, 2), "kv_slots": 128},
    ],
)
def test_boxes_are_skipped_along_one_dimension_only(change):
    shapes = {"box": (1, 1, 64), "groups": 3, "split": 2, "kv_tile": (1, 1, 64), "kv_slots": 64, "skips": True}
    with pytest.raises(ValueError, match="skips=True is for boxes along one dimension"):
        KernelTiles(**(shapes | change))


@pytest.mark.parametrize("seed", range(6))
def test_every_pair_is_met_exactly_once_where_rows_are_keys(seed):
    rng = random.Random(100 + seed)
    for _ in range(40):
        gna, tiles = Transposed.of(random_gna(rng, text=TEXT)), random_tiles(rng)
        assert_exact(gna, tiles)
        assert (work_records(gna, tiles)[:, KEY_START] >= 0).all(), "sums are added to boxes that start in the grid"


@pytest.mark.parametrize("seed", range(3))
def test_every_pair_is_met_exactly_once_by_larger_tiles(seed):
    rng = random.Random(seed)
    for _ in range(40):
        assert_exact(random_gna(rng, text=(0, 5, 150, 300)), random_tiles(rng, rows=128))


@given(st.randoms(use_true_random=False))
def test_every_pair_is_met_exactly_once_property(rng):
    assert_exact(random_gna(rng, text=TEXT), random_tiles(rng))


@pytest.mark.parametrize(
    ("gna", "tiles"),
    [
        (GNA(7, 3), KernelTiles((1, 1, 64), 2, 2, (1, 1, 128), 128)),
        (GNA(1, 1), KernelTiles((4, 4, 4), 3, 0, (2, 8, 8), 128)),
        (
            GNA((5, 9, 13), (3, 9, 5), (2, 4, 5), causal=(True, False, False)),
            KernelTiles((3, 3, 7), 2, 1, (4, 4, 8), 128),
        ),
        (GNA((23, 17), (5, 4), (2, 3), dilation=(3, 4)), KernelTiles((1, 6, 7), 2, 2, (1, 4, 4), 16)),
        (GNA((12, 16), (4, 8), (4, 8), text_first=200, text_last=64), KernelTiles((1, 4, 8), 2, 2, (1, 2, 8), 16)),
        (GNA(300, 300, text_last=3), KernelTiles((1, 1, 61), 2, 2, (1, 1, 96), 96)),
    ],
    ids=["one item", "one token", "causal 3-D", "dilation", "blocked with text", "dense"],
)
def test_chosen_cases(gna, tiles):
    assert_exact(gna, tiles)


def brute_force(lo: int, hi: int, free_lo: int, free_hi: int, side: int, least: int) -> int:
    """Most free boxes over every start from ``least`` on that covers the union with the fewest boxes."""
    total = math.ceil((hi - lo) / side)
    return max(
        sum(free_lo <= start + i * side and start + (i + 1) * side <= free_hi for i in range(total))
        for start in range(max(hi - total * side, least), lo + 1)
    )


@given(*(st.integers(0, 40) for _ in range(3)), st.integers(1, 40), st.integers(1, 50), st.booleans())
def test_key_boxes_are_as_free_as_possible(lo, skip, width, rest, side, below):
    hi = lo + max(skip, width) + rest
    free_lo, free_hi = min(lo + skip, hi - 1), min(lo + width, hi)
    boxes = key_boxes(*np.array([lo, hi, free_lo, free_hi, side]), below=below)
    start, total, free, free_total = map(int, boxes)
    assert total == math.ceil((hi - lo) / side)
    least = hi - total * side if below else 0
    assert max(hi - total * side, least) <= start <= lo
    assert free_total == brute_force(lo, hi, free_lo, free_hi, side, least)
    inside = [i for i in range(total) if free_lo <= start + i * side and start + (i + 1) * side <= free_hi]
    assert inside == list(range(free, free + free_total))


@given(st.randoms(use_true_random=False), st.integers(1, 70))
def test_spans_are_union_and_intersection(rng, side):
    length, window, stride, _, causal = dim = next(iter(random_gna(rng, 1).dims()))
    spans = query_spans(Dim(*dim), np.array([length]), np.array([side]))
    assert spans.start.tolist() == list(range(0, length, side))
    keys = attended(length, window, stride, 1, causal)
    for start, lo, hi, free_lo, free_hi in zip(*spans[1:], strict=True):
        sets = [set(keys[i]) for i in range(start, min(start + side, length))]
        assert min(min(s) for s in sets) == lo
        assert max(max(s) for s in sets) == hi - 1
        assert set.intersection(*sets) == set(range(free_lo, free_hi))


@given(st.randoms(use_true_random=False))
def test_count_is_that_of_the_records(rng):
    gna, tiles = random_gna(rng, text=TEXT), random_tiles(rng)
    records = work_records(gna, tiles)
    assert records.dtype == np.int32
    assert records.shape[1] == COLUMNS + REST_COLUMNS * bool(tiles.kv_rest)
    assert not records[:, -3:].any()
    boxes, free = (np.prod(records[:, columns], axis=1).sum() for columns in (BOXES, FREE_BOXES))
    if tiles.kv_rest:
        boxes += np.prod(records[:, REST_BOXES], axis=1).sum()
        free += np.prod(records[:, REST_FREE_BOXES], axis=1).sum()
    work = count(gna, tiles)
    assert (work.items, work.text_items) == (len(records), np.count_nonzero(records[:, KIND]))
    assert (work.boxes, work.masked) == (boxes, boxes - free)
    keys = math.prod(tiles.kv_tile)
    pieces = [min(keys, n - i) for n in (gna.text_first, gna.text_last) for i in range(0, n, keys)]
    assert work.text_boxes == len(records) * len(pieces)
    assert work.text_masked == len(records) * sum(piece < tiles.kv_slots for piece in pieces)


@given(st.randoms(use_true_random=False))
def test_order_of_the_records(rng):
    gna, tiles = random_gna(rng, text=TEXT), random_tiles(rng)
    records = work_records(gna, tiles)
    is_text = records[:, KIND] > 0
    assert not is_text[np.count_nonzero(is_text) :].any()
    assert records[is_text][:, [KIND, 2]].tolist() == sorted(records[is_text][:, [KIND, 2]].tolist())
    assert (records[is_text][:, LENGTHS] == PLAIN).all()
    grid = records[~is_text].tolist()
    cost = [-number * any(gna.causal) for number in boxes_of(records[~is_text])]
    keys = [(c, record[GROUP], record[START]) for c, record in zip(cost, grid, strict=True)]
    assert keys == sorted(keys)


@given(st.randoms(use_true_random=False))
def test_window_table(rng):
    gna = random_gna(rng, text=TEXT)
    dims = padded_dims(gna)
    windows, offsets = window_table(gna)
    lengths = class_lengths(gna)
    assert (windows.dtype, offsets.dtype) == (np.int32, np.int32)
    assert windows.shape[1:] == (2,)
    assert offsets.shape == (PLAIN + 1, 3)
    used = set(work_records(gna, KernelTiles((1, 1, 64), 1, 2, (1, 1, 64), 64))[:, LENGTHS].tolist())
    assert used == {c for c in range(PLAIN + 1) if offsets[c, 0] >= 0}
    np.testing.assert_array_equal(offsets < 0, lengths < 0)
    for c in used:
        for axis, (length, window, stride, dilation, causal, _) in enumerate(dims):
            short = c >> axis & 1
            size = length if c == PLAIN else math.ceil(length / dilation) - short
            rows = windows[offsets[c, axis] :][:size].tolist()
            assert size == lengths[c, axis]
            keys = [range(size)] * size if c == PLAIN else attended(size, window, stride, 1, causal)
            assert rows == [[k[0], k[-1] + 1] for k in keys]


def test_a_strided_window_needs_no_mask():
    gna = GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))
    tiles = KernelTiles((1, 8, 8), 2, 0, (2, 8, 8), 128)
    records = work_records(gna, tiles)
    assert len(records) == 900
    assert not records[:, MASKED].any()
    assert count(gna, tiles).boxes * 128 * 128 == gna.kept_pairs()


def test_sixteen_million_tokens_take_no_time():
    gna = GNA((121, 360, 368), (24, 24, 24), text_last=512)
    tiles = KernelTiles((4, 4, 4), 2, 0, (2, 8, 8), 128)
    begin = time.perf_counter()
    records = work_records(gna, tiles)
    assert time.perf_counter() - begin < 2
    work = count(gna, tiles)
    assert len(records) == work.items > 125_000
    assert np.prod(records[:, BOXES], axis=1, dtype=np.int64).sum() == work.boxes
    assert time.perf_counter() - begin < 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": (1, 8, 9)}, "72 queries"),
        ({"box": (0, 8, 8)}, "box"),
        ({"kv_tile": (8, 16)}, "kv_tile"),
        ({"groups": 5}, "groups=5"),
        ({"groups": 0}, "groups=0"),
        ({"split": 3}, "split=3"),
        ({"kv_tile": (1, 8, 17)}, "kv_slots=128"),
        ({"kv_slots": 100}, "kv_slots=100"),
        ({"kv_slots": 0}, "kv_slots=0"),
        ({"rows": 96}, "rows=96 must be 64 or 128"),
        ({"rows": 128, "box": (1, 8, 17)}, "136 queries; a warpgroup holds 128"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    shapes = {"box": (1, 8, 8), "groups": 2, "split": 1, "kv_tile": (1, 8, 16), "kv_slots": 128}
    with pytest.raises(ValueError, match=message):
        KernelTiles(**(shapes | change))
