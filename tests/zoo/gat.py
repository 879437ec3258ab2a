"""A dense graph attention layer: the score is a leaky sum of two vectors, not a product; the adjacency is an input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(open=True)


class GraphAttentionLayer(nn.Module):
    def __init__(self, inputs: int = 32, outputs: int = 16, alpha: float = 0.2) -> None:
        super().__init__()
        self.outputs = outputs
        self.W = nn.Parameter(torch.randn(inputs, outputs))
        self.a = nn.Parameter(torch.randn(2 * outputs, 1))
        self.leakyrelu = nn.LeakyReLU(alpha)

    def forward(self, h: Tensor, adj: Tensor) -> Tensor:
        Wh = torch.mm(h, self.W)
        Wh1 = torch.matmul(Wh, self.a[: self.outputs, :])
        Wh2 = torch.matmul(Wh, self.a[self.outputs :, :])
        e = self.leakyrelu(Wh1 + Wh2.T)
        zero_vec = -9e15 * torch.ones_like(e)
        attention = torch.where(adj > 0, e, zero_vec)
        attention = nn.functional.softmax(attention, dim=1)
        attention = nn.functional.dropout(attention, 0.6, training=self.training)
        return nn.functional.elu(torch.matmul(attention, Wh))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    adj = ((torch.rand(100, 100) < 0.1) | torch.eye(100, dtype=torch.bool)).float()
    return GraphAttentionLayer(), (torch.randn(100, 32), adj)
