"""Gated attention unit (FLASH): squared ReLU of the scores of one shared head, whose queries and keys are scales and
shifts of one projection; over all tokens, or inside of chunks with a linear attention between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="pairwise", mask="j <= i")


class GatedAttentionUnit(nn.Module):
    def __init__(self, width: int = 48, key_width: int = 16, causal: bool = True, group: int | None = None) -> None:
        super().__init__()
        self.causal, self.group = causal, group
        self.hidden = nn.Linear(width, 4 * width)
        self.key = nn.Linear(width, key_width)
        self.gamma = nn.Parameter(torch.randn(2, key_width) * 0.5)
        self.beta = nn.Parameter(torch.randn(2, key_width) * 0.1)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = F.silu(self.hidden(x)).chunk(2, dim=-1)
        z = F.silu(self.key(x))
        query, key = (z.unsqueeze(-2) * self.gamma + self.beta).unbind(-2)
        length = x.shape[1] if self.group is None else self.group
        if self.group is not None:
            query, key, value = (t.unflatten(1, (-1, self.group)) for t in (query, key, value))
        weights = F.relu(query @ key.mT / length).square()
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            weights = weights.masked_fill(later, 0.0)
        attended = weights @ value
        return self.out(gate * (attended if self.group is None else attended.flatten(1, 2)))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return GatedAttentionUnit(), (torch.randn(2, 80, 48),)


VARIANTS = {
    "all": Variant(
        lambda: (GatedAttentionUnit(causal=False), (torch.randn(2, 50, 48),)), Expect(family="pairwise", mask="")
    ),
    "groups": Variant(
        lambda: (GatedAttentionUnit(group=16), (torch.randn(2, 64, 48),)),
        Expect(family="pairwise", mask="j <= i", regrouped=True),
    ),
}


def allowed(module: GatedAttentionUnit, x: Tensor) -> Tensor:
    pairs = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    return pairs.tril() if module.causal else pairs


def reference(module: GatedAttentionUnit, x: Tensor) -> Tensor:
    value, gate = F.silu(module.hidden(x)).chunk(2, dim=-1)
    z = F.silu(module.key(x))
    query, key = (z * module.gamma[n] + module.beta[n] for n in range(2))
    weights = (torch.einsum("bid,bjd->bij", query, key) / (module.group or x.shape[1])).clamp(min=0) ** 2
    if module.causal:
        weights = weights.tril()
    if module.group is not None:
        at = torch.arange(x.shape[1]) // module.group
        weights = weights * (at[:, None] == at)
    return module.out(gate * torch.einsum("bij,bje->bie", weights, value))
