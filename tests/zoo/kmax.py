"""kMaX-DeepLab: the cluster assignment normalises over the queries (the clusters), not over the keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(declined="")


class KMaXCrossAttention(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)

    def forward(self, clusters: Tensor, pixels: Tensor) -> Tensor:
        logits = torch.einsum("bmd,bnd->bmn", self.query(clusters), self.key(pixels))
        assignment = logits.softmax(dim=1)
        return torch.einsum("bmn,bnd->bmd", assignment, self.value(pixels))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return KMaXCrossAttention(), (torch.randn(2, 24, 32), torch.randn(2, 100, 32))
