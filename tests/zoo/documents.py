"""Packed documents: ids from a running count of end-of-text tokens; causal inside each document only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

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


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    tokens = torch.randint(1, 100, (2, 160))
    tokens[0, [47, 101]] = 0
    tokens[1, [15, 79, 140]] = 0
    return PackedAttention(), (torch.randn(2, 160, 64), tokens)


def allowed(module: PackedAttention, x: Tensor, tokens: Tensor) -> Tensor:
    document = torch.zeros_like(tokens)
    for row in range(tokens.shape[0]):
        current = 0
        for column in range(tokens.shape[1]):
            document[row, column] = current
            current += int(tokens[row, column] == module.eos)
    i = torch.arange(x.shape[1])
    return ((document[:, :, None] == document[:, None, :]) & (i[None, :] <= i[:, None]))[:, None]
