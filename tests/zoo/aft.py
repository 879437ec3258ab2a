"""The attention-free transformer as RRNCO adapts it: a learned bias between nodes weights values channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

# The weights of pairs hold no product of queries and keys, and do not come apart.
EXPECT = Expect(declined="")


class AFTFull(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.alpha = nn.Parameter(torch.ones(1))
        self.mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor, distance: Tensor) -> Tensor:
        bias = self.alpha * self.mlp(torch.stack((distance, distance.mT), -1)).squeeze(-1)
        a, k, v = torch.exp(bias.softmax(dim=-1)), torch.exp(self.k(x).softmax(dim=1)), self.v(x)
        return torch.sigmoid(self.q(x)) * ((a @ (k * v)) / (a @ k))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return AFTFull(), (torch.randn(2, 40, 32), torch.rand(2, 40, 40))
