"""The Blackwell kernel's barriers in a model (``protocol.py``): all orders of events are right, all changes caught."""

from collections.abc import Iterator

import pytest
from protocol import ROLES, Op, Program, ProtocolError, Sizes, explore, parse, programs

from gna_flex.cuda import jit

SOURCE = (jit.source_folder() / "blackwell" / "forward.cu").read_text()
SMALL = parse(SOURCE, key_stages=3, output_stages=2, chunks=2)


def name_of(barrier: str) -> str:
    return barrier.rstrip("0123456789")


def waits(role: Program) -> set[str]:
    return {name_of(op[1]) for op in role.ops if op[0] == "wait"}


def arrivals(role: Program) -> set[str]:
    loads = {name_of(op[3]) for op in role.ops if op[0] == "load"}
    return {name_of(op[1]) for op in role.ops if op[0] in ("arrive", "commit")} | loads


def test_every_barrier_has_somebody_who_waits_and_who_arrives():
    """Arrivals add up to what the kernel says."""
    roles = programs(SMALL)
    assert {role.function for role in roles} == set(ROLES)
    assert set().union(*map(waits, roles)) == set().union(*map(arrivals, roles)) == set(SMALL.barriers)
    assert SMALL.barriers["p_full"] == (SMALL.tiles, 256)
    assert SMALL.barriers["item_empty"] == (SMALL.records, sum(role.threads for role in roles) - 1)


@pytest.mark.slow
def test_every_order_ends_well():
    assert explore(SMALL, programs(SMALL)) > 100_000


@pytest.mark.parametrize(
    ("key_stages", "output_stages", "chunks", "items", "boxes"),
    [(2, 2, 1, 1, 3), (6, 2, 1, 1, 2), (4, 1, 2, 1, 2), (3, 2, 3, 1, 1), (3, 2, 1, 2, 1)],
)
def test_other_sizes(key_stages, output_stages, chunks, items, boxes):
    sizes = parse(SOURCE, key_stages, output_stages, chunks, items, boxes)
    assert explore(sizes, programs(sizes)) > 10_000


def test_one_slot_of_keys_or_values_is_too_few():
    sizes = parse(SOURCE, key_stages=1, output_stages=2, chunks=1)
    with pytest.raises(ProtocolError, match="all wait for each other"):
        explore(sizes, programs(sizes))


def changed(role: Program, kind: str, barrier: str) -> Iterator[Op]:
    """Operations of a role after a change to all its waits for a barrier, or to all its arrivals at it."""
    for i, op in enumerate(role.ops):
        here = op[0] in ("wait", "arrive", "commit") and name_of(op[1]) == barrier
        following = role.ops[i + 1] if i + 1 < len(role.ops) else ("",)
        arrives_next = following[0] in ("arrive", "commit") and name_of(following[1]) == barrier
        if kind == "swap":
            # The arrival before what it tells of.
            if arrives_next and op[0] in ("read", "write", "mma"):
                yield following
                yield op
            elif not (here and i and role.ops[i - 1][0] in ("read", "write", "mma")):
                yield op
        elif not here:
            yield op
        elif kind == "double":
            yield op
            yield op
        elif kind == "phase":
            yield "wait", op[1], op[2] ^ 1


def mutants() -> Iterator[tuple[str, int, str, str]]:
    """Name, role, kind of change and barrier. The second tile's softmax is as the first's."""
    for r, role in enumerate(programs(SMALL)[:-1]):
        plain = sorted({name_of(op[1]) for op in role.ops if op[0] in ("arrive", "commit")})
        kinds = [
            ("without", sorted(waits(role))),
            ("phase", sorted(waits(role))),
            ("without", plain),
            ("double", plain),
        ]
        kinds.append(("swap", [name for name in plain if tuple(changed(role, "swap", name)) != role.ops]))
        for kind, names in kinds:
            for barrier in names:
                yield f"{role.function}-{kind}-{barrier}", r, kind, barrier


HARMLESS = {"multiply-swap-item_empty", "correct-swap-item_empty"}
"""Changes that change nothing: the record stays until softmax is done with its item, after both have read it."""
MUTANTS = [mutant for mutant in mutants() if mutant[0] not in HARMLESS]


def test_there_are_many_changes():
    assert len(MUTANTS) == len(list(mutants())) - len(HARMLESS)
    assert len(MUTANTS) > 60


@pytest.mark.parametrize(("role", "kind", "barrier"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_every_change_is_caught(role, kind, barrier):
    roles = programs(SMALL)
    ops = tuple(changed(roles[role], kind, barrier))
    assert ops != roles[role].ops
    roles[role] = roles[role]._replace(ops=ops)
    with pytest.raises(ProtocolError):
        explore(SMALL, roles)


@pytest.mark.parametrize("barrier", sorted(SMALL.barriers))
def test_another_number_of_arrivals_is_caught(barrier):
    barriers = dict(SMALL.barriers)
    barriers[barrier] = barriers[barrier]._replace(arrivals=barriers[barrier].arrivals + 1)
    sizes: Sizes = SMALL._replace(barriers=barriers)
    with pytest.raises(ProtocolError):
        explore(sizes, programs(sizes))
