"""Perceiver IO's cross attention: latents read an input of another length and width; q/k and v widths differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="")


class PerceiverCrossAttention(nn.Module):
    def __init__(self, latent: int = 48, inputs: int = 40, heads: int = 4, qk: int = 32, v: int = 96) -> None:
        super().__init__()
        self.heads, self.qk, self.v = heads, qk // heads, v // heads
        self.query = nn.Linear(latent, qk)
        self.key = nn.Linear(inputs, qk)
        self.value = nn.Linear(inputs, v)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, inputs: Tensor) -> Tensor:
        queries = self.query(hidden_states).unflatten(-1, (self.heads, self.qk)).permute(0, 2, 1, 3)
        keys = self.key(inputs).unflatten(-1, (self.heads, self.qk)).permute(0, 2, 1, 3)
        values = self.value(inputs).unflatten(-1, (self.heads, self.v)).permute(0, 2, 1, 3)
        scores = torch.matmul(queries, keys.transpose(-1, -2)) / math.sqrt(queries.shape[3])
        probs = self.dropout(nn.Softmax(dim=-1)(scores))
        context = torch.matmul(probs, values).permute(0, 2, 1, 3).contiguous()
        return context.view(*context.size()[:-2], self.heads * self.v)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return PerceiverCrossAttention(), (
        torch.randn(2, 40, 48),
        torch.randn(2, 150, 40),
    )
