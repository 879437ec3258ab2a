"""HaloNet: each block of queries sees its block and a halo; keys past the border are zeros, and not masked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class HaloAttn(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 2, block: int = 4, halo: int = 2) -> None:
        super().__init__()
        self.num_heads, self.block_size, self.halo_size = heads, block, halo
        self.win_size, self.dim_head, self.scale = block + 2 * halo, dim // heads, (dim // heads) ** -0.5
        self.q = nn.Conv2d(dim, dim, 1, bias=False)
        self.kv = nn.Conv2d(dim, 2 * dim, 1, bias=False)

    def scored(self, attn: Tensor, q: Tensor) -> Tensor:
        return attn

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
        attn = self.scored(attn, q)
        attn = attn.softmax(dim=-1)
        out = (attn @ v).transpose(1, 3)
        out = out.reshape(-1, block, block, num_h, num_w)
        return out.permute(0, 3, 1, 4, 2).contiguous().view(b, -1, h, w)


class Masked(HaloAttn):
    """The other port: keys past the border are masked, blocks are einops-like, the halo comes from F.unfold."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        block, halo, heads = self.block_size, self.halo_size, self.num_heads
        rows, columns = h // block, w // block
        q = self.q(x).view(b, heads, -1, rows, block, columns, block).permute(0, 3, 5, 1, 4, 6, 2)
        q = q.reshape(b * rows * columns * heads, block * block, -1) * self.scale
        kv = nn.functional.unfold(self.kv(x), kernel_size=self.win_size, stride=block, padding=halo)
        kv = kv.view(b, heads, 2, self.dim_head, self.win_size**2, rows * columns).permute(2, 0, 5, 1, 4, 3)
        k, v = kv.reshape(2, -1, self.win_size**2, self.dim_head)
        sim = torch.einsum("b i d, b j d -> b i j", q, k)
        inside = torch.ones(1, 1, h, w, device=x.device)
        inside = nn.functional.unfold(inside, kernel_size=self.win_size, stride=block, padding=halo)
        outside = inside.permute(0, 2, 1).repeat_interleave(heads, 1).repeat(b, 1, 1).flatten(0, 1)[:, None] == 0
        sim = sim.masked_fill(outside, -torch.finfo(sim.dtype).max)
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        out = out.view(b, rows, columns, heads, block, block, -1).permute(0, 3, 6, 1, 4, 2, 5)
        return out.reshape(b, c, h, w)


def rel_logits_1d(q: Tensor, rel_k: Tensor, permute_mask: list[int]) -> Tensor:
    """Relative to absolute positions by padding and reshaping."""
    b, h, w, _ = q.shape
    rel_size = rel_k.shape[0]
    win_size = (rel_size + 1) // 2
    x = q @ rel_k.transpose(-1, -2)
    x = x.reshape(-1, w, rel_size)
    x_pad = nn.functional.pad(x, [0, 1]).flatten(1)
    x_pad = nn.functional.pad(x_pad, [0, rel_size - w])
    x_pad = x_pad.reshape(-1, w + 1, rel_size)
    x = x_pad[:, :w, win_size - 1 :]
    x = x.reshape(b, h, 1, w, win_size).expand(-1, -1, win_size, -1, -1)
    return x.permute(permute_mask)


class Relative(HaloAttn):
    """With relative logits of rows and of columns, which depend on the query's content."""

    def __init__(self) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.randn(2 * self.win_size - 1, self.dim_head))
        self.width_rel = nn.Parameter(torch.randn(2 * self.win_size - 1, self.dim_head))

    def scored(self, attn: Tensor, q: Tensor) -> Tensor:
        b, blocks, _, _ = q.shape
        block = self.block_size
        q = q.reshape(-1, block, block, self.dim_head)
        width = rel_logits_1d(q, self.width_rel, [0, 1, 3, 2, 4])
        height = rel_logits_1d(q.transpose(1, 2), self.height_rel, [0, 3, 1, 4, 2])
        return attn + (height + width).reshape(b, blocks, block * block, -1)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return HaloAttn(), (torch.randn(2, 32, 16, 16),)


VARIANTS = {
    "masked": Variant(lambda: (Masked(), (torch.randn(2, 32, 16, 16),)), Expect()),
    "relative": Variant(lambda: (Relative(), (torch.randn(1, 32, 16, 16),))),
    "stripes": Variant(lambda: (HaloAttn(halo=3), (torch.randn(1, 32, 8, 12),))),
}


def reference(module: HaloAttn, x: Tensor) -> Tensor:
    """Block by block, on the padded image."""
    b, c, h, w = x.shape
    block, halo, heads, win = module.block_size, module.halo_size, module.num_heads, module.win_size
    q = module.q(x).view(b, heads, -1, h, w)
    kv = nn.functional.pad(module.kv(x), [halo] * 4).view(b, heads, 2, -1, h + 2 * halo, w + 2 * halo)
    inside = nn.functional.pad(torch.ones(h, w, dtype=torch.bool), [halo] * 4)
    out = torch.zeros_like(q)
    for y in range(0, h, block):
        for z in range(0, w, block):
            mine = q[..., y : y + block, z : z + block]
            keys, values = kv[..., y : y + win, z : z + win].flatten(-2).unbind(2)
            scores = torch.einsum("bhdyx,bhdj->bhyxj", mine, keys) * module.scale
            if isinstance(module, Masked):
                keep = inside[y : y + win, z : z + win].flatten()
                scores = scores.masked_fill(~keep, float("-inf"))
            if isinstance(module, Relative):
                along = torch.arange(block)[:, None] * -1 + torch.arange(win) + win - 1
                rows = torch.einsum("bhdyx,yid->bhyxi", mine, module.height_rel[along])
                columns = torch.einsum("bhdyx,xjd->bhyxj", mine, module.width_rel[along])
                scores = scores + (rows[..., :, None] + columns[..., None, :]).flatten(-2)
            result = torch.einsum("bhyxj,bhdj->bhdyx", scores.softmax(-1), values)
            out[..., y : y + block, z : z + block] = result
    return out.view(b, c, h, w)
