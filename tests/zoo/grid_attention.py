"""MaxViT's grid attention: tokens a grid apart attend to each other; as a mask, and as a reshape into groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class GridMaskAttention(nn.Module):
    def __init__(self, dim: int = 32, side: int = 12, grid: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.side, self.grid, self.heads, self.scale = side, grid, heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def mask(self, device: torch.device) -> Tensor:
        step = self.side // self.grid
        y, x = torch.meshgrid([torch.arange(self.side, device=device)] * 2, indexing="ij")
        group = ((y % step) * step + x % step).flatten()
        return group.unsqueeze(1) == group.unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        q, k, v = self.qkv(x).view(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attn = torch.einsum("bhid,bhjd->bhij", q * self.scale, k)
        attn = attn.masked_fill(self.mask(x.device) == 0, float("-inf")).softmax(-1)
        out = torch.einsum("bhij,bhjd->bihd", attn, v)
        return self.proj(out.reshape(batch, height, width, channels))


class GridPartition(GridMaskAttention):
    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        g, step = self.grid, self.side // self.grid
        grid = x.view(batch, g, step, g, step, channels).permute(0, 2, 4, 1, 3, 5).reshape(-1, g * g, channels)
        q, k, v = self.qkv(grid).view(grid.shape[0], g * g, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        out = self.proj((attn @ v).transpose(1, 2).reshape(grid.shape))
        out = out.view(batch, step, step, g, g, channels).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, height, width, channels)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return GridMaskAttention(), (torch.randn(2, 12, 12, 32),)


VARIANTS = {
    "reshaped": Variant(lambda: (GridPartition(), (torch.randn(2, 12, 12, 32),)), Expect(mask="", regrouped=True))
}


def allowed(module: GridMaskAttention, x: Tensor) -> Tensor:
    step = module.side // module.grid
    line = torch.eye(step, dtype=torch.bool).repeat(module.grid, module.grid)
    return torch.kron(line, line)


def reference(module: GridMaskAttention, x: Tensor) -> Tensor:
    batch, height, width, _ = x.shape
    q, k, v = module.qkv(x).view(batch, height * width, 3, module.heads, -1).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * module.scale
    probs = scores.masked_fill(~allowed(module, x), float("-inf")).softmax(-1)
    return module.proj(torch.einsum("bhij,bjhd->bihd", probs, v).reshape(x.shape))
