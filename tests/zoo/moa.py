"""Mixture of sparse attention: every head has its own band, besides the sink tokens; a buffer filled by a loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(empty_share=0.5975)


class MixtureOfSparseAttention(nn.Module):
    keep: Tensor

    def __init__(
        self, width: int = 64, bands: tuple[int, ...] = (16, 32, 64, 160), sink: int = 8, n: int = 160
    ) -> None:
        super().__init__()
        self.heads, self.bands, self.sink = len(bands), bands, sink
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        keep = torch.zeros(len(bands), n, n, dtype=torch.bool)
        for head, band in enumerate(bands):
            keep[head] = torch.ones(n, n, dtype=torch.bool).tril() & ~torch.ones(n, n, dtype=torch.bool).tril(-band)
            keep[head, :, :sink] = True
            keep[head] &= torch.ones(n, n, dtype=torch.bool).tril()
        self.register_buffer("keep", keep)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])
        lowest = torch.finfo(x.dtype).min
        additive = torch.zeros_like(self.keep, dtype=x.dtype).masked_fill(~self.keep, lowest)
        scores = scores + additive[None, :, :length, :length]
        probs = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(probs, v).transpose(1, 2).flatten(2)


class BandsByHead(MixtureOfSparseAttention):
    """Where the triangles are: a comparison with each head's band, made on every call."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        i = torch.arange(x.shape[1], device=x.device)
        gap = i.view(1, -1, 1) - i.view(1, 1, -1)
        bands = torch.tensor(self.bands, device=x.device).view(-1, 1, 1)
        seen = (gap >= 0) & torch.logical_or(gap < bands, i.view(1, 1, -1) < self.sink)
        scores = torch.where(seen, (q * q.shape[-1] ** -0.5) @ k.mT, torch.finfo(x.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return MixtureOfSparseAttention(), (torch.randn(2, 160, 64),)


VARIANTS = {"compared": Variant(lambda: (BandsByHead(), (torch.randn(2, 160, 64),)))}


def allowed(module: MixtureOfSparseAttention, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    gap = i[:, None] - i[None, :]
    return torch.stack([(gap >= 0) & ((gap < band) | (i[None, :] < module.sink)) for band in module.bands])
