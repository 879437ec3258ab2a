"""Phi-3-small: block-sparse causal attention, local blocks and every stride-th, shifted from head to head; by kron."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(empty_share=0.72)


class BlockSparseAttention(nn.Module):
    keep: Tensor

    def __init__(self, width: int = 64, heads: int = 4, block: int = 16, local: int = 2, stride: int = 4) -> None:
        super().__init__()
        self.heads, self.block, self.local, self.stride = heads, block, local, stride
        self.qkv = nn.Linear(width, 3 * width)
        count = 160 // block
        q_pos, k_pos = torch.arange(count)[None, :, None], torch.arange(count)[None, None]
        step = max(1, stride // heads)
        vertical = (torch.arange(count)[None, :] + torch.arange(heads)[:, None] * step + 1) % stride == 0
        dense = (q_pos >= k_pos) & ((q_pos - k_pos < local) | vertical[:, None, :])
        keep = torch.kron(dense, dense.new_ones((block, block)))
        self.register_buffer("keep", keep & torch.tril(torch.ones_like(keep)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attn = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        attn = attn.masked_fill(~self.keep[None], float("-inf"))
        return torch.matmul(attn.softmax(-1), v).transpose(1, 2).flatten(2)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return BlockSparseAttention(), (torch.randn(2, 160, 64),)


def allowed(module: BlockSparseAttention, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    ib, jb = i[:, None] // module.block, i[None, :] // module.block
    near = ib - jb < module.local
    return torch.stack(
        [(i[None, :] <= i[:, None]) & (near | ((jb + h + 1) % module.stride == 0)) for h in range(module.heads)]
    )
