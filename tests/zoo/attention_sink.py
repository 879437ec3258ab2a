"""The masks of the attention-sink study: a window, a prefix of open columns, ALiBi's slopes; all over a tril."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class StudiedAttention(nn.Module):
    def __init__(self, kind: str, width: int = 64, heads: int = 4, size: int = 24) -> None:
        super().__init__()
        self.kind, self.heads, self.size = kind, heads, size
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def mask(self, length: int, device: torch.device) -> Tensor:
        ones = torch.ones(length, length, dtype=torch.bool, device=device)
        mask = torch.tril(ones)
        if self.kind == "window":
            mask = mask & ~torch.tril(ones, diagonal=-self.size)
        if self.kind == "prefix":
            mask[:, : self.size] = True
        return mask

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if self.kind == "alibi":
            position = torch.arange(length, device=x.device)
            slopes = 2.0 ** (-8.0 * torch.arange(1, self.heads + 1, device=x.device) / self.heads)
            scores = scores + slopes[:, None, None] * (position[None, :] - position[:, None])
        scores = scores.masked_fill(~self.mask(length, x.device), torch.finfo(scores.dtype).min)
        probs = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        return (probs @ v).transpose(1, 2).flatten(2)


class Banded(StudiedAttention):
    """The window as a band of ones between two triangles, the prefix as a sum of two masks."""

    def mask(self, length: int, device: torch.device) -> Tensor:
        ones = torch.ones(length, length, device=device)
        if self.kind == "window":
            return torch.triu(torch.tril(ones), diagonal=1 - self.size) != 0
        if self.kind == "prefix":
            opened = torch.cat([ones[:, : self.size], torch.zeros_like(ones[:, self.size :])], dim=-1)
            return (ones.tril() + opened).clamp(max=1.0) == 1.0
        return ones.tril().bool()


def _maker(build: type[StudiedAttention], kind: str) -> Variant:
    return Variant(lambda: (build(kind), (torch.randn(2, 128, 64),)))


make = _maker(StudiedAttention, "window").make
VARIANTS = {
    "prefix": _maker(StudiedAttention, "prefix"),
    "alibi": _maker(StudiedAttention, "alibi"),
    "banded": _maker(Banded, "window"),
    "banded_prefix": _maker(Banded, "prefix"),
}


def allowed(module: StudiedAttention, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    gap = i[:, None] - i[None, :]
    if module.kind == "window":
        return (gap >= 0) & (gap < module.size)
    return (gap >= 0) | (i[None, :] < module.size if module.kind == "prefix" else False)
