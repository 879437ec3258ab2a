"""SeerAttention: a gate for each pair of blocks, given as a block mask; causal inside the blocks of the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class GatedBlocks(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, block: int = 16) -> None:
        super().__init__()
        self.heads, self.block = heads, block
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def mask(self, gate: Tensor, length: int) -> Tensor:
        """`gate` (batch, heads, blocks, blocks), bool, spread over tokens by repetition."""
        mask = gate.repeat_interleave(self.block, dim=2).repeat_interleave(self.block, dim=3)
        return mask & torch.ones(length, length, dtype=torch.bool, device=gate.device).tril()

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~self.mask(gate, x.shape[1]), float("-inf"))
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


class Indexed(GatedBlocks):
    def mask(self, gate: Tensor, length: int) -> Tensor:
        token = torch.arange(length, device=gate.device)
        block = token // self.block
        return gate[:, :, block[:, None], block[None, :]] & (token[:, None] >= token[None, :])


class Expanded(GatedBlocks):
    def mask(self, gate: Tensor, length: int) -> Tensor:
        batch, heads, rows, columns = gate.shape
        mask = gate[:, :, :, None, :, None].expand(batch, heads, rows, self.block, columns, self.block)
        return mask.reshape(batch, heads, length, length).tril()


class Kronecker(GatedBlocks):
    def mask(self, gate: Tensor, length: int) -> Tensor:
        ones = torch.ones(self.block, self.block, dtype=torch.bool, device=gate.device)
        return torch.kron(gate, ones[None, None]) & torch.ones(length, length, dtype=torch.bool).tril()


def _inputs() -> tuple[Tensor, ...]:
    gate = (torch.rand(2, 4, 8, 8) < 0.3) | torch.eye(8, dtype=torch.bool)
    gate[:, :, -1] = True
    return torch.randn(2, 128, 64), gate.tril()


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return GatedBlocks(), _inputs()


VARIANTS = {
    "indexed": Variant(lambda: (Indexed(), _inputs())),
    "expanded": Variant(lambda: (Expanded(), _inputs())),
    "kron": Variant(lambda: (Kronecker(), _inputs())),
}


def allowed(module: GatedBlocks, x: Tensor, gate: Tensor) -> Tensor:
    keep = torch.zeros(2, 4, 128, 128, dtype=torch.bool)
    size = module.block
    for b, h, r, c in gate.nonzero().tolist():
        keep[b, h, r * size : (r + 1) * size, c * size : (c + 1) * size] = True
    return keep & torch.ones(128, 128, dtype=torch.bool).tril()
