"""DreamVLA: steps of context, dream and action tokens; filled block by block into a frozen additive mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class BlockwiseMask(nn.Module):
    def __init__(
        self, width: int = 32, steps: int = 5, context: int = 11, dream: int = 14, action: int = 3, heads: int = 2
    ) -> None:
        super().__init__()
        self.steps, self.context, self.dream, self.action, self.heads = steps, context, dream, action, heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def mask(self, device: torch.device) -> Tensor:
        span = self.context + self.dream + self.action
        total = span * self.steps
        mask = torch.full((total, total), float("-inf"), device=device)
        for t in range(self.steps):
            start = t * span
            for s in range(t + 1):
                mask[start : start + span, s * span : s * span + self.context] = 0.0
            action = start + self.context + self.dream
            mask[action : start + span, start + self.context : action] = 0.0
        return mask

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (t.view(batch, length, self.heads, -1).permute(0, 2, 1, 3) for t in (q, k, v))
        w = torch.matmul(q, k.transpose(-1, -2)) / (v.size(-1) ** 0.5)
        w = torch.softmax(w + self.mask(x.device), dim=-1)
        return self.c_proj(torch.matmul(w, v).permute(0, 2, 1, 3).reshape(batch, length, width))


class ByIndex(BlockwiseMask):
    def mask(self, device: torch.device) -> Tensor:
        span = self.context + self.dream + self.action
        token = torch.arange(span * self.steps, device=device)
        step, place = token // span, token % span
        seen = (step[None, :] <= step[:, None]) & (place < self.context)[None, :]
        acts = (place >= self.context + self.dream)[:, None] & (step[:, None] == step[None, :])
        dreams = (place >= self.context) & (place < self.context + self.dream)
        keep = seen | (acts & dreams[None, :])
        return torch.zeros(keep.shape, device=device).masked_fill(~keep, float("-inf"))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return BlockwiseMask(), (torch.randn(2, 140, 32),)


VARIANTS = {"index": Variant(lambda: (ByIndex(), (torch.randn(2, 140, 32),)))}


def allowed(module: BlockwiseMask, x: Tensor) -> Tensor:
    a, o, p = module.context, module.dream, module.action
    inside = torch.zeros(a + o + p, a + o + p, dtype=torch.bool)
    inside[:, :a] = True
    before = inside.clone()
    inside[a + o :, a : a + o] = True
    steps = torch.arange(module.steps)
    diagonal, lower = torch.eye(module.steps, dtype=torch.bool), steps[None, :] < steps[:, None]
    return torch.kron(diagonal, inside) | torch.kron(lower, before)
