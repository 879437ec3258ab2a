"""Attention by kernels instead of softmax: a product of feature maps, masked after it, normalised by its sum or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="j <= i")
PAIRWISE = Expect(family="pairwise", mask="j <= i")


class KernelAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, kernel: str = "elu", normalized: bool = True) -> None:
        super().__init__()
        self.heads, self.kernel, self.normalized = heads, kernel, normalized
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width // heads, 24), nn.GELU(), nn.Linear(24, 24))

    def feature(self, x: Tensor) -> Tensor:
        if self.kernel == "mlp":
            return self.mlp(x)
        return nn.functional.elu(x) + 1 if self.kernel == "elu" else x

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return self.feature(q) @ self.feature(k).transpose(-2, -1) * q.shape[-1] ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attn = self.weights(q, k)
        mask = torch.tril(torch.ones(length, length, device=x.device)).view(1, 1, length, length)
        attn = attn.masked_fill(mask == 0, 0.0)
        if self.normalized and self.kernel in ("elu", "sigmoid"):
            attn = attn / (attn.sum(dim=-1, keepdim=True) + 1e-8)
        elif self.normalized:
            attn = attn / torch.clamp(attn.sum(dim=-1, keepdim=True).abs(), min=1)
        return (attn @ v).transpose(1, 2).flatten(2)


class Similarity(KernelAttention):
    """The kernel is applied to the scores: not linear in them."""

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return torch.sigmoid(scores) if self.kernel == "sigmoid" else nn.functional.elu(scores) + 1


def _maker(build: type[KernelAttention], kernel: str, normalized: bool, expect: Expect | None = None) -> Variant:
    return Variant(lambda: (build(kernel=kernel, normalized=normalized), (torch.randn(2, 80, 64),)), expect)


make = _maker(KernelAttention, "elu", True).make
VARIANTS = {
    "unnormalized": _maker(KernelAttention, "elu", False),
    "identity": _maker(KernelAttention, "identity", True),
    "identity_unnormalized": _maker(KernelAttention, "identity", False),
    "mlp": _maker(KernelAttention, "mlp", True),
    "sigmoid": _maker(Similarity, "sigmoid", True, PAIRWISE),
    "sigmoid_unnormalized": _maker(Similarity, "sigmoid", False, PAIRWISE),
    "elu_of_scores": _maker(Similarity, "elu", True, PAIRWISE),
    "elu_of_scores_unnormalized": _maker(Similarity, "elu", False, PAIRWISE),
}


def reference(module: KernelAttention, x: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).unbind(2)
    weights = module.weights(q.transpose(1, 2), k.transpose(1, 2)).tril()
    if module.normalized:
        sums = weights.sum(-1, keepdim=True)
        weights = weights / (sums + 1e-8 if module.kernel in ("elu", "sigmoid") else sums.abs().clamp(min=1))
    return torch.einsum("bhij,bjhe->bihe", weights, v).flatten(2)
