"""DaViT's channel attention: channels of a group attend to one another; a softmax over channels, dense and small."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="")


class ChannelAttention(nn.Module):
    def __init__(self, dim: int = 64, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.groups, c // self.groups).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        k = k * (c // self.groups) ** -0.5
        attention = k.transpose(-1, -2) @ v
        attention = attention.softmax(dim=-1)
        x = (attention @ q.transpose(-1, -2)).transpose(-1, -2)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ChannelAttention(), (torch.randn(2, 100, 64),)
