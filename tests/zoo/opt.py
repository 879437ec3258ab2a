"""OPT: scale on the queries, three-dimensional bmm, additive mask clamped from below by the dtype's minimum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(empty_share=0.465)


class OPTAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size, self.scaling = heads, width // heads, (width // heads) ** -0.5
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def _shape(self, x: Tensor, length: int, batch: int) -> Tensor:
        return x.view(batch, length, self.heads, self.size).transpose(1, 2).contiguous()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        batch, length, width = x.size()
        folded = (batch * self.heads, -1, self.size)
        query = self._shape(self.q_proj(x) * self.scaling, length, batch).view(*folded)
        key = self._shape(self.k_proj(x), -1, batch).view(*folded)
        value = self._shape(self.v_proj(x), -1, batch).view(*folded)
        weights = torch.bmm(query, key.transpose(1, 2))
        weights = weights.view(batch, self.heads, length, length) + attention_mask
        lowest = torch.tensor(torch.finfo(weights.dtype).min, device=weights.device, dtype=weights.dtype)
        weights = torch.max(weights, lowest)
        weights = weights.view(batch * self.heads, length, length)
        weights = nn.functional.softmax(weights, dim=-1)
        output = torch.bmm(nn.functional.dropout(weights, p=0.1, training=self.training), value)
        output = output.view(batch, self.heads, length, self.size).transpose(1, 2)
        return self.out_proj(output.reshape(batch, length, width))


class OPTLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = OPTAttention()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        lowest, length = torch.finfo(x.dtype).min, x.shape[1]
        mask = torch.full((length, length), lowest, device=x.device, dtype=x.dtype)
        cond = torch.arange(mask.size(-1), device=x.device)
        mask.masked_fill_(cond < (cond + 1).view(mask.size(-1), 1), 0)
        causal = mask[None, None, :, :].expand(x.shape[0], 1, length, length)
        inverted = 1.0 - padding[:, None, None, :].expand(-1, 1, length, -1).to(x.dtype)
        expanded = inverted.masked_fill(inverted.to(torch.bool), lowest)
        return self.self_attn(x, expanded + causal)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    padding = torch.ones(2, 160, dtype=torch.long)
    padding[1, 120:] = 0
    return OPTLayer(), (torch.randn(2, 160, 64), padding)


def allowed(module: nn.Module, x: Tensor, padding: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return (i[None, :] <= i[:, None]) & padding.bool()[:, None, None, :]
