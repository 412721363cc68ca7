"""NATTEN's own masks and outputs, where ``natten`` is installed (its FlexAttention backend runs on a CPU)."""

import os
import random

import pytest
import torch
from helpers import Sizes, assert_within_budget, dense_attention, dense_mask, exact_attention, gna_id, random_gna
from torch.nn.attention.flex_attention import create_mask

from gna_flex import GNA, flex_attention, gna_mask
from gna_flex.mask_mod import mask_mod

pytestmark = pytest.mark.oracle


def natten_cases(count: int) -> list[GNA]:
    """Random masks that NATTEN takes: windows of at least 2, no text."""
    rng = random.Random(5)
    cases: list[GNA] = []
    while len(cases) < count:
        gna = random_gna(rng, sizes=Sizes(one=80, two=12, three=7), text=(0,))
        if min(gna.window) >= 2:
            cases.append(gna)
    return cases


CASES = natten_cases(60)


@pytest.fixture(scope="module", autouse=True)
def quiet_natten():
    os.environ.setdefault("NATTEN_LOG_LEVEL", "error")


def arguments(gna: GNA) -> dict[str, tuple]:
    return {"kernel_size": gna.window, "stride": gna.stride, "dilation": gna.dilation, "is_causal": gna.causal}


@pytest.mark.parametrize("gna", CASES, ids=gna_id)
def test_mask(gna):
    from natten.backends.flex import get_na_flex_mask

    theirs = get_na_flex_mask(device="cpu", na_dim=gna.ndim, qkv_shape=gna.layout, **arguments(gna))
    n = gna.tokens
    expected = create_mask(theirs.mask_mod, None, None, n, n, device="cpu")[0, 0]
    found = create_mask(mask_mod((gna,)), None, None, n, n, device="cpu")[0, 0]
    assert torch.equal(found, expected)
    assert (expected.numpy() == dense_mask(gna)).all()


# NATTEN hands whole windows to a dense kernel that a CPU lacks.
@pytest.mark.parametrize("gna", [gna for gna in CASES if gna.window != gna.layout][::2], ids=gna_id)
def test_output(gna):
    import natten

    operation = (natten.na1d, natten.na2d, natten.na3d)[gna.ndim - 1]
    q, k, v = torch.randn(3, 2, 2, gna.tokens, 16).unbind()
    ours = flex_attention(q, k, v, block_mask=gna_mask(gna, device="cpu"))
    heads_last = [x.transpose(1, 2).unflatten(1, gna.layout).contiguous() for x in (q, k, v)]
    theirs = operation(*heads_last, backend="flex-fna", **arguments(gna))
    theirs = theirs.flatten(1, gna.ndim).transpose(1, 2)
    exact, plain = (f(q, k, v, dense_mask(gna)).out for f in (exact_attention, dense_attention))
    assert_within_budget("ours", ours, exact, plain)
    assert_within_budget("natten's", theirs, exact, plain)
