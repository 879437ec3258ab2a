"""CSWin: half of the heads attend in vertical stripes, half in horizontal ones; a convolution of v is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="", sites=2)


def img2windows(img: Tensor, h_sp: int, w_sp: int) -> Tensor:
    b, c, h, w = img.shape
    img = img.view(b, c, h // h_sp, h_sp, w // w_sp, w_sp)
    return img.permute(0, 2, 4, 3, 5, 1).contiguous().reshape(-1, h_sp * w_sp, c)


def windows2img(windows: Tensor, h_sp: int, w_sp: int, h: int, w: int) -> Tensor:
    b = int(windows.shape[0] / (h * w / h_sp / w_sp))
    img = windows.view(b, h // h_sp, w // w_sp, h_sp, w_sp, -1)
    return img.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


class LePEAttention(nn.Module):
    def __init__(self, dim: int, side: int, h_sp: int, w_sp: int, heads: int) -> None:
        super().__init__()
        self.side, self.h_sp, self.w_sp, self.heads, self.scale = side, h_sp, w_sp, heads, (dim // heads) ** -0.5
        self.get_v = nn.Conv2d(dim, dim, kernel_size=3, stride=1, padding=1, groups=dim)

    def im2cswin(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        x = x.transpose(-2, -1).contiguous().view(b, c, self.side, self.side)
        x = img2windows(x, self.h_sp, self.w_sp)
        return x.reshape(-1, self.h_sp * self.w_sp, self.heads, c // self.heads).permute(0, 2, 1, 3).contiguous()

    def get_lepe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, _, c = x.shape
        x = x.transpose(-2, -1).contiguous().view(b, c, self.side, self.side)
        x = x.view(b, c, self.side // self.h_sp, self.h_sp, self.side // self.w_sp, self.w_sp)
        x = x.permute(0, 2, 4, 1, 3, 5).contiguous().reshape(-1, c, self.h_sp, self.w_sp)
        lepe = self.get_v(x).reshape(-1, self.heads, c // self.heads, self.h_sp * self.w_sp).permute(0, 1, 3, 2)
        x = x.reshape(-1, self.heads, c // self.heads, self.h_sp * self.w_sp).permute(0, 1, 3, 2).contiguous()
        return x, lepe.contiguous()

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv[0], qkv[1], qkv[2]
        b, _, c = q.shape
        q, k = self.im2cswin(q), self.im2cswin(k)
        v, lepe = self.get_lepe(v)
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = nn.functional.softmax(attn, dim=-1, dtype=attn.dtype)
        x = (attn @ v) + lepe
        x = x.transpose(1, 2).reshape(-1, self.h_sp * self.w_sp, c)
        return windows2img(x, self.h_sp, self.w_sp, self.side, self.side).view(b, -1, c)


class CSWinBlock(nn.Module):
    def __init__(self, dim: int = 64, side: int = 16, split: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, dim * 3)
        self.attns = nn.ModuleList(
            [
                LePEAttention(dim // 2, side, side, split, heads // 2),
                LePEAttention(dim // 2, side, split, side, heads // 2),
            ]
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        qkv = self.qkv(x).reshape(b, -1, 3, c).permute(2, 0, 1, 3)
        x1 = self.attns[0](qkv[:, :, :, : c // 2])
        x2 = self.attns[1](qkv[:, :, :, c // 2 :])
        return self.proj(torch.cat([x1, x2], dim=2))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return CSWinBlock(), (torch.randn(1, 256, 64),)


def reference(module: CSWinBlock, x: Tensor) -> Tensor:
    """Stripes as a mask on the flat image; the convolution sees zeros past its stripe's border."""
    b, length, c = x.shape
    side, split, half = 16, 2, c // 2
    q, k, v = module.qkv(x).view(b, length, 3, c).unbind(2)
    y, z = torch.arange(length) // side, torch.arange(length) % side
    outs = []
    for branch, stripe in enumerate((z // split, y // split)):
        attn: Any = module.attns[branch]
        part = slice(branch * half, (branch + 1) * half)
        heads = attn.heads
        qb, kb, vb = (t[..., part].reshape(b, length, heads, -1) for t in (q, k, v))
        scores = torch.einsum("bihd,bjhd->bhij", qb, kb) * attn.scale
        probs = scores.masked_fill(stripe[:, None] != stripe[None], float("-inf")).softmax(-1)
        out = torch.einsum("bhij,bjhd->bihd", probs, vb).reshape(b, length, half)
        weight, grid = attn.get_v.weight[:, 0], vb.reshape(b, side, side, half)
        padded = nn.functional.pad(grid, (0, 0, 1, 1, 1, 1))
        stripes = nn.functional.pad(stripe.view(side, side), (1, 1, 1, 1), value=-1)
        for dy in range(3):
            for dz in range(3):
                same = stripes[dy : dy + side, dz : dz + side] == stripe.view(side, side)
                near = padded[:, dy : dy + side, dz : dz + side] * same[None, :, :, None]
                out = out + (near * weight[:, dy, dz]).reshape(b, length, half)
        outs.append(out + attn.get_v.bias)
    return module.proj(torch.cat(outs, -1))
