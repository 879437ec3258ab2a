"""Attention by scores that are no products of queries and keys is seen, and left with that reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import refocus
from tests.drawn import Attention, drawn, stays

Scores = Callable[[Tensor, Tensor], Tensor]


def distances(q: Tensor, k: Tensor) -> Tensor:
    return -(q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)


def lengths(q: Tensor, k: Tensor) -> Tensor:
    return -torch.linalg.vector_norm(q.unsqueeze(3) - k.unsqueeze(2), dim=-1) / 4


def additive(q: Tensor, k: Tensor) -> Tensor:
    """Bahdanau's, with a weight of each feature."""
    return (torch.arange(8.0) * torch.tanh(q[:, :, :, None] + k[:, :, None])).sum(-1)


def smaller_ones(q: Tensor, k: Tensor) -> Tensor:
    return torch.minimum(q[:, :, :, None], k[:, :, None]).mean(-1)


@pytest.mark.parametrize("scores", [distances, lengths, additive, smaller_ones])
def test_is_told(scores: Scores) -> None:
    stays(lambda q, k, v: scores(q, k).softmax(-1) @ v, "hold no product of queries and keys", 20)


def pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One weight for each position, of its own features and a bias."""
    gate = (k * torch.arange(8.0) + torch.arange(20.0)[:, None]).tanh().sum(-1).softmax(-1)
    return gate[..., None, :] @ v


def test_what_compares_nothing_is_no_site() -> None:
    assert not refocus.explain(Attention(pooled), *drawn(20)).sites
