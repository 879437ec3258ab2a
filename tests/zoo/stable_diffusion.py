"""Latent diffusion's cross attention: heads folded into the batch, a text mask repeated for each, -finfo.max fill."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(empty_share=0.3)


class CrossAttention(nn.Module):
    def __init__(self, query: int = 64, context: int = 48, heads: int = 4, size: int = 16) -> None:
        super().__init__()
        inner = heads * size
        self.scale, self.heads = size**-0.5, heads
        self.to_q = nn.Linear(query, inner, bias=False)
        self.to_k = nn.Linear(context, inner, bias=False)
        self.to_v = nn.Linear(context, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query), nn.Dropout(0.0))

    def fold(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return x.view(b, n, self.heads, -1).permute(0, 2, 1, 3).reshape(b * self.heads, n, -1)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.fold(self.to_q(x)), self.fold(self.to_k(context)), self.fold(self.to_v(context))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
        max_neg_value = -torch.finfo(sim.dtype).max
        mask = mask.reshape(mask.shape[0], -1)
        mask = mask[:, None, None, :].expand(-1, self.heads, -1, -1).reshape(q.shape[0], 1, -1)
        sim.masked_fill_(~mask, max_neg_value)
        attn = sim.softmax(dim=-1)
        out = torch.einsum("b i j, b j d -> b i d", attn, v)
        b, n, _ = x.shape
        out = out.view(b, self.heads, n, -1).permute(0, 2, 1, 3).reshape(b, n, -1)
        return self.to_out(out)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    mask = torch.arange(77)[None] < torch.tensor([[77], [20]])
    return CrossAttention(), (torch.randn(2, 64, 64), torch.randn(2, 77, 48), mask)


def allowed(module: nn.Module, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    return mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)
