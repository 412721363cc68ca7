"""Repeated calls: what is remembered, and what makes a mask forget. A stand-in takes the place of the GPU's kernel."""

import pytest
import torch

from gna_flex import GNA, attention, backend, direct, flex_attention, gna_mask, kernels

INPUTS = tuple(torch.randn(3, 1, 2, 64, 16).unbind())


class Launcher:
    """Counts its calls."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def __call__(self, query, key, value, scale, text_valid):
        self.calls.append((scale, text_valid))
        if self.error:
            raise self.error
        return torch.full_like(query, 7.0), query.new_zeros(query.shape[:-1])


@pytest.fixture
def mask(monkeypatch):
    """A mask that has made one call of :data:`INPUTS`."""
    monkeypatch.setattr(direct, "undisturbed", lambda *tensors: True)
    mask = gna_mask(GNA((8, 8), 3, text_last=0), device="cpu")
    mask.launchers[direct._signature(INPUTS, None, False)] = Launcher()
    return mask


def calls(mask):
    return [call for launcher in mask.launchers.values() for call in launcher.calls]


def test_the_same_call_again(mask):
    assert (flex_attention(*INPUTS, block_mask=mask) == 7).all()
    out, lse = flex_attention(*INPUTS, block_mask=mask, return_lse=True)
    assert (out == 7).all()
    assert (lse == 0).all()
    assert calls(mask) == [(0.25, None)] * 2


@pytest.mark.parametrize(
    "options", [{"scale": 0.5}, {"enable_gqa": True}, {"score_mod": lambda score, *_: score}, {"kernel_options": {}}]
)
def test_other_options(mask, options):
    assert not (flex_attention(*INPUTS, block_mask=mask, **options) == 7).any()
    assert not calls(mask)


def test_other_tensors(mask):
    for other in (
        [x.double() for x in INPUTS],
        [x.mT.contiguous().mT for x in INPUTS],
        [x.expand(2, -1, -1, -1) for x in INPUTS],
        [x[..., :8] for x in INPUTS],
    ):
        assert not (flex_attention(*other, block_mask=mask) == 7).any()
    query = INPUTS[0].clone().requires_grad_()
    assert flex_attention(query, *INPUTS[1:], block_mask=mask).requires_grad
    assert not calls(mask)


def test_wrong_tensors_are_still_refused(mask):
    with pytest.raises(ValueError, match="must share one floating-point type"):
        flex_attention(INPUTS[0], INPUTS[1].double(), INPUTS[2], block_mask=mask)


def test_a_forced_route_and_another_kernel(mask):
    with backend("reference"):
        assert not (flex_attention(*INPUTS, block_mask=mask) == 7).any()
    assert (flex_attention(*INPUTS, block_mask=mask) == 7).all()
    kernels.changed()
    assert not (flex_attention(*INPUTS, block_mask=mask) == 7).any()


def test_what_disturbs_goes_the_whole_way(mask, monkeypatch):
    monkeypatch.setattr(direct, "undisturbed", lambda *tensors: False)
    assert not (flex_attention(*INPUTS, block_mask=mask) == 7).any()


def test_compiled_code_does_not_ask(mask, monkeypatch):
    monkeypatch.setattr(attention, "recall", None)
    graphs = []
    compiled = torch.compile(flex_attention, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    assert not (compiled(*INPUTS, block_mask=mask) == 7).any()
    mask.launchers.clear()
    compiled(*INPUTS, block_mask=mask)
    assert len(graphs) == 1, "eager calls in between compile nothing anew"


def test_a_launch_that_fails_goes_the_whole_way(mask):
    failing = Launcher(RuntimeError("CUDA_ERROR_LAUNCH_FAILED"))
    mask.launchers = dict.fromkeys(mask.launchers, failing)
    assert not (flex_attention(*INPUTS, block_mask=mask) == 7).any()
    assert len(failing.calls) == 1
    assert not mask.launchers


def test_memory_running_out_is_said(mask):
    mask.launchers = dict.fromkeys(mask.launchers, Launcher(torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError):
        flex_attention(*INPUTS, block_mask=mask)


def test_what_is_remembered_is_the_launcher_of_the_calls_plan(mask, monkeypatch):
    asked = []

    class Plan:
        def __init__(self, request):
            asked.append((request.gnas, request.head_dim, request.float16))

        def launcher(self, *tensors):
            return Launcher()

    monkeypatch.setattr("gna_flex.cuda.forward.plan", Plan)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    mask.launchers.clear()
    direct.remember(mask, INPUTS, 0.5, False)
    assert asked == [((GNA((8, 8), 3),), 16, False)]
    assert (flex_attention(*INPUTS, block_mask=mask, scale=0.5) == 7).all()
    assert calls(mask) == [(0.5, None)]
