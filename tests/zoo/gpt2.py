"""GPT-2: fused qkv split, causal mask sliced from a lower-triangular buffer, `where` with the dtype's minimum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(empty_share=0.45)


class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.1))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view((*x.size()[:-1], self.nf))


class GPT2Attention(nn.Module):
    bias: Tensor

    def __init__(self, width: int = 64, heads: int = 4, positions: int = 256) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        mask = torch.tril(torch.ones((positions, positions), dtype=torch.bool)).view(1, 1, positions, positions)
        self.register_buffer("bias", mask, persistent=False)
        self.c_attn = Conv1D(3 * width, width)
        self.c_proj = Conv1D(width, width)
        self.attn_dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.width // self.heads)
        query, key, value = self.c_attn(hidden_states).split(self.width, dim=2)
        query, key, value = (x.view(shape).transpose(1, 2) for x in (query, key, value))
        weights = torch.matmul(query, key.transpose(-1, -2))
        weights = weights / torch.full([], value.size(-1) ** 0.5, dtype=weights.dtype, device=weights.device)
        rows, columns = query.size(-2), key.size(-2)
        causal = self.bias[:, :, columns - rows : columns, :columns]
        lowest = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype, device=weights.device)
        weights = torch.where(causal, weights.to(weights.dtype), lowest)
        weights = self.attn_dropout(nn.functional.softmax(weights, dim=-1).type(value.dtype))
        output = torch.matmul(weights, value).transpose(1, 2)
        return self.c_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return GPT2Attention(), (torch.randn(2, 160, 64),)


def allowed(module: nn.Module, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return i[None, :] <= i[:, None]
