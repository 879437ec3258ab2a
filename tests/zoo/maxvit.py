"""MaxViT: attention in blocks, then in a grid that spans the image, each with a table of relative biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=2)


class RelativeAttention(nn.Module):
    def __init__(self, dim: int, side: int, heads: int) -> None:
        super().__init__()
        self.side, self.heads, self.scale = side, heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn(heads, 2 * side - 1, 2 * side - 1))

    def bias(self) -> Tensor:
        """(heads, side * side, side * side), by two products with one-hot matrices, as in the TensorFlow code."""
        line = torch.arange(self.side, device=self.table.device)
        offsets = line[None, :] - line[:, None] + self.side - 1
        hot = nn.functional.one_hot(offsets, 2 * self.side - 1).to(self.table.dtype)
        table = torch.einsum("nhw,ixh->nixw", self.table, hot)
        return torch.einsum("nixw,jyw->nijxy", table, hot).flatten(3, 4).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(groups, tokens, channels)."""
        g, n, c = x.shape
        q, k, v = self.qkv(x).view(g, n, self.heads, -1).transpose(1, 2).chunk(3, dim=3)
        attn = ((q * self.scale) @ k.transpose(-2, -1) + self.bias()).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(g, n, c))


class Block(nn.Module):
    def __init__(self, dim: int = 32, size: int = 4, heads: int = 2, side: int = 12) -> None:
        super().__init__()
        self.size, self.side = size, side
        self.block, self.grid = (RelativeAttention(dim, size, heads) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        p = self.size
        y = x.view(b, h // p, p, w // p, p, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, p * p, c)
        y = self.block(y).view(b, h // p, w // p, p, p, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + y
        y = x.view(b, p, h // p, p, w // p, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, p * p, c)
        y = self.grid(y).view(b, h // p, w // p, p, p, c).permute(0, 3, 1, 4, 2, 5).reshape(b, h, w, c)
        return x + y


class Axes(Block):
    """The groups as axes of their own, letters, and the bias gathered by an index."""

    def attend(self, attn: RelativeAttention, x: Tensor) -> Tensor:
        """(batch, group rows, group columns, rows, columns, channels)."""
        q, k, v = attn.qkv(x).unflatten(-1, (attn.heads, -1)).chunk(3, -1)
        line = torch.arange(self.size, device=x.device)
        offset = line[None] - line[:, None] + self.size - 1
        bias = attn.table[:, offset[:, None, :, None], offset[None, :, None, :]].flatten(3, 4).flatten(1, 2)
        q, k, v = (t.flatten(3, 4).transpose(3, 4) for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return attn.proj(out.transpose(3, 4).flatten(4)).unflatten(3, (self.size, self.size))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        p = self.size
        y = x.view(b, h // p, p, w // p, p, c).transpose(2, 3)
        x = x + self.attend(self.block, y).transpose(2, 3).reshape(x.shape)
        y = x.view(b, p, h // p, p, w // p, c).permute(0, 2, 4, 1, 3, 5)
        return x + self.attend(self.grid, y).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Block(), (torch.randn(2, 12, 12, 32),)


VARIANTS = {
    "axes": Variant(lambda: (Axes(), (torch.randn(2, 12, 12, 32),))),
    "seven": Variant(lambda: (Block(size=7, side=14), (torch.randn(1, 14, 14, 32),))),
}


def reference(module: Block, x: Tensor) -> Tensor:
    """Both over all tokens, by a mask."""
    _, h, w, _ = x.shape
    p = module.size
    for attn, grid in ((module.block, False), (module.grid, True)):
        step_y, step_x = h // p, w // p
        scores = torch.full((attn.heads, h, w, h, w), float("-inf"), dtype=x.dtype)
        for y in range(h):
            for z in range(w):
                for i in range(p):
                    for j in range(p):
                        if grid:
                            other, cell = (i * step_y + y % step_y, j * step_x + z % step_x), (y // step_y, z // step_x)
                        else:
                            other, cell = (y // p * p + i, z // p * p + j), (y % p, z % p)
                        scores[:, y, z, other[0], other[1]] = attn.table[:, i - cell[0] + p - 1, j - cell[1] + p - 1]
        q, k, v = (t.flatten(1, 2) for t in attn.qkv(x).unflatten(-1, (attn.heads, -1)).chunk(3, -1))
        full = torch.einsum("bihd,bjhd->bhij", q, k) * attn.scale + scores.flatten(3, 4).flatten(1, 2)
        x = x + attn.proj(torch.einsum("bhij,bjhd->bihd", full.softmax(-1), v).reshape(x.shape))
    return x
