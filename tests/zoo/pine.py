"""PINE: documents see each other both ways, ordered anew for each head and document; keys at positions of that order.

Given are the positions: of every query, and of every key as each document's queries see it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class InterSegmentAttention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def mask(self, segment: Tensor, order: Tensor, own: Tensor) -> Tensor:
        """`segment`, `own` (N,): of each query; `order` (heads, segments, N): where keys stand for it."""
        return order[:, segment] <= own[None, :, None]

    def forward(self, x: Tensor, segment: Tensor, order: Tensor, own: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * self.scale
        scores = scores.masked_fill(~self.mask(segment, order, own), torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Segments(nn.Module):
    """Without the order: causal in the prefix, documents see all documents whole, the rest sees what came before."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor, bounds: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        position = torch.arange(x.shape[1], device=x.device)
        segment = (position[:, None] >= bounds[None, :]).sum(-1)  # 0: prefix, then documents, the last one the rest
        documents = (segment > 0) & (segment < bounds.shape[0])
        other = documents[:, None] & documents[None, :] & (segment[:, None] != segment[None, :])
        keep = (position[None, :] <= position[:, None]) | other
        scores = (q @ k.transpose(-2, -1) * self.scale).masked_fill(~keep, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


LENGTHS = (20, 30, 24, 26, 28)  # the prefix, three documents, the rest


def _inputs() -> tuple[Tensor, ...]:
    """Ranks that differ from head to head and document to document; the own document always stands last."""
    count, length = len(LENGTHS), sum(LENGTHS)
    segment = torch.repeat_interleave(torch.arange(count), torch.tensor(LENGTHS))
    starts = [sum(LENGTHS[:k]) for k in range(count)]
    order = torch.zeros(2, count, length, dtype=torch.long)
    own = torch.arange(length)
    for head in range(2):
        for asking in range(count):
            ranked = [0, 1, 2, 3, 4]
            if 0 < asking < count - 1:
                others = [d for d in (1, 2, 3) if d != asking]
                ranked = [0, *(others if head == 0 else others[::-1]), asking, 4]
            place = 0
            for d in ranked:
                order[head, asking, starts[d] : starts[d] + LENGTHS[d]] = torch.arange(place, place + LENGTHS[d])
                place += LENGTHS[d]
            rows = slice(starts[asking], starts[asking] + LENGTHS[asking])
            own[rows] = order[head, asking, rows]
    return torch.randn(2, length, 32), segment, order, own


def _bounds() -> Tensor:
    return torch.tensor([sum(LENGTHS[: k + 1]) for k in range(len(LENGTHS) - 1)])


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return InterSegmentAttention(), _inputs()


VARIANTS = {"segments": Variant(lambda: (Segments(), (torch.randn(2, 128, 32), _bounds())))}


def allowed(module: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
    segment = [k for k, size in enumerate(LENGTHS) for _ in range(size)]
    keep = torch.zeros(128, 128, dtype=torch.bool)
    for i in range(128):
        for j in range(128):
            both = 0 < segment[i] < 4 and 0 < segment[j] < 4
            keep[i, j] = j <= i or (both and segment[i] != segment[j])
    return keep
