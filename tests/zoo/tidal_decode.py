"""TidalDecode, a decoding step: one layer picks keys by its own scores, later layers read those keys alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class SparseLayer(nn.Module):
    """The eager spelling: the chosen keys of each head are scattered into a mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen.unsqueeze(2), True)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), v)


class Gathered(SparseLayer):
    """The chosen keys and values are read alone."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        index = chosen[..., None].expand(-1, -1, -1, q.shape[-1])
        k, v = k.gather(2, index), v.gather(2, index)
        return (torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Selecting(nn.Module):
    """The layer that picks: it needs its scores for the choice, and attends to all keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        chosen = scores.squeeze(2).topk(16, dim=-1).indices
        return scores.softmax(-1) @ v, chosen


def _cache() -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 1, 16), torch.randn(2, 4, 96, 16), torch.randn(2, 4, 96, 16)


def _inputs() -> tuple[Tensor, ...]:
    chosen = torch.stack([torch.randperm(96)[:16] for _ in range(8)]).view(2, 4, 16)
    return (*_cache(), chosen)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SparseLayer(), _inputs()


VARIANTS = {
    "gathered": Variant(lambda: (Gathered(), _inputs()), Expect(mask="")),
    "selecting": Variant(lambda: (Selecting(), _cache()), Expect(declined="a score is read elsewhere (by `squeeze`)")),
}


def reference(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None = None) -> object:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    if chosen is None:
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v), scores[:, :, 0].topk(16).indices
    out = torch.zeros_like(q)
    for b in range(2):
        for h in range(4):
            keys = chosen[b, h]
            out[b, h, 0] = scores[b, h, 0, keys].softmax(0) @ v[b, h, keys]
    return out
