"""ReLU of the scores, divided by the number of keys that a query sees (active-dormant attention heads).

The mask is -inf before the ReLU, which makes a zero of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="pairwise", mask="j <= i")


class ReluAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, filled: bool = False) -> None:
        super().__init__()
        self.heads, self.filled = heads, filled
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        if self.filled:
            scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
        else:
            scores = scores + torch.zeros(length, length, device=x.device).masked_fill(later, float("-inf"))
        seen = torch.arange(1, length + 1, device=x.device).view(1, 1, -1, 1)
        return torch.einsum("bhij,bhjd->bihd", torch.relu(scores) / seen, v).flatten(2)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ReluAttention(), (torch.randn(2, 80, 64),)


VARIANTS = {"filled": Variant(lambda: (ReluAttention(filled=True), (torch.randn(2, 50, 64),)))}


def allowed(module: nn.Module, x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def reference(module: ReluAttention, x: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).unbind(2)
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5).clamp(min=0).tril()
    number = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return (torch.einsum("bhij,bjhd->bihd", weights, v) / number[:, None, None]).flatten(2)
