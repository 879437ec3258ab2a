"""Video-CCAM: learned queries, spread evenly over time, see the frames up to their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class CausalCrossAttention(nn.Module):
    def __init__(self, width: int = 32, queries: int = 48, frames: int = 6, tokens: int = 25, heads: int = 2) -> None:
        super().__init__()
        self.queries, self.frames, self.tokens, self.heads = queries, frames, tokens, heads
        self.query = nn.Parameter(torch.randn(1, queries, width))
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(width, width) for _ in range(4))

    def mask(self, device: torch.device) -> Tensor:
        """True: not seen, as nn.MultiheadAttention counts."""
        mask = torch.ones(self.queries, self.frames * self.tokens, dtype=torch.bool, device=device)
        each = self.queries // self.frames
        for frame in range(self.frames):
            mask[frame * each : (frame + 1) * each, : (frame + 1) * self.tokens] = False
        return mask

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(self.query.expand(x.shape[0], -1, -1))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, self.k_proj(x), self.v_proj(x)))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(self.mask(x.device), float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class ByIndex(CausalCrossAttention):
    def mask(self, device: torch.device) -> Tensor:
        last = torch.arange(self.queries, device=device) * self.frames // self.queries
        frame = torch.arange(self.frames, device=device).repeat_interleave(self.tokens)
        return frame[None, :] > last[:, None]


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return CausalCrossAttention(), (torch.randn(2, 150, 32),)


VARIANTS = {
    "index": Variant(lambda: (ByIndex(), (torch.randn(2, 150, 32),))),
    "uneven": Variant(lambda: (ByIndex(queries=50), (torch.randn(2, 150, 32),))),
}


def allowed(module: CausalCrossAttention, x: Tensor) -> Tensor:
    rows = [[f <= q * module.frames // module.queries for f in range(module.frames)] for q in range(module.queries)]
    return torch.tensor(rows).repeat_interleave(module.tokens, dim=1)
