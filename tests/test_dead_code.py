"""Code without a reader that is not dead: writes in the bodies of operations that hold graphs of their own; and what
else is not looked into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from refocus.report import Report
from refocus.testing import rewritten

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


class Halves(torch.autograd.Function):
    """Softmax attention that adds its gradients up in place, half of the queries after the other."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
        for rows, some in zip(weights.chunk(2, 1), q.chunk(2, 1)):
            rows.copy_((some @ k.mT).softmax(-1))
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, weights = ctx.saved_tensors
        of_q, of_k, of_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, p, some, g in zip(of_q.chunk(2, 1), weights.chunk(2, 1), q.chunk(2, 1), grad.chunk(2, 1)):
            of_v.add_(p.mT @ g)
            of_p = g @ v.mT
            of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True))
            rows.add_(of_scores @ k)
            of_k += of_scores.mT @ some
        return of_q, of_k, of_v


def own_backward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Halves.apply(q, k, v)


def beside_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Halves.apply(q, k, v) + (q @ k.mT).softmax(-1) @ v


def recomputed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        kept = torch.zeros(q.shape[1], k.shape[1])
        kept.view(-1).add_(1)
        kept[:, -2:] = 0
        half = kept.chunk(2)[0]
        half.mul_(0.5)
        return (scores * kept).tanh() @ v

    return checkpoint(attend, q, k, v, use_reentrant=False) + (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("function", [own_backward, beside_attention, recomputed])
def test_what_writes_is_kept(function: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    inputs = torch.randn(3, 2, 8, 4, generator=torch.Generator().manual_seed(0)).unbind()
    results, reports = [], []
    for call in (function, rewritten(function, engine="tiled", report=reports.append)):
        given = [x.clone().requires_grad_() for x in inputs]
        out = call(*given)
        results.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for ours, eager in zip(results[1], results[0]):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    notes = [note for report in reports for note in report.notes if "not looked into" in note]
    assert bool(notes) == (function is not recomputed)


def test_an_attention_that_is_fused_already_runs_as_it_is() -> None:
    def banded(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where((i - j).abs() < 3, score, -torch.inf)

    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 2, 128, 16, generator=torch.Generator().manual_seed(0)).unbind()
    reports: list[Report] = []
    ours = rewritten(lambda q, k, v: flex_attention(q, k, v, score_mod=banded), report=reports.append)(q, k, v)
    position = torch.arange(128)
    bias = torch.where((position[:, None] - position).abs() < 3, 0.0, -torch.inf)
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(q, k, v, bias))
    assert [note for report in reports for note in report.notes if "fused attention already" in note]
