"""HAT's overlapping cross-attention: windows of queries, larger windows of keys by unfold, zeros past the border."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class OverlappingCrossAttention(nn.Module):
    def __init__(self, dim: int = 24, side: int = 16, window: int = 4, ratio: float = 0.5, heads: int = 2) -> None:
        super().__init__()
        self.dim, self.side, self.window, self.heads, self.scale = dim, side, window, heads, (dim // heads) ** -0.5
        self.overlap = int(window * ratio) + window
        self.qkv = nn.Linear(dim, dim * 3)
        self.unfold = nn.Unfold(self.overlap, stride=window, padding=(self.overlap - window) // 2)
        self.table = nn.Parameter(torch.randn((window + self.overlap - 1) ** 2, heads))
        self.proj = nn.Linear(dim, dim)
        inner, outer = torch.arange(window), torch.arange(self.overlap)
        own = torch.stack(torch.meshgrid([inner, inner], indexing="ij")).flatten(1)
        wide = torch.stack(torch.meshgrid([outer, outer], indexing="ij")).flatten(1)
        relative = wide[:, None, :] - own[:, :, None] + window - 1
        self.register_buffer("index", relative[0] * (window + self.overlap - 1) + relative[1])

    def bias(self) -> Tensor:
        index: Tensor = self.index  # type: ignore[assignment]
        bias = self.table[index.view(-1)].view(self.window**2, self.overlap**2, -1)
        return bias.permute(2, 0, 1).contiguous()

    def gathered(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """(batch * windows, overlap * overlap, dim) each, of keys and values (batch, 2 * dim, height, width)."""
        windows = self.unfold(kv)
        b, _, count = windows.shape
        windows = windows.view(b, 2, self.dim, self.overlap, self.overlap, count).permute(1, 0, 5, 3, 4, 2)
        k, v = windows.reshape(2, b * count, self.overlap**2, self.dim)
        return k, v

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        h = w = self.side
        qkv = self.qkv(x).reshape(b, h, w, 3, c).permute(3, 0, 4, 1, 2)
        q = qkv[0].permute(0, 2, 3, 1)
        kv = torch.cat((qkv[1], qkv[2]), dim=1)
        s = self.window
        q = q.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, s * s, c)
        k, v = self.gathered(kv)
        folded, nq, _ = q.shape
        n, d = k.shape[1], c // self.heads
        q = q.reshape(folded, nq, self.heads, d).permute(0, 2, 1, 3)
        k = k.reshape(folded, n, self.heads, d).permute(0, 2, 1, 3)
        v = v.reshape(folded, n, self.heads, d).permute(0, 2, 1, 3)
        attn = ((q * self.scale) @ k.transpose(-2, -1) + self.bias().unsqueeze(0)).softmax(-1)
        out = (attn @ v).transpose(1, 2).reshape(folded, nq, self.dim).view(-1, s, s, self.dim)
        out = out.view(b, h // s, w // s, s, s, -1).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h * w, self.dim)
        return self.proj(out) + x


class TensorUnfold(OverlappingCrossAttention):
    """The same windows by padding and Tensor.unfold."""

    def gathered(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        kv = nn.functional.pad(kv, [(self.overlap - self.window) // 2] * 4)
        kv = kv.unfold(2, self.overlap, self.window).unfold(3, self.overlap, self.window)  # b 2c Y X y x
        kv = kv.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(0, 2)
        k, v = kv.chunk(2, dim=-1)
        return k, v


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return OverlappingCrossAttention(), (torch.randn(2, 256, 24),)


VARIANTS = {
    "unfold": Variant(lambda: (TensorUnfold(), (torch.randn(2, 256, 24),))),
    "wide": Variant(lambda: (OverlappingCrossAttention(ratio=1.0), (torch.randn(1, 256, 24),))),
}


def reference(module: OverlappingCrossAttention, x: Tensor) -> Tensor:
    """Window by window, the keys of the padded image; a zero key scores its bias."""
    b, _, _ = x.shape
    side, s, o, heads = module.side, module.window, module.overlap, module.heads
    q, k, v = (t.view(b, side, side, heads, -1) for t in module.qkv(x).chunk(3, -1))
    margin = (o - s) // 2
    k, v = (nn.functional.pad(t, (0, 0, 0, 0, margin, margin, margin, margin)) for t in (k, v))
    out = torch.zeros_like(q)
    for y in range(0, side, s):
        for z in range(0, side, s):
            mine = q[:, y : y + s, z : z + s].flatten(1, 2)
            keys, values = (t[:, y : y + o, z : z + o].flatten(1, 2) for t in (k, v))
            scores = torch.einsum("bihd,bjhd->bhij", mine, keys) * module.scale + module.bias()
            result = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)
            out[:, y : y + s, z : z + s] = result.unflatten(1, (s, s))
    return module.proj(out.reshape(x.shape)) + x
