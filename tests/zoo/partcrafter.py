"""PartCrafter: local attention inside each part and global attention over all parts, by the batch; and as a mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", regrouped=True)


class PartAttention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, parts: int = 5, everywhere: bool = False) -> None:
        super().__init__()
        self.heads, self.parts, self.everywhere = heads, parts, everywhere
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(x.shape[0], -1, self.heads, 16).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        if self.everywhere:
            shape = (x.shape[0] // self.parts, self.parts, self.heads, x.shape[1], 16)
            q, k, v = (t.reshape(shape).permute(0, 2, 1, 3, 4).flatten(2, 3) for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        if self.everywhere:
            out = out.unflatten(2, (self.parts, -1)).permute(0, 2, 1, 3, 4).flatten(0, 1)
        return self.to_out(out.transpose(1, 2).flatten(2))


class PartMask(PartAttention):
    """All parts in one sequence, each token with the number of its part."""

    def forward(self, x: Tensor) -> Tensor:
        joint = x.unflatten(0, (-1, self.parts)).flatten(1, 2)
        q, k, v = (p(joint).unflatten(-1, (self.heads, 16)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        part = torch.arange(self.parts, device=x.device).repeat_interleave(x.shape[1])
        keep = part.view(-1, 1).eq(part.view(1, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[None, None])
        return self.to_out(out.transpose(1, 2).flatten(2)).reshape(x.shape)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return PartAttention(), (torch.randn(10, 24, 32),)


VARIANTS = {
    "global": Variant(lambda: (PartAttention(everywhere=True), (torch.randn(10, 24, 32),))),
    "masked": Variant(lambda: (PartMask(), (torch.randn(10, 24, 32),)), Expect(mask="i//24 == j//24")),
}


def allowed(module: PartAttention, x: Tensor) -> Tensor:
    return torch.block_diag(*[torch.ones(x.shape[1], x.shape[1])] * module.parts).bool()


def reference(module: PartAttention, x: Tensor) -> Tensor:
    joint = x.view(-1, module.parts * x.shape[1], 32)
    q, k, v = (p(joint).view(*joint.shape[:2], module.heads, 16) for p in (module.to_q, module.to_k, module.to_v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4.0
    keep = torch.ones_like(scores[0, 0], dtype=torch.bool) if module.everywhere else allowed(module, x)
    probs = scores.masked_fill(~keep, float("-inf")).softmax(-1)
    return module.to_out(torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2)).view(x.shape)
