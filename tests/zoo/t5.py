"""T5's encoder: no scale, a learned bias for each head and logarithmic distance bucket, softmax in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="")


def relative_position_bucket(relative_position: Tensor, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    num_buckets //= 2
    buckets = (relative_position > 0).to(torch.long) * num_buckets
    relative_position = torch.abs(relative_position)
    max_exact = num_buckets // 2
    is_small = relative_position < max_exact
    large = max_exact + (
        torch.log(relative_position.float() / max_exact)
        / math.log(max_distance / max_exact)
        * (num_buckets - max_exact)
    ).to(torch.long)
    large = torch.min(large, torch.full_like(large, num_buckets - 1))
    buckets += torch.where(is_small, relative_position, large)
    return buckets


class T5Attention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.relative_attention_bias = nn.Embedding(32, heads)

    def compute_bias(self, rows: int, columns: int) -> Tensor:
        device = self.relative_attention_bias.weight.device
        context = torch.arange(rows, dtype=torch.long, device=device)[:, None]
        memory = torch.arange(columns, dtype=torch.long, device=device)[None, :]
        values = self.relative_attention_bias(relative_position_bucket(memory - context))
        return values.permute([2, 0, 1]).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], -1, self.heads, self.size)
        query, key, value = (p(x).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = torch.matmul(query, key.transpose(3, 2))
        position_bias = self.compute_bias(x.shape[1], key.shape[-2])
        scores += position_bias
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        weights = nn.functional.dropout(weights, p=0.1, training=self.training)
        output = torch.matmul(weights, value).transpose(1, 2).contiguous()
        return self.o(output.view(x.shape[0], -1, self.heads * self.size))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return T5Attention(), (torch.randn(2, 144, 64),)
