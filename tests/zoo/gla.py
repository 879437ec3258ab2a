"""Gated linear attention: every channel of the keys decays by a gate of its own, which the data decide."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="j <= i")


class GatedLinearAttention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.v_proj, self.g_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.gk_proj = nn.Sequential(nn.Linear(width, 16, bias=False), nn.Linear(16, width // 2))
        self.o_proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        gk = nn.functional.logsigmoid(self.gk_proj(x)) / 16
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x), gk)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gk = self.project(x)
        o = self.attend(q * q.shape[-1] ** -0.5, k, v, gk).transpose(1, 2).flatten(2)
        return self.o_proj(o * nn.functional.silu(self.g_proj(x)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, gk: Tensor) -> Tensor:
        c = gk.cumsum(dim=2)
        decay = torch.exp(c[:, :, :, None, :] - c[:, :, None, :, :])
        scores = (q[:, :, :, None] * k[:, :, None] * decay).sum(-1)
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~mask, 0) @ v


class Einsum(GatedLinearAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, gk: Tensor) -> Tensor:
        c = gk.cumsum(dim=2)
        keep = torch.ones(q.shape[2], q.shape[2], device=q.device).tril().bool()
        between = (c.unsqueeze(3) - c.unsqueeze(2)).masked_fill(~keep[..., None], float("-inf"))
        return torch.einsum("bhid,bhjd,bhijd,bhje->bhie", q, k, between.exp(), v)


class Chunks(GatedLinearAttention):
    """In chunks: decays from and to the start of a chunk on queries and keys, one state between chunks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, gk: Tensor, size: int = 10) -> Tensor:
        q, k, v, gk = (x.unflatten(2, (-1, size)) for x in (q, k, v, gk))
        sums = gk.cumsum(dim=3)
        inside = ((q * sums.exp()) @ (k * (-sums).exp()).mT).tril() @ v
        state, rows = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
        for i in range(q.shape[2]):
            total = sums[:, :, i, -1:]
            rows.append(inside[:, :, i] + (q[:, :, i] * sums[:, :, i].exp()) @ state)
            state = total.exp().mT * state + (k[:, :, i] * (total - sums[:, :, i]).exp()).mT @ v[:, :, i]
        return torch.cat(rows, dim=2)


def _maker(build: type[GatedLinearAttention]) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, 50, 32),)))


make = _maker(GatedLinearAttention).make
VARIANTS = {"einsum": _maker(Einsum), "chunks": _maker(Chunks)}


def reference(module: GatedLinearAttention, x: Tensor) -> Tensor:
    q, k, v, gk = module.project(x)
    state = x.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    rows = []
    for t in range(x.shape[1]):
        state = state * gk[:, :, t].exp()[..., None] + k[:, :, t, :, None] * v[:, :, t, None]
        rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, t] * q.shape[-1] ** -0.5, state))
    o = torch.stack(rows, 1).flatten(2)
    return module.o_proj(o * nn.functional.silu(module.g_proj(x)))
