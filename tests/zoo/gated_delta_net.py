"""The gated delta rule as transformers' Qwen3-Next runs it step by step: the state decays, then the delta rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="j <= i")


class GatedDeltaNet(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.ba, self.out = nn.Linear(width, 3 * width), nn.Linear(width, 2 * heads), nn.Linear(width, width)
        self.rate = nn.Parameter(torch.rand(heads))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, g, beta: (batch, length, heads, ..)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        beta, alpha = self.ba(x).chunk(2, -1)
        return q, k, v, -self.rate.exp() * nn.functional.softplus(alpha), beta.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.project(x)).flatten(2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        query, key = unit(query), unit(key)
        query, key, value, beta, g = (x.transpose(1, 2).contiguous() for x in (query, key, value, beta, g))
        state = torch.zeros(*key.shape[:2], key.shape[-1], value.shape[-1], dtype=value.dtype, device=value.device)
        out = torch.zeros_like(value)
        query = query * query.shape[-1] ** -0.5
        for i in range(query.shape[2]):
            q, k, v = query[:, :, i], key[:, :, i], value[:, :, i]
            decay = g[:, :, i].exp().unsqueeze(-1).unsqueeze(-1)
            rate = beta[:, :, i].unsqueeze(-1)
            state = state * decay
            memory = (state * k.unsqueeze(-1)).sum(dim=-2)
            delta = (v - memory) * rate
            state = state + k.unsqueeze(-1) * delta.unsqueeze(-2)
            out[:, :, i] = (state * q.unsqueeze(-1)).sum(dim=-2)
        return out.transpose(1, 2).contiguous()


class Chunked(GatedDeltaNet):
    """In chunks, as it runs on whole sequences: two triangular solves, then a loop over chunks with a state."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, size: int = 8) -> Tensor:
        length = query.shape[1]
        query, key, value, beta, g = (x.transpose(1, 2).contiguous() for x in (query, key, value, beta, g))
        query, key = unit(query) * query.shape[-1] ** -0.5, unit(key)
        rest = (size - length % size) % size
        query, key, value = (nn.functional.pad(x, (0, 0, 0, rest)) for x in (query, key, value))
        beta, g = (nn.functional.pad(x, (0, rest)) for x in (beta, g))
        v_beta, k_beta = value * beta.unsqueeze(-1), key * beta.unsqueeze(-1)
        query, key, k_beta, v_beta = (x.unflatten(2, (-1, size)) for x in (query, key, k_beta, v_beta))
        sums = g.unflatten(2, (-1, size)).cumsum(-1)
        upper = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
        decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(upper, float("-inf")).exp()
        system, inside = (k_beta @ key.mT) * decay, (query @ key.mT) * decay
        solve = torch.linalg.solve_triangular
        values = solve(system, v_beta, upper=False, unitriangular=True)
        seen = solve(system, k_beta * sums.exp().unsqueeze(-1), upper=False, unitriangular=True)
        state = value.new_zeros(*value.shape[:2], key.shape[-1], value.shape[-1])
        out = torch.zeros_like(values)
        query, key = query * sums.exp().unsqueeze(-1), key * (sums[..., -1:] - sums).exp().unsqueeze(-1)
        whole = sums[..., -1].exp()[..., None, None]
        for i in range(values.shape[2]):
            new = values[:, :, i] - seen[:, :, i] @ state
            out[:, :, i] = query[:, :, i] @ state + inside[:, :, i] @ new
            state = state * whole[:, :, i] + key[:, :, i].mT @ new
        return out.flatten(2, 3)[:, :, :length].transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def _maker(build: type[GatedDeltaNet], length: int) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, length, 32),)))


make = _maker(GatedDeltaNet, 24).make
VARIANTS = {"chunked": _maker(Chunked, 30)}


def reference(module: GatedDeltaNet, x: Tensor) -> Tensor:
    q, k, v, g, beta = (t.transpose(1, 2) for t in module.project(x))
    q, k, c = unit(q) * q.shape[-1] ** -0.5, unit(k), g.cumsum(-1)
    decay = (c[..., :, None] - c[..., None, :]).exp().tril()
    system = torch.eye(x.shape[1], dtype=x.dtype) + (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    written = torch.linalg.solve_triangular(system, beta[..., None] * v, upper=False)
    return module.out(((q @ k.mT * decay) @ written).transpose(1, 2).flatten(2))
