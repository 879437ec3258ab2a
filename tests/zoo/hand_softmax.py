"""The softmax written out: subtract the row maximum, exponentiate, divide by the sum; mask multiplied in afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="j <= i", empty_share=0.45)


class HandSoftmaxAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        k, v = self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (t.reshape(batch, length, self.heads, -1).transpose(1, 2) for t in (self.to_q(x), k, v))
        sim = (q * self.scale) @ k.mT
        keep = torch.tril(torch.ones(length, length, device=x.device, dtype=torch.bool))
        sim = torch.where(keep, sim, torch.full_like(sim, float("-inf")))
        weights = torch.exp(sim - sim.amax(dim=-1, keepdim=True).detach())
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights @ v).transpose(1, 2).reshape(batch, length, width)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return HandSoftmaxAttention(), (torch.randn(2, 160, 64),)


def allowed(module: nn.Module, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return i[None, :] <= i[:, None]
