"""Reformer's local attention: chunks of tokens that see themselves and the chunk before, the first one the last."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(regrouped=True)


class LocalSelfAttention(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 2, chunk: int = 16, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.chunk, self.causal = heads, chunk, causal
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.register_buffer("mask_value", torch.tensor(-1e9), persistent=False)

    def split(self, x: Tensor) -> Tensor:
        return (
            x.view(*x.shape[:2], self.heads, -1)
            .transpose(2, 1)
            .reshape(len(x), self.heads, -1, self.chunk, x.shape[2] // self.heads)
        )

    def look_adjacent(self, x: Tensor) -> Tensor:
        return torch.cat([torch.cat([x[:, :, -1:, ...], x[:, :, :-1, ...]], dim=2), x], dim=3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        b, n, dim = x.shape
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        k, v = self.look_adjacent(k / (dim // self.heads) ** 0.5), self.look_adjacent(v)
        indices = torch.arange(n, device=x.device).repeat(b, self.heads, 1).view(b, self.heads, -1, self.chunk)
        key_indices = self.look_adjacent(indices)
        dots = q @ k.transpose(-1, -2)
        mask = attention_mask.to(torch.bool)[:, None, None, :].expand(*indices.shape[:-1], -1)
        mask = mask.gather(-1, key_indices).unsqueeze(-2).expand(dots.shape)
        if self.causal:
            mask = (indices.unsqueeze(-1) >= key_indices.unsqueeze(-2)) * mask
        dots = torch.where(mask, dots, self.mask_value)
        probs = torch.exp(dots - torch.logsumexp(dots, dim=-1, keepdim=True))
        return (probs @ v).flatten(2, 3).permute(0, 2, 1, 3).reshape(b, n, dim)


def _inputs() -> tuple[Tensor, ...]:
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 56:] = 0
    return torch.randn(2, 64, 32), mask


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return LocalSelfAttention(), _inputs()


VARIANTS = {"encoder": Variant(lambda: (LocalSelfAttention(causal=False), _inputs()))}


def reference(module: LocalSelfAttention, x: Tensor, attention_mask: Tensor) -> Tensor:
    b, n, dim = x.shape
    q, k, v = (f(x).view(b, n, module.heads, -1).transpose(1, 2) for f in (module.query, module.key, module.value))
    place = torch.arange(n)
    ago = (place[:, None] // module.chunk - place // module.chunk) % (n // module.chunk)
    mask = (ago <= 1) & attention_mask.bool()[:, None, None, :]
    mask = mask & (place[:, None] >= place) if module.causal else mask
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, dim)
