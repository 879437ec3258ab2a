"""BigBird's three parts over blocks: global blocks, a window of three blocks, and blocks drawn once and kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class BigBirdMask(nn.Module):
    drawn: Tensor

    def __init__(self, width: int = 32, heads: int = 2, block: int = 16, blocks: int = 10, random: int = 2) -> None:
        super().__init__()
        self.heads, self.block, self.blocks, self.scale = heads, block, blocks, (width // heads) ** -0.5
        generator = torch.Generator().manual_seed(3)
        rows = [torch.randperm(blocks - 2, generator=generator)[:random] + 1 for _ in range(heads * blocks)]
        self.register_buffer("drawn", torch.stack(rows).view(heads, blocks, random))
        self.qkv = nn.Linear(width, 3 * width)

    def mask(self, device: torch.device) -> Tensor:
        """From the drawn numbers of blocks (heads, blocks, random), compared with every block."""
        number = torch.arange(self.blocks, device=device)
        near = (number[:, None] - number[None, :]).abs() <= 1
        ends = (number == 0) | (number == self.blocks - 1)
        chosen = torch.zeros(self.heads, self.blocks, self.blocks, dtype=torch.bool, device=device)
        for k in range(self.drawn.shape[-1]):
            chosen = chosen | (self.drawn[:, :, k, None] == number)
        blocks = chosen | (near | ends[:, None] | ends[None, :])[None]
        return blocks.repeat_interleave(self.block, dim=1).repeat_interleave(self.block, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        scores = scores + (1.0 - self.mask(x.device).to(scores.dtype)) * -10000.0
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Scattered(BigBirdMask):
    """A layout of blocks that is filled by slices and a scatter, then spread over the tokens by an index."""

    def mask(self, device: torch.device) -> Tensor:
        layout = torch.zeros(self.heads, self.blocks, self.blocks, dtype=torch.long, device=device)
        layout = layout.scatter(2, self.drawn, 1)
        layout[:, 0, :] = 1
        layout[:, -1, :] = 1
        layout[:, :, 0] = 1
        layout[:, :, -1] = 1
        for row in range(1, self.blocks - 1):
            layout[:, row, row - 1 : row + 2] = 1
        token = torch.arange(self.blocks * self.block, device=device) // self.block
        return layout[:, token][:, :, token].bool()


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return BigBirdMask(), (torch.randn(2, 160, 32),)


VARIANTS = {"scattered": Variant(lambda: (Scattered(), (torch.randn(2, 160, 32),)))}


def allowed(module: BigBirdMask, x: Tensor) -> Tensor:
    count = module.blocks
    keep = torch.zeros(module.heads, count, count, dtype=torch.bool)
    for h in range(module.heads):
        for r in range(count):
            for c in range(count):
                drawn = c in module.drawn[h, r].tolist()
                keep[h, r, c] = drawn or abs(r - c) <= 1 or r in (0, count - 1) or c in (0, count - 1)
    return torch.kron(keep, torch.ones(1, module.block, module.block, dtype=torch.bool))
