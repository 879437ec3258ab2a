"""What the weights of a linear attention are divided by, where that is no function of their sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refocus.testing import check
from tests.drawn import Attention

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, 2, 3, 20, 8, generator=torch.Generator().manual_seed(0)).unbind()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def absolute_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return weights / weights.abs().sum(-1, keepdim=True) @ v


def norm_of_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return weights / weights.norm(dim=-1, keepdim=True) @ v


def largest_weight(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return weights / weights.amax(-1, keepdim=True).clamp(min=1) @ v


def squares_of_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return weights / (weights * weights).sum(-1, keepdim=True) @ v


def absolute_sum_of_the_results(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return weights @ v / weights.abs().sum(-1, keepdim=True).clamp(min=1, max=5e4)


def norm_of_the_results(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return (weights @ v).transpose(1, 2) * weights.detach().norm(dim=-1).transpose(1, 2)[..., None].reciprocal()


def largest_of_the_results(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return weights @ v / weights.max(-1, keepdim=True).values


def squares_of_the_results(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return weights @ v / (weights * weights).sum(-1, keepdim=True).sqrt()


CASES = [
    (absolute_sum, "abs"),
    (norm_of_the_weights, "linalg_vector_norm"),
    (largest_weight, "max"),
    (squares_of_the_weights, "mul"),
    (absolute_sum_of_the_results, "abs"),
    (norm_of_the_results, "linalg_vector_norm"),
    (largest_of_the_results, "max"),
    (squares_of_the_results, "mul"),
]


@pytest.mark.parametrize(("function", "op"), CASES, ids=[f.__name__ for f, _ in CASES])
def test_the_reason_names_what_is_not_linear(function: Function, op: str) -> None:
    (site,) = check(Attention(function), inputs(), fused=False, sites=1, lower=False).report.sites
    assert not site.fused and site.reason == f"the normaliser is not linear in the scores (`{op}` of them)"


def largest_of_the_sum_and_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).tril()
    return weights @ v / weights.sum(-1, keepdim=True).abs().clamp(min=1)


def sum_and_a_little(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q.exp(), k.exp()).tril()
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


@pytest.mark.parametrize("function", [largest_of_the_sum_and_one, sum_and_a_little], ids=lambda f: f.__name__)
def test_functions_of_the_sum_are_read(function: Function) -> None:
    check(Attention(function), inputs(), sites=1, family="linear", lower=False, gradients=True)
