"""GPT-OSS: a learned sink logit for each head, concatenated as a last column that is dropped after the softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="i - j < 16 and j <= i", empty_share=0.81)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None, :, :].expand(batch, heads, n_rep, length, size).reshape(batch, heads * n_rep, length, size)


class GptOssAttention(nn.Module):
    def __init__(self, hidden: int = 64, heads: int = 4, kv_heads: int = 2, window: int = 16) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.window = heads, kv_heads, hidden // heads, window
        self.q_proj = nn.Linear(hidden, heads * self.size)
        self.k_proj = nn.Linear(hidden, kv_heads * self.size)
        self.v_proj = nn.Linear(hidden, kv_heads * self.size)
        self.o_proj = nn.Linear(heads * self.size, hidden)
        self.sinks = nn.Parameter(torch.randn(heads))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.size)
        query, key, value = (p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        key, value = repeat_kv(key, self.heads // self.kv_heads), repeat_kv(value, self.heads // self.kv_heads)
        positions = torch.arange(x.shape[1], device=x.device)
        keep = (positions[None, :] <= positions[:, None]) & (positions[None, :] > positions[:, None] - self.window)
        zero, lowest = torch.tensor(0.0, dtype=x.dtype), torch.tensor(torch.finfo(x.dtype).min, dtype=x.dtype)
        attention_mask = torch.where(keep, zero, lowest)[None, None]
        weights = torch.matmul(query, key.transpose(2, 3)) * self.size**-0.5
        weights = weights + attention_mask
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
        combined = torch.cat([weights, sinks], dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values
        probs = nn.functional.softmax(combined, dim=-1, dtype=combined.dtype)
        scores = probs[..., :-1]
        output = torch.matmul(scores, value).transpose(1, 2).contiguous()
        return self.o_proj(output.reshape(*x.shape[:-1], -1).contiguous())


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return GptOssAttention(), (torch.randn(2, 160, 64),)


def allowed(module: nn.Module, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    gap = i[:, None] - i[None, :]
    return (gap >= 0) & (gap < 16)
