"""Linear transformers: elu + 1 of queries and keys instead of softmax, normalised by the sum; both associations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="")
CAUSAL = Expect(family="linear", mask="j <= i")


class LinearAttention(nn.Module):
    causal = False

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        return self.attend(q, k, v).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = torch.einsum("nshd,nshm->nhmd", k, v)
        z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
        return torch.einsum("nlhd,nhmd,nlh->nlhm", q, kv, z)


class Quadratic(LinearAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("nlhd,nshd->nhls", q, k)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)
        return torch.einsum("nhls,nshm->nlhm", weights, v)


class Causal(LinearAttention):
    causal = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2)).tril()
        return ((weights @ v) / (weights.sum(dim=-1, keepdim=True) + 1e-6)).transpose(1, 2)


class Cumulative(LinearAttention):
    causal = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        states = torch.cumsum(torch.einsum("nlhd,nlhm->nlhdm", k, v), dim=1)
        z = 1 / (torch.einsum("nlhd,nlhd->nlh", q, k.cumsum(dim=1)) + 1e-6)
        return torch.einsum("nlhd,nlhdm,nlh->nlhm", q, states, z)


class Outer(LinearAttention):
    causal = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(dim=1)
        num = (q.unsqueeze(-1) * states).sum(dim=-2)
        return num / ((q * k.cumsum(dim=1)).sum(dim=-1, keepdim=True) + 1e-6)


def _maker(build: type[LinearAttention], expect: Expect | None = None) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, 100, 64),)), expect)


make = _maker(LinearAttention).make
VARIANTS = {
    "quadratic": _maker(Quadratic),
    "causal": _maker(Causal, CAUSAL),
    "cumulative": _maker(Cumulative, CAUSAL),
    "outer": _maker(Outer, CAUSAL),
}


def reference(module: LinearAttention, x: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).unbind(2)
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    weights = torch.einsum("bihd,bjhd->bhij", q, k)
    if module.causal:
        weights = weights * torch.ones_like(weights[0, 0]).tril()
    return torch.einsum("bhij,bjhe->bihe", weights / (weights.sum(-1, keepdim=True) + 1e-6), v).flatten(2)
