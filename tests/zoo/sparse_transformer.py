"""Sparse Transformer: even heads see a local causal window, odd heads every stride-th position before them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(
    mask="h%2 == 0 and i - j < 16 and j <= i or (i - j) % 16 == 0 and j <= i and h%2 != 0", empty_share=0.63
)


class StridedSparseAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, stride: int = 16) -> None:
        super().__init__()
        self.heads, self.stride = heads, stride
        self.qkv = nn.Linear(width, 3 * width)

    def attention_mask(self, length: int, device: torch.device) -> Tensor:
        x = torch.arange(length, device=device).reshape(length, 1)
        y = torch.arange(length, device=device).reshape(1, length)
        causal = y <= x
        local = causal & (x - y < self.stride)
        strided = causal & ((x - y) % self.stride == 0)
        head = torch.arange(self.heads, device=device).reshape(self.heads, 1, 1)
        return torch.where(head % 2 == 0, local, strided)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        w = torch.matmul(q, k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]))
        mask = self.attention_mask(x.shape[1], x.device).to(w.dtype)
        w = w * mask + -1e9 * (1 - mask)
        return torch.matmul(torch.softmax(w, dim=-1), v).transpose(1, 2).flatten(2)


class StridedByColumns(StridedSparseAttention):
    """The masks of the authors' `get_attn_mask`, one for each kind of head, by slices of a triangle."""

    def attention_mask(self, length: int, device: torch.device) -> Tensor:
        local, strided = (torch.zeros(length, length, device=device) for _ in range(2))
        for back in range(0, length, self.stride):
            strided += torch.diag_embed(torch.ones(length - back, device=device), offset=-back)
        local += torch.ones(length, length, device=device).tril() - torch.ones(length, length).tril(-self.stride)
        return torch.stack([local, strided]).repeat(self.heads // 2, 1, 1)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return StridedSparseAttention(), (torch.randn(2, 160, 64),)


VARIANTS = {"diagonals": Variant(lambda: (StridedByColumns(), (torch.randn(2, 160, 64),)), Expect(empty_share=0.63))}


def allowed(module: StridedSparseAttention, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    gap = i[:, None] - i[None, :]
    local, strided = (gap >= 0) & (gap < 16), (gap >= 0) & (gap % 16 == 0)
    return torch.stack([local if h % 2 == 0 else strided for h in range(module.heads)])
