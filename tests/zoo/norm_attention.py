"""TransNormer's other attention: feature maps and no denominator, normalised over the channels afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="j <= i")


class NormAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, causal: bool = True, act: str = "1+elu") -> None:
        super().__init__()
        self.heads, self.causal, self.act = heads, causal, act
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def feature(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x) if self.act == "relu" else 1 + nn.functional.elu(x)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            p(x).view(batch, length, self.heads, -1).transpose(1, 2).reshape(batch * self.heads, length, -1)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.feature(q), self.feature(k)
        if self.causal:
            mask = (torch.triu(torch.ones(length, length, device=x.device)) == 1).transpose(0, 1)
            mask = mask.float().masked_fill(mask == 0, float("-inf"))
            weights = torch.bmm(q, k.transpose(1, 2))
            weights = weights.masked_fill(mask == float("-inf"), 0)
            output = torch.bmm(weights, v)
        else:
            output = torch.bmm(q, torch.matmul(k.transpose(1, 2), v))
        output = output.view(batch, self.heads, length, -1).transpose(1, 2).reshape(batch, length, -1)
        return self.out_proj(self.norm(output))


def _maker(causal: bool, act: str, expect: Expect | None = None) -> Variant:
    return Variant(lambda: (NormAttention(causal=causal, act=act), (torch.randn(2, 100, 64),)), expect)


make = _maker(True, "1+elu").make
VARIANTS = {
    "relu": _maker(True, "relu"),
    "bidirectional": _maker(False, "1+elu", Expect(family="linear", mask="")),
}


def reference(module: NormAttention, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (module.heads, -1)) for p in (module.q_proj, module.k_proj, module.v_proj))
    weights = torch.einsum("bihd,bjhd->bhij", module.feature(q), module.feature(k))
    weights = weights.tril() if module.causal else weights
    return module.out_proj(module.norm(torch.einsum("bhij,bjhe->bihe", weights, v).flatten(2)))
