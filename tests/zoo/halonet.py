"""HaloNet: each block of queries sees its block and a halo; keys past the border are zeros, and not masked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="")


class HaloAttn(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 2, block: int = 4, halo: int = 2) -> None:
        super().__init__()
        self.num_heads, self.block_size, self.halo_size = heads, block, halo
        self.win_size, self.dim_head, self.scale = block + 2 * halo, dim // heads, (dim // heads) ** -0.5
        self.q = nn.Conv2d(dim, dim, 1, bias=False)
        self.kv = nn.Conv2d(dim, 2 * dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        block, num_h, num_w = self.block_size, h // self.block_size, w // self.block_size
        num_blocks = num_h * num_w
        q = self.q(x)
        q = q.reshape(-1, self.dim_head, num_h, block, num_w, block).permute(0, 1, 3, 5, 2, 4)
        q = q.reshape(b * self.num_heads, self.dim_head, -1, num_blocks).transpose(1, 3)
        kv = nn.functional.pad(self.kv(x), [self.halo_size] * 4)
        kv = kv.unfold(2, self.win_size, block).unfold(3, self.win_size, block)
        kv = kv.reshape(b * self.num_heads, 2 * self.dim_head, num_blocks, -1).permute(0, 2, 3, 1)
        k, v = torch.split(kv, [self.dim_head, self.dim_head], dim=-1)
        attn = (q @ k.transpose(-1, -2)) * self.scale
        attn = attn.softmax(dim=-1)
        out = (attn @ v).transpose(1, 3)
        out = out.reshape(-1, block, block, num_h, num_w)
        return out.permute(0, 3, 1, 4, 2).contiguous().view(b, -1, h, w)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return HaloAttn(), (torch.randn(2, 32, 16, 16),)
