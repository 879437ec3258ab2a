"""Efficient attention: a softmax over the features of queries, one over the tokens of keys; keys meet values first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="")


class EfficientAttention(nn.Module):
    def __init__(self, width: int = 32, key_channels: int = 8) -> None:
        super().__init__()
        self.queries, self.keys = nn.Conv2d(width, key_channels, 1), nn.Conv2d(width, key_channels, 1)
        self.values, self.reprojection = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.size()
        keys = torch.softmax(self.keys(x).reshape(n, -1, h * w), dim=2)
        queries = torch.softmax(self.queries(x).reshape(n, -1, h * w), dim=1)
        values = self.values(x).reshape(n, -1, h * w)
        context = keys @ values.transpose(1, 2)
        attended = context.transpose(1, 2) @ queries
        return self.reprojection(attended.reshape(n, -1, h, w)) + x


class Quadratic(EfficientAttention):
    def forward(self, x: Tensor) -> Tensor:
        keys = torch.softmax(self.keys(x).flatten(2), dim=2)
        queries = torch.softmax(self.queries(x).flatten(2), dim=1)
        weights = torch.einsum("bdi,bdj->bij", queries, keys)
        attended = torch.einsum("bij,bej->bei", weights, self.values(x).flatten(2))
        return self.reprojection(attended.view_as(x)) + x


def _maker(build: type[EfficientAttention]) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, 32, 10, 10),)))


make = _maker(EfficientAttention).make
VARIANTS = {"quadratic": _maker(Quadratic)}


def reference(module: EfficientAttention, x: Tensor) -> Tensor:
    q, k, v = (
        module.queries(x).flatten(2).softmax(1),
        module.keys(x).flatten(2).softmax(-1),
        module.values(x).flatten(2),
    )
    return module.reprojection((v @ (q.mT @ k).mT).view_as(x)) + x
