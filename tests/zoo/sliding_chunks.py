"""Longformer's first spelling: products of overlapping chunks, skewed into a band, and filled where the band leaves the
sequence, by rows that are made one by one and stacked."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="i - j < 9 and j - i < 9", empty_share=42 / 64)


class SlidingChunks(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, window: int = 8) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width)

    def chunk(self, x: Tensor) -> Tensor:
        """Chunks of two windows that overlap by one."""
        x = x.view(x.size(0), x.size(1) // (self.window * 2), self.window * 2, x.size(2))
        size, stride = list(x.size()), list(x.stride())
        size[1], stride[1] = size[1] * 2 - 1, stride[1] // 2
        return x.as_strided(size=size, stride=stride)

    def skew(self, x: Tensor) -> Tensor:
        """Diagonals into columns."""
        x = F.pad(x, (0, 0, 0, 1))
        return x.view(*x.size()[:-2], x.size(-1), x.size(-2))

    def skew_back(self, x: Tensor) -> Tensor:
        batch, chunks, rows, columns = x.size()
        x = F.pad(x, (0, rows + 1)).view(batch, chunks, -1)[:, :, :-rows]
        return x.view(batch, chunks, rows, rows + columns)[:, :, :, :-1]

    def outside(self) -> Tensor:
        diagonals = []
        for j in range(-self.window, 1):
            diagonal = torch.zeros(self.window, device="cpu", dtype=torch.uint8)
            diagonal[:-j] = 1
            diagonals.append(diagonal)
        return torch.stack(diagonals, dim=-1)[None, :, None, :]

    def fill(self, scores: Tensor) -> None:
        w, length = self.window, scores.size(1)
        before = self.outside()
        after = before.flip(dims=(1, 3)).bool()
        first, last = scores[:, :w, :, : w + 1], scores[:, -w:, :, -(w + 1) :]
        first.masked_fill_(before.bool()[:, :length].expand(first.size()), -float("inf"))
        last.masked_fill_(after[:, -length:].expand(last.size()), -float("inf"))

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        batch, length, heads, width = q.size()
        w, last = self.window, length // self.window - 1
        q, k = (t.transpose(1, 2).reshape(batch * heads, length, width) for t in (q, k))
        found = self.skew(torch.einsum("bcxd,bcyd->bcxy", self.chunk(q), self.chunk(k)))
        scores = found.new_empty((batch * heads, last + 1, w, w * 2 + 1))
        scores[:, :-1, :, w:] = found[:, :, :w, : w + 1]
        scores[:, -1, :, w:] = found[:, -1, w:, : w + 1]
        scores[:, 1:, :, :w] = found[:, :, -(w + 1) : -1, w + 1 :]
        scores[:, 0, 1:w, 1:w] = found[:, 0, : w - 1, 1 - w :]
        scores = scores.view(batch, heads, length, 2 * w + 1).transpose(2, 1)
        self.fill(scores)
        return scores

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)

    def forward(self, x: Tensor) -> Tensor:
        w = self.window
        q, k, v = self.project(x)
        batch, length, heads, width = q.size()
        p = torch.softmax(self.products(q / math.sqrt(width), k), dim=-1)
        p = p.transpose(1, 2).reshape(batch * heads, length // w, w, 2 * w + 1)
        padded = F.pad(v.transpose(1, 2).reshape(batch * heads, length, width), (0, 0, w, w), value=-1)
        stride = padded.stride()
        around = padded.as_strided(
            size=(batch * heads, length // w, 3 * w, width), stride=(stride[0], w * stride[1], stride[1], stride[2])
        )
        out = torch.einsum("bcwd,bcdh->bcwh", self.skew_back(p), around)
        return out.view(batch, heads, length, width).transpose(1, 2).flatten(2)


class Lower(SlidingChunks):
    """The corners as triangles of ones, put in by `where` (transformers)."""

    def fill(self, scores: Tensor) -> None:
        w = self.window
        before = scores.new_ones(w, w + 1).tril().flip(dims=[0])[None, :, None, :]
        after = before.flip(dims=(1, 3))
        first, last = scores[:, :w, :, : w + 1], scores[:, -w:, :, -(w + 1) :]
        scores[:, :w, :, : w + 1] = torch.full_like(first, -float("inf")).where(
            before.expand(first.size()).bool(), first
        )
        scores[:, -w:, :, -(w + 1) :] = torch.full_like(last, -float("inf")).where(
            after.expand(last.size()).bool(), last
        )


class TokensFirst(Lower):
    """Chunks are strides over heads that do not lie one after another in memory (transformers' LED)."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.contiguous() for t in self.qkv(x.transpose(0, 1)).chunk(3, -1))
        return tuple(t.view(*t.shape[:2], self.heads, -1).transpose(0, 1) for t in (q, k, v))

    def chunk(self, x: Tensor) -> Tensor:
        assert x.stride(0) < x.stride(1)
        return super().chunk(x)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SlidingChunks(), (torch.randn(2, 128, 32),)


VARIANTS = {
    "lower": Variant(lambda: (Lower(), (torch.randn(2, 128, 32),))),
    "tokens_first": Variant(lambda: (TokensFirst(), (torch.randn(2, 128, 32),))),
}


def allowed(module: SlidingChunks, x: Tensor) -> Tensor:
    return torch.tensor([[abs(i - j) <= module.window for j in range(128)] for i in range(128)])


def reference(module: SlidingChunks, x: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed(module, x), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
