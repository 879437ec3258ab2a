"""`scaled_dot_product_attention` with an additive mask that is a user's input (a distance bias) and its own scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="")


class BiasedSDPA(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
        return out.transpose(1, 2).flatten(2)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return BiasedSDPA(), (torch.randn(2, 100, 64), torch.randn(2, 1, 100, 100))
