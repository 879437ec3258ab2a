"""Two-dimensional neighbourhood attention as a mask: K x K nearest keys, the window sliding inward at the borders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(
    mask="abs(min(9, max(2, i%12)) - j%12) < 3 and abs(min(9, max(2, i//12)) - j//12) < 3", empty_share=0.4938
)


def neighbourhood(position: Tensor, other: Tensor, length: int, kernel: int) -> Tensor:
    centre = position.clamp(kernel // 2, length - 1 - kernel // 2)
    return (centre[:, None] - other[None, :]).abs() <= kernel // 2


class NeighborhoodAttention2D(nn.Module):
    def __init__(self, dim: int = 64, side: int = 12, kernel: int = 5, heads: int = 2) -> None:
        super().__init__()
        self.side, self.kernel, self.heads, self.scale = side, kernel, heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        tokens = torch.arange(height * width, device=x.device)
        y, z = tokens // width, tokens % width
        keep = neighbourhood(y, y, height, self.kernel) & neighbourhood(z, z, width, self.kernel)
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.heads, -1).permute(2, 0, 1, 3, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        attn = attn.masked_fill(~keep, float("-inf")).softmax(dim=-1)
        out = torch.einsum("bhqk,bkhd->bqhd", attn, v)
        return self.proj(out.reshape(batch, height, width, channels))


class Gathered(NeighborhoodAttention2D):
    """The eager backend: for each residue of the dilation, an integer table of neighbours, gathered keys and values."""

    dilation = 1

    def axis_table(self, length: int, device: torch.device) -> Tensor:
        """(length, kernel): the neighbours of each position, the window slid inward at the borders."""
        k = self.kernel
        start = (torch.arange(length, device=device) - k // 2).clamp(0, length - k)
        return start[:, None] + torch.arange(k, device=device)[None, :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, height, width, heads, head_dim), all of one residue."""
        b, h, w, heads, d = q.shape
        rows, columns = self.axis_table(h, q.device), self.axis_table(w, q.device)
        index = rows[:, None, :, None] * w + columns[None, :, None, :]
        index = index.reshape(h * w, self.kernel**2)
        k, v = k.reshape(b, h * w, heads, d)[:, index], v.reshape(b, h * w, heads, d)[:, index]
        attn = torch.einsum("bqhd,bqkhd->bqhk", q.reshape(b, h * w, heads, d) * self.scale, k)
        return torch.einsum("bqhk,bqkhd->bqhd", attn.softmax(dim=-1), v).reshape(q.shape)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        q, k, v = self.qkv(x).view(batch, height, width, 3, self.heads, -1).unbind(3)
        out = torch.zeros_like(q)
        step = self.dilation
        for y in range(step):
            for z in range(step):
                residue = (slice(None), slice(y, None, step), slice(z, None, step))
                out[residue] = self.attend(q[residue], k[residue], v[residue])
        return self.proj(out.reshape(batch, height, width, channels))


class Dilated(Gathered):
    dilation = 2


class LocalBias(Gathered):
    """The older interface: windows by unfold of the clamped neighbourhood, a table of relative biases."""

    def __init__(self) -> None:
        super().__init__()
        self.rpb = nn.Parameter(torch.randn(self.heads, 2 * self.kernel - 1, 2 * self.kernel - 1))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).view(b, h, w, 3, self.heads, -1).permute(3, 0, 4, 1, 2, 5)
        rows, columns = self.axis_table(h, x.device), self.axis_table(w, x.device)
        k, v = (t[:, :, rows][:, :, :, :, columns] for t in (k, v))  # b n y i x j d
        dy = rows - torch.arange(h, device=x.device)[:, None] + self.kernel - 1
        dx = columns - torch.arange(w, device=x.device)[:, None] + self.kernel - 1
        bias = self.rpb[:, dy[:, None, :, None], dx[None, :, None, :]]  # n y x i j
        attn = torch.einsum("bnyxd,bnyixjd->bnyxij", q * self.scale, k) + bias
        attn = attn.flatten(-2).softmax(-1).unflatten(-1, (self.kernel, self.kernel))
        out = torch.einsum("bnyxij,bnyixjd->byxnd", attn, v)
        return self.proj(out.reshape(b, h, w, c))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return NeighborhoodAttention2D(), (torch.randn(2, 12, 12, 64),)


# Each residue is a site. Two of them are read over all tokens, where that is cheaper than a copy of keys; the others
# gather theirs.
RESIDUE = (
    "(j + 1) % 2 == 0 and j//12 - min(1, max(0, i//6 - 2)) < 5 and min(1, max(0, i//6 - 2)) <= j//12"
    " and j%12 - 2*min(1, max(0, i%6 - 2)) < 10 and 2*min(1, max(0, i%6 - 2)) < j%12"
)
DILATED = Expect(mask=("", RESIDUE), sites=4, regrouped=True)

VARIANTS = {
    "gathered": Variant(lambda: (Gathered(), (torch.randn(2, 12, 12, 64),)), Expect(mask="", regrouped=True)),
    "dilated": Variant(lambda: (Dilated(), (torch.randn(2, 12, 12, 64),)), DILATED),
    "local_bias": Variant(lambda: (LocalBias(), (torch.randn(2, 12, 12, 64),)), Expect(regrouped=True)),
}


def allowed(module: NeighborhoodAttention2D, x: Tensor) -> Tensor:
    side, kernel = module.side, module.kernel
    keep = torch.zeros(side, side, side, side, dtype=torch.bool)
    for y in range(side):
        for z in range(side):
            top, left = min(max(y - kernel // 2, 0), side - kernel), min(max(z - kernel // 2, 0), side - kernel)
            keep[y, z, top : top + kernel, left : left + kernel] = True
    return keep.view(side * side, side * side)


def reference(module: NeighborhoodAttention2D, x: Tensor) -> Tensor:
    """Pair for pair: for each query, the keys of its residue in its window."""
    b, side, _, _ = x.shape
    step, kernel, heads = getattr(module, "dilation", 1), module.kernel, module.heads
    small = side // step
    scores = torch.full((heads, side, side, side, side), float("-inf"), dtype=x.dtype)
    for y in range(side):
        for z in range(side):
            top = min(max(y // step - kernel // 2, 0), small - kernel)
            left = min(max(z // step - kernel // 2, 0), small - kernel)
            for dy in range(kernel):
                for dx in range(kernel):
                    other = ((top + dy) * step + y % step, (left + dx) * step + z % step)
                    bias = torch.zeros(heads, dtype=x.dtype)
                    if isinstance(module, LocalBias):
                        bias = module.rpb[:, other[0] - y + kernel - 1, other[1] - z + kernel - 1]
                    scores[:, y, z, other[0], other[1]] = bias
    q, k, v = module.qkv(x).view(b, side * side, 3, heads, -1).unbind(2)
    full = torch.einsum("bihd,bjhd->bhij", q, k) * module.scale + scores.view(heads, side**2, side**2)
    return module.proj(torch.einsum("bhij,bjhd->bihd", full.softmax(-1), v).reshape(x.shape))
