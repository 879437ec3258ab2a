"""BERT: additive padding mask of the dtype's minimum, scores divided by the scale, dropout on the probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(empty_share=0.25)


class BertSelfAttention(nn.Module):
    def __init__(self, hidden: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, hidden // heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(0.1)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        return x.view((*x.size()[:-1], self.heads, self.size)).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        extended = attention_mask[:, None, None, :].to(hidden_states.dtype)
        extended = (1.0 - extended) * torch.finfo(hidden_states.dtype).min
        query = self.transpose_for_scores(self.query(hidden_states))
        key = self.transpose_for_scores(self.key(hidden_states))
        value = self.transpose_for_scores(self.value(hidden_states))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.size)
        scores = scores + extended
        probs = self.dropout(nn.functional.softmax(scores, dim=-1))
        context = torch.matmul(probs, value).permute(0, 2, 1, 3).contiguous()
        return context.view(*context.size()[:-2], self.heads * self.size)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    lengths = torch.tensor([[160], [80]])
    mask = (torch.arange(160)[None] < lengths).long()
    return BertSelfAttention(), (torch.randn(2, 160, 64), mask)


def allowed(module: nn.Module, x: Tensor, attention_mask: Tensor) -> Tensor:
    return attention_mask.bool()[:, None, None, :].expand(-1, 1, x.shape[1], -1)
