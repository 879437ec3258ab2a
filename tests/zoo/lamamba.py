"""LaMamba-Diff's attention: Swin blocks with input and result modulated by a condition, every other one shifted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant
from tests.zoo.swin import Fused, WindowAttention, window_partition, window_reverse

EXPECT = Expect(sites=2)


class ModulatedWindows(nn.Module):
    def __init__(self, dim: int, side: int, window: int, shift: int, kind: type[WindowAttention]) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = kind(dim, window, 2)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        line = torch.arange(side)
        region = (line >= side - window).long() + (line >= side - shift).long() if shift else torch.zeros_like(line)
        image = (region[:, None] * 3 + region[None, :])[None, :, :, None]
        flat = window_partition(image, window).view(-1, window * window)
        mask = (flat[:, None, :] != flat[:, :, None]).float() * -100.0
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        b, length, channels = x.shape
        shift, scale, gate = self.modulation(c).chunk(3, dim=1)
        y = self.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        y = torch.roll(y.view(b, self.side, self.side, channels), (-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(y, self.window).view(-1, self.window**2, channels)
        windows = self.attn(windows, self.attn_mask).view(-1, self.window, self.window, channels)
        y = torch.roll(
            window_reverse(windows, self.window, self.side, self.side), (self.shift, self.shift), dims=(1, 2)
        )
        return x + gate.unsqueeze(1) * y.view(b, length, channels)


class Blocks(nn.Module):
    def __init__(self, kind: type[WindowAttention] = WindowAttention) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ModulatedWindows(32, 16, 8, shift, kind) for shift in (0, 4))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Blocks(), (torch.randn(2, 256, 32), torch.randn(2, 32))


VARIANTS = {"fused": Variant(lambda: (Blocks(Fused), (torch.randn(2, 256, 32), torch.randn(2, 32))))}
