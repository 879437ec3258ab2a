"""Titans: persistent memory tokens in front of segments; blocks or a sliding window behind them, always causal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class SegmentedAttention(nn.Module):
    """Memory as a context: `sliding` picks the window instead of the blocks."""

    def __init__(self, width: int = 64, segment: int = 32, persistent: int = 6, heads: int = 4, sliding: bool = False):
        super().__init__()
        self.segment, self.persistent, self.heads, self.sliding = segment, persistent, heads, sliding
        self.norm = nn.RMSNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.memory = nn.Parameter(torch.randn(2, heads, persistent, width // heads))

    def mask(self, queries: int, device: torch.device) -> Tensor:
        q_idx = torch.arange(queries, device=device)[:, None]
        kv_idx = torch.arange(queries + self.persistent, device=device)[None, :]
        is_persistent = kv_idx < self.persistent
        without = kv_idx - self.persistent
        causal = q_idx >= without
        if self.sliding:
            near = (q_idx - without) <= self.segment
        else:
            near = (q_idx // self.segment) == (without // self.segment)
        return is_persistent | (~is_persistent & (causal & near))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        before = self.memory[:, None].expand(-1, x.shape[0], -1, -1, -1)
        k, v = torch.cat((before[0], k), dim=-2), torch.cat((before[1], v), dim=-2)
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        sim = sim.masked_fill(~self.mask(x.shape[1], x.device), -torch.finfo(sim.dtype).max)
        return torch.einsum("bhij,bhjd->bihd", sim.softmax(dim=-1), v).flatten(2)


class Gated(SegmentedAttention):
    """Memory as a gate: the window branch, times another branch; its mask padded with the memory's columns."""

    def mask(self, queries: int, device: torch.device) -> Tensor:
        ones = torch.ones(queries, queries, dtype=torch.bool, device=device)
        band = ones.tril() & ones.triu(-self.segment)
        if not self.sliding:
            blocks = torch.eye(queries // self.segment, dtype=torch.bool, device=device)
            blocks = blocks.repeat_interleave(self.segment, 0).repeat_interleave(self.segment, 1)
            band = ones.tril() & blocks
        return nn.functional.pad(band, (self.persistent, 0), value=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(self.norm(x))


def _maker(build: type[SegmentedAttention], sliding: bool) -> Variant:
    return Variant(lambda: (build(sliding=sliding), (torch.randn(2, 128, 64),)))


make = _maker(SegmentedAttention, False).make
VARIANTS = {
    "sliding": _maker(SegmentedAttention, True),
    "gated": _maker(Gated, True),
    "gated_blocks": _maker(Gated, False),
}


def allowed(module: SegmentedAttention, x: Tensor) -> Tensor:
    length, size = x.shape[1], module.segment
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    near = i - j <= size if module.sliding else i // size == j // size
    return torch.cat([torch.ones(length, module.persistent, dtype=torch.bool), (j <= i) & near], dim=1)
