"""Speculative decoding: a tree of drafted tokens behind a cache, given as a dense mask of ancestors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()

PARENTS = (-1, 0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 8)


class TreeDecoding(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)

    def mask(self, tree: Tensor, cached: int) -> Tensor:
        """The cache is seen whole; `tree` (drafts, drafts) holds ones for a draft's ancestors and itself."""
        drafts = tree.shape[0]
        mask = torch.ones(drafts, cached + drafts, dtype=tree.dtype, device=tree.device)
        mask[:, cached:] = tree
        return mask

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, tree: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        mask = self.mask(tree, keys.shape[2])
        scores = scores.masked_fill(mask[None, None] == 0, torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Joined(TreeDecoding):
    def mask(self, tree: Tensor, cached: int) -> Tensor:
        return torch.cat([tree.new_ones(tree.shape[0], cached), tree], dim=-1)


def _inputs() -> tuple[Tensor, ...]:
    tree = torch.eye(len(PARENTS), dtype=torch.long)
    for draft, parent in enumerate(PARENTS):
        if parent >= 0:
            tree[draft] += tree[parent]
    return torch.randn(1, 12, 32), torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16), tree


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return TreeDecoding(), _inputs()


VARIANTS = {"joined": Variant(lambda: (Joined(), _inputs()))}


def allowed(module: TreeDecoding, x: Tensor, keys: Tensor, values: Tensor, tree: Tensor) -> Tensor:
    keep = torch.ones(12, 82, dtype=torch.bool)
    keep[:, 70:] = False
    for draft in range(12):
        at = draft
        while at >= 0:
            keep[draft, 70 + at] = True
            at = PARENTS[at]
    return keep
