"""A jagged batch: padded rows of several lengths, whose padding nobody sees; lengths, or a mask of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class JaggedAttention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)

    def keys(self, lengths: Tensor, length: int) -> Tensor:
        return torch.arange(length, device=lengths.device)[None, :] < lengths[:, None]

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        valid = self.keys(lengths, x.shape[1])
        scores = (q @ k.transpose(-2, -1)) * self.scale
        scores = scores.masked_fill(~valid[:, None, None, :], float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return out * valid[:, :, None]


class TokenMask(JaggedAttention):
    """A mask of tokens, additive; pairs of padding are taken away too, and rows of padding see everything."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        token = self.keys(lengths, x.shape[1]).to(x.dtype)
        pairs = token[:, None, :, None] * token[:, None, None, :]
        scores = (q @ k.transpose(-2, -1)) * self.scale + (1.0 - pairs) * torch.finfo(x.dtype).min
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return out * token[:, :, None]


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, 96, 32), torch.tensor([96, 33, 50])


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return JaggedAttention(), _inputs()


VARIANTS = {"pairs": Variant(lambda: (TokenMask(), _inputs()))}


def allowed(module: JaggedAttention, x: Tensor, lengths: Tensor) -> Tensor:
    keep = torch.zeros(3, 1, 96, 96, dtype=torch.bool)
    for b, n in enumerate(lengths.tolist()):
        keep[b, :, : n if isinstance(module, TokenMask) else None, :n] = True
    return keep
