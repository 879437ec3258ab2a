"""HiP: for each block of queries a table of key blocks; selected blocks, sinks and a window, causal inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class HierarchicallyPruned(nn.Module):
    """The table (batch, heads, query blocks, slots) is an input; -1 is an empty slot."""

    def __init__(self, q_block: int = 16, k_block: int = 8, sink: int = 8, window: int = 24) -> None:
        super().__init__()
        self.q_block, self.k_block, self.sink, self.window = q_block, k_block, sink, window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        n, count = q.shape[2], q.shape[2] // self.k_block
        chosen = torch.zeros(*table.shape[:3], count + 1, dtype=torch.bool, device=q.device)
        chosen = chosen.scatter(3, torch.where(table < 0, count, table), True)[..., :count]
        mask = chosen.repeat_interleave(self.q_block, 2).repeat_interleave(self.k_block, 3)
        i, j = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)[None, :]
        mask = (mask | (j < self.sink) | (i - j < self.window)) & (j <= i)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


class Gathered(HierarchicallyPruned):
    """Blocks gathered by the table, without sinks and window: positions tell what is causal, and what is empty."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        b, h, n, d = q.shape
        size, slots = self.k_block, table.shape[-1]
        offset = torch.arange(size, device=q.device)
        index = (table.clamp(min=0)[..., None] * size + offset).flatten(3)  # b h blocks slots*size
        valid = (table >= 0)[..., None].expand(*table.shape, size).flatten(3)
        batch, head = (
            torch.arange(b, device=q.device)[:, None, None, None],
            torch.arange(h, device=q.device)[:, None, None],
        )
        keys, values = k[batch, head, index], v[batch, head, index]
        rows = torch.arange(n, device=q.device).view(1, 1, -1, self.q_block, 1)
        keep = valid[:, :, :, None, :] & (index[:, :, :, None, :] <= rows)
        scores = torch.einsum("bhtid,bhtjd->bhtij", q.unflatten(2, (-1, self.q_block)), keys) * d**-0.5
        probs = scores.masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1)
        assert probs.shape[-1] == slots * size
        return torch.einsum("bhtij,bhtjd->bhtid", probs, values).flatten(2, 3)


def _inputs() -> tuple[Tensor, ...]:
    table = torch.full((1, 2, 6, 4), -1)
    for h in range(2):
        for t in range(6):
            last = (t + 1) * 2  # key blocks that a block of queries may see
            picked = torch.randperm(last)[:3]
            table[0, h, t, : len(picked)] = picked
            table[0, h, t, 3] = t * 2  # its own first block: no row is empty
            table[0, h, t, : len(picked)][picked == t * 2] = -1
    return (*(torch.randn(1, 2, 96, 16) for _ in range(3)), table)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return HierarchicallyPruned(), _inputs()


VARIANTS = {"gathered": Variant(lambda: (Gathered(), _inputs()), Expect(regrouped=True))}


def reference(module: HierarchicallyPruned, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                blocks = {int(t) for t in table[b, h, i // module.q_block] if t >= 0}
                extra = not isinstance(module, Gathered)
                keys = [
                    j for j in range(i + 1)
                    if j // module.k_block in blocks or (extra and (j < module.sink or i - j < module.window))
                ]  # fmt: skip
                probs = (k[b, h, keys] @ q[b, h, i] * q.shape[-1] ** -0.5).softmax(0)
                out[b, h, i] = probs @ v[b, h, keys]
    return out
