"""Causal attention: the triangle as buffers, comparisons, additive triangles and SDPA's flag have it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="j <= i", empty_share=0.4375)


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        length = q.shape[-2]
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        mask = torch.tril(torch.ones(length, length, device=q.device)).view(1, 1, length, length)
        return att.masked_fill(mask == 0, float("-inf"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (self.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2)


class UpperAdded(CausalSelfAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        length = q.shape[-2]
        att = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(k.size(-1))
        return att + torch.triu(torch.full((length, length), float("-inf"), device=q.device), diagonal=1)


class Multiplied(CausalSelfAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        length = q.shape[-2]
        att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        keep = torch.ones(length, length, device=q.device).tril()
        return att * keep - 1e4 * (1 - keep)


class Cumulated(CausalSelfAttention):
    """By a running sum over the rows of a diagonal."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        length = q.shape[-2]
        att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        keep = torch.eye(length, device=q.device).cumsum(dim=0).bool()
        return torch.where(keep, att, torch.finfo(att.dtype).min)


class Flag(CausalSelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


def _maker(build: type[CausalSelfAttention], expect: Expect | None = None) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, 128, 64),)), expect)


make = _maker(CausalSelfAttention).make
VARIANTS = {
    "added": _maker(UpperAdded),
    "multiplied": _maker(Multiplied),
    "cumulated": _maker(Cumulated, Expect()),
    "flag": _maker(Flag),
}


def allowed(module: CausalSelfAttention, x: Tensor) -> Tensor:
    return torch.tensor([[j <= i for j in range(x.shape[1])] for i in range(x.shape[1])])
