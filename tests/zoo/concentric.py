"""Concentric causal attention: image tokens see the rings around and outside them, everything else is causal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class ConcentricCausal(nn.Module):
    def __init__(self, width: int = 32, side: int = 10, start: int = 14, heads: int = 2) -> None:
        super().__init__()
        self.side, self.start, self.heads = side, start, heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def ring(self, device: torch.device) -> Tensor:
        """Position of each image token: rings numbered from the border inwards, painted from the outside in."""
        rings = torch.zeros(self.side, self.side, dtype=torch.long, device=device)
        for k in range(self.side // 2):
            rings[k : self.side - k, k : self.side - k] = k
        return rings.flatten()

    def mask(self, length: int, device: torch.device) -> Tensor:
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        image = slice(self.start, self.start + self.side**2)
        ring = self.ring(device)
        mask[image, image] = ring[None, :] <= ring[:, None]
        return mask

    def forward(self, x: Tensor) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        mask = self.mask(x.shape[1], x.device)[None, None]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


class ByDistance(ConcentricCausal):
    """By index arithmetic: a ring is the distance to the border."""

    def mask(self, length: int, device: torch.device) -> Tensor:
        token = torch.arange(length, device=device)
        place = token - self.start
        inside = (place >= 0) & (place < self.side**2)
        y, x = place // self.side, place % self.side
        ring = torch.minimum(torch.minimum(y, self.side - 1 - y), torch.minimum(x, self.side - 1 - x))
        both = inside[:, None] & inside[None, :]
        return torch.where(both, ring[None, :] <= ring[:, None], token[None, :] <= token[:, None])


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ConcentricCausal(), (torch.randn(2, 140, 32),)


VARIANTS = {"distance": Variant(lambda: (ByDistance(), (torch.randn(2, 140, 32),)))}


def allowed(module: ConcentricCausal, x: Tensor) -> Tensor:
    length, side, start = x.shape[1], module.side, module.start
    keep = torch.zeros(length, length, dtype=torch.bool)
    rings = [min(p // side, side - 1 - p // side, p % side, side - 1 - p % side) for p in range(side * side)]
    for i in range(length):
        for j in range(length):
            both = start <= i < start + side * side and start <= j < start + side * side
            keep[i, j] = rings[j - start] <= rings[i - start] if both else j <= i
    return keep
