"""CrossViT: the class token of one branch asks the patches of the other; one query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=2)


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.wq(x[:, 0:1, ...]).reshape(b, 1, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        k = self.wk(x).reshape(b, n, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        v = self.wv(x).reshape(b, n, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, 1, c))


class NoQueryAxis(CrossAttention):
    """The one query without an axis of its own."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.wq(x[:, 0]).unflatten(-1, (self.num_heads, -1))
        k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.wk, self.wv))
        probs = (torch.einsum("bhd,bjhd->bhj", q, k) * self.scale).softmax(-1)
        return self.proj(torch.einsum("bhj,bjhd->bhd", probs, v).flatten(1)).unsqueeze(1)


class TwoBranches(nn.Module):
    def __init__(self, kind: type[CrossAttention] = CrossAttention, small: int = 32, large: int = 48) -> None:
        super().__init__()
        self.to_large, self.to_small = nn.Linear(small, large), nn.Linear(large, small)
        self.in_large, self.in_small = kind(large), kind(small)
        self.back_small, self.back_large = nn.Linear(large, small), nn.Linear(small, large)

    def forward(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        token = torch.cat((self.to_large(small[:, 0:1]), large[:, 1:]), dim=1)
        token = token[:, 0:1] + self.in_large(token)
        new_small = torch.cat((self.back_small(token), small[:, 1:]), dim=1)
        token = torch.cat((self.to_small(large[:, 0:1]), small[:, 1:]), dim=1)
        token = token[:, 0:1] + self.in_small(token)
        return new_small, torch.cat((self.back_large(token), large[:, 1:]), dim=1)


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 101, 32), torch.randn(2, 50, 48)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return TwoBranches(), _inputs()


VARIANTS = {"letters": Variant(lambda: (TwoBranches(NoQueryAxis), _inputs()))}
