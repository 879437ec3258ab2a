"""Croc: causal, but everything before the first supervised token is open to all, as the labels say."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class PrefixFromLabels(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def mask(self, labels: Tensor) -> Tensor:
        batch, length = labels.shape
        mask = torch.tril(torch.ones(length, length, device=labels.device)).expand(batch, length, length)
        prefix = (labels != -100).int().argmax(dim=1)
        columns = torch.arange(length, device=labels.device)
        opened = (columns[None, :] < prefix[:, None]).unsqueeze(1)
        return torch.where(opened, torch.ones_like(mask), mask)[:, None]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])
        scores = scores + (1.0 - self.mask(labels)) * torch.finfo(scores.dtype).min
        probs = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.o_proj(torch.matmul(probs, v).transpose(1, 2).flatten(2))


class Lengths(PrefixFromLabels):
    """The prefix as a count of unsupervised tokens, the mask as booleans."""

    def mask(self, labels: Tensor) -> Tensor:
        prefix = (labels == -100).long().sum(dim=-1)
        i = torch.arange(labels.shape[1], device=labels.device)
        keep = (i[None, :] <= i[:, None])[None] | (i[None, None, :] < prefix[:, None, None])
        return keep[:, None].float()


def _inputs() -> tuple[Tensor, ...]:
    labels = torch.randint(1, 50, (2, 128))
    labels[0, :50] = -100
    labels[1, :17] = -100
    return torch.randn(2, 128, 32), labels


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return PrefixFromLabels(), _inputs()


VARIANTS = {"counted": Variant(lambda: (Lengths(), _inputs()))}


def allowed(module: PrefixFromLabels, x: Tensor, labels: Tensor) -> Tensor:
    length = x.shape[1]
    keep = torch.ones(length, length, dtype=torch.bool).tril().repeat(2, 1, 1)
    for row, line in enumerate(labels.tolist()):
        keep[row, :, : line.index(next(t for t in line if t != -100))] = True
    return keep[:, None]
