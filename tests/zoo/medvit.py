"""MedViTV2's global block: dilated neighbourhood attention on a plane, next to a convolution, joined on channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class DilatedNeighborhoodBlock(nn.Module):
    def __init__(self, dim: int = 32, side: int = 12, kernel: int = 3, dilation: int = 3, heads: int = 2) -> None:
        super().__init__()
        self.side, self.kernel, self.dilation, self.heads = side, kernel, dilation, heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=4)
        self.proj = nn.Conv2d(2 * dim, dim, 1)

    def window(self, device: torch.device) -> Tensor:
        """(side, side): which positions of one axis see each other."""
        position = torch.arange(self.side, device=device)
        group, step = position % self.dilation, position // self.dilation
        half = self.kernel // 2
        last = (self.side - 1 - group) // self.dilation
        center = torch.minimum(step.clamp(min=half), last - half)
        near = (center[:, None] - step[None, :]).abs() <= half
        return near & (group[:, None] == group[None, :])

    def mask(self, device: torch.device) -> Tensor:
        line = self.window(device)
        return (line[:, None, :, None] & line[None, :, None, :]).reshape(self.side**2, self.side**2)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(x).reshape(batch, 3, self.heads, -1, height * width).transpose(-2, -1)
        q, k, v = qkv.unbind(1)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + torch.zeros_like(attn).masked_fill(~self.mask(x.device), float("-inf"))
        out = (attn.softmax(dim=-1) @ v).transpose(-2, -1).reshape(batch, channels, height, width)
        return self.proj(torch.cat([out, self.conv(x)], dim=1))


class Kronecker(DilatedNeighborhoodBlock):
    def mask(self, device: torch.device) -> Tensor:
        line = self.window(device)
        return torch.kron(line, line)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return DilatedNeighborhoodBlock(), (torch.randn(2, 32, 12, 12),)


VARIANTS = {"kron": Variant(lambda: (Kronecker(), (torch.randn(2, 32, 12, 12),)))}


def allowed(module: DilatedNeighborhoodBlock, x: Tensor) -> Tensor:
    side, kernel, dilation = module.side, module.kernel, module.dilation
    line = torch.zeros(side, side, dtype=torch.bool)
    for q in range(side):
        group = list(range(q % dilation, side, dilation))
        first = min(max(group.index(q) - kernel // 2, 0), len(group) - kernel)
        line[q, group[first : first + kernel]] = True
    return torch.kron(line, line)
