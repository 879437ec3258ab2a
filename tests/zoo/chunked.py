"""Sliced attention: a Python loop over chunks of queries, each written into its rows of the output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="", sites=4)


class SlicedAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, chunk: int = 32) -> None:
        super().__init__()
        self.heads, self.chunk, self.scale = heads, chunk, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        folded = (batch * self.heads, length, -1)
        q, k, v = (t.reshape(folded) for t in self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4))
        hidden = torch.zeros((batch * self.heads, length, width // self.heads), device=q.device, dtype=q.dtype)
        for start in range(0, length, self.chunk):
            rows = slice(start, start + self.chunk)
            scores = torch.bmm(q[:, rows], k.transpose(-1, -2)) * self.scale
            hidden[:, rows] = torch.bmm(scores.softmax(dim=-1), v)
        return hidden.view(batch, self.heads, length, -1).transpose(1, 2).reshape(batch, length, width)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SlicedAttention(), (torch.randn(2, 128, 64),)


def reference(module: SlicedAttention, x: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).unbind(2)
    probs = (torch.einsum("bihd,bjhd->bhij", q, k) * module.scale).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", probs, v).reshape(x.shape)
