"""ConViT: attention by content and by position, blended by a learned gate for each head, and divided by its sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

# The map of positions is no product of queries and keys: it is applied outside the region.
EXPECT = Expect(mask="")


class GatedPositional(nn.Module):
    def __init__(self, dim: int = 32, side: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qk, self.v, self.proj = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, heads)
        self.gating_param = nn.Parameter(torch.randn(heads))
        along = torch.arange(side)
        y, x = (t.flatten() for t in torch.meshgrid(along, along, indexing="ij"))
        dy, dx = (y[None] - y[:, None]).float(), (x[None] - x[:, None]).float()
        self.register_buffer("rel_indices", torch.stack((dx, dy, dx**2 + dy**2), -1)[None] / side)

    def get_attention(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qk = self.qk(x).reshape(b, n, 2, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = qk[0], qk[1]
        pos_score = self.rel_indices.expand(b, -1, -1, -1)  # type: ignore[operator]
        pos_score = self.pos_proj(pos_score).permute(0, 3, 1, 2)
        patch_score = (q @ k.transpose(-2, -1)) * self.scale
        patch_score = patch_score.softmax(dim=-1)
        pos_score = pos_score.softmax(dim=-1)
        gating = self.gating_param.view(1, -1, 1, 1)
        attn = (1.0 - torch.sigmoid(gating)) * patch_score + torch.sigmoid(gating) * pos_score
        attn /= attn.sum(dim=-1).unsqueeze(-1)
        return attn

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        attn = self.get_attention(x)
        v = self.v(x).reshape(b, n, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))


class Twice(GatedPositional):
    """Weights that do not add up to one before the division: the gate of the content is doubled."""

    def get_attention(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k = self.qk(x).reshape(b, n, 2, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        pos = self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)
        gate = torch.sigmoid(self.gating_param.view(1, -1, 1, 1))
        attn = 2.0 * gate * ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1) + gate * pos + 0.5 * pos
        return attn / attn.sum(dim=-1, keepdim=True)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return GatedPositional(), (torch.randn(2, 36, 32),)


VARIANTS = {
    "twice": Variant(lambda: (Twice(), (torch.randn(2, 36, 32),))),
}


def reference(module: GatedPositional, x: Tensor) -> Tensor:
    q, k = module.qk(x).unflatten(-1, (2, module.num_heads, -1)).unbind(2)
    v = module.v(x).unflatten(-1, (module.num_heads, -1))
    content = (torch.einsum("bihd,bjhd->bhij", q, k) * module.scale).softmax(-1)
    position = module.pos_proj(module.rel_indices[0]).permute(2, 0, 1).softmax(-1)  # type: ignore[index]
    gate = torch.sigmoid(module.gating_param)[:, None, None]
    near, far = (2 * gate, gate + 0.5) if isinstance(module, Twice) else (1 - gate, gate)
    probs = (near * content + far * position) / (near + far)
    return module.proj(torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2))
