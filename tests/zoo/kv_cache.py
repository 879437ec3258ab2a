"""One decoding step with a cache: the new key and value are appended, a few query rows attend to all of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="j - i < 101", empty_share=0.0)


class CachedAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = torch.cat((past_key, k), dim=-2), torch.cat((past_value, v), dim=-2)
        past, total = past_key.shape[-2], k.shape[-2]
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        positions = torch.arange(past, total, device=x.device)
        keep = torch.arange(total, device=x.device)[None, :] <= positions[:, None]
        scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        out = torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)
        return out.transpose(1, 2).flatten(2), k, v


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    past = (torch.randn(2, 4, 100, 16), torch.randn(2, 4, 100, 16))
    return CachedAttention(), (torch.randn(2, 4, 64), *past)


def allowed(module: nn.Module, x: Tensor, past_key: Tensor, past_value: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])[:, None] + past_key.shape[-2]
    return torch.arange(past_key.shape[-2] + x.shape[1])[None, :] <= i
