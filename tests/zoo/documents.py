"""Packed documents: ids from a running count of end-of-text tokens; causal inside each document only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(empty_share=0.76)


class PackedAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, eos: int = 0) -> None:
        super().__init__()
        self.heads, self.eos = heads, eos
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (t.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        is_eos = (tokens == self.eos).long()
        document = torch.cumsum(is_eos, dim=1) - is_eos
        same = document[:, :, None] == document[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        keep = (same & causal)[:, None]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(~keep, float("-inf"))
        y = nn.functional.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class PackedByStarts(PackedAttention):
    """Keys from the start of the query's document on, which a running maximum carries along."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        i = torch.arange(length, device=x.device)
        first = nn.functional.pad(tokens[:, :-1] == self.eos, (1, 0), value=True)
        start = torch.where(first, i, 0).cummax(-1).values
        keep = (i >= start[:, :, None]) & (i <= i[:, None])
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None])
        return self.c_proj(y.transpose(1, 2).flatten(2))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    tokens = torch.randint(1, 100, (2, 160))
    tokens[0, [47, 101]] = 0
    tokens[1, [15, 79, 140]] = 0
    return PackedAttention(), (torch.randn(2, 160, 64), tokens)


VARIANTS = {"starts": Variant(lambda: (PackedByStarts(), make()[1]))}


def allowed(module: PackedAttention, x: Tensor, tokens: Tensor) -> Tensor:
    document = torch.zeros_like(tokens)
    for row in range(tokens.shape[0]):
        current = 0
        for column in range(tokens.shape[1]):
            document[row, column] = current
            current += int(tokens[row, column] == module.eos)
    i = torch.arange(x.shape[1])
    return ((document[:, :, None] == document[:, None, :]) & (i[None, :] <= i[:, None]))[:, None]
