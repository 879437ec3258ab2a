"""SAISA: text before and after an image; only text rows ask, causally, and each sees itself where it really stands."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class NoVisualQueries(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, start: int = 13, visual: int = 60) -> None:
        super().__init__()
        self.heads, self.start, self.visual = heads, start, visual
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def mask(self, length: int, device: torch.device) -> Tensor:
        causal = torch.tril(torch.ones(length, length, dtype=torch.bool, device=device))
        return torch.cat([causal[: self.start], causal[self.start + self.visual :]], dim=0)

    def forward(self, x: Tensor) -> Tensor:
        text = torch.cat([x[:, : self.start], x[:, self.start + self.visual :]], dim=1)
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.q_proj, text), (self.k_proj, x), (self.v_proj, x))
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x.shape[1], x.device))
        return out.transpose(1, 2).flatten(2)


class Positions(NoVisualQueries):
    """By the positions of the text tokens, as kept for the rotary embedding."""

    def mask(self, length: int, device: torch.device) -> Tensor:
        positions = torch.arange(length, device=device)
        rows = torch.cat([positions[: self.start], positions[self.start + self.visual :]])
        return rows[:, None] >= positions[None, :]


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return NoVisualQueries(), (torch.randn(2, 140, 32),)


VARIANTS = {"positions": Variant(lambda: (Positions(), (torch.randn(2, 140, 32),)))}


def allowed(module: NoVisualQueries, x: Tensor) -> Tensor:
    rows = [i for i in range(x.shape[1]) if not module.start <= i < module.start + module.visual]
    return torch.tensor([[j <= i for j in range(x.shape[1])] for i in rows])
