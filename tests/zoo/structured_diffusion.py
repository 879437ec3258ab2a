"""Structured Diffusion Guidance: one map of the full prompt, applied to the values of several aligned prompts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(mask="", sites=3)


class StructuredCrossAttention(nn.Module):
    def __init__(self, dim: int = 32, context: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(n, dim, bias=False) for n in (dim, context, context, dim)
        )

    def split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        """`prompts` (1 + phrases, batch, tokens, width); keys are of the first."""
        q, k = self.split(self.to_q(x)), self.split(self.to_k(prompts[0]))
        attn = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(dim=-1)
        outs = [torch.einsum("bhij,bhjd->bhid", attn, self.split(self.to_v(prompt))) for prompt in prompts]
        out = torch.stack(outs).sum(0) / len(outs)
        return self.to_out(out.transpose(1, 2).flatten(2))


class MeanValues(StructuredCrossAttention):
    """The mean of the values instead of the mean of the results."""

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(prompts[0])), self.split(self.to_v(prompts).mean(0))
        attn = ((q @ k.transpose(-1, -2)) * self.scale).softmax(dim=-1)
        return self.to_out((attn @ v).transpose(1, 2).flatten(2))


class AllAtOnce(StructuredCrossAttention):
    """All values in one product."""

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        q, k = (t.unflatten(-1, (self.heads, -1)) for t in (self.to_q(x), self.to_k(prompts[0])))
        v = self.to_v(prompts).unflatten(-1, (self.heads, -1))
        attn = (torch.einsum("bihd,bjhd->bhij", q, k) * self.scale).softmax(dim=-1)
        return self.to_out(torch.einsum("bhij,mbjhd->mbihd", attn, v).mean(0).flatten(2))


class MeanKeys(StructuredCrossAttention):
    """The alternative: a map of each prompt's keys, values of the first."""

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        q, v = self.split(self.to_q(x)), self.split(self.to_v(prompts[0]))
        total = 0.0
        for prompt in prompts:
            attn = (q @ self.split(self.to_k(prompt)).transpose(-1, -2)) * self.scale
            total = total + attn.softmax(dim=-1) @ v
        return self.to_out((total / len(prompts)).transpose(1, 2).flatten(2))  # type: ignore[attr-defined]


def _inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 64, 32), torch.randn(3, 2, 20, 24)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return StructuredCrossAttention(), _inputs()


VARIANTS = {
    "mean": Variant(lambda: (MeanValues(), _inputs()), Expect(mask="")),
    "at_once": Variant(lambda: (AllAtOnce(), _inputs()), Expect(mask="")),
    "keys": Variant(lambda: (MeanKeys(), _inputs())),
}


def reference(module: StructuredCrossAttention, x: Tensor, prompts: Tensor) -> Tensor:
    q = module.to_q(x).unflatten(-1, (module.heads, -1))
    k, v = (p(prompts).unflatten(-1, (module.heads, -1)) for p in (module.to_k, module.to_v))
    k, v = (k, v[:1].expand_as(v)) if isinstance(module, MeanKeys) else (k[:1].expand_as(k), v)
    probs = (torch.einsum("bihd,mbjhd->mbhij", q, k) * module.scale).softmax(-1)
    return module.to_out(torch.einsum("mbhij,mbjhd->mbihd", probs, v).mean(0).flatten(2))
