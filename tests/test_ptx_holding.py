"""The Hopper kernel with queries in registers: right in the interpreter, with every bit of the results as without."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from machine_code import needs_nvrtc

needs_nvrtc()

from kernel_problems import HOPPER, ONE_BOX, check, launched  # noqa: E402

from gna_flex.cuda.config import SHARED_LIMIT  # noqa: E402
from gna_flex.cuda.kernel import HEAD_DIMS, Config  # noqa: E402

PROBLEMS = HOPPER | {"one box": ONE_BOX}
QUICK = ("2-D", "text, some of it valid", "causal, head dim 128", "two blocks", "one box", "three warpgroups")


def has_text(name: str) -> bool:
    """Whether a problem has text tokens."""
    gna = PROBLEMS[name].gna
    return gna.text_first + gna.text_last > 0


CASES = [
    *((name, slots) for name, slots in product(QUICK, (1, 2))),
    # Beside them those of text, the only ones for which a plan ever holds queries.
    *(pytest.param(name, 2, marks=pytest.mark.slow) for name in PROBLEMS if has_text(name) and name not in QUICK),
]


@pytest.mark.parametrize(("name", "slots"), CASES)
def test_queries_in_registers(name: str, slots: int) -> None:
    problem = PROBLEMS[name]
    held, plain = (
        problem._replace(config=replace(problem.config, holds_queries=holds, query_stages=slots))
        for holds in (True, False)
    )
    if name in QUICK:  # the others are right without held queries: tests/test_ptx_kernel.py
        check(held, slots)
    for one, other in zip(launched(held, 2)[:2], launched(plain, 3)[:2], strict=True):
        assert torch.equal(one, other)


def test_which_configurations_hold_queries() -> None:
    for head_dim in HEAD_DIMS:
        for text in (False, True):
            found = Config.variants(head_dim, text=text)
            assert len(set(found)) == len(found)
            for config in found:
                pays = text and head_dim == 128 and config.keys <= 128 and config.consumers == 2
                assert config.holds_queries == pays
                assert config.shared_bytes <= SHARED_LIMIT
