"""RetNet's retention: no softmax, a decay of gamma for each step between query and key; one gamma for each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="j <= i")


class Retention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.group_norm = nn.GroupNorm(heads, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.retain(q, k * k.shape[-1] ** -0.5, v).transpose(1, 2).flatten(2)
        return self.out(self.group_norm(y.flatten(0, 1)).view_as(y))

    def retain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        gamma = 1 - torch.exp2(-5 - torch.arange(self.heads, dtype=q.dtype, device=q.device))
        index = torch.arange(length, device=q.device)
        n, m = index.unsqueeze(1), index.unsqueeze(0)
        decay = (gamma[:, None, None] ** (n - m)) * (n >= m)
        decay = torch.where(torch.isnan(decay), 0.0, decay)
        return (q @ k.transpose(-1, -2)) * decay @ v


class LogDecay(Retention):
    """The decay as the exponential of a multiple of the distance, -inf above the diagonal."""

    def retain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        head = torch.arange(self.heads, dtype=torch.float64, device=q.device)
        log_decay = torch.log(1 - 2 ** (-5 - head)).to(q.dtype)
        index = torch.arange(length, dtype=q.dtype, device=q.device)
        distance = index[:, None] - index[None, :]
        mask = (distance * log_decay.view(-1, 1, 1)).masked_fill(distance < 0, float("-inf")).exp()
        return torch.einsum("bhnm,bhme->bhne", torch.einsum("bhnd,bhmd->bhnm", q, k) * mask, v)


class Learned(Retention):
    """A decay that is learned: a sigmoid's."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.decay = nn.Parameter(torch.linspace(1.0, 5.0, heads))

    def retain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = torch.arange(q.shape[2], device=q.device)
        weights = torch.sigmoid(self.decay)[:, None, None] ** (index[:, None] - index[None]).clamp(min=0)
        return ((q @ k.mT) * weights).tril() @ v


class Recurrent(Retention):
    """The recurrent form: one state, step by step."""

    def retain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gamma = (1 - torch.exp2(-5 - torch.arange(self.heads, dtype=q.dtype, device=q.device))).view(-1, 1, 1)
        state, rows = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
        for n in range(q.shape[2]):
            state = gamma * state + k[:, :, n : n + 1].mT @ v[:, :, n : n + 1]
            rows.append(q[:, :, n : n + 1] @ state)
        return torch.cat(rows, dim=2)


class Chunkwise(Retention):
    """The chunkwise form: pairs inside of a chunk, one state between chunks."""

    def retain(self, q: Tensor, k: Tensor, v: Tensor, size: int = 16) -> Tensor:
        gamma = (1 - torch.exp2(-5 - torch.arange(self.heads, dtype=q.dtype, device=q.device))).view(-1, 1, 1)
        n = torch.arange(size, device=q.device).unsqueeze(1)
        inner_decay = (gamma ** (n - n.T).clamp(min=0)) * (n >= n.T)
        state, chunks = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
        for query, key, value in zip(q.split(size, 2), k.split(size, 2), v.split(size, 2)):
            inner = ((query @ key.mT) * inner_decay) @ value
            cross = (query @ state) * gamma ** (n + 1)
            chunks.append(inner + cross)
            state = gamma**size * state + (key * gamma ** (size - 1 - n)).mT @ value
        return torch.cat(chunks, dim=2)


def _maker(build: type[Retention], length: int = 100) -> Variant:
    return Variant(lambda: (build(), (torch.randn(2, length, 64),)))


make = _maker(Retention).make
VARIANTS = {
    "log_decay": _maker(LogDecay), "learned": _maker(Learned), "recurrent": _maker(Recurrent, 24),
    "chunkwise": _maker(Chunkwise, 64),
}  # fmt: skip


def reference(module: Retention, x: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    gamma = 1 - 0.5 ** torch.arange(5, 5 + module.heads, dtype=x.dtype)
    gamma = torch.sigmoid(module.decay) if isinstance(module, Learned) else gamma
    state = x.new_zeros(x.shape[0], module.heads, q.shape[-1], v.shape[-1])
    rows = []
    for t in range(x.shape[1]):
        state = gamma[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :] / q.shape[-1] ** 0.5
        rows.append((q[:, :, t, None] @ state).squeeze(2))
    y = torch.stack(rows, 1).flatten(2)
    return module.out(module.group_norm(y.flatten(0, 1)).view_as(y))
