"""StarCoder: one key-value head; the query heads are folded into the query rows of one baddbmm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect

EXPECT = Expect()


class GPTBigCodeAttention(nn.Module):
    bias: Tensor

    def __init__(self, width: int = 64, heads: int = 4, positions: int = 256) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = width, heads, width // heads
        self.register_buffer("bias", torch.tril(torch.ones((positions, positions), dtype=torch.bool)))
        self.c_attn = nn.Linear(width, width + 2 * self.head_dim)
        self.c_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key_value = self.c_attn(hidden_states).split((self.embed_dim, 2 * self.head_dim), dim=2)
        key, value = key_value.split((self.head_dim, self.head_dim), dim=-1)
        key = key.transpose(-1, -2)
        query_shape = query.shape
        batch, key_length, query_length = query_shape[0], key.size(-1), query_shape[1]
        attn_shape = (batch, query_length, self.num_heads, key_length)
        attn_view = (batch, query_length * self.num_heads, key_length)
        query = query.reshape(batch, query_length * self.num_heads, self.head_dim)
        initial = torch.empty(attn_view, device=query.device, dtype=query.dtype)
        scores = torch.baddbmm(initial, query, key, beta=0, alpha=self.head_dim**-0.5).view(attn_shape)
        mask = self.bias[None, key_length - query_length : key_length, :key_length].unsqueeze(2)
        mask_value = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
        scores = torch.where(mask, scores, mask_value)
        weights = nn.functional.softmax(scores, dim=-1)
        output = torch.bmm(weights.view(attn_view), value).view(query_shape)
        return self.c_proj(output)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return GPTBigCodeAttention(), (torch.randn(2, 128, 64),)


def reference(module: GPTBigCodeAttention, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = module.c_attn(x).split((module.embed_dim, module.head_dim, module.head_dim), -1)
    scores = torch.einsum("bihd,bjd->bhij", q.view(batch, length, module.num_heads, -1), k) * module.head_dim**-0.5
    i = torch.arange(length)
    probs = scores.masked_fill(i[None, :] > i[:, None], float("-inf")).softmax(-1)
    return module.c_proj(torch.einsum("bhij,bjd->bihd", probs, v).reshape(x.shape))
