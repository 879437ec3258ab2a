"""Scores that do not depend on the query: every query sees the same exponentials, so sums over prefixes are enough."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

# A softmax, if one of a table of equal rows; sums over prefixes would be cheaper still.
EXPECT = Expect(open=True)


class SharedScores(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (nn.functional.silu(q) * k).sum(-1) * q.shape[-1] ** -0.5
        return self.attend(scores, v).transpose(1, 2).flatten(2)

    def attend(self, scores: Tensor, v: Tensor) -> Tensor:
        length = scores.shape[-1]
        keep = torch.ones(length, length, dtype=torch.bool, device=v.device).tril()
        table = scores.unsqueeze(-2).expand(*scores.shape, length)
        return table.masked_fill(~keep, float("-inf")).softmax(-1) @ v


class Prefix(SharedScores):
    def attend(self, scores: Tensor, v: Tensor) -> Tensor:
        e = torch.exp(scores)
        return (e.unsqueeze(-1) * v).cumsum(-2) / e.cumsum(-1).unsqueeze(-1)


def _maker(build: type[SharedScores]) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, 60, 64),)))


make = _maker(SharedScores).make
VARIANTS = {"prefix": _maker(Prefix)}


def reference(module: SharedScores, x: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    e = (nn.functional.silu(q) * k).sum(-1).div(q.shape[-1] ** 0.5).exp()
    seen = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
    out = (seen @ (e[..., None] * v)) / (seen @ e[..., None])
    return out.transpose(1, 2).flatten(2)
