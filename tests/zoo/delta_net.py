"""The delta rule: a step takes from the state what its key finds there, and writes its value instead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="j <= i")


class DeltaNet(nn.Module):
    """A loop over the steps, its rows stacked."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.beta = nn.Linear(width, 3 * width), nn.Linear(width, heads)
        self.out = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(nn.functional.silu(k), dim=-1)
        return q, k, v, self.beta(x).sigmoid().transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.project(x)).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
        rows = []
        for t in range(q.shape[2]):
            found = torch.einsum("bhd,bhde->bhe", k[:, :, t], state)
            written = beta[:, :, t, None] * (v[:, :, t] - found)
            state = state + torch.einsum("bhd,bhe->bhde", k[:, :, t], written)
            rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
        return torch.stack(rows, 2)


class Written(DeltaNet):
    """The rows written into a tensor, the steps as slices, the update as two products of matrices."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        out, state = torch.empty_like(v.contiguous()), v.new_zeros(*v.shape[:2], q.shape[-1], v.shape[-1])
        for t in range(q.shape[2]):
            key, value, rate = k[:, :, t : t + 1], v[:, :, t : t + 1], beta[:, :, t, None, None]
            state = state - rate * key.mT @ (key @ state) + rate * (key.mT @ value)
            out[:, :, t : t + 1] = q[:, :, t : t + 1] @ state
        return out


def _maker(build: type[DeltaNet]) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, 24, 32),)))


make = _maker(DeltaNet).make
VARIANTS = {"written": _maker(Written)}


def reference(module: DeltaNet, x: Tensor) -> Tensor:
    """Without a state: what is written at each step is the solution of a triangular system."""
    q, k, v, beta = module.project(x)
    system = torch.eye(x.shape[1], dtype=x.dtype) + (beta[..., None] * (k @ k.mT)).tril(-1)
    written = torch.linalg.solve_triangular(system, beta[..., None] * v, upper=False)
    return module.out(((q @ k.mT).tril() @ written).transpose(1, 2).flatten(2))
