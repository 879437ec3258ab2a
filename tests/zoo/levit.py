"""LeViT: narrow keys and wide values, a bias for each head and absolute offset read through an index table."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="")


class LeViTAttention(nn.Module):
    attention_bias_idxs: Tensor

    def __init__(self, dim: int = 48, key_dim: int = 8, heads: int = 3, ratio: int = 2, side: int = 10) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.d, self.scale = heads, key_dim, ratio * key_dim, key_dim**-0.5
        self.qkv = nn.Linear(dim, heads * (2 * key_dim + self.d))
        self.proj = nn.Sequential(nn.Hardswish(), nn.Linear(heads * self.d, dim))
        points = list(itertools.product(range(side), range(side)))
        offsets: dict[tuple[int, int], int] = {}
        index = [offsets.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(offsets)) for a in points for b in points]
        self.attention_biases = nn.Parameter(torch.randn(heads, len(offsets)))
        self.register_buffer("attention_bias_idxs", torch.LongTensor(index).view(len(points), len(points)))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, self.num_heads, -1).split([self.key_dim, self.key_dim, self.d], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        attn = (q @ k.transpose(-2, -1)) * self.scale + self.attention_biases[:, self.attention_bias_idxs]
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, n, self.num_heads * self.d)
        return self.proj(x)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return LeViTAttention(), (torch.randn(2, 100, 48),)
