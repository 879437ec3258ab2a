"""`scaled_dot_product_attention` with a boolean mask: a dilated causal pattern of its own for every head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="(i - j) % (h + 1) == 0 and j <= i", empty_share=0.45)


class DilatedSDPA(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        i = torch.arange(x.shape[1], device=x.device)
        gap = i[:, None] - i[None, :]
        dilation = torch.arange(1, self.heads + 1, device=x.device)[:, None, None]
        keep = (gap >= 0) & (gap % dilation == 0)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return out.transpose(1, 2).flatten(2)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return DilatedSDPA(), (torch.randn(2, 160, 64),)


def allowed(module: DilatedSDPA, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    gap = i[:, None] - i[None, :]
    return torch.stack([(gap >= 0) & (gap % (h + 1) == 0) for h in range(module.heads)])
