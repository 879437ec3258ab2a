"""Recycled attention, a decoding step: keys picked at the last full step, shared by some heads, and newer ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class RecycledStep(nn.Module):
    """`kept` (batch, kv heads, budget) was chosen at the last full step; `new` keys came since."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        index = kept[..., None].expand(-1, -1, -1, k.shape[-1])
        k = torch.cat((k.gather(2, index), new_k), dim=2)
        v = torch.cat((v.gather(2, index), new_v), dim=2)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        weights = torch.matmul(q, k.transpose(2, 3)) / q.shape[-1] ** 0.5
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, v)


class Grouped(RecycledStep):
    """The group as an axis of the queries, keys by index."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
        b, heads, _, d = q.shape
        kv = k.shape[1]
        batch, head = torch.arange(b, device=q.device)[:, None, None], torch.arange(kv, device=q.device)[:, None]
        k, v = torch.cat((k[batch, head, kept], new_k), 2), torch.cat((v[batch, head, kept], new_v), 2)
        scores = torch.einsum("bkgd,bkjd->bkgj", q.view(b, kv, heads // kv, d), k) * d**-0.5
        return torch.einsum("bkgj,bkjd->bkgd", scores.softmax(-1), v).view(b, heads, 1, d)


def _inputs() -> tuple[Tensor, ...]:
    kept = torch.stack([torch.randperm(90)[:24] for _ in range(4)]).view(2, 2, 24)
    return (
        torch.randn(2, 4, 1, 16), torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 16), kept,
        torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16),
    )  # fmt: skip


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return RecycledStep(), _inputs()


VARIANTS = {"grouped": Variant(lambda: (Grouped(), _inputs()))}


def reference(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for b in range(2):
        for h in range(4):
            g = h // 2
            keys, values = (torch.cat((t[b, g, kept[b, g]], u[b, g])) for t, u in ((k, new_k), (v, new_v)))
            out[b, h, 0] = (keys @ q[b, h, 0] * q.shape[-1] ** -0.5).softmax(0) @ values
    return out
