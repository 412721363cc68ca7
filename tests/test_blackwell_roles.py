"""The roles of ``protocol.py`` do what the Blackwell kernel's threads do: the kernel's PTX runs, thread by thread.

What every thread does at barriers and with the engines, in order and with its parities, is compared with the model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from unittest import mock

import pytest
from machine_code import needs_nvrtc

needs_nvrtc()

import protocol  # noqa: E402
from kernel_problems import Problem, check, tiles  # noqa: E402
from protocol import Op, Program, Sizes  # noqa: E402
from ptx import launch  # noqa: E402
from ptx.warp import Event  # noqa: E402
from test_blackwell_protocol import changed, name_of  # noqa: E402

from gna_flex import GNA  # noqa: E402
from gna_flex.cuda.blackwell import BlackwellConfig  # noqa: E402

CONFIG = BlackwellConfig(96, 32, key_stages=3, output_stages=2)
SOURCE = CONFIG.source()
FIRST_WARPS = {"correct": "kCorrection", "multiply": "kMultiply", "store_outputs": "kStore", "load_keys": "kLoad"}
Done = tuple[str, str, int]
"""What a thread did: a kind, the name of a barrier or of an accumulator, the parity of a wait."""


def sizes(items: int, boxes: int) -> Sizes:
    chunks = CONFIG.head_dim // CONFIG.columns
    return protocol.parse(SOURCE, CONFIG.key_stages, CONFIG.output_stages, chunks, items, boxes)


def steps(ops: Sequence[Op]) -> list[Done]:
    """What a thread of the model's role does."""
    done: list[Done] = []
    for kind, what, *rest in ops:
        if kind == "wait":
            done.append((kind, what, rest[0]))
        elif kind in ("arrive", "commit"):
            done.append((kind, what, 0))
        elif kind == "load":
            done += [("expect", rest[1], 0), ("load", rest[1], 0)]
        elif kind == "mma":
            done.append(("multiply", next(op[1] for op in what if op[0] == "write"), 0))
    return done


def named(history: Sequence[Event], names: dict[int, str]) -> list[Done]:
    """A thread's history. Copies to one barrier count as one, as do products of one accumulator."""
    done: list[Done] = []
    for kind, address, parity in history:
        event = kind, names[address], parity
        if kind not in ("load", "multiply") or event != done[-1]:
            done.append(event)
    return done


@functools.cache
def recorded(items: int, boxes: int, old: str = "", new: str = "") -> dict[str, list[list[Done]]]:
    """What the threads of each role did that did anything, after ``old`` became ``new`` in the source."""
    tokens = CONFIG.keys * boxes  # all keys are in the window of each query, and all queries in one item
    problem = Problem(GNA(tokens, tokens), CONFIG, tiles((1, 1, tokens // 2), (1, 1, CONFIG.keys), CONFIG.keys, 2),
                      heads=items, key_heads=items)  # fmt: skip
    assert not old or SOURCE.count(old) == 1
    with (
        mock.patch.object(BlackwellConfig, "source", return_value=SOURCE.replace(old, new) if old else SOURCE),
        mock.patch.object(launch, "ptx", launch.ptx.__wrapped__),
    ):
        (block,) = check(problem, 0, change=str).grid
    first = protocol.constants(SOURCE, "kScores", "kOutput", "kTileColumns")
    names = dict(zip(sorted(block.shared.barriers), sizes(items, boxes).names, strict=True))
    for tile in range(2):
        names[first["kScores"] + tile * first["kTileColumns"]] = f"scores{tile}"
        names[first["kOutput"] + tile * first["kTileColumns"]] = f"output{tile}"
    warps = protocol.constants(SOURCE, *FIRST_WARPS.values(), "kWarps")
    roles = {role: [warps[name]] for role, name in FIRST_WARPS.items()} | {"fetch_items": [warps["kWarps"] - 1]}
    roles["correct"] = list(range(warps["kCorrection"], warps["kCorrection"] + 4))
    roles |= {f"compute_weights {tile}": list(range(4 * tile, 4 * tile + 4)) for tile in range(2)}
    assert sorted(warp for each in roles.values() for warp in each) == list(range(warps["kWarps"]))
    return {
        role: [named(history, names) for warp in each for history in block.warps[warp].history if history]
        for role, each in roles.items()
    }


def modelled(items: int, boxes: int) -> dict[str, Program]:
    """The model's roles, with those of softmax numbered."""
    *others, first, second = protocol.programs(sizes(items, boxes))
    return {role.function: role for role in others} | {"compute_weights 0": first, "compute_weights 1": second}


@pytest.mark.parametrize(("items", "boxes"), [(3, 1), (2, 3)])
def test_every_thread_does_what_the_model_says(items: int, boxes: int) -> None:
    roles = modelled(items, boxes)
    assert recorded(items, boxes).keys() == roles.keys()
    for name, threads in recorded(items, boxes).items():
        assert len(threads) == roles[name].threads, name
        for thread in threads:
            assert thread == steps(roles[name].ops), name


ARRIVES = "    C.arrive(item_empty + R.index);\n    if (boxes == 0) break;\n"
DIFFERENT = {
    "multiply": (
        f"{ARRIVES}    // Scores",
        "    if (boxes == 0) break;\n    C.arrive(item_empty + R.index);\n    // Scores",
    ),
    "correct": (
        "const float inverse = receive_factor(tile);\n      C.wait(o_full + tile, O.phase);",
        "C.wait(o_full + tile, O.phase);\n      const float inverse = receive_factor(tile);",
    ),
    "fetch_items": ("C.wait(q_empty, Q.phase);", "C.wait(q_empty, Q.phase);\nC.wait(q_empty, Q.phase);"),
}
"""Changes of the kernel with which it works just as well: an arrival less, two waits exchanged, a wait more."""


@pytest.mark.parametrize("role", DIFFERENT)
def test_a_kernel_that_does_otherwise_is_noticed(role: str) -> None:
    roles = modelled(1, 2)
    threads = recorded(1, 2, *DIFFERENT[role])
    assert {name for name in roles if any(thread != steps(roles[name].ops) for thread in threads[name])} == {role}


@pytest.mark.parametrize("kind", ["without", "double", "phase"])
def test_a_model_that_does_otherwise_is_noticed(kind: str) -> None:
    """Changes to all waits for a barrier, or to all arrivals at it."""
    tried = 0
    for name, role in modelled(2, 3).items():
        kinds = {"wait"} if kind == "phase" else {"wait", "arrive", "commit"}
        for barrier in {name_of(op[1]) for op in role.ops if op[0] in kinds}:
            ops = tuple(changed(role, kind, barrier))
            assert all(steps(ops) != thread for thread in recorded(2, 3)[name]), (name, barrier)
            tried += 1
    assert tried >= 20
