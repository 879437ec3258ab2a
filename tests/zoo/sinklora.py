"""SinkLoRA: some shifted heads return to the plain groups, and the first tokens are seen from everywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class SinkFixedAttention(nn.Module):
    def __init__(
        self, width: int = 64, group: int = 40, sink: int = 4, shifted: tuple[int, ...] = (0, 0, 1, 0)
    ) -> None:
        super().__init__()
        self.group, self.sink, self.shifted, self.heads = group, sink, shifted, len(shifted)
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def mask(self, length: int, device: torch.device) -> Tensor:
        position = torch.arange(length, device=device)
        masks = []
        for head in range(self.heads):
            place = position + self.shifted[head] * (self.group // 2)
            same = torch.div(place, self.group, rounding_mode="floor")
            masks.append(same[:, None] == same[None, :])
        keep = torch.stack(masks)
        keep = keep | (position < self.sink)[None, None, :]
        return keep & torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])
        lowest = torch.finfo(scores.dtype).min
        mask = self.mask(x.shape[1], x.device)
        scores = scores + torch.where(mask, torch.zeros((), dtype=scores.dtype), lowest)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Columns(SinkFixedAttention):
    """The sink columns opened by a slice assignment, the groups by a block-diagonal of ones for each head."""

    def mask(self, length: int, device: torch.device) -> Tensor:
        masks = torch.zeros(self.heads, length, length, dtype=torch.bool, device=device)
        for head in range(self.heads):
            offset = self.shifted[head] * (self.group // 2)
            for start in range(-offset, length, self.group):
                rows = slice(max(start, 0), start + self.group)
                masks[head, rows, rows] = True
        masks[:, :, : self.sink] = True
        return torch.tril(masks)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SinkFixedAttention(), (torch.randn(2, 160, 64),)


VARIANTS = {"columns": Variant(lambda: (Columns(), (torch.randn(2, 160, 64),)))}


def allowed(module: SinkFixedAttention, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    i, j = i[:, None], i[None, :]
    shifts = [s * module.group // 2 for s in module.shifted]
    return torch.stack(
        [(j <= i) & (((i + s) // module.group == (j + s) // module.group) | (j < module.sink)) for s in shifts]
    )
