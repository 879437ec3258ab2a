"""FreeSwim: video tokens see all frames, and in each a window that reaches further on the inner side at a border."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class InwardWindowAttention(nn.Module):
    def __init__(
        self, width: int = 32, frames: int = 3, rows: int = 7, columns: int = 8, window: tuple[int, int] = (2, 2)
    ) -> None:
        super().__init__()
        self.frames, self.rows, self.columns, self.window, self.heads = frames, rows, columns, window, 2
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.scale = math.sqrt(math.log(3120, 1560) / (width // 2))

    def mask(self, device: torch.device) -> Tensor:
        tokens = torch.arange(self.frames * self.rows * self.columns, device=device)
        q_idx, kv_idx = tokens[:, None], tokens[None, :]

        def near(q: Tensor, k: Tensor, size: int, reach: int) -> Tensor:
            before = reach + (reach - (size - 1 - q)).clamp(min=0)
            after = reach + (reach - q).clamp(min=0)
            return (k >= q - before) & (k <= q + after)

        plane = self.rows * self.columns
        q_y, q_x = q_idx % plane // self.columns, q_idx % self.columns
        k_y, k_x = kv_idx % plane // self.columns, kv_idx % self.columns
        return near(q_y, k_y, self.rows, self.window[0]) & near(q_x, k_x, self.columns, self.window[1])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mask = self.mask(x.device)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return out.transpose(1, 2).flatten(2)


class Clamped(InwardWindowAttention):
    def mask(self, device: torch.device) -> Tensor:
        lines = []
        for size, reach in zip((self.rows, self.columns), self.window):
            position = torch.arange(size, device=device)
            center = position.clamp(reach, size - 1 - reach)
            lines.append((position[None, :] - center[:, None]).abs() <= reach)
        plane = torch.einsum("ab,cd->acbd", lines[0].long(), lines[1].long())
        plane = plane.reshape(self.rows * self.columns, self.rows * self.columns)
        return plane.repeat(self.frames, self.frames).bool()


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return InwardWindowAttention(), (torch.randn(2, 168, 32),)


VARIANTS = {"clamped": Variant(lambda: (Clamped(), (torch.randn(2, 168, 32),)))}


def allowed(module: InwardWindowAttention, x: Tensor) -> Tensor:
    keep = torch.ones(module.frames, module.frames, dtype=torch.bool)
    for size, reach in zip((module.rows, module.columns), module.window):
        line = torch.zeros(size, size, dtype=torch.bool)
        for q in range(size):
            first = min(max(q - reach, 0), size - 2 * reach - 1)
            line[q, first : first + 2 * reach + 1] = True
        keep = torch.kron(keep, line)
    return keep
