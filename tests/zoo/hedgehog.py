"""Hedgehog: a small learned map and a softmax over its features make linear attention copy softmax's sharp weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="j <= i")


class Hedgehog(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, size = heads, width // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.map_q, self.map_k = (nn.Parameter(torch.eye(size).repeat(heads, 1, 1)) for _ in range(2))

    def features(self, y: Tensor) -> Tensor:
        return torch.cat([torch.softmax(y, dim=-1), torch.softmax(-y, dim=-1)], dim=-1).clamp(min=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = self.features(torch.einsum("hdf,bhld->bhlf", self.map_q, q))
        k = self.features(torch.einsum("hdf,bhld->bhlf", self.map_k, k))
        a = torch.einsum("bhmd,bhnd->bhmn", q, k)
        keep = torch.ones(a.shape[-2:], device=x.device, dtype=torch.bool).tril()
        a = a.masked_fill(~keep, 0)
        a = a / a.sum(dim=-1, keepdim=True)
        return torch.einsum("bhmn,bhnd->bhmd", a, v).transpose(1, 2).flatten(2)


class Joint(Hedgehog):
    """One softmax over both signs."""

    def features(self, y: Tensor) -> Tensor:
        return torch.softmax(torch.cat([2 * y, -2 * y], dim=-1), dim=-1)


class Exponentials(Hedgehog):
    """Exponentials shifted by the largest."""

    def features(self, y: Tensor) -> Tensor:
        return torch.cat([torch.exp(y - y.amax(-1, keepdim=True)), torch.exp(y.amin(-1, keepdim=True) - y)], dim=-1)


def _maker(build: type[Hedgehog]) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, 70, 64),)))


make = _maker(Hedgehog).make
VARIANTS = {"joint": _maker(Joint), "exponentials": _maker(Exponentials)}


def reference(module: Hedgehog, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (module.heads, -1)) for p in (module.q_proj, module.k_proj, module.v_proj))
    q, k = (module.features(torch.einsum("bihd,hdf->bihf", t, m)) for t, m in ((q, module.map_q), (k, module.map_k)))
    z = k.cumsum(1)
    state = torch.einsum("bjhf,bjhe->bjhfe", k, v).cumsum(1)
    return (torch.einsum("bihf,bihfe->bihe", q, state) / (q * z).sum(-1, keepdim=True)).flatten(2)
