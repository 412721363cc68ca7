"""Tuning on a Hopper GPU: it ends, results stay right, later plans take the choice, and captured graphs survive."""

import math

import pytest
import torch

import gna_flex
from gna_flex import GNA, flex_attention, gna_mask, reference_attention
from gna_flex.cuda import forward, tune
from gna_flex.cuda.forward import Request, estimated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

SMALL = GNA((24, 40), (9, 12), text_last=30)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache on disk and no plans, before and after."""
    monkeypatch.setenv("GNA_FLEX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("GNA_FLEX_AUTOTUNE", raising=False)
    tune.forget_plans()
    yield
    tune.forget_plans()


def inputs(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(2, 4, SMALL.tokens, head_dim, device="cuda", dtype=dtype) for _ in range(3)]


def request(head_dim: int = 128) -> Request:
    return Request((SMALL,), head_dim, False, torch.cuda.current_device())


def store(choice: int) -> tune.Shapes:
    """As if this candidate had won."""
    shapes = tune.candidates(request())[choice]
    tune.write(tune.entry_path(request(), torch.cuda.get_device_name()), tune.Measurement(*shapes, 1.0))
    tune.forget_plans()
    return shapes


def check(out: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    mask = gna_mask(SMALL, device="cuda")
    exact = reference_attention(*(x.double() for x in tensors), mask.mask_mod)[0]
    assert (out.double() - exact).norm() / exact.norm() < 4e-3


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_tuning(head_dim, caplog):
    steps: list[tuple[int, int]] = []
    result = gna_flex.tune(
        SMALL, heads=4, head_dim=head_dim, batch=2, progress=lambda done, total: steps.append((done, total))
    )
    assert not caplog.records, "every candidate runs and agrees"
    assert len(result.measurements) == len(tune.candidates(request(head_dim)))
    assert (result.default.config, result.default.tiles) == estimated(request(head_dim))
    assert all(0 < entry.milliseconds < 1 for entry in result.measurements)
    assert steps[-1][0] == steps[-1][1]
    assert "default" in str(result)
    tensors = inputs(head_dim)
    with gna_flex.backend("hopper"):
        check(flex_attention(*tensors, block_mask=gna_mask(SMALL, device="cuda")), tensors)
    plan = forward.plan(request(head_dim))
    assert (plan.config.keys, plan.tiles) == (result.chosen.config.keys, result.chosen.tiles)


@pytest.mark.parametrize("choice", range(1, 8))
def test_plans_take_what_was_chosen(choice):
    config, tiles = store(choice)
    plan = forward.plan(request())
    assert (plan.config.keys, plan.config.consumers, plan.tiles) == (config.keys, config.consumers, tiles)
    tensors = inputs()
    check(plan.run(*tensors, 128**-0.5)[0], tensors)


def test_calls_that_were_made_before_take_it_too():
    mask, tensors = gna_mask(SMALL, device="cuda"), inputs()
    with gna_flex.backend("hopper"):
        before = [flex_attention(*tensors, block_mask=mask) for _ in range(3)]
        _, tiles = store(3)
        after = [flex_attention(*tensors, block_mask=mask) for _ in range(3)]
    plan = forward.plan(request())
    assert plan.tiles == tiles
    wanted = plan.run(*tensors, 128**-0.5)[0]
    assert all(torch.equal(out, before[0]) for out in before)
    assert all(torch.equal(out, wanted) for out in after)


def test_first_use(monkeypatch):
    monkeypatch.setenv("GNA_FLEX_AUTOTUNE", "1")
    mask, tensors = gna_mask(SMALL, device="cuda"), inputs()
    state = torch.cuda.get_rng_state()
    with gna_flex.backend("hopper"):
        out = flex_attention(*tensors, block_mask=mask)
        assert tune.tuned_entries() == 1
        check(out, tensors)
        monkeypatch.setattr(tune, "measure", None)
        tune.forget_plans()
        assert torch.equal(flex_attention(*tensors, block_mask=mask), out)
    assert torch.equal(torch.cuda.get_rng_state(), state), "random numbers are the caller's"


def test_graphs_outlive_a_tuning():
    mask, tensors = gna_mask(SMALL, device="cuda"), inputs()
    with gna_flex.backend("hopper"):
        out = flex_attention(*tensors, block_mask=mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = flex_attention(*tensors, block_mask=mask)
        gna_flex.tune(mask, heads=4, head_dim=128)
        spoiled = [torch.full((1 << 20,), -1, device="cuda", dtype=torch.int32) for _ in range(16)]
        captured.fill_(math.nan)
        graph.replay()
        assert torch.equal(captured, out)
        del spoiled
        check(flex_attention(*tensors, block_mask=mask), tensors)


def test_nothing_is_measured_inside_of_a_capture(monkeypatch):
    monkeypatch.setenv("GNA_FLEX_AUTOTUNE", "1")
    monkeypatch.setattr(tune, "measure", None)
    x = torch.zeros(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        shapes = tune.shapes_for(request(), torch.cuda.get_device_name())
    assert shapes == estimated(request())
    graph.replay()
    assert tune.tuned_entries() == 0


@pytest.mark.parametrize("options", [{"head_dim": 100}, {"head_dim": 128, "dtype": torch.float32}])
def test_what_the_kernel_cannot_take_is_refused(options):
    with pytest.raises(RuntimeError, match="cannot be tuned"):
        gna_flex.tune(SMALL, heads=4, **options)


def test_a_candidate_with_a_wrong_result_is_left_out(monkeypatch, caplog):
    wrong = tune.candidates(request())[2]

    class Broken(tune.Plan):
        def run(self, *arguments):
            out, lse = super().run(*arguments)
            spoiled = (self.request.config, self.request.tiles) == wrong
            return (out * 1.5 if spoiled else out), lse

    monkeypatch.setattr(tune, "Plan", Broken)
    result = tune.measure(request(), heads=4, batch=2)
    assert wrong not in [(entry.config, entry.tiles) for entry in result.measurements]
    assert len(result.measurements) == len(tune.candidates(request())) - 1
    assert "left out of tuning" in caplog.text
