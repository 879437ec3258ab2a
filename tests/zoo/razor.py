"""RazorAttention: retrieval heads see everything before them, the others sinks and a recent span of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class SpansByHead(nn.Module):
    spans: Tensor

    def __init__(self, width: int = 64, spans: tuple[int, ...] = (128, 24, 40, 16), sink: int = 4) -> None:
        super().__init__()
        self.heads, self.sink, self.lengths = len(spans), sink, spans
        self.register_buffer("spans", torch.tensor(spans))
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def mask(self, length: int, device: torch.device) -> Tensor:
        """Spans from a buffer, one number a head."""
        position = torch.arange(length, device=device)
        gap = position[:, None] - position[None, :]
        recent = gap[None] < self.spans.view(-1, 1, 1)
        return (gap >= 0)[None] & (recent | (position < self.sink)[None, None, :])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        scores = torch.where(self.mask(x.shape[1], x.device)[None], scores, torch.finfo(scores.dtype).min)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


class HeadByHead(SpansByHead):
    """A loop over the heads that starts from the triangle and takes the far past away."""

    def mask(self, length: int, device: torch.device) -> Tensor:
        mask = torch.ones(self.heads, length, length, dtype=torch.bool, device=device).tril()
        for head, span in enumerate(self.lengths):
            far = torch.ones(length, length, dtype=torch.bool, device=device).tril(-span)
            far[:, : self.sink] = False
            mask[head] &= ~far
        return mask


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SpansByHead(), (torch.randn(2, 128, 64),)


VARIANTS = {"loop": Variant(lambda: (HeadByHead(), (torch.randn(2, 128, 64),)))}


def allowed(module: SpansByHead, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    gap = i[:, None] - i[None, :]
    return torch.stack([(gap >= 0) & ((gap < span) | (i[None, :] < module.sink)) for span in module.lengths])
