"""BLOOM: ALiBi as the input of a baddbmm over folded heads, slopes by position counts, masked_fill, float32 softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="j <= i", empty_share=0.45)


def build_alibi_tensor(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    batch, length = attention_mask.shape
    base = torch.tensor(2 ** (-(2 ** -(math.log2(num_heads) - 3))), device=attention_mask.device, dtype=torch.float32)
    powers = torch.arange(1, 1 + num_heads, device=attention_mask.device, dtype=torch.int32)
    slopes = torch.pow(base, powers)
    positions = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
    alibi = slopes[..., None] * positions
    return alibi.reshape(batch * num_heads, 1, length).to(dtype)


class BloomAttention(nn.Module):
    def __init__(self, hidden: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, hidden // heads
        self.inv_norm_factor, self.beta = 1.0 / math.sqrt(self.size), 1.0
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        alibi = build_alibi_tensor(torch.ones(batch, length, device=x.device), self.heads, x.dtype)
        fused = self.query_key_value(x).view(batch, length, self.heads, 3, self.size)
        query = fused[..., 0, :].transpose(1, 2).reshape(batch * self.heads, -1, self.size)
        key = fused[..., 1, :].transpose(1, 2).reshape(batch * self.heads, -1, self.size).transpose(-1, -2)
        value = fused[..., 2, :].transpose(1, 2).reshape(batch * self.heads, -1, self.size)
        scores = alibi.baddbmm(batch1=query, batch2=key, beta=self.beta, alpha=self.inv_norm_factor)
        weights = scores.view(batch, self.heads, length, -1)
        causal = torch.triu(torch.ones(length, length, dtype=torch.bool, device=x.device), diagonal=1)
        weights = torch.masked_fill(weights, causal[None, None], torch.finfo(weights.dtype).min)
        probs = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(x.dtype)
        context = torch.bmm(probs.view(batch * self.heads, length, -1), value)
        context = context.view(batch, self.heads, length, self.size).permute(0, 2, 1, 3)
        return self.dense(context.reshape(batch, length, self.heads * self.size))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return BloomAttention(), (torch.randn(2, 160, 64),)


def allowed(module: nn.Module, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return i[None, :] <= i[:, None]
