"""Which passes the Hopper backward takes, and what is handed to them, without a GPU."""

from __future__ import annotations

import logging
from typing import ClassVar

import pytest
import torch
from helpers import dense_gradients, dense_mask
from torch import Tensor

from gna_flex import GNA
from gna_flex.cuda import backward as cuda_backward
from gna_flex.cuda import rows
from gna_flex.cuda.backward import default_config
from gna_flex.cuda.forward import Request
from gna_flex.cuda.sums import Ring, Sums

KEEP = torch.from_numpy(dense_mask(GNA((4, 6), (3, 2))))


class DensePass:
    """Stands for a pass on a GPU: gradients by the formulas, in float64."""

    taken: ClassVar[list[str]] = []

    def __init__(self, request: Request, rows_are_keys: bool, fused: bool = False) -> None:
        self.config = default_config(request.head_dim, rows_are_keys, fused)

    def sums(self, query: Tensor, key: Tensor, to: Tensor) -> Sums:
        return Sums.zeros(Ring(key.shape[0] * key.shape[1], 2, 1, 32), to, self.config.head_dim, 1)

    def launch(
        self,
        tensors: tuple[Tensor, ...],
        results: tuple[Tensor, ...],
        statistics: Tensor,
        scale: float,
        text_valid: Tensor | None,
        sums: Sums | None = None,
    ) -> None:
        if self.config.rows_are_keys:
            key, value, query, grad = tensors
        else:
            query, grad, key, value = tensors
        of_query, *of_others = dense_gradients(query, key, value, grad, KEEP, scale)[:3]
        assert (sums is not None) == self.config.fused
        if sums is not None:
            assert not sums.sums.any()
            sums.to.copy_(of_query)
        for x, found in zip(results, of_others if self.config.rows_are_keys else (of_query,), strict=True):
            x.copy_(found)
        self.taken.append("fused" if sums is not None else "keys" if self.config.rows_are_keys else "queries")


@pytest.mark.parametrize(
    ("deterministic", "memory", "passes"),
    [
        (False, True, ["fused"]),
        (False, False, ["keys", "queries"]),
        (True, True, ["keys", "queries"]),
        (True, False, ["keys", "queries"]),
    ],
)
def test_passes(
    deterministic: bool,
    memory: bool,
    passes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One that is fused needs sums in float32, for which there may be no memory."""

    def zeros(*shape: int, **options: object) -> Tensor:
        if not memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.full(shape, 0.0, **options)

    caplog.set_level(logging.INFO, "gna_flex")
    monkeypatch.setattr(DensePass, "taken", [])
    monkeypatch.setattr(cuda_backward, "pass_for", DensePass)
    monkeypatch.setattr(rows, "statistics", lambda out, *rest: out.new_empty(0))
    q, k, v, grad = (torch.randn(2, heads, 24, 128).bfloat16() for heads in (4, 2, 2, 4))
    wanted = dense_gradients(q, k, v, grad, KEEP, 0.1)[:3]
    call = ((GNA((4, 6), (3, 2)),), q, k, v, grad, grad[..., 0].float(), grad, None, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", zeros)
        found = cuda_backward.backward(*call, deterministic=deterministic)
    for got, exact, x in zip(found, wanted, (q, k, v), strict=True):
        assert got.shape == x.shape
        assert (got.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert DensePass.taken == passes
    assert ("two passes" in caplog.text) == (not deterministic and not memory)
