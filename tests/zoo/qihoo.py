"""PT-DiT: proxies of windows attend to each other, all tokens to the proxies, then windows and shifted 3-D windows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(sites=4)


class Attention(nn.Module):
    """diffusers' plain attention: self- or cross-, an additive mask repeated over heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        b, n, c = x.shape
        q = self.to_q(x).view(b, n, self.heads, -1).transpose(1, 2).reshape(b * self.heads, n, -1)
        k, v = (p(context).view(b, -1, self.heads, c // self.heads).transpose(1, 2) for p in (self.to_k, self.to_v))
        k, v = (t.reshape(b * self.heads, -1, c // self.heads) for t in (k, v))
        if mask is None:
            empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
            scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=self.scale)
        else:
            mask = mask.repeat_interleave(self.heads, dim=0)
            scores = torch.baddbmm(mask, q, k.transpose(-1, -2), beta=1, alpha=self.scale)
        out = torch.bmm(scores.softmax(dim=-1), v)
        return self.to_out(out.view(b, self.heads, n, -1).transpose(1, 2).reshape(b, n, c))


class Fused(Attention):
    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        context = x if context is None else context
        k, v = (p(context).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.to_k, self.to_v))
        mask = None if mask is None else mask[:, None]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.to_out(out.transpose(1, 2).flatten(2))


class ProxyBlock(nn.Module):
    def __init__(self, kind: type[Attention] = Attention, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.grid, self.window = (4, 8, 8), (2, 4, 4)
        self.proxy, self.cross, self.local, self.shifted = (kind(dim, heads) for _ in range(4))
        image = torch.zeros(self.grid)
        count = 0
        cuts = [(slice(0, -w), slice(-w, -(w // 2)), slice(-(w // 2), None)) for w in self.window]
        for f in cuts[0]:
            for y in cuts[1]:
                for x in cuts[2]:
                    image[f, y, x] = count
                    count += 1
        regions = self.partition(image[None, ..., None]).squeeze(-1)
        mask = (regions[:, None, :] != regions[:, :, None]).float() * -10000.0
        self.register_buffer("mask", mask)

    def partition(self, x: Tensor) -> Tensor:
        b, f, h, w, c = x.shape
        i, j, k = self.window
        x = x.view(b, f // i, i, h // j, j, w // k, k, c)
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, i * j * k, c)

    def reverse(self, x: Tensor, b: int) -> Tensor:
        (f, h, w), (i, j, k) = self.grid, self.window
        x = x.view(b, f // i, h // j, w // k, i, j, k, -1)
        return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, f, h, w, -1)

    def forward(self, x: Tensor) -> Tensor:
        """`x` is kept as windows, (batch * windows, tokens, channels)."""
        i, j, k = self.window
        folded, n, c = x.shape
        count = (self.grid[0] // i) * (self.grid[1] // j) * (self.grid[2] // k)
        b = folded // count
        proxies = x.view(b, count, i // 2, 2, j // 2, 2, k // 2, 2, c).mean((2, 4, 6)).view(b, count * 8, c)
        proxies = proxies + self.proxy(proxies)
        x = x + self.cross(x.reshape(b, count * n, c), proxies).view(folded, n, c)
        x = x + self.local(x)
        shift = (i // 2, j // 2, k // 2)
        rolled = torch.roll(self.reverse(x, b), shifts=tuple(-s for s in shift), dims=(1, 2, 3))
        mask: Tensor = self.mask  # type: ignore[assignment]
        out = self.shifted(self.partition(rolled), mask=mask.repeat(b, 1, 1))
        return x + self.partition(torch.roll(self.reverse(out, b), shifts=shift, dims=(1, 2, 3)))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ProxyBlock(), (torch.randn(16, 32, 32),)


VARIANTS = {"fused": Variant(lambda: (ProxyBlock(Fused), (torch.randn(16, 32, 32),)))}


def reference(module: ProxyBlock, x: Tensor) -> Tensor:
    """The four attentions over all tokens of the grid."""
    (f, h, w), window = module.grid, module.window
    b, total, c = x.shape[0] // 8, f * h * w, x.shape[-1]
    token = torch.arange(total)
    place = torch.stack((token // (h * w), token // w % h, token % w))
    size = torch.tensor(window)[:, None]
    cell = place // size
    home = (cell[0] * (h // window[1]) + cell[1]) * (w // window[2]) + cell[2]
    image = module.reverse(x, b).reshape(b, total, c)

    def attend(attn: Attention, queries: Tensor, keys: Tensor, keep: Tensor | None) -> Tensor:
        q, k, v = (
            p(t).unflatten(-1, (attn.heads, -1))
            for p, t in ((attn.to_q, queries), (attn.to_k, keys), (attn.to_v, keys))
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * attn.scale
        scores = scores if keep is None else scores.masked_fill(~keep, float("-inf"))
        return attn.to_out(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))

    parity = (place[0] % 2 * 2 + place[1] % 2) * 2 + place[2] % 2
    label = home * 8 + parity
    proxies = torch.zeros(b, 64, c, dtype=x.dtype).index_add(1, label, image) / 4
    proxies = proxies + attend(module.proxy, proxies, proxies, None)
    image = image + attend(module.cross, image, proxies, None)
    image = image + attend(module.local, image, image, home[:, None] == home[None])
    # offset windows, each axis cut at half a window; what wraps around is a window of its own
    edge = (place - size // 2) // size
    same = (edge[:, :, None] == edge[:, None, :]).all(0)
    image = image + attend(module.shifted, image, image, same)
    return module.partition(image.view(b, f, h, w, c))
