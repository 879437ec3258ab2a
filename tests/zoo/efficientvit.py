"""EfficientViT: linear attention by ReLU; a row of ones below the values sums the weights on the way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="")


class LiteMLA(nn.Module):
    def __init__(self, width: int = 32, dim: int = 8, side: int = 10) -> None:
        super().__init__()
        self.dim, self.side, self.eps = dim, side, 1e-5
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.proj = nn.Conv2d(width, width, 1)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, height, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, -1, 3 * self.dim, height * width).transpose(-1, -2).chunk(3, dim=-1)
        return F.relu(q), F.relu(k), v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        v = F.pad(v, (0, 1), mode="constant", value=1.0)
        out = q @ (k.transpose(-1, -2) @ v)
        out = out[..., :-1] / (out[..., -1:] + self.eps)
        return self.proj(out.transpose(-1, -2).reshape(x.shape[0], -1, *x.shape[2:]))


class Quadratic(LiteMLA):
    """As the library does where tokens are few."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        att_map = k @ q.transpose(-1, -2)
        att_map = att_map / (att_map.sum(dim=2, keepdim=True) + self.eps)
        out = v.transpose(-1, -2) @ att_map
        return self.proj(out.reshape(x.shape[0], -1, *x.shape[2:]))


def _maker(build: type[LiteMLA]) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, 32, 10, 10),)))


make = _maker(LiteMLA).make
VARIANTS = {"quadratic": _maker(Quadratic)}


def reference(module: LiteMLA, x: Tensor) -> Tensor:
    q, k, v = module.heads(x)
    weights = q @ k.mT
    out = weights / (weights.sum(-1, keepdim=True) + module.eps) @ v
    return module.proj(out.mT.reshape(x.shape[0], -1, *x.shape[2:]))
