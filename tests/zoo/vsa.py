"""VSA: each window and head asks for its own rectangle of keys, sampled bilinearly; past the border are zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class VariedSizeWindows(nn.Module):
    """The sampling is a function of the features, and stays outside; the attention reads what was sampled."""

    def __init__(self, dim: int = 32, side: int = 16, window: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.side, self.window, self.heads, self.scale = side, window, heads, (dim // heads) ** -0.5
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.offsets, self.scales = (self._predictor(dim) for _ in range(2))
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        along = torch.arange(window)
        coords = torch.stack(torch.meshgrid(along, along, indexing="ij")).flatten(1)
        relative = coords[:, :, None] - coords[:, None, :] + window - 1
        self.register_buffer("index", relative[0] * (2 * window - 1) + relative[1])

    def _predictor(self, dim: int) -> nn.Module:
        return nn.Sequential(nn.AvgPool2d(self.window), nn.LeakyReLU(), nn.Conv2d(dim, 2 * self.heads, 1))

    def grid(self, x: Tensor) -> Tensor:
        """(batch * heads, height, width, 2): where each pixel of each window samples, in [-1, 1]."""
        b, count, w, side = x.shape[0], self.side // self.window, self.window, self.side
        centres = torch.linspace(-1 + w / side, 1 - w / side, count, device=x.device, dtype=x.dtype)
        cells = (torch.arange(w, device=x.device, dtype=x.dtype) - (w - 1) / 2) * 2 / (side - 1)
        base = torch.stack(torch.meshgrid(centres, centres, indexing="xy"))[:, :, None, :, None]
        cell = torch.stack(torch.meshgrid(cells, cells, indexing="xy"))[:, None, :, None, :]
        shape = (b * self.heads, 2, count, 1, count, 1)
        offset, scale = self.offsets(x).reshape(shape) / count, self.scales(x).reshape(shape)
        grid = base + cell * (scale + 1) + offset
        return grid.reshape(b * self.heads, 2, side, side).permute(0, 2, 3, 1)

    def bias(self) -> Tensor:
        index: Tensor = self.index  # type: ignore[assignment]
        n = self.window**2
        return self.table[index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()

    def windows(self, x: Tensor) -> Tensor:
        b, w, count = x.shape[0] // self.heads, self.window, self.side // self.window
        x = x.reshape(b, self.heads, -1, count, w, count, w).permute(0, 3, 5, 1, 4, 6, 2)
        return x.reshape(b * count * count, self.heads, w * w, -1)

    def sampled(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, _, h, w = x.shape
        qkv = self.qkv(x).reshape(b, 3, self.heads, -1, h, w).transpose(0, 1)
        q, k, v = qkv.reshape(3, b * self.heads, -1, h, w).unbind(0)
        grid = self.grid(x)
        k, v = (
            nn.functional.grid_sample(t, grid, padding_mode="zeros", align_corners=True, mode="bilinear")
            for t in (k, v)
        )
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        count = self.side // self.window
        q, k, v = (self.windows(t) for t in self.sampled(x))
        dots = (q @ k.transpose(-2, -1)) * self.scale + self.bias().unsqueeze(0)
        out = dots.softmax(dim=-1) @ v
        out = out.reshape(b, count, count, self.heads, self.window, self.window, -1).permute(0, 3, 6, 1, 4, 2, 5)
        return self.proj(out.reshape(b, -1, h, w))


class Einsums(VariedSizeWindows):
    """Windows kept as axes of their own, letters instead of transposes, PyTorch's attention function."""

    def windows(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.heads)).unflatten(-1, (-1, self.window)).unflatten(-3, (-1, self.window))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.windows(t) for t in self.sampled(x))  # b h d Y y X x
        q, k, v = (t.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5) for t in (q, k, v))  # b Y X h (y x) d
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(), scale=self.scale)
        out = out.unflatten(4, (self.window, self.window)).permute(0, 3, 6, 1, 4, 2, 5)
        return self.proj(out.flatten(5, 6).flatten(3, 4).flatten(1, 2))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return VariedSizeWindows(), (torch.randn(2, 32, 16, 16),)


VARIANTS = {"einsums": Variant(lambda: (Einsums(), (torch.randn(2, 32, 16, 16),)))}


def reference(module: VariedSizeWindows, x: Tensor) -> Tensor:
    """Window by window."""
    w, side, heads = module.window, module.side, module.heads
    q, k, v = (t.unflatten(0, (-1, heads)) for t in module.sampled(x))
    out = torch.zeros_like(q)
    for y in range(0, side, w):
        for z in range(0, side, w):
            part = [t[..., y : y + w, z : z + w].flatten(-2) for t in (q, k, v)]
            scores = torch.einsum("bhdi,bhdj->bhij", part[0], part[1]) * module.scale + module.bias()
            result = torch.einsum("bhij,bhdj->bhdi", scores.softmax(-1), part[2])
            out[..., y : y + w, z : z + w] = result.unflatten(-1, (w, w))
    return module.proj(out.flatten(1, 2))
