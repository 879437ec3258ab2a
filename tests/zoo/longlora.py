"""LongLoRA's shifted groups: half of the heads rolled by half a group, in place, causal attention inside each group."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class ShiftedGroupAttention(nn.Module):
    def __init__(self, hidden: int = 64, heads: int = 4, ratio: float = 0.25) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.ratio = heads, hidden // heads, ratio
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def shift(self, qkv: Tensor, bsz: int, q_len: int, group_size: int) -> Tensor:
        qkv[:, self.num_heads // 2 :] = qkv[:, self.num_heads // 2 :].roll(-group_size // 2, dims=2)
        qkv = qkv.transpose(1, 2).reshape(bsz * (q_len // group_size), group_size, self.num_heads, self.head_dim)
        return qkv.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        bsz, q_len, _ = x.size()
        shape = (bsz, q_len, self.num_heads, self.head_dim)
        query = self.q_proj(x).view(shape).transpose(1, 2)
        key = self.k_proj(x).view(shape).transpose(1, 2)
        value = self.v_proj(x).view(shape).transpose(1, 2)
        group_size = int(q_len * self.ratio)
        num_group = q_len // group_size
        query, key, value = (self.shift(t, bsz, q_len, group_size) for t in (query, key, value))
        weights = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)
        mask = torch.full((q_len, q_len), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        mask = mask[None, None].expand(bsz, 1, q_len, q_len)
        weights = weights + mask[:, :, :group_size, :group_size].repeat(num_group, 1, 1, 1)
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
        output = torch.matmul(weights, value)
        output = output.transpose(1, 2).contiguous().reshape(bsz, q_len, self.num_heads, self.head_dim)
        output[:, :, self.num_heads // 2 :] = output[:, :, self.num_heads // 2 :].roll(group_size // 2, dims=1)
        return self.o_proj(output.reshape(bsz, q_len, self.num_heads * self.head_dim))


class RolledAttention(ShiftedGroupAttention):
    """Out of place: half of the heads rolled and concatenated, groups as an axis, rolled back."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.size()
        heads, group = self.num_heads, int(n * self.ratio)
        out = []
        for p in (self.q_proj, self.k_proj, self.v_proj):
            near, far = p(x).view(b, n, heads, self.head_dim).chunk(2, 2)
            out.append(torch.cat((near, far.roll(-group // 2, dims=1)), 2).view(b, n // group, group, heads, -1))
        q, k, v = out
        scores = torch.einsum("bgihd,bgjhd->bghij", q, k) / math.sqrt(self.head_dim)
        future = torch.ones(group, group, dtype=torch.bool, device=x.device).triu(1)
        probs = scores.masked_fill(future, float("-inf")).softmax(-1)
        result = torch.einsum("bghij,bgjhd->bgihd", probs, v).reshape(b, n, heads, -1)
        near, far = result.chunk(2, 2)
        return self.o_proj(torch.cat((near, far.roll(group // 2, dims=1)), 2).reshape(b, n, -1))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ShiftedGroupAttention(), (torch.randn(2, 160, 64),)


VARIANTS = {"rolled": Variant(lambda: (RolledAttention(), (torch.randn(2, 160, 64),)))}


def reference(module: ShiftedGroupAttention, x: Tensor) -> Tensor:
    """One mask a head: the same group of the rolled position, and not after it there."""
    batch, length, heads = x.shape[0], x.shape[1], module.num_heads
    group = length // 4
    place = torch.stack(
        [(torch.arange(length) - (group // 2 if h >= heads // 2 else 0)) % length for h in range(heads)]
    )
    i, j = place[:, :, None], place[:, None, :]
    keep = (i // group == j // group) & (j <= i)
    q, k, v = (p(x).view(batch, length, heads, -1) for p in (module.q_proj, module.k_proj, module.v_proj))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(module.head_dim)
    probs = scores.masked_fill(~keep, float("-inf")).softmax(-1)
    return module.o_proj(torch.einsum("bhij,bjhd->bihd", probs, v).reshape(x.shape))
