"""TimeSformer's divided attention: first along time for every place, then over the places of every frame."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="", sites=2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = self.attn_drop(attn.softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))


class DividedSpaceTime(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 2, frames: int = 8) -> None:
        super().__init__()
        self.frames = frames
        self.temporal_attn, self.attn = Attention(dim, heads), Attention(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        t, p = self.frames, n // self.frames
        xt = x.view(b, p, t, c).reshape(b * p, t, c)
        x = x + self.temporal_attn(xt).reshape(b, p * t, c)
        xs = x.view(b, p, t, c).permute(0, 2, 1, 3).reshape(b * t, p, c)
        return x + self.attn(xs).reshape(b, t, p, c).permute(0, 2, 1, 3).reshape(b, n, c)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return DividedSpaceTime(), (torch.randn(2, 128, 32),)
