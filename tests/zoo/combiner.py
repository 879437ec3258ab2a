"""Combiner: every key is reached directly or through the summary of its span; one softmax over both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.expect import Expect, Variant

# The summaries are attentions of their own: a pooled query over each span.
EXPECT = Expect(sites=2)


class Fixed(nn.Module):
    """Spans of equal length: tokens of the own span up to the query, summaries of the spans before."""

    def __init__(self, dim: int = 32, heads: int = 2, span: int = 16) -> None:
        super().__init__()
        self.heads, self.span, self.scale = heads, span, (dim // heads) ** -0.5
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q * self.scale, k, v

    def forward(self, x: Tensor) -> Tensor:
        _, n, _ = x.shape
        m = self.span
        q, k, v = (t.unflatten(2, (n // m, m)) for t in self.project(x))  # b h r m d
        span_k, span_q = k.max(dim=3).values, q.max(dim=3).values
        span_probs = torch.einsum("bhrd,bhrmd->bhrm", span_q, k).softmax(-1)
        span_v = torch.einsum("bhrm,bhrmd->bhrd", span_probs, v)
        local = torch.einsum("bhrid,bhrjd->bhrij", q, k)
        causal = torch.ones(m, m, dtype=torch.bool, device=x.device).tril()
        local = local.masked_fill(~causal, float("-inf"))
        far = torch.einsum("bhrid,bhsd->bhris", q, span_k)
        before = torch.ones(n // m, n // m, dtype=torch.bool, device=x.device).tril(-1)
        far = far.masked_fill(~before[:, None, :], float("-inf"))
        probs = torch.cat((local, far), dim=-1).softmax(-1)
        near_probs, far_probs = probs.split((m, n // m), dim=-1)
        out = torch.einsum("bhrij,bhrjd->bhrid", near_probs, v) + torch.einsum("bhris,bhsd->bhrid", far_probs, span_v)
        return self.out(out.flatten(2, 3).transpose(1, 2).flatten(2))


class OneList(Fixed):
    """Direct keys and summaries as one list of keys."""

    def forward(self, x: Tensor) -> Tensor:
        n, m = x.shape[1], self.span
        q, k, v = self.project(x)
        spans_k, spans_q, spans_v = (t.unflatten(2, (n // m, m)) for t in (k, q, v))
        span_k = spans_k.amax(3)
        span_probs = (spans_q.amax(3)[..., None, :] @ spans_k.transpose(-1, -2)).softmax(-1)
        span_v = (span_probs @ spans_v).squeeze(-2)
        keys, values = torch.cat((k, span_k), 2), torch.cat((v, span_v), 2)
        i = torch.arange(n, device=x.device)[:, None]
        j = torch.arange(n + n // m, device=x.device)[None, :]
        keep = torch.where(j < n, (i // m == j // m) & (j <= i), j - n < i // m)
        scores = (q @ keys.transpose(-1, -2)).masked_fill(~keep, float("-inf"))
        return self.out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))


class LogSparse(Fixed):
    """The token itself, and one span of each power of two that tiles what is before it."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.project(x)
        token = torch.arange(n, device=x.device)
        keys, values, covered = [k], [v], [torch.ones_like(token, dtype=torch.bool)]
        level = 0
        while 1 << level < n:
            size = 1 << level
            spans_k, spans_v, spans_q = (t.unflatten(2, (n // size, size)) for t in (k, v, q))
            span_k, span_q, span_v = spans_k.amax(3), spans_q.amax(3), v
            if size > 1:
                probs = torch.einsum("bhrd,bhrmd->bhrm", span_q, spans_k).softmax(-1)
                span_v = torch.einsum("bhrm,bhrmd->bhrd", probs, spans_v)
            which = (token // size - 1).clamp(min=0)
            keys.append(span_k[:, :, which])
            values.append(span_v[:, :, which])
            covered.append(token // size % 2 == 1)
            level += 1
        scores = torch.einsum("bhnd,lbhnd->bhnl", q, torch.stack(keys))
        probs = scores.masked_fill(~torch.stack(covered, -1), float("-inf")).softmax(-1)
        out = torch.einsum("bhnl,bhnld->bhnd", probs, torch.stack(values, 3))
        return self.out(out.transpose(1, 2).flatten(2))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Fixed(), (torch.randn(2, 128, 32),)


VARIANTS = {
    "one_list": Variant(lambda: (OneList(), (torch.randn(2, 128, 32),))),
    "logsparse": Variant(lambda: (LogSparse(), (torch.randn(2, 32, 32),)), Expect(sites=5)),
}


def reference(module: Fixed, x: Tensor) -> Tensor:
    """Token by token: its keys are what its spans say."""
    _, n, _ = x.shape
    q, k, v = module.project(x)

    def summary(start: int, end: int) -> tuple[Tensor, Tensor]:
        probs = torch.einsum("bhd,bhmd->bhm", q[:, :, start:end].amax(2), k[:, :, start:end]).softmax(-1)
        return k[:, :, start:end].amax(2), torch.einsum("bhm,bhmd->bhd", probs, v[:, :, start:end])

    out = torch.zeros_like(v)
    for i in range(n):
        direct, spans = [i], []
        if isinstance(module, LogSparse):
            end = 0  # [0, i) from the largest span to the smallest
            for level in reversed(range(n.bit_length() - 1)):
                if i >> level & 1:
                    spans.append((end, end + (1 << level)))
                    end += 1 << level
        else:
            m = module.span
            direct = list(range(i // m * m, i + 1))
            spans = [(r * m, r * m + m) for r in range(i // m)]
        found = [summary(*span) for span in spans]
        keys = torch.stack([k[:, :, j] for j in direct] + [s[0] for s in found], 2)
        values = torch.stack([v[:, :, j] for j in direct] + [s[1] for s in found], 2)
        probs = torch.einsum("bhd,bhjd->bhj", q[:, :, i], keys).softmax(-1)
        out[:, :, i] = torch.einsum("bhj,bhjd->bhd", probs, values)
    return module.out(out.transpose(1, 2).flatten(2))
