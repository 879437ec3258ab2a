"""Block-diagonal attention over blocks of one size and of several sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="i//32 == j//32", empty_share=0.75)


class BlockDiagonal(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, sizes: tuple[int, ...] = (32, 32, 32, 32)) -> None:
        super().__init__()
        self.heads, self.sizes, self.scale = heads, sizes, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)

    def mask(self, device: torch.device) -> Tensor:
        number = torch.arange(sum(self.sizes), device=device).div(self.sizes[0], rounding_mode="trunc")
        return number[:, None].eq(number[None, :])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        scores = scores.masked_fill(~self.mask(x.device), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Kronecker(BlockDiagonal):
    def mask(self, device: torch.device) -> Tensor:
        eye = torch.eye(len(self.sizes), device=device)
        return torch.kron(eye, torch.ones(self.sizes[0], self.sizes[0], device=device)).bool()


class Library(BlockDiagonal):
    def mask(self, device: torch.device) -> Tensor:
        return torch.block_diag(*[torch.ones(n, n, device=device) for n in self.sizes]).bool()


class Looped(BlockDiagonal):
    def mask(self, device: torch.device) -> Tensor:
        mask = torch.zeros(sum(self.sizes), sum(self.sizes), dtype=torch.bool, device=device)
        start = 0
        for size in self.sizes:
            mask[start : start + size, start : start + size] = True
            start += size
        return mask


def _maker(build: type[BlockDiagonal], sizes: tuple[int, ...] = (32, 32, 32, 32), mask: str | None = None) -> Variant:
    return Variant(lambda: (build(sizes=sizes), (torch.randn(2, 128, 32),)), Expect(mask=mask))


make = _maker(BlockDiagonal).make
UNEVEN = (24, 60, 10, 34)
VARIANTS = {
    "kron": _maker(Kronecker, mask="i//32 == j//32"),
    "library": _maker(Library),
    "looped": _maker(Looped),
    "library_uneven": _maker(Library, UNEVEN),
    "looped_uneven": _maker(Looped, UNEVEN),
}


def allowed(module: BlockDiagonal, x: Tensor) -> Tensor:
    number = [k for k, size in enumerate(module.sizes) for _ in range(size)]
    return torch.tensor([[a == b for b in number] for a in number])
