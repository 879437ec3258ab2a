"""Prefix language model: a triangle whose first columns are opened for every row by a slice assignment."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(empty_share=0.42)


class PrefixCausalSelfAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, prefix: int = 40) -> None:
        super().__init__()
        self.heads, self.prefix = heads, prefix
        self.attn = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.attn(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(length, length, device=x.device).tril(diagonal=0)
        mask[:, : self.prefix] = 1
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(mask == 0, float("-inf"))
        y = torch.softmax(scores, dim=-1) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class PrefixByPositions(PrefixCausalSelfAttention):
    """An additive mask: a triangle of -inf, of which the columns of the prefix are cut off and filled up with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        q, k, v = self.attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        triangle = torch.full((length, length), float("-inf"), device=x.device).triu(1)
        added = nn.functional.pad(triangle[:, self.prefix :], (self.prefix, 0))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * k.size(-1) ** -0.5 + added
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return PrefixCausalSelfAttention(), (torch.randn(2, 160, 64),)


VARIANTS = {"padded": Variant(lambda: (PrefixByPositions(), (torch.randn(2, 160, 64),)))}


def allowed(module: PrefixCausalSelfAttention, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return (i[None, :] <= i[:, None]) | (i[None, :] < module.prefix)
