"""Sums of a row's weights that are read beside an attention: of a softmax they are one, and no sum of exponentials."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refocus.testing import check
from tests.linear_cases import Function, Module

Results = tuple[Tensor, Tensor]


def of_softmax(q: Tensor, k: Tensor, v: Tensor) -> Results:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights.sum(-1)


def of_features(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """Probabilities over the keys of each feature."""
    weights = (k @ q[0, 0].mT).softmax(2)
    return torch.einsum("bhnd,bhne->bhde", weights, v), weights.sum(2)


def of_scaled_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Results:
    scores = q @ k.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v, (weights * 3).sum(-1).log()


@pytest.mark.parametrize("function", [of_softmax, of_features, of_scaled_exponentials])
def test_right_whether_fused_or_not(function: Function) -> None:
    given = tuple(torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    check(Module(function), given, fused=False, lower=False, gradients=True)
