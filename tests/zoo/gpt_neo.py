"""GPT-Neo's local layer: the window is the exclusive or of two lower triangles; no scale; scores in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(empty_share=0.81)


class GPTNeoLocalAttention(nn.Module):
    bias: Tensor

    def __init__(self, width: int = 64, heads: int = 4, window: int = 16, positions: int = 256) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        bias = torch.tril(torch.ones((positions, positions), dtype=torch.bool)).view(1, 1, positions, positions)
        self.register_buffer("bias", torch.bitwise_xor(bias, torch.tril(bias, -window)), persistent=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.view((*x.size()[:-1], self.heads, self.size)).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._split(self.q_proj(x)), self._split(self.k_proj(x)), self._split(self.v_proj(x))
        query, key = query.to(torch.float32), key.to(torch.float32)
        weights = torch.matmul(query, key.transpose(-1, -2))
        rows, columns = query.size(-2), key.size(-2)
        causal_mask = self.bias[:, :, columns - rows : columns, :columns]
        mask_value = torch.tensor(torch.finfo(weights.dtype).min, dtype=weights.dtype, device=weights.device)
        weights = torch.where(causal_mask, weights, mask_value)
        weights = nn.functional.softmax(weights, dim=-1).to(value.dtype)
        output = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        return self.out_proj(output.view((*output.size()[:-2], self.heads * self.size)))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return GPTNeoLocalAttention(), (torch.randn(2, 160, 64),)


def allowed(module: nn.Module, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    gap = i[:, None] - i[None, :]
    return (gap >= 0) & (gap < 16)
