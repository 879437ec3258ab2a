"""Flowformer: attention as a flow network, whose incoming and outgoing flows are normalised: three dependent passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(family="linear", mask="")


class FlowAttention(nn.Module):
    causal, eps = False, 1e-6

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        return self.out(self.flow(torch.sigmoid(q), torch.sigmoid(k), v).transpose(1, 2).flatten(2))

    def flow(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        eps = self.eps
        sink = 1.0 / torch.einsum("nhld,nhd->nhl", q + eps, k.sum(dim=2) + eps)
        source = 1.0 / torch.einsum("nhld,nhd->nhl", k + eps, q.sum(dim=2) + eps)
        conserved_sink = torch.einsum("nhld,nhd->nhl", q + eps, (k * source[..., None]).sum(dim=2) + eps)
        conserved_source = torch.einsum("nhld,nhd->nhl", k + eps, (q * sink[..., None]).sum(dim=2) + eps)
        conserved_source = torch.clamp(conserved_source, min=-1.0, max=1.0)
        allocation = torch.sigmoid(conserved_sink * (float(q.shape[2]) / float(k.shape[2])))
        competition = torch.softmax(conserved_source, dim=-1) * float(k.shape[2])
        kv = k.transpose(-2, -1) @ (v * competition[..., None])
        return ((q * sink[..., None]) @ kv) * allocation[..., None]


class Causal(FlowAttention):
    causal = True

    def flow(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        eps = self.eps
        n = (torch.arange(q.shape[2], device=q.device) + 1.0).to(q.dtype)[None, None, :]
        sink = 1.0 / torch.einsum("nhld,nhld->nhl", q + eps, k.cumsum(dim=2) + eps) * n
        source = 1.0 / torch.einsum("nhld,nhld->nhl", k + eps, q.cumsum(dim=2) + eps) * n
        conserved_sink = torch.einsum("nhld,nhld->nhl", q + eps, (k * source[..., None]).cumsum(dim=2) + eps) / n
        conserved_source = torch.einsum("nhld,nhld->nhl", k + eps, (q * sink[..., None]).cumsum(dim=2) + eps) / n
        conserved_source = torch.exp(torch.clamp(conserved_source, min=-1.0, max=1.0))
        competition = conserved_source / conserved_source.cumsum(dim=-1) * n
        q = q * (sink / n)[..., None]
        kv = torch.einsum("nhld,nhlm->nhldm", k, v * competition[..., None]).cumsum(dim=2)
        return torch.einsum("nhld,nhldm->nhlm", q, kv) * torch.sigmoid(conserved_sink)[..., None]


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return FlowAttention(), (torch.randn(2, 60, 64),)


VARIANTS = {
    "causal": Variant(lambda: (Causal(), (torch.randn(2, 60, 64),)), Expect(family="linear", mask="j <= i")),
}


def reference(module: FlowAttention, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (module.heads, -1)).transpose(1, 2) for p in (module.query, module.key, module.value))
    q, k, eps, n = torch.sigmoid(q), torch.sigmoid(k), module.eps, x.shape[1]
    seen = torch.ones(n, n, dtype=x.dtype).tril() if module.causal else torch.ones(n, n, dtype=x.dtype)
    count = seen.sum(-1) if module.causal else torch.ones(n, dtype=x.dtype)

    def flow(a: Tensor, b: Tensor) -> Tensor:
        return ((a + eps) * (seen @ b + eps)).sum(-1)

    sink, source = count / flow(q, k), count / flow(k, q)
    into = flow(q, k * source[..., None]) / count
    out_of = (flow(k, q * sink[..., None]) / count).clamp(-1, 1).exp()
    share = out_of / (seen @ out_of[..., None])[..., 0] * (count if module.causal else n)
    weights = (q * (sink / count)[..., None]) @ k.mT * seen
    y = weights @ (v * share[..., None]) * torch.sigmoid(into)[..., None]
    return module.out(y.transpose(1, 2).flatten(2))
