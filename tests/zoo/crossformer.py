"""CrossFormer's long-distance attention with its dynamic position bias, an MLP over all relative offsets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", regrouped=True)


class DynamicPosBias(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.pos_proj = nn.Linear(2, dim)
        self.pos1 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(inplace=True), nn.Linear(dim, dim))
        self.pos2 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(inplace=True), nn.Linear(dim, heads))

    def forward(self, biases: Tensor) -> Tensor:
        return self.pos2(self.pos1(self.pos_proj(biases)))


class LongDistanceAttention(nn.Module):
    def __init__(self, dim: int = 32, side: int = 12, group: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.side, self.group, self.heads, self.scale = side, group, heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.pos = DynamicPosBias(dim // 4, heads)

    def bias(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        size = self.group
        offsets = torch.arange(1 - size, size, device=device)
        biases = torch.stack(torch.meshgrid([offsets, offsets], indexing="ij")).flatten(1).transpose(0, 1)
        along = torch.arange(size, device=device)
        coords = torch.flatten(torch.stack(torch.meshgrid([along, along], indexing="ij")), 1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += size - 1
        relative[:, :, 1] += size - 1
        relative[:, :, 0] *= 2 * size - 1
        index = relative.sum(-1)
        table = self.pos(biases.to(dtype))
        return table[index.view(-1)].view(size * size, size * size, -1).permute(2, 0, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        g, step = self.group, self.side // self.group
        x = x.view(batch, g, step, g, step, channels).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(batch * step * step, g * g, channels)
        qkv = self.qkv(x).reshape(-1, g * g, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        attn = (qkv[0] * self.scale) @ qkv[1].transpose(-2, -1)
        attn = (attn + self.bias(x.device, x.dtype).unsqueeze(0)).softmax(-1)
        out = self.proj((attn @ qkv[2]).transpose(1, 2).reshape(-1, g * g, channels))
        out = out.reshape(batch, step, step, g, g, channels).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, length, channels)


class Masked(LongDistanceAttention):
    """The same on the ungrouped image: the bias read at the position inside the group."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        step = self.side // self.group
        token = torch.arange(length, device=x.device)
        y, z = token // self.side, token % self.side
        keep = (y[:, None] % step == y[None, :] % step) & (z[:, None] % step == z[None, :] % step)
        inner = (y // step) * self.group + z // step
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + self.bias(x.device, x.dtype)[:, inner[:, None], inner[None, :]]
        attn = attn.masked_fill(~keep, float("-inf")).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(batch, length, channels))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return LongDistanceAttention(), (torch.randn(2, 144, 32),)


VARIANTS = {"masked": Variant(lambda: (Masked(), (torch.randn(2, 144, 32),)), Expect())}


def allowed(module: LongDistanceAttention, x: Tensor) -> Tensor:
    step = module.side // module.group
    line = torch.eye(step, dtype=torch.bool).repeat(module.group, module.group)
    return torch.kron(line, line)


def reference(module: LongDistanceAttention, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    side, step, size = module.side, module.side // module.group, module.group
    place = torch.arange(length)
    y, z = place // side // step, place % side // step
    table = module.pos(
        torch.tensor([[dy, dz] for dy in range(1 - size, size) for dz in range(1 - size, size)], dtype=x.dtype)
    )
    index = (y[:, None] - y[None, :] + size - 1) * (2 * size - 1) + z[:, None] - z[None, :] + size - 1
    q, k, v = module.qkv(x).view(batch, length, 3, module.heads, -1).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * module.scale + table[index].permute(2, 0, 1)
    probs = scores.masked_fill(~allowed(module, x), float("-inf")).softmax(-1)
    return module.proj(torch.einsum("bhij,bjhd->bihd", probs, v).reshape(x.shape))
