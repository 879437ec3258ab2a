"""Shifted windows without any roll: a mask on the whole image that keeps pairs of the same shifted window."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class ShiftedWindowMask(nn.Module):
    def __init__(self, dim: int = 32, side: int = 12, window: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.side, self.window, self.shift, self.heads = side, window, window // 2, heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def regions(self, device: torch.device) -> Tensor:
        """Nine regions, painted as the reference paints them, with the shift undone: one number a token."""
        side, window, shift = self.side, self.window, self.shift
        image = torch.zeros((1, side, side, 1), device=device)
        slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        count = 0
        for rows in slices:
            for columns in slices:
                image[:, rows, columns, :] = count
                count += 1
        along = torch.arange(side, device=device) // window
        windows = along[:, None] * (side // window) + along[None, :]
        return torch.roll(image[0, :, :, 0] + 9 * windows, (shift, shift), dims=(0, 1)).flatten()

    def mask(self, device: torch.device) -> Tensor:
        regions = self.regions(device)
        return regions.unsqueeze(1) == regions.unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn.masked_fill(~self.mask(x.device), torch.finfo(attn.dtype).min).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(batch, length, channels))


class ClosedForm(ShiftedWindowMask):
    def mask(self, device: torch.device) -> Tensor:
        token = torch.arange(self.side**2, device=device)
        y, x = token // self.side - self.shift, token % self.side - self.shift
        y, x = torch.div(y, self.window, rounding_mode="floor"), torch.div(x, self.window, rounding_mode="floor")
        return (y[:, None] == y[None, :]) & (x[:, None] == x[None, :])


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ShiftedWindowMask(), (torch.randn(2, 144, 32),)


VARIANTS = {"closed": Variant(lambda: (ClosedForm(), (torch.randn(2, 144, 32),)))}


def allowed(module: ShiftedWindowMask, x: Tensor) -> Tensor:
    edges = [0, *range(module.shift, module.side, module.window), module.side]
    blocks = [torch.ones(b - a, b - a) for a, b in itertools.pairwise(edges)]
    line = torch.block_diag(*blocks).bool()
    return torch.kron(line, line)
