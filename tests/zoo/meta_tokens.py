"""Meta-attention: among the meta tokens only, causally; rows of other tokens are empty and their result is zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class MetaAttention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, meta: int = 7) -> None:
        super().__init__()
        self.heads, self.meta, self.scale = heads, meta, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        is_meta = tokens == self.meta
        length = x.shape[1]
        causal = torch.full((length, length), float("-inf"), device=x.device).triu(1)
        both = is_meta[:, :, None] & is_meta[:, None, :]
        extra = torch.zeros(both.shape, device=x.device).masked_fill(~both, float("-inf"))
        scores = q @ k.transpose(-2, -1) * self.scale + causal + extra[:, None]
        probs = scores.softmax(-1)
        out = (probs @ v).transpose(1, 2).flatten(2)
        return torch.where(is_meta[..., None], out, 0.0)


class FilledOnce(MetaAttention):
    """One boolean mask in SDPA, which makes zeros of empty rows itself."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        is_meta = tokens.eq(self.meta)
        position = torch.arange(x.shape[1], device=x.device)
        keep = is_meta.unsqueeze(-1) * is_meta.unsqueeze(-2) * (position[:, None] >= position)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep.unsqueeze(1))
        return out.transpose(1, 2).flatten(2)


def _inputs() -> tuple[Tensor, ...]:
    tokens = torch.randint(10, 50, (2, 128))
    tokens[0, [3, 5, 70, 71, 120]] = 7
    tokens[1, [40, 41, 42, 100]] = 7
    return torch.randn(2, 128, 32), tokens


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return MetaAttention(), _inputs()


VARIANTS = {"boolean": Variant(lambda: (FilledOnce(), _inputs()))}


def allowed(module: MetaAttention, x: Tensor, tokens: Tensor) -> Tensor:
    keep = torch.zeros(2, 1, 128, 128, dtype=torch.bool)
    for b in range(2):
        places = [p for p in range(128) if tokens[b, p] == module.meta]
        for i in places:
            for j in places:
                keep[b, 0, i, j] = j <= i
    return keep
