"""Local attention in buckets: every bucket of queries looks at its own keys and at those of the buckets beside it. They
are put together from shifted parts of one padded tensor; positions are put together alike, and decide."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.expect import Expect, Variant

EXPECT = Expect(regrouped=True)


def look_around(x: Tensor, backward: int, forward: int, pad_value: float, dim: int = 2) -> Tensor:
    """(batch, buckets, tokens, ...) with the tokens of the buckets beside it in each."""
    buckets = x.shape[1]
    dims = (len(x.shape) - dim) * (0, 0)
    padded = F.pad(x, (*dims, backward, forward), value=pad_value)
    return torch.cat([padded[:, k : k + buckets, ...] for k in range(forward + backward + 1)], dim=dim)


class LocalAttention(nn.Module):
    def __init__(
        self, width: int = 32, heads: int = 2, window: int = 16, causal: bool = True, backward: int = 1,
        exact: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.window, self.causal, self.exact = heads, window, causal, exact
        self.backward, self.forward_ = backward, 0 if causal else 1
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        w = self.window
        length, missing = x.shape[1], -x.shape[1] % w
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind()
        q, k, v = (F.pad(t, (0, 0, 0, missing)).unflatten(1, (-1, w)) for t in (q, k, v))
        k, v = (look_around(t, self.backward, self.forward_, -1) for t in (k, v))
        rows = torch.arange(length + missing, device=x.device).view(1, -1, w)
        columns = look_around(rows, self.backward, self.forward_, -1)
        i, j = rows[..., :, None], columns[..., None, :]
        sim = torch.einsum("bwie,bwje->bwij", q * q.shape[-1] ** -0.5, k)
        fill = -torch.finfo(sim.dtype).max
        if self.causal:
            out = i < j
            if self.exact:
                out = out | (i > j + w * self.backward)
            sim = sim.masked_fill(out, fill)
        elif self.exact:
            sim = sim.masked_fill((j - w * self.forward_ > i) | (i > j + w * self.backward), fill)
        sim = sim.masked_fill((j == -1) | (j >= length), fill)
        out = torch.einsum("bwij,bwje->bwie", sim.softmax(-1), v).flatten(1, 2)[:, :length]
        return out.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)


def make(length: int = 64, **options: object) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return LocalAttention(**options), (torch.randn(2, length, 32),)  # type: ignore[arg-type]


VARIANTS = {
    "exact": Variant(lambda: make(60, exact=True, backward=2)),
    "both_sides": Variant(lambda: make(causal=False)),
    "both_sides_exact": Variant(lambda: make(50, causal=False, exact=True, window=8)),
}


def allowed(module: LocalAttention, x: Tensor) -> Tensor:
    w, length = module.window, x.shape[1]
    keep = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            near = -module.backward <= j // w - i // w <= module.forward_
            within = (
                not module.exact
                or -module.forward_ * w <= i - j <= module.backward * w
                or (module.causal and 0 <= i - j <= module.backward * w)
            )
            keep[i, j] = near and within and (j <= i or not module.causal)
    return keep


def reference(module: LocalAttention, x: Tensor) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed(module, x), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
