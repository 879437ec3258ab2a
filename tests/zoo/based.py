"""Based: a feature map whose product is the second-order Taylor polynomial of exp(q . k)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="j <= i")


class TaylorAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, features: int = 6) -> None:
        super().__init__()
        self.heads, self.size = heads, features
        self.proj_q, self.proj_k = nn.Linear(width, heads * features), nn.Linear(width, heads * features)
        self.proj_v = nn.Linear(width, width)

    def feature_map(self, x: Tensor) -> Tensor:
        x2 = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(start_dim=-2) / math.sqrt(2)
        ones = torch.ones(x[..., :1].shape, device=x.device, dtype=x.dtype)
        return torch.cat([ones, x / math.sqrt(math.sqrt(self.size)), x2 / math.sqrt(self.size)], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.proj_q, self.proj_k, self.proj_v)
        )
        return self.attend(self.feature_map(q), self.feature_map(k), v).transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = torch.einsum("bhnd,bhmd->bhnm", q, k)
        a = torch.tril(a)
        z = 1 / (torch.einsum("bhld,bhld->bhl", q, k.cumsum(2)) + 1e-12)
        return torch.einsum("bhnm,bhme,bhn->bhne", a, v, z)


class Recurrent(TaylorAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.unsqueeze(-2), k.unsqueeze(-2), v.unsqueeze(-1)
        num = (q * (k * v).cumsum(dim=2)).sum(dim=-1)
        return num / ((q * k.cumsum(dim=2)).sum(dim=-1) + 1e-12)


def _maker(build: type[TaylorAttention]) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, 60, 64),)))


make = _maker(TaylorAttention).make
VARIANTS = {"recurrent": _maker(Recurrent)}


def reference(module: TaylorAttention, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (module.heads, -1)) for p in (module.proj_q, module.proj_k, module.proj_v))
    t = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(module.size)
    weights = (1 + t + t * t / 2).tril()
    return torch.einsum("bhij,bjhe->bihe", weights / weights.sum(-1, keepdim=True), v).flatten(2)
