"""Performer: positive random features of queries and keys, drawn once and kept; causal by running sums, or not."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="")
CAUSAL = Expect(family="linear", mask="j <= i")


class FastAttention(nn.Module):
    projection: Tensor
    causal = False

    def __init__(self, width: int = 64, heads: int = 4, features: int = 24) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.register_buffer("projection", torch.randn(features, width // heads))

    def features(self, data: Tensor, is_query: bool, eps: float = 1e-4) -> Tensor:
        normalizer = data.shape[-1] ** -0.25
        ratio = self.projection.shape[0] ** -0.5
        dash = torch.einsum("bhid,jd->bhij", normalizer * data, self.projection)
        diag = (data**2).sum(dim=-1, keepdim=True) / 2.0 * normalizer**2
        stab = dash.amax(dim=-1, keepdim=True) if is_query else dash.amax(dim=(-1, -2), keepdim=True)
        return ratio * (torch.exp(dash - diag - stab.detach()) + eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.attend(self.features(0.3 * q, True), self.features(0.3 * k, False), v)
        return out.transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cumsum = k.sum(dim=-2)
        d_inv = 1.0 / torch.einsum("...nd,...d->...n", q, k_cumsum.type_as(q))
        context = torch.einsum("...nd,...ne->...de", k, v)
        return torch.einsum("...de,...nd,...n->...ne", context, q, d_inv)


class CausalAttention(FastAttention):
    causal = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        d_inv = 1.0 / torch.einsum("...nd,...nd->...n", q, k.cumsum(dim=-2) + 1e-6)
        context = torch.einsum("...nd,...ne->...nde", k, v).cumsum(dim=-3)
        return torch.einsum("...nde,...nd,...n->...ne", context, q, d_inv)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return FastAttention(), (torch.randn(2, 90, 64),)


VARIANTS = {"causal": Variant(lambda: (CausalAttention(), (torch.randn(2, 90, 64),)), CAUSAL)}


def reference(module: FastAttention, x: Tensor) -> Tensor:
    q, k, v = module.to_qkv(x).unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = 0.3 * q, 0.3 * k
    scale, shares = math.sqrt(math.sqrt(q.shape[-1])), math.sqrt(module.projection.shape[0])

    def phi(t: Tensor, dims: tuple[int, ...]) -> Tensor:
        y = t / scale @ module.projection.T
        rows = (t / scale).square().sum(-1, keepdim=True) / 2
        return (torch.exp(y - rows - y.amax(dims, keepdim=True)) + 1e-4) / shares

    weights = phi(q, (-1,)) @ phi(k, (-2, -1)).mT
    weights = weights.tril() if module.causal else weights
    extra = 1e-6 * phi(q, (-1,)).sum(-1, keepdim=True) if module.causal else 0.0
    return (weights / (weights.sum(-1, keepdim=True) + extra) @ v).transpose(1, 2).flatten(2)
