"""ZeroI2V: some heads read keys and values of the frame before or after; the first and last frame keep their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="")


class ShiftedHeads(nn.Module):
    """The shift is a number of channels: whole heads, where it is a multiple of their width."""

    def __init__(self, dim: int = 32, heads: int = 4, frames: int = 6, shift: int = 8) -> None:
        super().__init__()
        self.heads, self.frames, self.shift, self.scale = heads, frames, shift, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def shifted(self, x: Tensor) -> Tensor:
        """(batch * frames, tokens, channels)."""
        f = self.shift
        folded, n, c = x.shape
        x = x.view(-1, self.frames, n, c)
        out = x.clone()
        out[:, 1:, :, :f] = x[:, :-1, :, :f]
        out[:, :-1, :, f : 2 * f] = x[:, 1:, :, f : 2 * f]
        return out.view(folded, n, c)

    def forward(self, x: Tensor) -> Tensor:
        folded, n, c = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = self.shifted(k), self.shifted(v)
        q, k, v = (t.reshape(folded, n, self.heads, c // self.heads).transpose(1, 2) for t in (q, k, v))
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(folded, n, c))


class Concatenated(ShiftedHeads):
    """Parts of the channels concatenated, frames by index."""

    def shifted(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, self.frames))
        frame = torch.arange(self.frames, device=x.device)
        f = self.shift
        before, after = x[:, (frame - 1).clamp(min=0)], x[:, (frame + 1).clamp(max=self.frames - 1)]
        return torch.cat((before[..., :f], after[..., f : 2 * f], x[..., 2 * f :]), -1).flatten(0, 1)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ShiftedHeads(), (torch.randn(12, 26, 32),)


VARIANTS = {
    "concatenated": Variant(lambda: (Concatenated(), (torch.randn(12, 26, 32),))),
    # a head that mixes channels of two frames in one dot product
    "half_head": Variant(lambda: (ShiftedHeads(shift=4), (torch.randn(12, 26, 32),))),
}


def reference(module: ShiftedHeads, x: Tensor) -> Tensor:
    """Channel by channel: which frame each reads."""
    t, f = module.frames, module.shift
    q, k, v = (y.unflatten(0, (-1, t)) for y in module.qkv(x).chunk(3, -1))
    _, _, _, c = q.shape
    k2, v2 = torch.empty_like(k), torch.empty_like(v)
    for frame in range(t):
        for channel in range(c):
            source = max(frame - 1, 0) if channel < f else min(frame + 1, t - 1) if channel < 2 * f else frame
            k2[:, frame, :, channel], v2[:, frame, :, channel] = k[:, source, :, channel], v[:, source, :, channel]
    q, k2, v2 = (y.unflatten(-1, (module.heads, -1)) for y in (q, k2, v2))
    probs = (torch.einsum("btihd,btjhd->bthij", q, k2) * module.scale).softmax(-1)
    return module.proj(torch.einsum("bthij,btjhd->btihd", probs, v2).reshape(x.shape))
