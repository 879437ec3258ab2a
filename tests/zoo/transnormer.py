"""TransNormer's diagonal attention: softmax inside blocks, by a reshape into blocks and by a mask over everything."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(regrouped=True)


class DiagAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, block: int = 32, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.block, self.causal, self.scale = heads, block, causal, (width // heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length // self.block, self.block, self.heads, -1)
        q, k, v = (p(x).reshape(shape).transpose(2, 3) for p in (self.q_proj, self.k_proj, self.v_proj))
        weights = torch.einsum("bghid,bghjd->bghij", q, k) * self.scale
        if self.causal:
            mask = (torch.triu(torch.ones(self.block, self.block, device=x.device)) == 1).transpose(0, 1)
            mask = mask.float().masked_fill(mask == 0, float("-inf"))
            weights = weights.masked_fill(mask == float("-inf"), float("-inf"))
        out = torch.einsum("bghij,bghjd->bghid", weights.softmax(dim=-1), v)
        return self.out_proj(out.transpose(2, 3).reshape(batch, length, width))


class Masked(DiagAttention):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            p(x).view(batch, length, self.heads, -1).transpose(1, 2).reshape(batch * self.heads, length, -1)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        index = torch.arange(length, device=x.device)
        mask = torch.floor(index[:, None] / self.block) == torch.floor(index[None, :] / self.block)
        if self.causal:
            mask = mask & (index[:, None] >= index[None, :])
        weights = torch.bmm(q, k.transpose(1, 2)) * self.scale
        weights = weights.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        out = torch.bmm(weights, v).view(batch, self.heads, length, -1).transpose(1, 2)
        return self.out_proj(out.reshape(batch, length, width))


def _maker(build: type[DiagAttention], causal: bool, expect: Expect | None = None) -> Variant:
    return Variant(lambda: (build(causal=causal), (torch.randn(2, 128, 64),)), expect)


make = _maker(DiagAttention, True).make
VARIANTS = {
    "bidirectional": _maker(DiagAttention, False),
    "masked": _maker(Masked, False, Expect(mask="i//32 == j//32")),
    "masked_causal": _maker(Masked, True, Expect()),
}


def allowed(module: DiagAttention, x: Tensor) -> Tensor:
    keep = torch.block_diag(*[torch.ones(module.block, module.block)] * (x.shape[1] // module.block)).bool()
    return keep.tril() if module.causal else keep


def reference(module: DiagAttention, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (module.heads, -1)) for p in (module.q_proj, module.k_proj, module.v_proj))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * module.scale
    probs = scores.masked_fill(~allowed(module, x), float("-inf")).softmax(-1)
    return module.out_proj(torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2))
