"""Longformer: a window, and tokens marked at run time that see and are seen by all; padding is seen by none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class LongformerMask(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, window: int = 16) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)

    def mask(self, attention_mask: Tensor) -> Tensor:
        """`attention_mask` (batch, length): 0 padding, 1 local, 2 global."""
        position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        near = (position[:, None] - position[None, :]).abs() <= self.window // 2
        is_global = attention_mask > 1
        keep = near[None] | is_global[:, :, None] | is_global[:, None, :]
        return (keep & (attention_mask > 0)[:, None, :])[:, None]

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores.masked_fill(~self.mask(attention_mask), torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Added(LongformerMask):
    """The window as a band of a matrix of ones, its parts joined by arithmetic on numbers."""

    def mask(self, attention_mask: Tensor) -> Tensor:
        length = attention_mask.shape[1]
        ones = torch.ones(length, length, device=attention_mask.device)
        band = ones.tril(self.window // 2).triu(-(self.window // 2))
        is_global = attention_mask.eq(2).float()
        keep = band[None] + is_global[:, :, None] + is_global[:, None, :]
        return ((keep > 0).float() * attention_mask.ne(0).float()[:, None, :]).bool()[:, None]


def _inputs() -> tuple[Tensor, ...]:
    marks = torch.ones(2, 128, dtype=torch.long)
    marks[:, 0] = 2
    marks[0, 70] = 2
    marks[1, 100:] = 0
    return torch.randn(2, 128, 32), marks


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return LongformerMask(), _inputs()


VARIANTS = {"added": Variant(lambda: (Added(), _inputs()))}


def allowed(module: LongformerMask, x: Tensor, marks: Tensor) -> Tensor:
    keep = torch.zeros(2, 1, 128, 128, dtype=torch.bool)
    for b in range(2):
        for i in range(128):
            low, high = max(i - module.window // 2, 0), i + module.window // 2 + 1
            keep[b, 0, i, low:high] = True
        for g in (marks[b] == 2).nonzero().flatten().tolist():
            keep[b, 0, g, :] = True
            keep[b, 0, :, g] = True
        keep[b, 0, :, marks[b] == 0] = False
    return keep
