"""Music Transformer: relative scores skewed into place by pad, reshape and slice; mask of -1e9."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="j <= i", empty_share=0.45)


class RelativeGlobalAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, max_len: int = 256) -> None:
        super().__init__()
        self.heads, self.size, self.max_len = heads, width // heads, max_len
        self.Wq = nn.Linear(width, width)
        self.Wk = nn.Linear(width, width)
        self.Wv = nn.Linear(width, width)
        self.E = nn.Parameter(torch.randn(heads, max_len, self.size))

    @staticmethod
    def _qe_masking(qe: Tensor) -> Tensor:
        size = qe.size(-1)
        mask = torch.triu(torch.ones(size, size, device=qe.device)).flip(0)
        return mask.to(qe.dtype) * qe

    def _skewing(self, tensor: Tensor) -> Tensor:
        padded = nn.functional.pad(tensor, [1, 0, 0, 0, 0, 0, 0, 0])
        reshaped = padded.reshape(padded.size(0), padded.size(1), padded.size(3), padded.size(2))
        return reshaped[:, :, 1:, :]

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (p(x).reshape(batch, length, self.heads, -1).permute(0, 2, 1, 3) for p in (self.Wq, self.Wk, self.Wv))
        table = self.E[:, self.max_len - length :, :]
        srel = self._skewing(self._qe_masking(torch.einsum("bhld,hmd->bhlm", q, table)))
        logits = (torch.matmul(q, k.permute(0, 1, 3, 2)) + srel) / math.sqrt(self.size)
        mask = torch.triu(torch.ones(length, length, device=x.device), diagonal=1)
        logits = logits + (mask * -1e9).to(logits.dtype)
        weights = nn.functional.softmax(logits, -1)
        return torch.matmul(weights, v).permute(0, 2, 1, 3).reshape(batch, length, width)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return RelativeGlobalAttention(), (torch.randn(2, 160, 64),)


def allowed(module: nn.Module, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return i[None, :] <= i[:, None]


def reference(module: RelativeGlobalAttention, x: Tensor) -> Tensor:
    """S_ij = q_i . E[last - (i - j)] for j <= i."""
    batch, length, _ = x.shape
    q, k, v = (p(x).view(batch, length, module.heads, -1) for p in (module.Wq, module.Wk, module.Wv))
    i = torch.arange(length)
    table = module.E[:, (module.max_len - 1 - (i[:, None] - i[None, :])).clamp(max=module.max_len - 1)]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) + torch.einsum("bihd,hijd->bhij", q, table)
    scores = (scores / math.sqrt(module.size)).masked_fill(i[None, :] > i[:, None], float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(x.shape)
