"""Union-of-Experts: each head attends among the tokens that chose it, in their order; results are added back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

EXPECT = Expect()


class SelectiveHeads(nn.Module):
    """The gate only selects. Lists are padded to the longest; padding reads token 0 and is dropped again."""

    def __init__(self, dim: int = 32, heads: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.heads, self.chosen, self.head = heads, chosen, dim // heads
        self.gate = nn.Linear(dim, heads, bias=False)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(heads, dim, self.head) * 0.2) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, self.head, dim) * 0.2)

    @torch.no_grad()
    def select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, heads, slots): token numbers in order, and which slots hold one."""
        n = x.shape[1]
        best = self.gate(x).softmax(-1).topk(self.chosen, dim=-1).indices
        picked = torch.zeros(*x.shape[:2], self.heads, device=x.device).scatter(-1, best, 1.0).transpose(1, 2)
        token = torch.arange(n, device=x.device)
        order = torch.where(picked > 0, token, token + n).sort(-1).values
        valid = order < n
        return torch.where(valid, order, 0), valid

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        index, valid = self.select(x)
        slots = index.shape[-1]
        rows = torch.gather(x[:, None].expand(-1, self.heads, -1, -1), 2, index[..., None].expand(-1, -1, -1, c))
        rows = rows.transpose(0, 1).reshape(self.heads, b * slots, c)
        q, k, v = (torch.bmm(rows, w).view(self.heads * b, slots, self.head) for w in (self.q, self.k, self.v))
        keep = valid[:, :, None, :] & torch.ones(slots, slots, dtype=torch.bool, device=x.device).tril()
        mask = torch.zeros(keep.shape, dtype=x.dtype, device=x.device).masked_fill(~keep, torch.finfo(x.dtype).min)
        mask = mask.transpose(0, 1).reshape(self.heads * b, slots, slots)
        probs = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1, alpha=self.head**-0.5).softmax(-1)
        out = torch.bmm(probs, v).view(self.heads, b * slots, self.head)
        out = torch.bmm(out, self.o).view(self.heads, b, slots, c).transpose(0, 1)
        out = out * valid[..., None]
        flat = (index + torch.arange(b, device=x.device)[:, None, None] * n).flatten()
        total = torch.zeros(b * n, c, dtype=x.dtype, device=x.device).index_add(0, flat, out.reshape(-1, c))
        return x + total.view(b, n, c)


class Projected(SelectiveHeads):
    """All tokens projected first, then gathered; letters; results back by scatter_add."""

    def forward(self, x: Tensor) -> Tensor:
        _, _, c = x.shape
        index, valid = self.select(x)
        spread = index[..., None].expand(-1, -1, -1, self.head)
        q, k, v = (torch.einsum("bnc,hcd->bhnd", x, w).gather(2, spread) for w in (self.q, self.k, self.v))
        slots = index.shape[-1]
        place = torch.arange(slots, device=x.device)
        keep = valid[:, :, None, :] & (place[None, :] <= place[:, None])
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.head**-0.5
        probs = scores.masked_fill(~keep, torch.finfo(x.dtype).min).softmax(-1)
        out = torch.einsum("bhid,hdc->bhic", torch.einsum("bhij,bhjd->bhid", probs, v), self.o) * valid[..., None]
        total = torch.zeros_like(x).scatter_add(1, index.flatten(1)[..., None].expand(-1, -1, c), out.flatten(1, 2))
        return x + total


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SelectiveHeads(), (torch.randn(2, 48, 32),)


VARIANTS = {"projected": Variant(lambda: (Projected(), (torch.randn(2, 48, 32),)))}


def reference(module: SelectiveHeads, x: Tensor) -> Tensor:
    best = module.gate(x).softmax(-1).topk(module.chosen, dim=-1).indices
    total = x.clone()
    for b in range(x.shape[0]):
        for h in range(module.heads):
            mine = torch.nonzero((best[b] == h).any(-1)).flatten()
            q, k, v = (x[b, mine] @ w[h] for w in (module.q, module.k, module.v))
            future = torch.ones(len(mine), len(mine), dtype=torch.bool).triu(1)
            probs = (q @ k.t() * module.head**-0.5).masked_fill(future, float("-inf")).softmax(-1)
            total[b, mine] += probs @ v @ module.o[h]
    return total
