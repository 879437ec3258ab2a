"""TokenSelect, a decoding step: first tokens, tokens that the heads voted for together, and recent tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class SelectiveDecode(nn.Module):
    """`selected` (tokens, sorted) comes from the vote. The kernel's head map is h mod kv heads, not h // group."""

    def __init__(self, first: int = 4, recent: int = 8) -> None:
        super().__init__()
        self.first, self.recent = first, recent

    def forward(self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Tensor:
        """`q` (batch, heads, chunk, head_dim); the cache (batch, kv heads, length, head_dim)."""
        length, chunk = k.shape[2], q.shape[2]
        token = torch.arange(length, device=q.device)
        index = torch.cat((token[: self.first], selected, token[length - self.recent - chunk :]))
        k, v = k[:, :, index], v[:, :, index]
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        future = index[None, :] > token[length - chunk :, None]
        return scores.masked_fill(future, float("-inf")).softmax(-1) @ v


class Masked(SelectiveDecode):
    """All of the cache, and a mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Tensor:
        length, chunk = k.shape[2], q.shape[2]
        token = torch.arange(length, device=q.device)
        kept = torch.zeros(length, dtype=torch.bool, device=q.device).scatter(0, selected, True)
        kept = kept | (token < self.first) | (token >= length - self.recent - chunk)
        keep = kept[None, :] & (token[None, :] <= token[length - chunk :, None])
        kv = torch.arange(q.shape[1], device=q.device) % k.shape[1]
        return nn.functional.scaled_dot_product_attention(q, k[:, kv], v[:, kv], attn_mask=keep)


def _inputs() -> tuple[Tensor, ...]:
    selected = (4 + torch.randperm(100)[:20]).sort().values
    return torch.randn(1, 4, 3, 16), torch.randn(1, 2, 120, 16), torch.randn(1, 2, 120, 16), selected


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SelectiveDecode(), _inputs()


VARIANTS = {"masked": Variant(lambda: (Masked(), _inputs()))}


def reference(module: SelectiveDecode, q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    length, chunk = k.shape[2], q.shape[2]
    tokens = {*range(module.first), *selected.tolist(), *range(length - module.recent - chunk, length)}
    for h in range(q.shape[1]):
        for i in range(chunk):
            keys = sorted(t for t in tokens if t <= length - chunk + i)
            kv = h % k.shape[1]
            probs = (k[0, kv, keys] @ q[0, h, i] * q.shape[-1] ** -0.5).softmax(0)
            out[0, h, i] = probs @ v[0, kv, keys]
    return out
