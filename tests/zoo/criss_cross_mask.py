"""Criss-cross attention as a mask on the flat image: the query's row and its column, without any scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class CrissCross(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(dim, dim // 4, 1)
        self.key_conv = nn.Conv2d(dim, dim // 4, 1)
        self.value_conv = nn.Conv2d(dim, dim, 1)
        self.gamma = nn.Parameter(torch.ones(1))

    def mask(self, height: int, width: int, device: torch.device) -> Tensor:
        rows = torch.arange(height, device=device).repeat_interleave(width)
        columns = torch.arange(width, device=device).repeat(height)
        return (rows[:, None] == rows[None, :]) | (columns[:, None] == columns[None, :])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q = self.query_conv(x).flatten(2).permute(0, 2, 1)
        k, v = self.key_conv(x).flatten(2), self.value_conv(x).flatten(2)
        energy = torch.bmm(q, k)
        energy = energy.masked_fill(self.mask(height, width, x.device).logical_not(), -torch.inf)
        attention = nn.functional.softmax(energy, dim=-1)
        out = torch.bmm(v, attention.permute(0, 2, 1)).view(batch, channels, height, width)
        return self.gamma * out + x


class Kronecker(CrissCross):
    def mask(self, height: int, width: int, device: torch.device) -> Tensor:
        same_row = torch.kron(torch.eye(height, device=device), torch.ones(width, width, device=device))
        same_column = torch.kron(torch.ones(height, height, device=device), torch.eye(width, device=device))
        return (same_row + same_column) > 0


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return CrissCross(), (torch.randn(2, 32, 10, 14),)


VARIANTS = {"kron": Variant(lambda: (Kronecker(), (torch.randn(2, 32, 10, 14),)))}


def allowed(module: CrissCross, x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    keep = torch.zeros(height, width, height, width, dtype=torch.bool)
    for y in range(height):
        for z in range(width):
            keep[y, z, y, :] = True
            keep[y, z, :, z] = True
    return keep.view(height * width, -1)
