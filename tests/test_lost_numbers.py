"""A number added to a sum of exponentials lest it be zero: where the sum is one at least, it may be lost in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from refocus.testing import check, rewritten

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
TINY = 1e-10


class Attention(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return torch.randn(3, 2, 2, 22, 6, generator=torch.Generator().manual_seed(0), dtype=dtype).unbind()


def later(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(later(q @ k.mT), -1e9)
    weights = (scores - scores.max(-1, keepdim=True)[0]).exp()
    return (weights / (weights.sum(-1, keepdim=True) + TINY)) @ v


def divided_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return (weights @ v) / (TINY + weights.sum(-1, keepdim=True))


def in_chunks(q: Tensor, k: Tensor, v: Tensor, tiny: float = TINY, least: float | None = None) -> Tensor:
    """Each chunk of keys by itself, and all of them put on the greatest of their maxima."""
    sums, totals, greatest = [], [], []
    for some, values in zip(k.split(8, -2), v.split(8, -2)):
        scores = q @ some.mT
        most = scores.amax(-1, keepdim=True).detach()
        weights = (scores - most).exp()
        sums.append(weights @ values)
        totals.append(weights.sum(-1, keepdim=True))
        greatest.append(most)
    together = torch.stack(greatest).amax(0)
    if least is not None:
        together = together.clamp(min=least)
    factors = [(most - together).exp() for most in greatest]
    return sum(a * x for a, x in zip(factors, sums)) / (sum(a * x for a, x in zip(factors, totals)) + tiny)


@pytest.mark.parametrize("function", [by_hand, divided_after, in_chunks])
def test_a_number_is_lost_beside_one(function: Function) -> None:
    check(Attention(function), inputs(), family="softmax", sites=1, lower=False, gradients=True)


def unshifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT - 60).exp()
    return (weights @ v) / (weights.sum(-1, keepdim=True) + TINY)


def emptied_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows whose greatest score is of a later key may keep next to nothing."""
    scores = 20 * (q @ k.mT)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().masked_fill(later(scores), 0)
    return (weights @ v) / (weights.sum(-1, keepdim=True) + TINY)


def on_a_floor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT - 60
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=0)).exp()
    return (weights @ v) / (weights.sum(-1, keepdim=True) + TINY)


def chunks_on_a_floor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return in_chunks(q, k, v, least=40.0)


def not_so_small(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return in_chunks(q, k, v, tiny=1e-3)


@pytest.mark.parametrize("function", [unshifted, emptied_after, on_a_floor, chunks_on_a_floor, not_so_small])
def test_a_number_that_tells_is_not(function: Function) -> None:
    report = check(Attention(function), inputs(), fused=False, lower=False).report
    assert report.sites and not any(site.fused for site in report.sites)


@pytest.mark.parametrize("function", [by_hand, in_chunks])
def test_nothing_is_lost_in_double_precision(function: Function) -> None:
    reports: list = []
    rewritten(Attention(function), engine="tiled", report=reports.append)(*inputs(torch.float64))
    assert not any(site.fused for site in reports[0].sites)
