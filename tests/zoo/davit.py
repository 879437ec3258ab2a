"""DaViT: windows padded with zeros that are not masked, then attention between the channels of a group."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class SpatialWindows(nn.Module):
    def __init__(self, dim: int = 32, window: int = 5, heads: int = 2) -> None:
        super().__init__()
        self.window, self.heads, self.scale = window, heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s = self.window
        x = nn.functional.pad(x, (0, 0, 0, (s - w % s) % s, 0, (s - h % s) % s))
        tall, wide = x.shape[1:3]
        windows = x.view(b, tall // s, s, wide // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        out = self.attend(windows).view(b, tall // s, wide // s, s, s, c)
        return out.permute(0, 1, 3, 2, 4, 5).reshape(b, tall, wide, c)[:, :h, :w].contiguous()


class Rearranged(SpatialWindows):
    """PyTorch's attention function, the image flattened to tokens and back, keys and values from one projection."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).flatten(2))


class ChannelAttention(nn.Module):
    """Keys and values make the weights, d x d for each group; the queries are what they are applied to."""

    def __init__(self, dim: int = 32, groups: int = 2) -> None:
        super().__init__()
        self.groups, self.scale = groups, (dim // groups) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.groups, c // self.groups).permute(2, 0, 3, 1, 4)
        attn = ((k * self.scale).transpose(-1, -2) @ v).softmax(dim=-1)
        out = (attn @ q.transpose(-1, -2)).transpose(-1, -2)
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SpatialWindows(), (torch.randn(2, 15, 15, 32),)


VARIANTS = {
    "padded": Variant(lambda: (SpatialWindows(), (torch.randn(2, 13, 12, 32),))),
    "fused": Variant(lambda: (Rearranged(), (torch.randn(2, 13, 12, 32),))),
    "channels": Variant(lambda: (ChannelAttention(), (torch.randn(2, 49, 32),))),
}


def reference(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, ChannelAttention):
        q, k, v = (t.unflatten(-1, (module.groups, -1)) for t in module.qkv(x).chunk(3, -1))
        probs = (torch.einsum("bngc,bnge->bgce", k, v) * module.scale).softmax(-1)
        return module.proj(torch.einsum("bgce,bnge->bngc", probs, q).flatten(2))
    assert isinstance(module, SpatialWindows)
    b, h, w, c = x.shape
    s = module.window
    tall, wide = -(-h // s) * s, -(-w // s) * s
    padded = torch.zeros(b, tall, wide, c, dtype=x.dtype)
    padded[:, :h, :w] = x
    out = torch.zeros_like(padded)
    for y in range(0, tall, s):
        for z in range(0, wide, s):
            tokens = padded[:, y : y + s, z : z + s].flatten(1, 2)
            q, k, v = (t.unflatten(-1, (module.heads, -1)) for t in module.qkv(tokens).chunk(3, -1))
            probs = (torch.einsum("bihd,bjhd->bhij", q, k) * module.scale).softmax(-1)
            result = module.proj(torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2))
            out[:, y : y + s, z : z + s] = result.unflatten(1, (s, s))
    return out[:, :h, :w]
