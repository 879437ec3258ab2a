"""3-D deformable attention: each query looks at a few sampled points; then joints in strides of space and of time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class Deformable(nn.Module):
    """The sampling is trilinear and stays outside. The region has one query for each list of keys."""

    def __init__(self, dim: int = 32, heads: int = 2, points: int = 9) -> None:
        super().__init__()
        self.heads, self.points, self.scale = heads, points, (dim // heads) ** -0.5
        self.to_q, self.to_k, self.to_v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.offsets = nn.Conv3d(dim, 3 * points, 3, padding=1)

    def sample(self, query: Tensor, x: Tensor) -> Tensor:
        """(batch, tokens, points, channels) of `x` at the query's own place plus learned offsets."""
        b, c, t, h, w = query.shape
        offsets = self.offsets(query).view(b, self.points, 3, t, h, w).permute(0, 3, 4, 5, 1, 2)
        lines = [torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in (t, h, w)]
        base = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], -1)[:, :, :, None]
        grid = (base + 0.2 * offsets.tanh()).reshape(b, t, h, w * self.points, 3)
        found = nn.functional.grid_sample(x, grid, align_corners=True)
        return found.view(b, c, t * h * w, self.points).permute(0, 2, 3, 1)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        b, c, t, h, w = query.shape
        tokens = query.flatten(2).transpose(1, 2)
        q = self.to_q(tokens).view(b, -1, 1, self.heads, c // self.heads).transpose(2, 3)
        near = self.sample(query, x)
        k, v = (
            p(near).view(b, -1, self.points, self.heads, c // self.heads).transpose(2, 3)
            for p in (self.to_k, self.to_v)
        )
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        return self.proj((attn @ v).reshape(b, t * h * w, c))


class Summed(Deformable):
    """Products written as multiply and sum."""

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        q = self.to_q(query.flatten(2).transpose(1, 2)).unflatten(-1, (self.heads, -1))
        near = self.sample(query, x)
        k, v = (p(near).unflatten(-1, (self.heads, -1)) for p in (self.to_k, self.to_v))
        attn = ((q.unsqueeze(2) * k).sum(-1) * self.scale).softmax(dim=2)
        return self.proj((attn.unsqueeze(-1) * v).sum(2).flatten(2))


class Strided(nn.Module):
    """Joints of one frame and of every `stride`-th frame: queries everywhere, keys on a stride."""

    def __init__(self, dim: int = 32, heads: int = 2, stride: int = 3) -> None:
        super().__init__()
        self.heads, self.stride, self.scale = heads, stride, (dim // heads) ** -0.5
        self.to_q, self.to_kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, n, c = x.shape
        q = self.to_q(x).view(b, t * n, self.heads, -1).transpose(1, 2)
        kv = self.to_kv(x[:, :: self.stride]).reshape(b, -1, 2, self.heads, c // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        attn = ((q @ k.transpose(-1, -2)) * self.scale).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, t, n, c))


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(1, 32, 3, 5, 6), torch.randn(1, 32, 4, 7, 6)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Deformable(), _inputs()


VARIANTS = {
    "summed": Variant(lambda: (Summed(), _inputs())),
    "strided": Variant(lambda: (Strided(), (torch.randn(2, 8, 7, 32),))),
}
