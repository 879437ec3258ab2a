"""Routing Transformer: each cluster takes its nearest tokens, which attend among themselves; results are averaged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class ClusteredHeads(nn.Module):
    """Queries and keys are the same; a token sees itself only where it sees nothing else."""

    def __init__(self, dim: int = 32, heads: int = 2, clusters: int = 4, window: int = 16) -> None:
        super().__init__()
        self.heads, self.window, self.head = heads, window, dim // heads
        self.qk, self.v, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.register_buffer("means", torch.randn(heads, clusters, dim // heads))

    @torch.no_grad()
    def choose(self, qk: Tensor) -> Tensor:
        """(batch, heads, clusters * window): tokens of each cluster in their order."""
        means: Tensor = self.means  # type: ignore[assignment]
        similar = torch.einsum("bhtd,hcd->bhtc", *(nn.functional.normalize(t, dim=-1) for t in (qk, means)))
        index = similar.transpose(-2, -1).topk(self.window, dim=-1).indices
        return index.sort(-1).values.flatten(2)

    def split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        qk, v = self.split(self.qk(x)), self.split(self.v(x))
        index = self.choose(qk)
        spread = index[..., None].expand(-1, -1, -1, self.head)
        shape = (b, self.heads, -1, self.window, self.head)
        q, v = qk.gather(2, spread).reshape(shape), v.gather(2, spread).reshape(shape)
        k = nn.functional.normalize(q, dim=-1)
        dots = torch.einsum("bhnid,bhnjd->bhnij", q, k) * self.head**-0.5
        line = torch.arange(self.window, device=x.device)
        dots = dots.masked_fill(line[:, None] < line[None, :], torch.finfo(x.dtype).min)
        dots = dots.masked_fill(torch.eye(self.window, dtype=torch.bool, device=x.device), -5e4)
        bo = torch.einsum("bhcij,bhcjd->bhcid", dots.softmax(dim=-1), v).flatten(2, 3)
        summed = torch.zeros(b, self.heads, t, self.head, dtype=x.dtype, device=x.device).scatter_add(2, spread, bo)
        count = torch.zeros_like(summed).scatter_add(2, spread, torch.ones_like(bo))
        out = summed / (count + 1e-5)
        return self.out(out.transpose(1, 2).reshape(b, t, c))


class Indexed(ClusteredHeads):
    """Gathered by advanced indexing, the two masks as one."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        qk, v = self.split(self.qk(x)), self.split(self.v(x))
        index = self.choose(qk).unflatten(2, (-1, self.window))
        batch = torch.arange(b, device=x.device)[:, None, None, None]
        head = torch.arange(self.heads, device=x.device)[:, None, None]
        q, k, v = (y[batch, head, index] for y in (qk, nn.functional.normalize(qk, dim=-1), v))
        line = torch.arange(self.window, device=x.device)
        fill = torch.zeros(self.window, self.window, dtype=x.dtype, device=x.device)
        fill = fill.masked_fill(line[:, None] < line, torch.finfo(x.dtype).min)
        scores = (q @ k.transpose(-1, -2)) * self.head**-0.5 + fill
        scores = torch.where(line[:, None] == line, torch.full_like(scores, -5e4), scores)
        out = (scores.softmax(-1) @ v).flatten(2, 3)
        flat = index.flatten(2)
        summed = torch.zeros(b, self.heads, t, self.head, dtype=x.dtype, device=x.device)
        summed = summed.index_put((batch[..., 0], head[..., 0], flat), out, accumulate=True)
        hot = nn.functional.one_hot(flat, t).sum(2).to(x.dtype)
        return self.out((summed / (hot[..., None] + 1e-5)).transpose(1, 2).reshape(b, t, c))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ClusteredHeads(), (torch.randn(2, 64, 32),)


VARIANTS = {"indexed": Variant(lambda: (Indexed(), (torch.randn(2, 64, 32),)))}


def reference(module: ClusteredHeads, x: Tensor) -> Tensor:
    b, t, c = x.shape
    qk, v = module.split(module.qk(x)), module.split(module.v(x))
    index = module.choose(qk).unflatten(2, (-1, module.window))
    out, count = torch.zeros_like(v), torch.zeros(b, module.heads, t, 1, dtype=x.dtype)
    for s in range(b):
        for h in range(module.heads):
            for line in index[s, h]:
                for place, token in enumerate(line):
                    before = line[:place] if place else line[:1]
                    keys = nn.functional.normalize(qk[s, h, before], dim=-1)
                    probs = (keys @ qk[s, h, token] * module.head**-0.5).softmax(0)
                    out[s, h, token] += probs @ v[s, h, before]
                    count[s, h, token] += 1
    return module.out((out / (count + 1e-5)).transpose(1, 2).reshape(b, t, c))
