"""MVPA: content, time and channel scores; outside a time window the content term is zero, and the pair still counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="j//8 <= i//8", empty_share=0.45)


class MultiVariateParallelAttention(nn.Module):
    def __init__(self, hidden: int = 64, heads: int = 4, times: int = 20, channels: int = 8, window: int = 5) -> None:
        super().__init__()
        self.heads, self.size = heads, hidden // heads
        self.times, self.channels, self.window = times, channels, window
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.time_embeddings = nn.Parameter(torch.randn(heads, times, self.size))
        self.channel_embeddings = nn.Parameter(torch.randn(heads, channels, self.size))
        self.content_bias, self.time_bias, self.channel_bias = (
            nn.Parameter(torch.randn(heads, 1, self.size)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        tokens = torch.arange(length, device=x.device)
        time, channel = tokens // self.channels, tokens % self.channels
        gap = time[:, None] - time[None, :]
        inside = (gap.abs() <= self.window) | (time[:, None] == self.times - 1)
        content = torch.matmul(q + self.content_bias, k.transpose(-1, -2)).masked_fill(~inside, 0.0)
        by_time = torch.matmul(q + self.time_bias, self.time_embeddings.transpose(-1, -2))
        by_time = by_time.gather(-1, gap.clamp(min=0)[None, None].expand(batch, self.heads, -1, -1))
        by_channel = torch.matmul(q + self.channel_bias, self.channel_embeddings.transpose(-1, -2))
        offset = (channel[:, None] - channel[None, :]).abs()
        by_channel = by_channel.gather(-1, offset[None, None].expand(batch, self.heads, -1, -1))
        scores = (content + by_time + by_channel) / math.sqrt(self.size)
        scores = scores.masked_fill(gap < 0, torch.finfo(scores.dtype).min)
        probs = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(probs, v).transpose(1, 2).flatten(2)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return MultiVariateParallelAttention(), (torch.randn(2, 160, 64),)


def allowed(module: MultiVariateParallelAttention, x: Tensor) -> Tensor:
    time = torch.arange(x.shape[1]) // module.channels
    return time[None, :] <= time[:, None]
