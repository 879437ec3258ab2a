"""EE-MLLM's composite attention: only text asks; it sees every visual token, and the text before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class CompositeAttention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def mask(self, text: int, visual: int, device: torch.device) -> Tensor:
        """Additive: zeros for the visual columns, a triangle for the text."""
        causal = torch.full((text, text), float("-inf"), device=device).triu(1)
        return torch.cat([torch.zeros(text, visual, device=device), causal], dim=1)

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        every = torch.cat([visual, text], dim=1)
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.q_proj, text), (self.k_proj, every), (self.v_proj, every))
        )
        mask = self.mask(text.shape[1], visual.shape[1], text.device).to(q.dtype)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


class LowerTriangle(CompositeAttention):
    """The causal mask of the whole sequence with the visual rows cut away."""

    def mask(self, text: int, visual: int, device: torch.device) -> Tensor:
        whole = torch.ones(visual + text, visual + text, dtype=torch.bool, device=device).tril()
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(text, visual + text, device=device).masked_fill(~whole[visual:], lowest)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return CompositeAttention(), (torch.randn(2, 40, 32), torch.randn(2, 96, 32))


VARIANTS = {"cut": Variant(lambda: (LowerTriangle(), (torch.randn(2, 40, 32), torch.randn(2, 96, 32))))}


def allowed(module: CompositeAttention, visual: Tensor, text: Tensor) -> Tensor:
    i, j = torch.arange(text.shape[1])[:, None], torch.arange(visual.shape[1] + text.shape[1])[None, :]
    return (j < visual.shape[1]) | (j - visual.shape[1] <= i)
