"""FcaFormer: tokens of earlier blocks are further keys, with their own bias; one softmax over both score blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class ForwardCrossAttention(nn.Module):
    def __init__(self, dim: int = 32, side: int = 7, heads: int = 2, cross: int = 12) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.norm, self.cross_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.factor = nn.Parameter(torch.randn(1, cross, 1))
        self.cross_bias = nn.Parameter(torch.randn(heads, 1, cross))
        self.table = nn.Parameter(torch.randn(heads, side * side))
        along = torch.arange(side)
        y, x = (t.flatten() for t in torch.meshgrid(along, along, indexing="ij"))
        index = (y[:, None] - y[None]).abs() * side + (x[:, None] - x[None]).abs()
        self.register_buffer("index", index)

    def forward(self, x: Tensor, cross: Tensor) -> Tensor:
        b, n, c = x.shape
        tokens = torch.cat((self.norm(x), self.cross_norm(cross * self.factor)), dim=1)
        total = tokens.shape[1]
        qkv = self.qkv(tokens).reshape(b, total, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0][:, :, :n], qkv[1], qkv[2]
        index: Tensor = self.index  # type: ignore[assignment]
        inner = (q @ k[:, :, :n].transpose(-2, -1)) * self.scale + self.table[:, index]
        outer = (q @ k[:, :, n:].transpose(-2, -1)) * self.scale + self.cross_bias
        attn = torch.cat((inner, outer), dim=-1).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))


class OneProduct(ForwardCrossAttention):
    """One product with all keys; the biases are concatenated."""

    def forward(self, x: Tensor, cross: Tensor) -> Tensor:
        _, n, _ = x.shape
        tokens = torch.cat((self.norm(x), self.cross_norm(cross * self.factor)), dim=1)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)
        index: Tensor = self.index  # type: ignore[assignment]
        bias = torch.cat((self.table[:, index], self.cross_bias.expand(-1, n, -1)), -1)
        scores = torch.einsum("bihd,bjhd->bhij", q[:, :n], k) * self.scale + bias
        return self.proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))


class SplitValues(ForwardCrossAttention):
    """Keys and values of both kinds stay apart: the probabilities are cut, and two products added."""

    def forward(self, x: Tensor, cross: Tensor) -> Tensor:
        _, n, _ = x.shape
        own, other = self.norm(x), self.cross_norm(cross * self.factor)
        q, k, v = self.qkv(own).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        _, far_k, far_v = self.qkv(other).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        index: Tensor = self.index  # type: ignore[assignment]
        near = (q @ k.transpose(-1, -2)) * self.scale + self.table[:, index]
        far = (q @ far_k.transpose(-1, -2)) * self.scale + self.cross_bias
        probs = torch.cat((near, far), -1).softmax(-1)
        out = probs[..., :n] @ v + probs[..., n:] @ far_v
        return self.proj(out.transpose(1, 2).flatten(2))


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 49, 32), torch.randn(2, 12, 32)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ForwardCrossAttention(), _inputs()


VARIANTS = {
    "one": Variant(lambda: (OneProduct(), _inputs())),
    "split": Variant(lambda: (SplitValues(), _inputs())),
}
