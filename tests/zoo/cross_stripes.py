"""CSWin's stripes as one mask: the first half of the heads sees its columns' stripe, the second half its rows'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class StripeAttention(nn.Module):
    def __init__(self, dim: int = 64, side: int = 12, split: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.side, self.split, self.heads, self.scale = side, split, heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def mask(self, device: torch.device) -> Tensor:
        token = torch.arange(self.side**2, device=device)
        rows, columns = token // self.side // self.split, token % self.side // self.split
        stripes = torch.stack([columns] * (self.heads // 2) + [rows] * (self.heads // 2))
        return stripes[:, :, None] == stripes[:, None, :]

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = torch.where(self.mask(x.device), attn, float("-inf"))
        out = nn.functional.softmax(attn, dim=-1, dtype=attn.dtype) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, length, channels))


class Chosen(StripeAttention):
    def mask(self, device: torch.device) -> Tensor:
        grid = torch.arange(self.side, device=device) // self.split
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        vertical = x.flatten()[:, None] == x.flatten()[None, :]
        horizontal = y.flatten()[:, None] == y.flatten()[None, :]
        head = torch.arange(self.heads, device=device).view(-1, 1, 1)
        return torch.where(head < self.heads // 2, vertical, horizontal)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return StripeAttention(), (torch.randn(2, 144, 64),)


VARIANTS = {"chosen": Variant(lambda: (Chosen(), (torch.randn(2, 144, 64),)))}


def allowed(module: StripeAttention, x: Tensor) -> Tensor:
    side, split = module.side, module.split
    blocks = torch.block_diag(*[torch.ones(split, split)] * (side // split)).bool()
    every = torch.ones(side, side, dtype=torch.bool)
    vertical, horizontal = torch.kron(every, blocks), torch.kron(blocks, every)
    half = module.heads // 2
    return torch.stack([vertical] * half + [horizontal] * half)
