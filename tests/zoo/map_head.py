"""SigLIP's pooling head: one learned probe attends to all tokens through `nn.MultiheadAttention`: one query row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="")


class MultiheadAttentionPoolingHead(nn.Module):
    def __init__(self, hidden: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, hidden))
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(hidden)

    def forward(self, hidden_state: Tensor) -> Tensor:
        probe = self.probe.repeat(hidden_state.shape[0], 1, 1)
        hidden_state = self.attention(probe, hidden_state, hidden_state, need_weights=False)[0]
        return self.layernorm(hidden_state)[:, 0]


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return MultiheadAttentionPoolingHead(), (torch.randn(2, 150, 64),)
