"""Values that are positions, classes or flags: integers, which a product with probabilities needs as floats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refocus.testing import check

HEIGHT, WIDTH = 5, 7


class Expected(nn.Module):
    def values(self, like: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT * 0.5).softmax(-1) @ self.values(q)


class Coordinates(Expected):
    """Where a query looks, in rows and columns."""

    def values(self, like: Tensor) -> Tensor:
        grid = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
        return torch.stack(grid, -1).view(-1, 2).to(like.dtype)


class Position(Expected):
    """The same in one dimension, of positions that are floats from the start."""

    def values(self, like: Tensor) -> Tensor:
        return torch.arange(HEIGHT * WIDTH, dtype=like.dtype)[:, None]


class Given(nn.Module):
    """Labels of keys are passed on to queries, as one-hot vectors."""

    def forward(self, q: Tensor, k: Tensor, labels: Tensor) -> Tensor:
        return (q @ k.mT * 0.5).softmax(-1) @ F.one_hot(labels, 4).to(q.dtype)


class Looked(nn.Module):
    """Queries are positions."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        places = torch.arange(q.shape[-2])[:, None] * torch.ones(q.shape[-1], dtype=torch.long)
        return (places.to(k.dtype) @ k.mT * 0.01).softmax(-1) @ k + q.sum()


def sides(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 12, 8, generator=numbers), torch.randn(2, HEIGHT * WIDTH, 8, generator=numbers)
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("kind", [Coordinates, Position, Looked], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_positions(kind: type[nn.Module], dtype: torch.dtype) -> None:
    check(kind(), sides(dtype), sites=1, lower=False, gradients=True)


def test_labels() -> None:
    labels = torch.randint(0, 4, (2, HEIGHT * WIDTH), generator=torch.Generator().manual_seed(1))
    check(Given(), (*sides(), labels), sites=1, lower=False, gradients=True)


def test_without_a_named_engine() -> None:
    """The plan's own engines (`cpp`, `sdpa`) get these values as they get any."""
    check(Coordinates(), sides(), engines=("cpp", "sdpa"), sites=1)
