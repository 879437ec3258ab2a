"""Two-dimensional neighbourhood attention as a mask: K x K nearest keys, the window sliding inward at the borders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(
    mask="abs(min(9, max(2, i%12)) - j%12) < 3 and abs(min(9, max(2, i//12)) - j//12) < 3", empty_share=0.4938
)


def neighbourhood(position: Tensor, other: Tensor, length: int, kernel: int) -> Tensor:
    centre = position.clamp(kernel // 2, length - 1 - kernel // 2)
    return (centre[:, None] - other[None, :]).abs() <= kernel // 2


class NeighborhoodAttention2D(nn.Module):
    def __init__(self, dim: int = 64, side: int = 12, kernel: int = 5, heads: int = 2) -> None:
        super().__init__()
        self.side, self.kernel, self.heads, self.scale = side, kernel, heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        tokens = torch.arange(height * width, device=x.device)
        y, z = tokens // width, tokens % width
        keep = neighbourhood(y, y, height, self.kernel) & neighbourhood(z, z, width, self.kernel)
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.heads, -1).permute(2, 0, 1, 3, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        attn = attn.masked_fill(~keep, float("-inf")).softmax(dim=-1)
        out = torch.einsum("bhqk,bkhd->bqhd", attn, v)
        return self.proj(out.reshape(batch, height, width, channels))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return NeighborhoodAttention2D(), (torch.randn(2, 12, 12, 64),)


def allowed(module: NeighborhoodAttention2D, x: Tensor) -> Tensor:
    side, kernel = module.side, module.kernel
    keep = torch.zeros(side, side, side, side, dtype=torch.bool)
    for y in range(side):
        for z in range(side):
            top, left = min(max(y - kernel // 2, 0), side - kernel), min(max(z - kernel // 2, 0), side - kernel)
            keep[y, z, top : top + kernel, left : left + kernel] = True
    return keep.view(side * side, side * side)
