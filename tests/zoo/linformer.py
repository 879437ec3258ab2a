"""Linformer: keys and values are projected along the sequence to a fixed number of rows before the softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="")


class LinformerSelfAttention(nn.Module):
    def __init__(self, dim: int = 64, length: int = 128, k: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.dim_head, self.k = heads, dim // heads, k
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, self.dim_head, bias=False)
        self.to_v = nn.Linear(dim, self.dim_head, bias=False)
        self.proj_k = nn.Parameter(torch.randn(length, k))
        self.proj_v = nn.Parameter(torch.randn(length, k))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        queries = self.to_q(x).reshape(b, n, self.heads, -1).transpose(1, 2)
        keys = torch.einsum("bnd,nk->bkd", self.to_k(x), self.proj_k)
        values = torch.einsum("bnd,nk->bkd", self.to_v(x), self.proj_v)
        keys, values = (
            t.reshape(b, self.k, -1, self.dim_head).transpose(1, 2).expand(-1, self.heads, -1, -1)
            for t in (keys, values)
        )
        dots = torch.einsum("bhnd,bhkd->bhnk", queries, keys) * (self.dim_head**-0.5)
        out = torch.einsum("bhnk,bhkd->bhnd", dots.softmax(dim=-1), values)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return LinformerSelfAttention(), (torch.randn(2, 128, 64),)
