"""Softmax through the log-sum-exp, and through log_softmax and exp: the same weighting, two more spellings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="", sites=2)


class LogProbabilityAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.second = nn.Linear(width, 3 * width)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(self.qkv(x))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        probs = torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))
        x = torch.einsum("bhij,bhjd->bihd", probs, v).flatten(2)
        q, k, v = self._heads(self.second(x))
        probs = nn.functional.log_softmax(torch.einsum("bhid,bhjd->bhij", q, k) * self.scale, dim=-1).exp()
        return torch.einsum("bhij,bhjd->bihd", probs, v).flatten(2)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return LogProbabilityAttention(), (torch.randn(2, 100, 64),)
