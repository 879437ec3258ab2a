"""HiLo: some heads attend in windows of four tokens, the others to the averages of the windows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=2)


class HiLo(nn.Module):
    def __init__(self, dim: int = 64, heads: int = 4, window: int = 2, alpha: float = 0.5) -> None:
        super().__init__()
        head = dim // heads
        self.l_heads = int(heads * alpha)
        self.l_dim = self.l_heads * head
        self.h_heads = heads - self.l_heads
        self.h_dim = self.h_heads * head
        self.ws, self.scale = window, head**-0.5
        self.sr = nn.AvgPool2d(window, stride=window)
        self.l_q = nn.Linear(dim, self.l_dim)
        self.l_kv = nn.Linear(dim, self.l_dim * 2)
        self.l_proj = nn.Linear(self.l_dim, self.l_dim)
        self.h_qkv = nn.Linear(dim, self.h_dim * 3)
        self.h_proj = nn.Linear(self.h_dim, self.h_dim)

    def hifi(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        rows, columns = h // self.ws, w // self.ws
        x = x.reshape(b, rows, self.ws, columns, self.ws, c).transpose(2, 3)
        qkv = self.h_qkv(x).reshape(b, rows * columns, -1, 3, self.h_heads, self.h_dim // self.h_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        attn = (attn @ v).transpose(2, 3).reshape(b, rows, columns, self.ws, self.ws, self.h_dim)
        return self.h_proj(attn.transpose(2, 3).reshape(b, rows * self.ws, columns * self.ws, self.h_dim))

    def lofi(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        q = self.l_q(x).reshape(b, h * w, self.l_heads, self.l_dim // self.l_heads).permute(0, 2, 1, 3)
        small = self.sr(x.permute(0, 3, 1, 2)).reshape(b, c, -1).permute(0, 2, 1)
        kv = self.l_kv(small).reshape(b, -1, 2, self.l_heads, self.l_dim // self.l_heads).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.l_proj((attn @ v).transpose(1, 2).reshape(b, h, w, self.l_dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.hifi(x), self.lofi(x)), dim=-1)


class Fused(HiLo):
    """Letters and PyTorch's attention function."""

    def hifi(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        s = self.ws
        qkv = self.h_qkv(x).view(b, h // s, s, w // s, s, 3, self.h_heads, -1)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).unbind(0)
        out = nn.functional.scaled_dot_product_attention(q, k, v)  # b Y X h (y x) d
        out = out.unflatten(4, (s, s)).permute(0, 1, 4, 2, 5, 3, 6)
        return self.h_proj(out.reshape(b, h, w, -1))

    def lofi(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s = self.ws
        q = self.l_q(x).unflatten(-1, (self.l_heads, -1))
        small = x.view(b, h // s, s, w // s, s, c).mean((2, 4)).flatten(1, 2)
        k, v = (t.unflatten(-1, (self.l_heads, -1)) for t in self.l_kv(small).chunk(2, -1))
        probs = torch.einsum("byxhd,bjhd->bhyxj", q * self.scale, k).softmax(-1)
        return self.l_proj(torch.einsum("bhyxj,bjhd->byxhd", probs, v).flatten(3))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return HiLo(), (torch.randn(2, 12, 14, 64),)


VARIANTS = {
    "fused": Variant(lambda: (Fused(), (torch.randn(2, 12, 14, 64),))),
    "wide": Variant(lambda: (HiLo(window=4, alpha=0.75), (torch.randn(1, 12, 16, 64),))),
}


def reference(module: HiLo, x: Tensor) -> Tensor:
    b, h, w, c = x.shape
    s = module.ws
    y, z = torch.arange(h * w) // w, torch.arange(h * w) % w
    cell = y // s * (w // s) + z // s
    flat = x.reshape(b, h * w, c)
    q, k, v = (t.unflatten(-1, (module.h_heads, -1)) for t in module.h_qkv(flat).chunk(3, -1))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * module.scale
    probs = scores.masked_fill(cell[:, None] != cell[None], float("-inf")).softmax(-1)
    high = module.h_proj(torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2))
    means = torch.zeros(b, (h // s) * (w // s), c, dtype=x.dtype).index_add(1, cell, flat) / s**2
    q = module.l_q(flat).unflatten(-1, (module.l_heads, -1))
    k, v = (t.unflatten(-1, (module.l_heads, -1)) for t in module.l_kv(means).chunk(2, -1))
    probs = (torch.einsum("bihd,bjhd->bhij", q, k) * module.scale).softmax(-1)
    low = module.l_proj(torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2))
    return torch.cat((high, low), -1).view(b, h, w, -1)
