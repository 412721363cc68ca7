"""Which shapes are measured when a kernel is tuned, and how the race between them is decided."""

import math

import pytest
import torch

from gna_flex import GNA
from gna_flex.cuda import jit, tune
from gna_flex.cuda.blackwell import BlackwellConfig
from gna_flex.cuda.config import SHARED_LIMIT
from gna_flex.cuda.forward import Request, estimated
from gna_flex.cuda.kernel import HEAD_DIMS, Config
from gna_flex.presets import PRESETS

REQUEST = Request((GNA((24, 40), (9, 12), text_last=30),), 128, float16=False, device=0)
REQUESTS = [
    *(Request((entry.gna,), entry.head_dim, False, 0) for entry in PRESETS.values()),
    *(Request((GNA((24, 40), (9, 12)),), head_dim, False, 0) for head_dim in (8, *HEAD_DIMS, 248)),
    Request((GNA(7, 3),), 64, True, 0),
    Request((GNA((8, 9, 10), (3, 4, 5), dilation=(1, 2, 2)),), 128, True, 0),
    Request((GNA((16, 16), 4), GNA((16, 16), 8), GNA((16, 16), 4)), 128, True, 0),
    *(Request((GNA((24, 40), (9, 12), text_last=30),), d, False, 0, capability=(10, 0)) for d in (8, 64, 128)),
]


@pytest.mark.parametrize(
    "request_", REQUESTS, ids=lambda request: f"{request.gnas[0]}-{request.head_dim}-{request.capability}"
)
def test_candidates(request_):
    found = tune.candidates(request_)
    assert found[0] == estimated(request_)
    assert len(set(found)) == len(found)
    assert 1 < len(found) <= 8 or request_.gnas[0].layout == (7,)
    known = set(request_.kernel.variants(request_.head_dim, request_.capability, request_.text))
    for config, tiles in found:
        assert config in known
        assert config.fits(tiles)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_configurations_fit(head_dim):
    found = Config.variants(head_dim)
    assert found[: len(Config.defaults(head_dim))] == Config.defaults(head_dim)
    assert len(set(found)) == len(found)
    for config in found:
        assert config.head_dim == head_dim
        assert config.shared_bytes <= SHARED_LIMIT
        assert config.keys <= (
            128 if config.consumers == 3 else {32: 192, 64: 192, 96: 160, 128: 160}.get(head_dim, 112)
        )


def test_a_configuration_that_needs_too_much_memory_has_fewer_query_slots():
    assert [config.query_stages for config in Config.variants(128) if config.keys == 160] == [1]


CONFIGS = [config for head_dim in HEAD_DIMS for config in Config.variants(head_dim)]
CONFIGS += [config for head_dim in BlackwellConfig.head_dims for config in BlackwellConfig.variants(head_dim)]


@pytest.mark.slow
@pytest.mark.usefixtures("kernel_cache")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.folder}-{config.head_dim}-{config.keys}")
def test_configurations_compile(config):
    try:
        jit._nvrtc()
    except ImportError as error:
        pytest.skip(str(error))
    log = config.compile(config.arch((10, 0))).log
    assert jit.performance_warnings(log) == []
    assert isinstance(config, Config) or jit.spills(log) == 0


# The race


def test_every_round_has_another_order_and_medians_count():
    orders: list[tuple[int, ...]] = []

    def sample(order):
        orders.append(tuple(order))
        # The first of a round is disturbed, and one round altogether.
        return [10.0 * (place == 0) + 100.0 * (len(orders) == 5) + i for place, i in enumerate(order)]

    steps: list[tuple[int, int]] = []
    assert tune.race(sample, 4, lambda done, total: steps.append((done, total))) == [0.0, 1.0, 2.0, 3.0]
    assert len(set(orders[1:])) > 10
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert steps == [(i + 1, tune.MOST_ROUNDS) for i in range(tune.MOST_ROUNDS)]


def test_slow_kernels_have_fewer_rounds():
    rounds = []
    tune.race(lambda order: rounds.append(order) or [1.0 for _ in order], 2, seconds=0.0)
    assert len(rounds) == 1 + tune.FEWEST_ROUNDS


@pytest.mark.parametrize(("other", "chosen"), [(0.98, 1), (0.995, 0), (1.0, 0), (1.2, 0)])
def test_the_default_stays_unless_something_is_clearly_faster(other, chosen):
    found = tune.candidates(REQUEST)
    measured = [tune.Measurement(*found[0], 1.0), tune.Measurement(*found[1], other)]
    assert tune.best_of(measured) is measured[chosen]


def test_agreement():
    out, lse = torch.randn(1, 2, 50, 64).bfloat16(), torch.randn(1, 2, 50)
    assert tune.agree((out, lse), (out, lse))
    assert tune.agree(((out.float() * (1 + 2**-8)).bfloat16(), lse + 1e-6), (out, lse))
    wrong = out.clone()
    wrong[0, 1, 7] = 0
    assert not tune.agree((wrong, lse), (out, lse))
    assert not tune.agree((out, lse + 1e-3), (out, lse))
    for place in (0, 1):
        spoiled = [out.clone(), lse.clone()]
        spoiled[place][0, 0, 0] = math.nan
        assert not tune.agree((spoiled[0], spoiled[1]), (out, lse))
        assert not tune.agree((out, lse), (spoiled[0], spoiled[1]))
