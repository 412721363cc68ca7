"""A model of the Blackwell kernel's barriers: its roles as waits, arrivals, reads and writes, run in every order.

Barriers, their arrivals and the sizes of rings are parsed from the kernel's source. A role is a function below that
follows the role's function in the kernel, as ``test_blackwell_roles.py`` makes sure, with a value for each thing in a
buffer: whoever reads says what it expects.
Copies finish in any order; multiplications one after the other. A role's steps end at an arrival: what comes between a
wait and the next arrival can be moved next to the wait without hiding an error, because whatever could happen in
between could as well happen before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROLES = {
    "fetch_items": 1,
    "load_keys": 1,
    "multiply": 1,
    "compute_weights": 128,
    "correct": 128,
    "store_outputs": 1,
}
"""The kernel's functions, and the threads that arrive together; there is one ``compute_weights`` for each tile."""

Op = tuple[Any, ...]
"""``wait bar phase``, ``arrive/commit bar``, ``read/write buffer value``, ``load buffer value bar`` or ``mma ops``."""


class Barrier(NamedTuple):
    count: int
    arrivals: int


class Sizes(NamedTuple):
    """What the model depends on: barriers and rings from the kernel, and how much work there is."""

    barriers: dict[str, Barrier]
    records: int
    tiles: int
    key_stages: int
    output_stages: int
    chunks: int
    items: int = 2
    boxes: int = 2

    @property
    def names(self) -> list[str]:
        """All barriers, in the order of shared memory."""
        return [f"{name}{i}" for name, barrier in self.barriers.items() for i in range(barrier.count)]


def constants(source: str, *names: str) -> dict[str, int]:
    """Numbers that the kernel's source gives names."""
    found = {name: re.findall(rf"\b{name} = (\d+)[,;]", source) for name in names}
    return {name: int(value) for name, (value,) in found.items()}


def parse(source: str, key_stages: int, output_stages: int, chunks: int, items: int = 2, boxes: int = 2) -> Sizes:
    """Sizes of the kernel with this source, for a configuration and an amount of work."""
    known = constants(source, "kRecords", "kTiles") | {"kKeyStages": key_stages, "kOutputStages": output_stages}
    rows = re.findall(r"^  X\((\w+), (\w+), (\d+)\)", source, re.MULTILINE)
    barriers = {name: Barrier(int(known.get(count, count)), int(arrivals)) for name, count, arrivals in rows}
    return Sizes(barriers, known["kRecords"], known["kTiles"], key_stages, output_stages, chunks, items, boxes)


class Stage:
    """``Stage`` of the kernel."""

    def __init__(self, stages: int, phase: int) -> None:
        self.stages, self.index, self.phase = stages, 0, phase

    def next(self) -> None:
        self.index = (self.index + 1) % self.stages
        self.phase ^= self.index == 0


def fetch_items(m: Sizes) -> Iterator[Op]:
    R, Q = Stage(m.records, 1), Stage(1, 1)
    for i in range(m.items + 1):
        yield "wait", f"item_empty{R.index}", R.phase
        yield "write", f"work{R.index}", i
        yield "arrive", f"item_full{R.index}"
        if i < m.items:
            yield "wait", "q_empty0", Q.phase
            yield "load", "queries", i, "q_full0"
        R.next(), Q.next()


def item(i: int, R: Stage) -> Iterator[Op]:
    yield "wait", f"item_full{R.index}", R.phase
    yield "read", f"work{R.index}", i


