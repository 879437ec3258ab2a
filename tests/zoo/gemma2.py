"""Gemma 2: soft-capped scores (tanh), its own scale, grouped heads, a window mask added after the cap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="i - j < 32 and j <= i", empty_share=0.73)


class Gemma2Attention(nn.Module):
    def __init__(self, hidden: int = 64, heads: int = 4, kv_heads: int = 2, window: int = 32) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.window = heads, kv_heads, 16, window
        self.scaling, self.softcap = 24**-0.5, 5.0
        self.q_proj = nn.Linear(hidden, heads * self.size, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, hidden, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.size)
        query, key, value = (p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        lowest = torch.finfo(x.dtype).min
        outside = torch.tril(torch.ones_like(attention_mask, dtype=torch.bool), diagonal=-self.window)
        attention_mask = torch.where(outside, lowest, attention_mask)
        key = key.repeat_interleave(self.heads // self.kv_heads, dim=1)
        value = value.repeat_interleave(self.heads // self.kv_heads, dim=1)
        weights = torch.matmul(query, key.transpose(2, 3)) * self.scaling
        weights = weights / self.softcap
        weights = torch.tanh(weights)
        weights = weights * self.softcap
        weights = weights + attention_mask[:, :, :, : key.shape[-2]]
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
        output = torch.matmul(weights, value).transpose(1, 2).contiguous()
        return self.o_proj(output.reshape(*x.shape[:-1], -1))


class Gemma2Layer(nn.Module):
    """The model makes the causal mask once and every layer cuts its window out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Gemma2Attention()

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device)
        mask = torch.triu(mask, diagonal=1)[None, None, :, :].expand(x.shape[0], 1, -1, -1)
        return self.self_attn(x, mask)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Gemma2Layer(), (torch.randn(2, 160, 64) * 2,)


def allowed(module: nn.Module, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    gap = i[:, None] - i[None, :]
    return (gap >= 0) & (gap < 32)
