"""What tests of loops are made of: inputs of a few steps, and the parts of a step."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 6


def inputs(count: int) -> list[Tensor]:
    """q, k, v, and a number for each step and channel."""
    drawn = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, STEPS, 8, generator=drawn) for _ in range(4)][:count]


def zero(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def read(q: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bhd,bhde->bhe", q, state)
