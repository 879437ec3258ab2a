"""A dilated causal window: every third key of the last twenty-four, by arithmetic and by a loop over diagonals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(empty_share=0.671875)


class DilatedWindow(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, window: int = 24, dilation: int = 3) -> None:
        super().__init__()
        self.heads, self.window, self.dilation, self.scale = heads, window, dilation, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)

    def mask(self, length: int, device: torch.device) -> Tensor:
        position = torch.arange(length, device=device)
        gap = position.view(-1, 1) - position.view(1, -1)
        return (gap >= 0) & (gap < self.window) & (gap % self.dilation == 0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores.masked_fill(~self.mask(x.shape[1], x.device), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Diagonals(DilatedWindow):
    def mask(self, length: int, device: torch.device) -> Tensor:
        mask = torch.zeros(length, length, dtype=torch.bool, device=device)
        one = torch.eye(length, dtype=torch.bool, device=device)
        for offset in range(0, self.window, self.dilation):
            mask |= nn.functional.pad(one, (0, 0, offset, 0))[:length]
        return mask


class Paths(DilatedWindow):
    """Positions divided and taken apart: the same residue, and near in steps of the dilation."""

    def mask(self, length: int, device: torch.device) -> Tensor:
        position = torch.arange(length, device=device)
        same = position[:, None] % self.dilation == position[None, :] % self.dilation
        steps = (position[:, None] - position[None, :]).div(self.dilation, rounding_mode="floor")
        return same & (steps >= 0) & (steps < self.window // self.dilation)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return DilatedWindow(), (torch.randn(2, 128, 32),)


VARIANTS = {
    "diagonals": Variant(lambda: (Diagonals(), (torch.randn(2, 128, 32),))),
    "paths": Variant(lambda: (Paths(), (torch.randn(2, 128, 32),))),
}


def allowed(module: DilatedWindow, x: Tensor) -> Tensor:
    keep = torch.zeros(128, 128, dtype=torch.bool)
    for i in range(128):
        for step in range(module.window // module.dilation):
            if i - step * module.dilation >= 0:
                keep[i, i - step * module.dilation] = True
    return keep
