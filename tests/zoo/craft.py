"""CRAFT: half of the heads attend in flat windows, half in tall ones, shifted by half a window each its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(sites=2)


class PositionBias(nn.Module):
    """Bias of a window's pairs: an MLP over relative offsets, gathered."""

    def __init__(self, dim: int, heads: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.net = nn.Sequential(
            nn.Linear(2, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(),
            nn.Linear(dim, heads),
        )  # fmt: skip

    def forward(self, like: Tensor) -> Tensor:
        h, w = self.size
        y, x = torch.arange(1 - h, h, device=like.device), torch.arange(1 - w, w, device=like.device)
        table = self.net(torch.stack(torch.meshgrid([y, x], indexing="ij")).flatten(1).transpose(0, 1).to(like.dtype))
        rows, columns = torch.arange(h, device=like.device), torch.arange(w, device=like.device)
        coords = torch.flatten(torch.stack(torch.meshgrid([rows, columns], indexing="ij")), 1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += h - 1
        relative[:, :, 1] += w - 1
        relative[:, :, 0] *= 2 * w - 1
        return table[relative.sum(-1).view(-1)].view(h * w, h * w, -1).permute(2, 0, 1).contiguous()


def window_mask(side: int, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """-100 between the regions of a shifted window that are not neighbours in the image."""
    image = torch.zeros(1, side, side, 1)
    count = 0
    for rows in (slice(0, -size[0]), slice(-size[0], -shift[0]), slice(-shift[0], None)):
        for columns in (slice(0, -size[1]), slice(-size[1], -shift[1]), slice(-shift[1], None)):
            image[:, rows, columns, :] = count
            count += 1
    windows = image.view(1, side // size[0], size[0], side // size[1], size[1], 1).permute(0, 1, 3, 2, 4, 5)
    windows = windows.reshape(-1, size[0] * size[1])
    mask = windows.unsqueeze(1) - windows.unsqueeze(2)
    return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)


class RectangleWindows(nn.Module):
    """One half of the channels: windows of one shape."""

    def __init__(self, dim: int, side: int, heads: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.side, self.heads, self.size, self.scale = side, heads, size, (dim // heads) ** -0.5
        self.shift = (size[0] // 2, size[1] // 2)
        self.pos = PositionBias(8, heads, size)
        self.register_buffer("mask", window_mask(side, size, self.shift))

    def windows(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        (h, w), side = self.size, self.side
        x = torch.roll(x.view(b, side, side, c), (-self.shift[0], -self.shift[1]), dims=(1, 2))
        x = x.view(b, side // h, h, side // w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, h * w, c)
        return x.reshape(-1, h * w, self.heads, c // self.heads).permute(0, 2, 1, 3).contiguous()

    def forward(self, qkv: Tensor) -> Tensor:
        b, length, c = qkv.shape[1:]
        (h, w), side = self.size, self.side
        q, k, v = (self.windows(t) for t in qkv)
        attn = (q * self.scale) @ k.transpose(-2, -1) + self.pos(qkv).unsqueeze(0)
        mask: Tensor = self.mask  # type: ignore[assignment]
        count = mask.shape[0]
        attn = attn.view(b, count, self.heads, h * w, h * w) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, self.heads, h * w, h * w).softmax(-1)
        x = (attn @ v).transpose(1, 2).reshape(-1, h * w, c)
        x = x.view(b, side // h, side // w, h, w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, side, side, c)
        return torch.roll(x, self.shift, dims=(1, 2)).reshape(b, length, c)


class Masked(RectangleWindows):
    """The same on the image as it is: a mask of shifted windows, the bias read at the place in the window."""

    def forward(self, qkv: Tensor) -> Tensor:
        b, length, c = qkv.shape[1:]
        (h, w), side = self.size, self.side
        q, k, v = qkv.unflatten(-1, (self.heads, -1)).transpose(2, 3).unbind(0)
        token = torch.arange(length, device=qkv.device)
        y, x = token // side - self.shift[0], token % side - self.shift[1]
        same = (y // h == (y // h)[:, None]) & (x // w == (x // w)[:, None])
        cell = y % h * w + x % w
        bias = self.pos(qkv)[:, cell[:, None], cell[None, :]]
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale + bias
        probs = scores.masked_fill(~same, float("-inf")).softmax(-1)
        return torch.einsum("bhij,bhjd->bihd", probs, v).reshape(b, length, c)


class ShiftRectangleAttention(nn.Module):
    def __init__(self, dim: int = 32, side: int = 16, heads: int = 4, branch: Any = RectangleWindows) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, dim * 3)
        self.flat = branch(dim // 2, side, heads // 2, (2, 8))
        self.tall = branch(dim // 2, side, heads // 2, (8, 2))
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        b, length, c = x.shape
        qkv = self.qkv(x).reshape(b, length, 3, c).permute(2, 0, 1, 3)
        v = qkv[2].transpose(-2, -1).contiguous().view(b, c, self.side, self.side)
        attended = torch.cat([self.flat(qkv[..., : c // 2]), self.tall(qkv[..., c // 2 :])], dim=2)
        lepe = self.get_v(v).view(b, c, -1).transpose(-2, -1)
        return self.proj(attended + lepe)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ShiftRectangleAttention(), (torch.randn(1, 256, 32),)


VARIANTS = {"masked": Variant(lambda: (ShiftRectangleAttention(branch=Masked), (torch.randn(1, 256, 32),)))}


def reference(module: ShiftRectangleAttention, x: Tensor) -> Tensor:
    """Both halves over the whole image, by an offset partition."""
    b, length, c = x.shape
    side = module.side
    qkv = module.qkv(x).reshape(b, length, 3, c)
    outs = []
    for half, attn in ((slice(0, c // 2), module.flat), (slice(c // 2, c), module.tall)):
        (h, w), (dy, dx) = attn.size, attn.shift
        q, k, v = qkv[..., half].unflatten(-1, (attn.heads, -1)).unbind(2)
        keep = torch.zeros(length, length, dtype=torch.bool)
        bias = attn.pos(qkv)
        full = torch.zeros(attn.heads, length, length, dtype=x.dtype)
        for i in range(length):
            for j in range(length):
                (yi, xi), (yj, xj) = divmod(i, side), divmod(j, side)
                yi, xi, yj, xj = yi - dy, xi - dx, yj - dy, xj - dx
                if (yi // h, xi // w) == (yj // h, xj // w):
                    keep[i, j] = True
                    full[:, i, j] = bias[:, yi % h * w + xi % w, yj % h * w + xj % w]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * attn.scale + full
        probs = scores.masked_fill(~keep, float("-inf")).softmax(-1)
        outs.append(torch.einsum("bhij,bjhd->bihd", probs, v).reshape(b, length, -1))
    image = qkv[:, :, 2].transpose(1, 2).reshape(b, c, side, side)
    return module.proj(torch.cat(outs, -1) + module.get_v(image).flatten(2).transpose(1, 2))
