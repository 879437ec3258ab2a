"""Qwen3: root-mean-square norms on queries and keys, `scaled_dot_product_attention` causal with grouped heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="j <= i", empty_share=0.45)


class Qwen3RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


class Qwen3Attention(nn.Module):
    def __init__(self, hidden: int = 64, heads: int = 4, kv_heads: int = 1, size: int = 16) -> None:
        super().__init__()
        self.size = size
        self.q_proj = nn.Linear(hidden, heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, hidden, bias=False)
        self.q_norm, self.k_norm = Qwen3RMSNorm(size), Qwen3RMSNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.size)
        query = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        value = self.v_proj(x).view(shape).transpose(1, 2)
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=0.0, scale=self.size**-0.5, is_causal=True, enable_gqa=True
        )
        return self.o_proj(output.transpose(1, 2).reshape(*x.shape[:-1], -1))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Qwen3Attention(), (torch.randn(2, 160, 64),)


def allowed(module: nn.Module, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return i[None, :] <= i[:, None]
