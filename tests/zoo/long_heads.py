"""LongHeads: each head and token picks its chunks; their tokens are gathered, and get new, contiguous positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


def rotate(x: Tensor, position: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    frequency = 100.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = position[..., None].to(x.dtype) * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class ChunkHeads(nn.Module):
    """The choice (batch, heads, tokens, chunks), sorted, is an input."""

    def __init__(self, chunk: int = 8) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        b, h, n, d = q.shape
        size = self.chunk
        index = (chosen[..., None] * size + torch.arange(size, device=q.device)).flatten(3)  # b h n keys
        count = index.shape[-1]
        batch, head = (
            torch.arange(b, device=q.device)[:, None, None, None],
            torch.arange(h, device=q.device)[:, None, None],
        )
        keys, values = k[batch, head, index], v[batch, head, index]
        token = torch.arange(n, device=q.device)
        seen = index <= token[:, None]
        here = seen.sum(-1) - 1  # the query's own place among its keys
        keys = rotate(keys, torch.arange(count, device=q.device))
        query = rotate(q, here)
        scores = torch.einsum("bhnd,bhnjd->bhnj", query, keys) * d**-0.5
        probs = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1)
        return torch.einsum("bhnj,bhnjd->bhnd", probs, values)


class TakenAlong(ChunkHeads):
    """torch.gather on expanded chunks, a matrix product with one row."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        b, h, n, d = q.shape
        size, slots = self.chunk, chosen.shape[-1]
        index = chosen[..., None, None].expand(-1, -1, -1, -1, size, d)
        picked = []
        for t in (k, v):
            chunks = t.view(b, h, 1, -1, size, d).expand(-1, -1, n, -1, -1, -1)
            picked.append(torch.gather(chunks, 3, index).reshape(b, h, n, slots * size, d))
        place = torch.arange(n, device=q.device).view(n, 1, 1)
        seen = (chosen[..., None] * size + torch.arange(size, device=q.device) <= place).flatten(3)
        order = torch.arange(slots * size, device=q.device)
        query = rotate(q, seen.sum(-1) - 1)
        scores = query.unsqueeze(3) @ rotate(picked[0], order).transpose(-1, -2) * d**-0.5
        scores = torch.where(seen.unsqueeze(3), scores, torch.finfo(q.dtype).min)
        return (scores.softmax(-1) @ picked[1]).squeeze(3)


def _inputs() -> tuple[Tensor, ...]:
    chosen = torch.zeros(1, 2, 48, 3, dtype=torch.int64)
    for h in range(2):
        for i in range(48):
            own = i // 8
            others = torch.randperm(6)[:3]
            picked = sorted({0, own, *others.tolist()})
            picked = sorted(set(picked[:2]) | {own})
            while len(picked) < 3:
                picked.append(next(c for c in range(6) if c not in picked))
            chosen[0, h, i] = torch.tensor(sorted(picked))
    return (*(torch.randn(1, 2, 48, 16) for _ in range(3)), chosen)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ChunkHeads(), _inputs()


VARIANTS = {"along": Variant(lambda: (TakenAlong(), _inputs()))}


def reference(module: ChunkHeads, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [
                    j
                    for c in chosen[b, h, i].tolist()
                    for j in range(c * module.chunk, (c + 1) * module.chunk)
                    if j <= i
                ]
                places = torch.arange(len(keys))
                query = rotate(q[b, h, i], torch.tensor(len(keys) - 1))
                probs = (rotate(k[b, h, keys], places) @ query * q.shape[-1] ** -0.5).softmax(0)
                out[b, h, i] = probs @ v[b, h, keys]
    return out
