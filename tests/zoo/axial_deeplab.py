"""Axial-DeepLab: position-sensitive attention along one axis of a picture. Queries, keys and values have positions of
their own; the three maps of scores lie side by side as channels, are normalised together, and added up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(sites=2, mask="")


class AxialAttention(nn.Module):
    def __init__(self, channels: int = 16, groups: int = 2, size: int = 14, width: bool = False) -> None:
        super().__init__()
        self.groups, self.size, self.width = groups, size, width
        self.planes = channels // groups
        self.qkv = nn.Conv1d(channels, 2 * channels, kernel_size=1, bias=False)
        self.bn_qkv = nn.BatchNorm1d(2 * channels)
        self.bn_similarity = nn.BatchNorm2d(3 * groups)
        self.bn_output = nn.BatchNorm1d(2 * channels)
        self.relative = nn.Parameter(torch.randn(2 * self.planes, 2 * size - 1) / self.planes)
        query, key = torch.arange(size)[None], torch.arange(size)[:, None]
        self.register_buffer("flatten_index", (key - query + size - 1).view(-1))
        for norm in (self.bn_qkv, self.bn_similarity, self.bn_output):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)

    def positions(self) -> tuple[Tensor, ...]:
        every = torch.index_select(self.relative, 1, self.flatten_index)
        every = every.view(2 * self.planes, self.size, self.size)
        return torch.split(every, [self.planes // 2, self.planes // 2, self.planes], dim=0)

    def lines(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 1, 3) if self.width else x.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lines(x)
        batch, others, channels, size = x.shape
        x = x.contiguous().view(batch * others, channels, size)
        qkv = self.bn_qkv(self.qkv(x)).reshape(batch * others, self.groups, 2 * self.planes, size)
        q, k, v = torch.split(qkv, [self.planes // 2, self.planes // 2, self.planes], dim=2)
        of_q, of_k, of_v = self.positions()
        qr = torch.einsum("bgci,cij->bgij", q, of_q)
        kr = torch.einsum("bgci,cij->bgij", k, of_k).transpose(2, 3)
        qk = torch.einsum("bgci,bgcj->bgij", q, k)
        stacked = self.bn_similarity(torch.cat([qk, qr, kr], dim=1))
        stacked = stacked.view(batch * others, 3, self.groups, size, size).sum(dim=1)
        similarity = torch.softmax(stacked, dim=3)
        sv = torch.einsum("bgij,bgcj->bgci", similarity, v)
        sve = torch.einsum("bgij,cij->bgci", similarity, of_v)
        out = torch.cat([sv, sve], dim=-1).view(batch * others, 2 * channels, size)
        out = self.bn_output(out).view(batch, others, channels, 2, size).sum(dim=-2)
        return out.permute(0, 2, 1, 3) if self.width else out.permute(0, 2, 3, 1)


def make(width: bool = False) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return AxialAttention(width=width), (torch.randn(2, 16, *((5, 14) if width else (14, 5))),)


VARIANTS = {"width": Variant(lambda: make(True))}


def reference(module: AxialAttention, x: Tensor) -> Tensor:
    """One score at a time."""
    lines = module.lines(x)
    batch, others, channels, size = lines.shape
    qkv = module.bn_qkv(module.qkv(lines.flatten(0, 1))).unflatten(1, (module.groups, -1))
    half, whole = module.planes // 2, module.planes
    q, k, v = qkv[:, :, :half], qkv[:, :, half:whole], qkv[:, :, whole:]
    norm = module.bn_similarity
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).unflatten(0, (3, -1))
    shift = (norm.bias - norm.running_mean * scale.flatten()).unflatten(0, (3, -1)).sum(0)
    table = module.relative
    sv, sve = torch.zeros_like(v), torch.zeros_like(v)
    for i in range(size):
        at_q = torch.stack([table[:, i - j + size - 1] for j in range(size)])
        at_k = torch.stack([table[:, j - i + size - 1] for j in range(size)])
        logits = torch.einsum("bgc,bgcj->bgj", q[..., i], k) * scale[0][:, None]
        logits = logits + torch.einsum("bgc,jc->bgj", q[..., i], at_q[:, :half]) * scale[1][:, None]
        logits = logits + torch.einsum("bgcj,jc->bgj", k, at_k[:, half:whole]) * scale[2][:, None]
        p = (logits + shift[:, None]).softmax(-1)
        sv[..., i] = torch.einsum("bgj,bgcj->bgc", p, v)
        sve[..., i] = torch.einsum("bgj,jc->bgc", p, at_q[:, whole:])
    out = module.bn_output(torch.cat([sv, sve], -1).reshape(batch * others, 2 * channels, size))
    out = out.view(batch, others, channels, 2, size).sum(3)
    return out.permute(0, 2, 1, 3) if module.width else out.permute(0, 2, 3, 1)