def load_keys(m: Sizes) -> Iterator[Op]:
    R, K = Stage(m.records, 0), Stage(m.key_stages, 1)
    for i in range(m.items):
        yield from item(i, R)
        for j in range(2 * m.boxes):
            yield "wait", f"kv_empty{K.index}", K.phase
            yield "load", f"slot{K.index}", (i, j // 2, "KV"[j % 2]), f"kv_full{K.index}"
            K.next()
        yield "read", f"work{R.index}", i
        yield "arrive", f"item_empty{R.index}"
        R.next()
    yield from item(m.items, R)


def multiply(m: Sizes) -> Iterator[Op]:
    R, Q, K, S = Stage(m.records, 0), Stage(1, 0), Stage(m.key_stages, 0), Stage(1, 0)

    def scores(i: int, j: int, tile: int) -> Iterator[Op]:
        reads = ("read", "queries", i), ("read", f"slot{K.index}", (i, j, "K"))
        yield "mma", (*reads, ("write", f"scores{tile}", (i, j)), ("write", f"weights{tile}", "scores"))
        yield "commit", f"s_full{tile}"

    def values(i: int, j: int, tile: int, slot: int) -> Iterator[Op]:
        reads: tuple[Op, ...] = ("read", f"weights{tile}", (i, j)), ("read", f"slot{slot}", (i, j, "V"))
        if j:
            reads = (*reads, ("read", f"output{tile}", (i, j - 1, "rescaled")))
        yield "mma", (*reads, ("write", f"output{tile}", (i, j)))

    for i in range(m.items):
        yield from item(i, R)
        yield "arrive", f"item_empty{R.index}"
        yield "wait", f"kv_full{K.index}", K.phase
        yield "wait", "q_full0", Q.phase
        for tile in range(m.tiles):
            yield from scores(i, 0, tile)
        yield "commit", f"kv_empty{K.index}"
        if m.boxes == 1:
            yield "commit", "q_empty0"
        K.next()
        for j in range(m.boxes):
            V, more = K.index, j + 1 < m.boxes
            yield "wait", f"kv_full{K.index}", K.phase
            K.next()
            for tile in range(m.tiles):
                yield "wait", f"p_full{tile}", S.phase
                yield from values(i, j, tile, V)
                if tile == m.tiles - 1:
                    yield "commit", f"kv_empty{V}"
                if not more:
                    yield "commit", f"o_full{tile}"
                    continue
                if tile == 0:
                    yield "wait", f"kv_full{K.index}", K.phase
                yield from scores(i, j + 1, tile)
            if more:
                yield "commit", f"kv_empty{K.index}"
                if j + 2 == m.boxes:
                    yield "commit", "q_empty0"
                K.next()
            S.next()
        R.next(), Q.next()
    yield from item(m.items, R)
    yield "arrive", f"item_empty{R.index}"


def compute_weights(m: Sizes, tile: int) -> Iterator[Op]:
    R, S, F = Stage(m.records, 0), Stage(1, 0), Stage(1, 1)

    def send_factor(value: object) -> Iterator[Op]:
        yield "wait", f"factor_empty{tile}", F.phase
        F.next()
        yield "write", f"factor{tile}", value
        yield "arrive", f"factor_full{tile}"

    for i in range(m.items):
        yield from item(i, R)
        for j in range(m.boxes):
            yield "wait", f"s_full{tile}", S.phase
            yield "read", f"scores{tile}", (i, j)
            yield from send_factor((i, j))
            yield "write", f"scores{tile}", "weights"
            yield "write", f"weights{tile}", (i, j)
            yield "arrive", f"p_full{tile}"
            S.next()
        yield from send_factor((i, "last"))
        yield "read", f"work{R.index}", i
        yield "arrive", f"item_empty{R.index}"
        R.next()
    yield from item(m.items, R)


def correct(m: Sizes) -> Iterator[Op]:
    R, F, done, E = Stage(m.records, 0), Stage(1, 0), Stage(1, 0), Stage(m.output_stages, 1)

    def receive_factor(tile: int, value: object) -> Iterator[Op]:
        yield "wait", f"factor_full{tile}", F.phase
        yield "read", f"factor{tile}", value
        yield "arrive", f"factor_empty{tile}"

    for i in range(m.items):
        yield from item(i, R)
        yield "arrive", f"item_empty{R.index}"
        for j in range(m.boxes):
            for tile in range(m.tiles):
                yield from receive_factor(tile, (i, j))
                if j:
                    yield "read", f"output{tile}", (i, j - 1)
                    yield "write", f"output{tile}", (i, j - 1, "rescaled")
                yield "arrive", f"p_full{tile}"
            F.next()
        for tile in range(m.tiles):
            yield from receive_factor(tile, (i, "last"))
            yield "wait", f"o_full{tile}", done.phase
            for chunk in range(m.chunks):
                yield "wait", f"out_empty{E.index}", E.phase
                yield "read", f"output{tile}", (i, m.boxes - 1)
                yield "write", f"out{E.index}", (i, tile, chunk)
                yield "arrive", f"out_full{E.index}"
                E.next()
        F.next(), done.next(), R.next()
    yield from item(m.items, R)
    yield "arrive", f"item_empty{R.index}"


def store_outputs(m: Sizes) -> Iterator[Op]:
    R, ready = Stage(m.records, 0), Stage(m.output_stages, 0)
    for i in range(m.items):
        yield from item(i, R)
        for tile in range(m.tiles):
            for chunk in range(m.chunks):
                yield "wait", f"out_full{ready.index}", ready.phase
                yield "read", f"work{R.index}", i
                yield "read", f"out{ready.index}", (i, tile, chunk)
                yield "arrive", f"out_empty{ready.index}"
                ready.next()
        yield "arrive", f"item_empty{R.index}"
        R.next()
    yield from item(m.items, R)


class Program(NamedTuple):
    """Operations of one role, and the threads that arrive together."""

    function: str
    threads: int
    ops: tuple[Op, ...]


def programs(m: Sizes) -> list[Program]:
    """All roles of one CTA."""
    simple: list[Callable[[Sizes], Iterator[Op]]] = [fetch_items, load_keys, multiply, correct, store_outputs]
    roles = [Program(f.__name__, ROLES[f.__name__], tuple(f(m))) for f in simple]
    softmax = [Program("compute_weights", 128, tuple(compute_weights(m, tile))) for tile in range(m.tiles)]
    return roles + softmax


class ProtocolError(Exception):
    """An order of events in which something goes wrong."""


class _Step(NamedTuple):
    wait: tuple[int, int] | None
    ops: tuple[Op, ...]
    arrive: tuple[int, int] | None


def explore(m: Sizes, roles: list[Program], limit: int = 3_000_000) -> int:
    """Number of states that can be reached. Every order ends with all roles done.

    Raises:
        ProtocolError: a buffer does not hold what its reader expects, a barrier gets too many arrivals, or all wait.
    """
    names = m.names
    place = {name: i for i, name in enumerate(names)}
    full = [barrier.arrivals for barrier in m.barriers.values() for _ in range(barrier.count)]
    buffers: dict[str, int] = {}
    compiled = [_steps(role, place) for role in roles]
    loads = [op for role in roles for op in role.ops if op[0] == "load"]
    number = {op: i for i, op in enumerate(loads)}
    # Multiplications and commits of the one role that issues them, in order, and how many are issued before each step.
    (issuer,) = (i for i, role in enumerate(roles) if any(op[0] == "mma" for op in role.ops))
    queue = [op for op in roles[issuer].ops if op[0] in ("mma", "commit")]
    issued = [0]
    for step in compiled[issuer]:
        issued.append(issued[-1] + sum(op[0] in ("mma", "commit") for op in step.ops))

    def arrive(bars: tuple[int, ...], bar: int, threads: int) -> tuple[int, ...]:
        pending, parity = bars[bar] >> 1, bars[bar] & 1
        pending -= threads
        if pending < 0:
            raise ProtocolError(f"{names[bar]} gets too many arrivals")
        state = pending << 1 | parity if pending else full[bar] << 1 | (parity ^ 1)
        return (*bars[:bar], state, *bars[bar + 1 :])

    def apply(held: tuple[Any, ...], ops: tuple[Op, ...]) -> tuple[Any, ...]:
        for kind, buffer, value in ops:
            at = buffers.setdefault(buffer, len(buffers))
            held += (None,) * (at + 1 - len(held))
            if kind == "read":
                if held[at] != value:
                    raise ProtocolError(f"{buffer} holds {held[at]} where {value} is read")
            else:
                held = (*held[:at], value, *held[at + 1 :])
        return held

    State = tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...], tuple[int, ...], int]

    def following(state: State) -> Iterator[State]:
        places, bars, held, flying, done = state
        for r, steps in enumerate(compiled):
            if places[r] == len(steps):
                continue
            wait, ops, arrival = steps[places[r]]
            if wait is not None and bars[wait[0]] & 1 == wait[1]:
                continue
            plain = tuple(op for op in ops if op[0] in ("read", "write"))
            copies = tuple(number[op] for op in ops if op[0] == "load")
            then = (*places[:r], places[r] + 1, *places[r + 1 :])
            after = arrive(bars, *arrival) if arrival else bars
            yield then, after, apply(held, plain) if plain else held, tuple(sorted(flying + copies)), done
        for i, copy in enumerate(flying):
            _, buffer, value, bar = loads[copy]
            yield (
                places,
                arrive(bars, place[bar], 1),
                apply(held, (("write", buffer, value),)),
                flying[:i] + flying[i + 1 :],
                done,
            )
        if done < issued[places[issuer]]:
            kind, what = queue[done]
            if kind == "mma":
                yield places, bars, apply(held, what), flying, done + 1
            else:
                yield places, arrive(bars, place[what], 1), held, flying, done + 1

    end = tuple(len(steps) for steps in compiled)
    start: State = (0,) * len(roles), tuple(count << 1 for count in full), (), (), 0
    seen, stack = {start}, [start]
    while stack:
        state = stack.pop()
        stuck = True
        for after in following(state):
            stuck = False
            if after not in seen:
                seen.add(after)
                stack.append(after)
        if stuck and state[0] != end:
            raise ProtocolError("all wait for each other")
        if len(seen) > limit:
            raise RuntimeError(f"more than {limit} states")
    return len(seen)


def _steps(role: Program, place: dict[str, int]) -> list[_Step]:
    """Operations in steps: a wait comes first, an arrival last."""
    steps: list[_Step] = []
    wait: tuple[int, int] | None = None
    ops: list[Op] = []

    def close(arrival: tuple[int, int] | None) -> None:
        nonlocal wait
        if wait or ops or arrival:
            steps.append(_Step(wait, tuple(ops), arrival))
        wait = None
        ops.clear()

    for op in role.ops:
        if op[0] == "wait":
            close(None)
            wait = place[op[1]], op[2]
        elif op[0] == "arrive":
            close((place[op[1]], role.threads))
        else:
            ops.append(op)
    close(None)
    return steps
