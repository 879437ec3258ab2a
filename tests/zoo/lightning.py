"""Lightning attention: a fixed decay for each head, no softmax, no denominator; its mask in several spellings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="j <= i")


def slopes(heads: int) -> list[float]:
    return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]


class Lightning(nn.Module):
    """exp of the index difference, -inf above the diagonal."""

    slope: Tensor

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("slope", torch.tensor(slopes(heads)).view(heads, 1, 1))

    def decay(self, n: int, x: Tensor) -> Tensor:
        index = torch.arange(n, device=x.device)
        distance = (index[:, None] - index[None, :]).to(x.dtype)
        mask = torch.where(distance >= 0, -self.slope * distance, float("-inf"))
        return torch.exp(mask)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = nn.functional.silu(self.qkv(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.matmul(q, k.transpose(2, 3)).float() * self.decay(x.shape[1], x)
        return self.out(torch.matmul(weights.to(v.dtype), v).transpose(1, 2).flatten(2))


class Triangle(Lightning):
    """-inf by triu, added."""

    def decay(self, n: int, x: Tensor) -> Tensor:
        index = torch.arange(n, device=x.device)
        distance = -torch.abs(index[None, :] - index[:, None]) * self.slope
        return torch.exp(distance + torch.triu(torch.full((n, n), float("-inf"), device=x.device), diagonal=1))


class Multiplied(Lightning):
    """exp times a triangle of ones."""

    def decay(self, n: int, x: Tensor) -> Tensor:
        index = torch.arange(n, device=x.device)
        difference = (index[:, None] - index[None, :]).clamp(min=0)
        return torch.exp(-self.slope * difference) * torch.tril(torch.ones(n, n, device=x.device))


class Undecayed(Lightning):
    """The variant without decay."""

    def decay(self, n: int, x: Tensor) -> Tensor:
        return torch.tril(torch.ones(n, n, device=x.device))


class Blocks(Lightning):
    """A loop over blocks of positions, as transformers' MiniMax runs it."""

    def forward(self, x: Tensor, size: int = 16) -> Tensor:
        q, k, v = nn.functional.silu(self.qkv(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        index = torch.arange(size, device=x.device) + 1
        query_decay = torch.exp(-self.slope * index[:, None])
        key_decay = torch.exp(-self.slope * (size - index[:, None]))
        diagonal = self.decay(size, x)
        state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], device=v.device, dtype=v.dtype)
        blocks = []
        for start in range(0, x.shape[1], size):
            end = min(start + size, x.shape[1])
            query, key, value = q[:, :, start:end], k[:, :, start:end], v[:, :, start:end]
            intra = torch.matmul(torch.matmul(query, key.transpose(-1, -2)) * diagonal, value)
            inter = torch.matmul(query * query_decay, state)
            blocks.append(inter + intra)
            update = torch.matmul((key * key_decay).transpose(-1, -2), value)
            state = state * torch.exp(-self.slope * (end - start)) + update
        return self.out(torch.cat(blocks, dim=-2).transpose(1, 2).flatten(2))


class Buffers(Lightning):
    """The same, its decays kept as buffers, the pairs' filled by a loop; the last block is shorter."""

    query_decay: Tensor
    key_decay: Tensor
    diagonal_decay: Tensor

    def __init__(self, width: int = 64, heads: int = 4, size: int = 16) -> None:
        super().__init__(width, heads)
        self.size = size
        index = torch.arange(size) + 1
        diagonal = torch.zeros(1, heads, size, size)
        for i in range(size):
            for j in range(i + 1):
                diagonal[0, :, i, j] = torch.exp(-self.slope.flatten() * (i - j))
        self.register_buffer("query_decay", torch.exp(-self.slope * index[:, None]))
        self.register_buffer("key_decay", torch.exp(-self.slope * (size - index[:, None])))
        self.register_buffer("diagonal_decay", diagonal)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = nn.functional.silu(self.qkv(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], device=v.device, dtype=v.dtype)
        blocks = []
        for i in range((length + self.size - 1) // self.size):
            start, end = i * self.size, min((i + 1) * self.size, length)
            query, key, value = q[:, :, start:end], k[:, :, start:end], v[:, :, start:end]
            n = end - start
            intra = torch.matmul(torch.matmul(query, key.mT) * self.diagonal_decay[:, :, :n, :n], value)
            blocks.append(torch.matmul(query * self.query_decay[:, :n], state) + intra)
            update = torch.matmul((key * self.key_decay[:, -n:]).mT, value)
            state = state * torch.exp(-self.slope * n) + update
        return self.out(torch.cat(blocks, dim=-2).transpose(1, 2).flatten(2))


def _maker(build: type[Lightning], length: int = 100) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, length, 64),)))


make = _maker(Lightning).make
VARIANTS = {
    "triangle": _maker(Triangle), "multiplied": _maker(Multiplied), "undecayed": _maker(Undecayed),
    "blocks": _maker(Blocks, 64), "buffers": _maker(Buffers, 60),
}  # fmt: skip


def reference(module: Lightning, x: Tensor) -> Tensor:
    q, k, v = nn.functional.silu(module.qkv(x)).unflatten(-1, (3, module.heads, -1)).unbind(2)
    decay = torch.exp(-module.slope.flatten()) ** (0 if isinstance(module, Undecayed) else 1)
    state, rows = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(x.shape[1]):
        state = decay[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append(torch.einsum("bhd,bhde->bhe", q[:, t], state))
    return module.out(torch.stack(rows, 1).flatten(2))
