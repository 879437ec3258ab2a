"""PrimeComposer's region-constrained cross-attention: subject words are seen inside the foreground only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class RegionConstrained(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, subject: tuple[int, ...] = (4, 5)) -> None:
        super().__init__()
        self.heads, self.subject, self.scale = heads, subject, (width // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def mask(self, foreground: Tensor, words: int) -> Tensor:
        """(batch * heads, pixels, words), True where seen; written word by word."""
        inside = foreground.flatten(1).repeat_interleave(self.heads, dim=0)
        mask = torch.ones(*inside.shape, words, dtype=torch.bool, device=foreground.device)
        for token in self.subject:
            mask[:, :, token] = inside
        return mask

    def forward(self, x: Tensor, context: Tensor, foreground: Tensor) -> Tensor:
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)
            for p, t in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        sim = torch.einsum("bid,bjd->bij", q, k) * self.scale
        sim = sim.masked_fill(~self.mask(foreground, context.shape[1]), -torch.finfo(sim.dtype).max)
        out = torch.einsum("bij,bjd->bid", sim.softmax(dim=-1), v)
        return out.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)


class ByWord(RegionConstrained):
    def mask(self, foreground: Tensor, words: int) -> Tensor:
        word = torch.arange(words, device=foreground.device)
        is_subject = torch.zeros(words, dtype=torch.bool, device=foreground.device)
        for token in self.subject:
            is_subject = is_subject | (word == token)
        inside = foreground.flatten(1).repeat_interleave(self.heads, dim=0)
        return inside[:, :, None] | ~is_subject[None, None, :]


def _inputs() -> tuple[Tensor, ...]:
    foreground = torch.zeros(2, 8, 8, dtype=torch.bool)
    foreground[0, 2:5, 1:6] = True
    foreground[1, 4:, 4:] = True
    return torch.randn(2, 64, 32), torch.randn(2, 20, 32), foreground


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return RegionConstrained(), _inputs()


VARIANTS = {"words": Variant(lambda: (ByWord(), _inputs()))}


def allowed(module: RegionConstrained, x: Tensor, context: Tensor, foreground: Tensor) -> Tensor:
    keep = torch.ones(2, 1, 64, 20, dtype=torch.bool)
    for token in module.subject:
        keep[:, 0, :, token] = foreground.reshape(2, 64)
    return keep
