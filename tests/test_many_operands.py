"""Weights that meet several operands in one product: all of these together are the values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from refocus.testing import check

Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return self.function(q, k, v, w)


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(4)]


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / 3).softmax(-1)


def share_of_heads(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("h,bhij,bhjd->bid", w[0, :, 0, 0], weights(q, k), v)


def by_key(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd,bhj->bhid", weights(q, k), v, w[..., 0])


def by_query(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd,bhij->bhid", w, v, weights(q, k))


def by_pair(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd,bhij->bhid", weights(q, k), v, (w @ w.mT).sigmoid())


def pairs_of_values(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd,bhje->bhide", weights(q, k), v, w[..., :3])


@pytest.mark.parametrize("function", [share_of_heads, by_key, by_query, by_pair, pairs_of_values])
def test_all_are_fused(function: Function) -> None:
    report = check(Attention(function), tensors(), lower=False, gradients=True).report
    assert [site.fused for site in report.sites] == [True]


def squared(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    probabilities = weights(q, k)
    return torch.einsum("bhij,bhij,bhjd->bhid", probabilities, probabilities, v)


def over_queries(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhij,bhid,bhi->bhjd", weights(q, k), v, w[..., 0])


@pytest.mark.parametrize(
    ("function", "reason"),
    [(squared, "the values depend on the weights"), (over_queries, "the weights are not normalised over the keys")],
)
def test_near_misses(function: Function, reason: str) -> None:
    report = check(Attention(function), tensors(), fused=False, lower=False).report
    assert [site.reason for site in report.sites] == [reason]
