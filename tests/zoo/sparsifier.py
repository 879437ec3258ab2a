"""Sparsifier: a mask of the best keys of each query, predicted at low rank; rows without any key give zeros.

The prediction, coefficients times a fixed basis, is an attention of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(sites=2)


class SparseTokens(nn.Module):
    def __init__(self, dim: int = 32, tokens: int = 65, heads: int = 2, rank: int = 8, keep: float = 0.25) -> None:
        super().__init__()
        self.heads, self.scale, self.rank, self.budget = heads, (dim // heads) ** -0.5, rank, int(tokens * keep) + 1
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.low_q, self.low_k = nn.Linear(dim // heads, dim // heads // 2), nn.Linear(dim // heads, dim // heads // 2)
        self.down, self.up = nn.Linear(tokens, rank), nn.Linear(rank, tokens)

    @torch.no_grad()
    def predict(self, q: Tensor, k: Tensor, present: Tensor) -> Tensor:
        """(batch, heads, queries, keys): which pairs are worth a look; the class token sees all."""
        low_k = self.down(self.low_k(k).transpose(-1, -2))
        coefficients = ((self.low_q(q[:, :, 1:]) @ low_k) * self.heads**-0.5).softmax(-1)
        scores = coefficients @ torch.relu(self.up.weight.t())
        best = scores.topk(self.budget, dim=-1).indices
        mask = torch.zeros_like(scores).scatter_(-1, best, 1.0)
        first = torch.ones_like(mask[:, :, :1])
        mask = torch.cat((first, mask), dim=2)
        return mask * present[:, None, :, None] * present[:, None, None, :]

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mask = self.predict(q, k, present.to(x.dtype))
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.masked_fill(~mask.bool(), float("-inf"))
        attn = torch.nan_to_num(attn.softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))


class Cleaned(SparseTokens):
    """The rows that lost all keys put right by where."""

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = self.predict(q, k, present.to(x.dtype)) > 0.5
        attn = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        attn = torch.where(mask, attn, torch.full_like(attn, float("-inf"))).softmax(dim=-1)
        attn = torch.where(attn.isnan(), torch.zeros_like(attn), attn)
        return self.proj(torch.einsum("bhij,bhjd->bihd", attn, v).reshape(b, n, c))


def _inputs() -> tuple[Tensor, ...]:
    present = torch.ones(2, 65, dtype=torch.bool)
    present[0, 40:] = False
    present[1, 3:20] = False
    return torch.randn(2, 65, 32), present


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SparseTokens(), _inputs()


VARIANTS = {"cleaned": Variant(lambda: (Cleaned(), _inputs()))}


def reference(module: SparseTokens, x: Tensor, present: Tensor) -> Tensor:
    b, n, c = x.shape
    q, k, v = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in module.qkv(x).chunk(3, -1))
    keep = module.predict(q, k, present.to(x.dtype)) > 0
    weights = torch.exp(q @ k.transpose(-2, -1) * module.scale) * keep
    probs = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return module.proj((probs @ v).transpose(1, 2).reshape(b, n, c))
