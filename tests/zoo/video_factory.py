"""VideoFactory: two streams take turns to ask each other inside windows of space that span all frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=2)


class SwappedWindows(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 2, window: int = 4) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (dim // heads) ** -0.5
        self.first, self.second = (nn.ModuleList(nn.Linear(dim, dim) for _ in range(4)) for _ in range(2))

    def windows(self, x: Tensor) -> Tensor:
        """(batch * windows, heads, frames * cells, head_dim)."""
        b, f, h, w, c = x.shape
        s = self.window
        x = x.view(b, f, h // s, s, w // s, s, self.heads, c // self.heads).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return x.reshape(b * (h // s) * (w // s), self.heads, f * s * s, c // self.heads)

    def attend(self, layers: nn.ModuleList, x: Tensor, context: Tensor) -> Tensor:
        b, f, h, w, c = x.shape
        s = self.window
        q, k, v = (self.windows(p(t)) for p, t in zip(layers, (x, context, context)))
        out = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
        out = out.view(b, h // s, w // s, self.heads, f, s, s, -1).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return layers[3](out.reshape(b, f, h, w, c))

    def forward(self, spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor]:
        temporal = temporal + self.attend(self.first, spatial, temporal)
        spatial = spatial + self.attend(self.second, temporal, spatial)
        return spatial, temporal


class Masked(SwappedWindows):
    """All tokens, and a mask of equal windows."""

    def attend(self, layers: nn.ModuleList, x: Tensor, context: Tensor) -> Tensor:
        b, f, h, w, _ = x.shape
        token = torch.arange(f * h * w, device=x.device)
        cell = token // w % h // self.window * (w // self.window) + token % w // self.window
        q, k, v = (p(t).view(b, f * h * w, self.heads, -1) for p, t in zip(layers, (x, context, context)))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale
        scores = scores.masked_fill(cell[:, None] != cell[None, :], float("-inf"))
        return layers[3](torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(x.shape))


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(1, 3, 8, 12, 32), torch.randn(1, 3, 8, 12, 32)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SwappedWindows(), _inputs()


VARIANTS = {"masked": Variant(lambda: (Masked(), _inputs()), Expect(sites=2))}


def reference(module: SwappedWindows, spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor]:
    def attend(layers: nn.ModuleList, x: Tensor, context: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        s = module.window
        for y in range(0, x.shape[2], s):
            for z in range(0, x.shape[3], s):
                part = (slice(None), slice(None), slice(y, y + s), slice(z, z + s))
                q, k, v = (
                    p(t[part]).flatten(1, 3).unflatten(-1, (module.heads, -1)).transpose(1, 2)
                    for p, t in zip(layers, (x, context, context))
                )
                result = (q @ k.transpose(-2, -1) * module.scale).softmax(-1) @ v
                out[part] = layers[3](result.transpose(1, 2).flatten(2)).unflatten(1, (x.shape[1], s, s))
        return out

    temporal = temporal + attend(module.first, spatial, temporal)
    return spatial + attend(module.second, temporal, spatial), temporal
