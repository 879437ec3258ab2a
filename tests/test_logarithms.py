"""Scores to which the logarithm of a weight of each pair is added: a term like any other, and no weight of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from refocus.testing import check

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")
N = 18
EARLIER = torch.ones(N, N, dtype=torch.bool).tril()


class Weighted(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        return self.function((q @ k.mT) * 0.4, weights).softmax(-1) @ v


def added(scores: Tensor, weights: Tensor) -> Tensor:
    return scores + weights.log()


def taken_away(scores: Tensor, weights: Tensor) -> Tensor:
    return scores - (1 + weights).log()


def of_a_logarithm(scores: Tensor, weights: Tensor) -> Tensor:
    return scores - (-(0.1 + 0.8 * weights).log()).log()


def masked(scores: Tensor, weights: Tensor) -> Tensor:
    return scores.masked_fill(~EARLIER, -1e9) + (weights + 0.1).log()


def kept(scores: Tensor, weights: Tensor) -> Tensor:
    """Some weights are zero, and their keys left out."""
    return scores + torch.where(EARLIER, weights, 0.0).log()


@pytest.mark.parametrize("function", [added, taken_away, of_a_logarithm, masked, kept])
def test_a_logarithm_is_a_term_of_the_scores(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, N, 6, generator=draw).unbind()
    weights = torch.rand(2, 1, N, N, generator=draw) + 0.01
    check(Weighted(function), (q, k, v, weights), family="softmax", sites=1, lower=False, gradients=True)


def test_a_mask_may_still_be_a_logarithm() -> None:
    def ones(scores: Tensor, weights: Tensor) -> Tensor:
        return scores + torch.ones(N, N).tril().log()

    inputs = (*torch.randn(3, 1, 2, N, 6).unbind(), torch.ones(1))
    (site,) = check(Weighted(ones), inputs, sites=1, lower=False).report.sites
    assert site.mask == "j <= i"


def test_rows_without_weight_are_no_numbers() -> None:
    inputs = [*torch.randn(3, 1, 2, N, 6).unbind(), torch.ones(1, 1, N, N)]
    inputs[3][..., 3, :] = 0
    check(Weighted(added), inputs, sites=1, lower=False)
