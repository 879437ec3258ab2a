"""Pointwise aggregated attention of sequential recommenders (HSTU): SiLU of the scores, with a bias by position and by
the logarithm of the time between two events; divided by the length, padded events left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.expect import Expect

EXPECT = Expect(family="pairwise", mask="j <= i and t0[b,j]")


class Hstu(nn.Module):
    def __init__(self, width: int = 48, heads: int = 3, length: int = 64, buckets: int = 16) -> None:
        super().__init__()
        self.heads, self.length = heads, length
        self.uvqk = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        self.by_position = nn.Parameter(torch.randn(2 * length - 1) * 0.1)
        self.by_time = nn.Parameter(torch.randn(buckets + 1) * 0.1)
        self.register_buffer("seen", torch.ones(length, length).tril())

    def bias(self, times: Tensor) -> Tensor:
        at = torch.arange(self.length, device=times.device)
        passed = (times[:, :, None] - times[:, None, :]).abs().clamp(min=1).log() / 0.301
        bucket = passed.long().clamp(0, self.by_time.shape[0] - 1)
        return self.by_position[at[:, None] - at + self.length - 1] + self.by_time[bucket]

    def forward(self, x: Tensor, times: Tensor, valid: Tensor) -> Tensor:
        u, v, q, k = F.silu(self.uvqk(x)).unflatten(-1, (4, self.heads, -1)).unbind(2)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) + self.bias(times).unsqueeze(1)
        weights = F.silu(scores) / self.length
        weights = weights * self.seen * valid[:, None, None, :]
        attended = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)
        return x + self.out(u.flatten(2) * self.norm(attended))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    times = torch.randint(0, 400, (2, 64)).cumsum(-1)
    valid = torch.arange(64) < torch.tensor([[64], [41]])
    return Hstu(), (torch.randn(2, 64, 48), times, valid)


def allowed(module: Hstu, x: Tensor, times: Tensor, valid: Tensor) -> Tensor:
    return torch.ones(module.length, module.length, dtype=torch.bool).tril() & valid[:, None, None]
