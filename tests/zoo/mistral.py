"""Mistral: rotary positions, grouped keys and values by expand, a causal window filled in place, softmax in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect(mask="i - j < 64 and j <= i", empty_share=0.6)


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    batch, heads, length, size = x.shape
    if n_rep == 1:
        return x
    return x[:, :, None, :, :].expand(batch, heads, n_rep, length, size).reshape(batch, heads * n_rep, length, size)


class MistralAttention(nn.Module):
    inv_freq: Tensor

    def __init__(self, hidden: int = 64, heads: int = 4, kv_heads: int = 2, window: int = 64) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.window = heads, kv_heads, hidden // heads, window
        self.q_proj = nn.Linear(hidden, heads * self.size, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, hidden, bias=False)
        self.register_buffer("inv_freq", 1.0 / (10000.0 ** (torch.arange(0, self.size, 2) / self.size)))

    def causal_mask(self, x: Tensor, positions: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device)
        keys = torch.arange(length, device=x.device)
        diagonal = keys > positions.reshape(-1, 1)
        diagonal.bitwise_or_(keys <= (positions.reshape(-1, 1) - self.window))
        mask *= diagonal
        return mask[None, None, :, :].expand(x.shape[0], 1, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        positions = torch.arange(length, device=x.device)
        query = self.q_proj(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        key = self.k_proj(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        value = self.v_proj(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        angles = positions[:, None].to(self.inv_freq.dtype) * self.inv_freq[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        query = query * cos + rotate_half(query) * sin
        key = key * cos + rotate_half(key) * sin
        key, value = repeat_kv(key, self.heads // self.kv_heads), repeat_kv(value, self.heads // self.kv_heads)
        weights = torch.matmul(query, key.transpose(2, 3)) * self.size**-0.5
        weights = weights + self.causal_mask(x, positions)[:, :, :, : key.shape[-2]]
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
        weights = nn.functional.dropout(weights, p=0.0, training=self.training)
        output = torch.matmul(weights, value).transpose(1, 2).contiguous()
        return self.o_proj(output.reshape(batch, length, -1).contiguous())


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return MistralAttention(), (torch.randn(2, 160, 64),)


def allowed(module: nn.Module, x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    gap = i[:, None] - i[None, :]
    return (gap >= 0) & (gap < 64)
