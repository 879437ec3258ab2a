"""Swin: cyclic shift, window partition, a table of relative biases, a window mask of -100, and all of it undone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


def window_partition(x: Tensor, window: int) -> Tensor:
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window, window, channels)


def window_reverse(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    batch = int(windows.shape[0] / (height * width / window / window))
    x = windows.view(batch, height // window, width // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, -1)


class WindowAttention(nn.Module):
    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.window, self.heads, self.scale = window, heads, (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        coords = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += window - 1
        relative[:, :, 1] += window - 1
        relative[:, :, 0] *= 2 * window - 1
        self.register_buffer("relative_position_index", relative.sum(-1))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        folded, length, channels = x.shape
        qkv = self.qkv(x).reshape(folded, length, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(self.window**2, self.window**2, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        count = mask.shape[0]
        attn = attn.view(folded // count, count, self.heads, length, length) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, self.heads, length, length)
        attn = self.attn_drop(attn.softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).reshape(folded, length, channels))


class SwinBlock(nn.Module):
    attn_mask: Tensor

    def __init__(self, dim: int = 32, side: int = 16, window: int = 4, shift: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        regions = torch.zeros((1, side, side, 1))
        slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for count, (rows, columns) in enumerate((r, c) for r in slices for c in slices):
            regions[:, rows, columns, :] = count
        flat = window_partition(regions, window).view(-1, window * window)
        mask = flat.unsqueeze(1) - flat.unsqueeze(2)
        self.register_buffer("attn_mask", mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        x = self.norm(x).view(batch, self.side, self.side, channels)
        x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.window).view(-1, self.window**2, channels)
        windows = self.attn(windows, mask=self.attn_mask)
        windows = windows.view(-1, self.window, self.window, channels)
        x = window_reverse(windows, self.window, self.side, self.side)
        x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x.view(batch, length, channels)


class Fused(WindowAttention):
    """PyTorch's attention function, bias and window mask summed into one additive mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        folded, length, channels = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        both = (bias + mask.unsqueeze(1)).repeat(folded // mask.shape[0], 1, 1, 1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=both)
        return self.proj(out.transpose(1, 2).reshape(folded, length, channels))


class Tokens(SwinBlock):
    """The same on the image as it is, by a mask of shifted windows."""

    def forward(self, x: Tensor) -> Tensor:
        b, length, _ = x.shape
        attn, side, window = self.attn, self.side, self.window
        q, k, v = attn.qkv(self.norm(x)).view(b, length, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
        token = torch.arange(length, device=x.device)
        y, z = token // side - self.shift, token % side - self.shift
        same = (y[:, None] // window == y[None] // window) & (z[:, None] // window == z[None] // window)
        cell = y % window * window + z % window
        index = attn.relative_position_index[cell[:, None], cell[None, :]]
        bias = attn.relative_position_bias_table[index].permute(2, 0, 1)
        scores = (q * attn.scale) @ k.transpose(-2, -1) + bias
        probs = scores.masked_fill(~same, float("-inf")).softmax(-1)
        return attn.proj((probs @ v).transpose(1, 2).reshape(x.shape))


def _fused() -> tuple[nn.Module, tuple[Tensor, ...]]:
    block = SwinBlock()
    block.attn = Fused(32, 4, 2)
    return block, (torch.randn(2, 256, 32),)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SwinBlock(), (torch.randn(2, 256, 32),)


VARIANTS = {
    "fused": Variant(_fused),
    "tokens": Variant(lambda: (Tokens(), (torch.randn(2, 256, 32),))),
    "seven": Variant(lambda: (SwinBlock(side=14, window=7, shift=3), (torch.randn(1, 196, 32),))),
}


def reference(module: SwinBlock, x: Tensor) -> Tensor:
    """The same over the whole image: pairs of one shifted window, in the image's own coordinates."""
    attn, side, window = module.attn, module.side, module.window
    length, shift = side * side, module.shift
    tokens = torch.arange(length)
    y, z = tokens // side, tokens % side
    ry, rz = (y - shift) % side, (z - shift) % side
    same = (ry[:, None] // window == ry[None] // window) & (rz[:, None] // window == rz[None] // window)

    def band(r: Tensor) -> Tensor:
        return (r >= side - window).long() + (r >= side - shift).long()

    region = band(ry) * 3 + band(rz)
    dy, dz = ry[:, None] - ry[None] + window - 1, rz[:, None] - rz[None] + window - 1
    index = (dy * (2 * window - 1) + dz).clamp(0, (2 * window - 1) ** 2 - 1)
    bias = attn.relative_position_bias_table[index].permute(2, 0, 1)
    bias = bias - 100.0 * (region[:, None] != region[None])
    heads = attn.heads
    q, k, v = attn.qkv(module.norm(x)).view(x.shape[0], length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhid,bhjd->bhij", q * attn.scale, k) + bias
    probs = scores.masked_fill(~same, float("-inf")).softmax(-1)
    return attn.proj(torch.einsum("bhij,bhjd->bihd", probs, v).reshape(x.shape))
