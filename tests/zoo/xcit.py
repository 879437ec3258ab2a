"""XCiT: attention between channels; queries and keys are the rows of the normalised, transposed token matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="")


class XCA(nn.Module):
    def __init__(self, dim: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.num_heads = heads
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 4.0))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        attn = (q @ k.transpose(-2, -1)) * self.temperature
        attn = attn.softmax(dim=-1)
        return self.proj((attn @ v).permute(0, 3, 1, 2).reshape(b, n, c))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return XCA(), (torch.randn(2, 100, 64),)
