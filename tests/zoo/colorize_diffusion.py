"""ColorizeDiffusion: foreground and background references attended on their own; each row takes one, or a blend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=2)


class SplitCrossAttention(nn.Module):
    def __init__(self, dim: int = 32, context: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale, self.strength = heads, (dim // heads) ** -0.5, (0.9, 1.1)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(n, dim, bias=False) for n in (dim, context, context, dim)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, n, c = q.shape
        q, k, v = (
            t.unsqueeze(3).reshape(b, t.shape[1], self.heads, c // self.heads).permute(0, 2, 1, 3)
            .reshape(b * self.heads, t.shape[1], c // self.heads).contiguous() for t in (q, k, v)
        )  # fmt: skip
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.unsqueeze(0).reshape(b, self.heads, n, -1).permute(0, 2, 1, 3).reshape(b, n, c)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """`mask` (batch, tokens): how much of each row is background."""
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        (k1, k2), (v1, v2) = k.chunk(2, dim=1), v.chunk(2, dim=1)
        front, back = self.attend(q, k1, v1) * self.strength[0], self.attend(q, k2, v2) * self.strength[1]
        mask = mask.unsqueeze(-1)
        front = (1 - mask) * front + mask * back
        return self.to_out(torch.where(mask < 0.05, back, front))


class Batched(SplitCrossAttention):
    """Both halves as a batch axis of one attention."""

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        k, v = (p(context).unflatten(1, (2, -1)).unflatten(-1, (self.heads, -1)) for p in (self.to_k, self.to_v))
        probs = (torch.einsum("bihd,bsjhd->bshij", q, k) * self.scale).softmax(-1)
        out = torch.einsum("bshij,bsjhd->bsihd", probs, v).flatten(-2)
        front, back = out[:, 0] * self.strength[0], out[:, 1] * self.strength[1]
        mask = mask.unsqueeze(-1)
        return self.to_out(torch.where(mask < 0.05, back, torch.lerp(front, back, mask)))


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 64, 32), torch.randn(2, 34, 24), torch.rand(2, 64).round(decimals=1)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SplitCrossAttention(), _inputs()


VARIANTS = {"batched": Variant(lambda: (Batched(), _inputs()), Expect(mask=""))}


def reference(module: SplitCrossAttention, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    parts = []
    for half, strength in zip(context.chunk(2, 1), module.strength):
        q, k, v = (
            p(t).unflatten(-1, (module.heads, -1))
            for p, t in ((module.to_q, x), (module.to_k, half), (module.to_v, half))
        )
        probs = (torch.einsum("bihd,bjhd->bhij", q, k) * module.scale).softmax(-1)
        parts.append(torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2) * strength)
    m = mask[..., None]
    blend = torch.where(m < 0.05, 1.0, m).to(x.dtype)
    return module.to_out(parts[0] * (1 - blend) + parts[1] * blend)
