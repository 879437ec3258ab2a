"""MedSegFactory: image and mask streams ask each other; the second asks with what the first just answered."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=2)


class JointCrossAttention(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 2, keep_maps: bool = False) -> None:
        super().__init__()
        self.heads, self.scale, self.keep_maps = heads, (dim // heads) ** -0.5, keep_maps
        self.image, self.mask = (nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(3)) for _ in range(2))
        self.to_out = nn.Linear(dim, dim)

    def split(self, t: Tensor) -> Tensor:
        b, n, c = t.shape
        return t.reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3).reshape(b * self.heads, n, -1)

    def merge(self, t: Tensor) -> Tensor:
        return t.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)

    def attend(self, layers: nn.ModuleList, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (self.split(p(t)) for p, t in zip(layers, (x, context, context)))
        scores = torch.baddbmm(
            torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device),
            q, k.transpose(-1, -2), beta=0, alpha=self.scale,
        )  # fmt: skip
        probs = scores.softmax(dim=-1)
        return self.merge(torch.bmm(probs, v)), probs

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        image, mask = x.chunk(2)
        new_image, map_image = self.attend(self.image, mask, image)
        new_mask, map_mask = self.attend(self.mask, new_image, mask)
        out = self.to_out(torch.cat((new_image, new_mask)))
        with torch.no_grad():
            maps = (map_image.detach().clone(), map_mask.detach().clone())
        return (out, *maps) if self.keep_maps else out


class Fused(JointCrossAttention):
    def attend(self, layers: nn.ModuleList, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p, t in zip(layers, (x, context, context)))
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.transpose(1, 2).flatten(2), x


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return JointCrossAttention(), (torch.randn(4, 36, 32),)


VARIANTS = {
    "fused": Variant(lambda: (Fused(), (torch.randn(4, 36, 32),))),
    # the maps are asked for: they have to be stored, and nothing is gained
    "maps": Variant(
        lambda: (JointCrossAttention(keep_maps=True), (torch.randn(4, 36, 32),)),
        Expect(declined="the probabilities are read elsewhere"),
    ),
}


def reference(module: JointCrossAttention, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    image, mask = x.chunk(2)
    outs: list[Tensor] = []
    maps: list[Tensor] = []
    for layers, query, context in ((module.image, mask, image), (module.mask, None, mask)):
        asked = outs[0] if query is None else query
        q, k, v = (p(t).unflatten(-1, (module.heads, -1)) for p, t in zip(layers, (asked, context, context)))
        probs = (torch.einsum("bihd,bjhd->bhij", q, k) * module.scale).softmax(-1)
        outs.append(torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2))
        maps.append(probs.flatten(0, 1))
    out = module.to_out(torch.cat(outs))
    return (out, maps[0], maps[1]) if module.keep_maps else out
