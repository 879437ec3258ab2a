"""LookupViT: few tokens gather from many, and hand back through the same scores, normalised the other way round."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=2)


class Lookup(nn.Module):
    """Scores are made once: each reading of them is an attention of its own, with queries and keys exchanged."""

    def __init__(self, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q, self.k, self.v, self.back_v = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.q(compressed)), self.split(self.k(lookup)), self.split(self.v(lookup))
        logits = (q @ k.transpose(-2, -1)) * self.scale
        compressed = compressed + (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        compressed = compressed + self.mlp(compressed)
        back = logits.transpose(-2, -1).softmax(-1) @ self.split(self.back_v(compressed))
        return compressed, lookup + back.transpose(1, 2).flatten(2)


class TwoProducts(Lookup):
    """The same in two attentions that know nothing of each other."""

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.q(compressed)), self.split(self.k(lookup)), self.split(self.v(lookup))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        compressed = compressed + out.transpose(1, 2).flatten(2)
        compressed = compressed + self.mlp(compressed)
        scores = torch.einsum("bhjd,bhid->bhij", q, k * self.scale)
        probs = torch.softmax(scores, -1)
        back = torch.einsum("bhij,bhje->bihe", probs, self.split(self.back_v(compressed)))
        return compressed, lookup + back.flatten(2)


class SameMap(Lookup):
    """The paper's other reading: the first map itself, transposed, is what hands back."""

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.q(compressed)), self.split(self.k(lookup)), self.split(self.v(lookup))
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        compressed = compressed + (attn @ v).transpose(1, 2).flatten(2)
        compressed = compressed + self.mlp(compressed)
        back = attn.transpose(-2, -1) @ self.split(self.back_v(compressed))
        return compressed, lookup + back.transpose(1, 2).flatten(2)


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 25, 32), torch.randn(2, 100, 32)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Lookup(), _inputs()


VARIANTS = {
    "two": Variant(lambda: (TwoProducts(), _inputs())),
    "same_map": Variant(lambda: (SameMap(), _inputs()), Expect(declined="")),
}
