"""SCCAN: keys of the own window by their product, of the aligned support window by their cosine, in one softmax."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class SelfCalibrated(nn.Module):
    """Windows of both images are padded with zeros, which are not masked. Which support window a query window takes is
    decided outside, by the cosine of their means."""

    def __init__(self, dim: int = 32, heads: int = 2, window: int = 4) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (dim // heads) ** -0.5
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def partition(self, x: Tensor) -> Tensor:
        s = self.window
        b, h, w, c = x.shape
        x = nn.functional.pad(x, (0, 0, s // 2, s // 2, s // 2, s // 2))
        h, w = h + s, w + s
        return x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, -1, s * s, c)

    def reverse(self, x: Tensor, h: int, w: int) -> Tensor:
        s = self.window
        b, _, _, c = x.shape
        x = x.view(b, h // s + 1, w // s + 1, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h + s, w + s, c)
        return x[:, s // 2 : s // 2 + h, s // 2 : s // 2 + w]

    @torch.no_grad()
    def align(self, query: Tensor, support: Tensor) -> Tensor:
        a, b = (nn.functional.normalize(t.mean(2), dim=-1) for t in (query, support))
        return (a @ b.transpose(1, 2)).argmax(-1)

    def forward(self, query: Tensor, support: Tensor) -> Tensor:
        b, h, w, c = query.shape
        own, other = self.partition(query), self.partition(support)
        index = self.align(own, other)
        other = torch.gather(other, 1, index[:, :, None, None].expand(-1, -1, *other.shape[2:]))
        own, other = own.flatten(0, 1), other.flatten(0, 1)
        n = own.shape[1]
        q = self.q(own).reshape(-1, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        kv = self.kv(torch.cat((own, other), dim=1))
        k, v = kv.reshape(-1, 2 * n, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        k_own, k_other = k[:, :, :n], k[:, :, n:]
        attn = (q * self.scale) @ k_own.transpose(-2, -1)
        length = torch.norm(q, dim=-1)[..., :, None] @ torch.norm(k_other, dim=-1)[..., None, :]
        cosine = (q @ k_other.transpose(-2, -1)) / (length + 1e-7)
        attn = torch.cat((attn, cosine), dim=-1).softmax(dim=-1)
        out = self.proj((attn @ v).transpose(1, 2).reshape(-1, n, c))
        return self.reverse(out.unflatten(0, (b, -1)), h, w)


class Normalised(SelfCalibrated):
    """Both sides normalised before the product, one list of scaled keys."""

    def forward(self, query: Tensor, support: Tensor) -> Tensor:
        b, h, w, _ = query.shape
        own, other = self.partition(query), self.partition(support)
        rows = torch.arange(b, device=query.device)[:, None]
        other = other[rows, self.align(own, other)]
        q = self.q(own).unflatten(-1, (self.heads, -1))
        k, v = self.kv(own).unflatten(-1, (2, self.heads, -1)).unbind(3)
        k2, v2 = self.kv(other).unflatten(-1, (2, self.heads, -1)).unbind(3)
        q2, k2 = (t / (t.norm(dim=-1, keepdim=True) + 1e-7) for t in (q, k2))
        scores = torch.cat(
            (
                torch.einsum("bwihd,bwjhd->bwhij", q, k) * self.scale,
                torch.einsum("bwihd,bwjhd->bwhij", q2, k2),
            ),
            -1,
        )
        out = torch.einsum("bwhij,bwjhd->bwihd", scores.softmax(-1), torch.cat((v, v2), 2))
        return self.reverse(self.proj(out.flatten(-2)), h, w)


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(1, 12, 8, 32), torch.randn(1, 12, 8, 32)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SelfCalibrated(), _inputs()


VARIANTS = {"normalised": Variant(lambda: (Normalised(), _inputs()))}


def reference(module: SelfCalibrated, query: Tensor, support: Tensor) -> Tensor:
    own, other = module.partition(query), module.partition(support)
    other = torch.stack([o[i] for o, i in zip(other, module.align(own, other))])
    heads = module.heads
    q = module.q(own).unflatten(-1, (heads, -1))
    k, v = module.kv(torch.cat((own, other), 2)).unflatten(-1, (2, heads, -1)).unbind(3)
    n = own.shape[2]
    scores = torch.einsum("bwihd,bwjhd->bwhij", q, k)
    length = q.norm(dim=-1).transpose(2, 3)[..., None] * k.norm(dim=-1).transpose(2, 3)[..., None, :]
    scores = torch.where(torch.arange(2 * n) < n, scores * module.scale, scores / (length + 1e-7))
    out = module.proj(torch.einsum("bwhij,bwjhd->bwihd", scores.softmax(-1), v).flatten(-2))
    return module.reverse(out, *query.shape[1:3])
