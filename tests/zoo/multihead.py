"""`nn.MultiheadAttention` with a causal and a padding mask, weights not asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(empty_share=0.455)


class TorchMultihead(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        length = x.shape[1]
        causal = torch.triu(torch.ones(length, length, dtype=torch.bool, device=x.device), diagonal=1)
        return self.self_attn(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    padding = torch.zeros(2, 160, dtype=torch.bool)
    padding[1, 130:] = True
    return TorchMultihead(), (torch.randn(2, 160, 64), padding)


def allowed(module: nn.Module, x: Tensor, padding: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return (i[None, :] <= i[:, None]) & ~padding[:, None, None, :]
