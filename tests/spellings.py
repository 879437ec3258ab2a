"""One attention in very many spellings: where the scale is, how the mask is written, which layout, which softmax.

Every `Spelling` is one combination; `Spelled(spelling)` is the module that computes it, eagerly and literally. All of
them are softmax attention of the same inputs: q (batch, length, heads, width) and k, v (batch, length, kv heads,
width), masked causally or not. `covering` picks a small set in which every pair (or triple) of choices occurs.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, LENGTH, HEADS, WIDTH = 2, 48, 4, 16

CHOICES: dict[str, tuple[str, ...]] = {
    "scale": ("q", "k", "both", "scores", "divide", "none"),
    "mask": (
        "none",
        "where",
        "fill",
        "fill_in_place",
        "infinite",
        "lowest",
        "soft",
        "tril_buffer",
        "multiply",
        "multiply_buffer",
        "arange",
        "maximum",
        "sdpa_like",
        "logarithm",
        "slopes",
    ),
    "layout": ("matmul", "bmm", "baddbmm", "einsum bhid", "einsum bihd", "einsum ibhd", "einsum groups", "transposed"),
    "heads": ("equal", "expand", "interleave"),
    "softmax": ("functional", "method", "module", "by hand", "logsumexp", "log_softmax", "subtract_max"),
    "cast": ("none", "dtype", "float"),
    "dropout": ("none", "functional", "module"),
}


@dataclass(frozen=True)
class Spelling:
    scale: str = "scores"
    mask: str = "none"
    layout: str = "matmul"
    heads: str = "equal"
    softmax: str = "functional"
    cast: str = "none"
    dropout: str = "none"

    def __str__(self) -> str:
        return "-".join(part.replace(" ", "_") for part in astuple(self))


assert tuple(f.name for f in fields(Spelling)) == tuple(CHOICES)


def inputs(spelling: Spelling, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, equal for every spelling with as many key-value heads; peaked rows whatever the scale."""
    random_numbers = torch.Generator().manual_seed(0)
    kv_heads = HEADS if spelling.heads == "equal" else HEADS // 2
    spread = 1.5 if spelling.scale != "none" else 0.7
    q = torch.randn(BATCH, LENGTH, HEADS, WIDTH, generator=random_numbers) * spread
    k = torch.randn(BATCH, LENGTH, kv_heads, WIDTH, generator=random_numbers) * spread
    v = torch.randn(BATCH, LENGTH, kv_heads, WIDTH, generator=random_numbers)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def plain(spelling: Spelling, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What every spelling computes: (batch, length, heads, width)."""
    k, v = (t.repeat_interleave(HEADS // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (1.0 if spelling.scale == "none" else WIDTH**-0.5)
    if spelling.mask != "none":
        i = torch.arange(q.shape[1])
        scores = scores.masked_fill(i[None, :] > i[:, None], -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


class Spelled(nn.Module):
    """The attention, literally in one spelling."""

    bias: Tensor

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.how = spelling
        self.attn_dropout = nn.Dropout(0.1)
        self.normalize = nn.Softmax(dim=-1)
        if spelling.mask == "tril_buffer":
            self.register_buffer("bias", torch.tril(torch.ones(64, 64, dtype=torch.bool)).view(1, 1, 64, 64))
        if spelling.mask == "multiply_buffer":
            self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.scale_inputs(q, k, v)
        k, v = self.share_heads(k), self.share_heads(v)
        scores = self.scores(q, k)
        scores = self.scale_scores(scores)
        scores = self.masked(scores)
        weights = self.drop(self.softmax(scores).to(v.dtype))
        return self.weigh(weights, v)

    def scale_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        match self.how.scale:
            case "q":
                q = q * WIDTH**-0.5
            case "k":
                k = k / math.sqrt(WIDTH)
            case "both":
                q, k = q * WIDTH**-0.25, k * WIDTH**-0.25
        return q, k, v

    def scale_scores(self, scores: Tensor) -> Tensor:
        if self.how.layout == "baddbmm":
            return scores
        match self.how.scale:
            case "scores":
                return scores * WIDTH**-0.5
            case "divide":
                return scores / math.sqrt(WIDTH)
        return scores

    def share_heads(self, x: Tensor) -> Tensor:
        batch, length, heads, width = x.shape
        match self.how.heads:
            case "expand":
                copies = HEADS // heads
                return x[:, :, :, None, :].expand(batch, length, heads, copies, width).reshape(batch, length, -1, width)
            case "interleave":
                return torch.repeat_interleave(x, HEADS // heads, dim=2)
        return x

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(batch, heads, queries, keys)."""
        batch, length, heads, width = q.shape
        match self.how.layout:
            case "matmul":
                return torch.matmul(q.transpose(1, 2), k.transpose(1, 2).transpose(-1, -2))
            case "bmm" | "baddbmm":
                q = q.transpose(1, 2).reshape(batch * heads, length, width)
                k = k.permute(0, 2, 3, 1).reshape(batch * heads, width, -1)
                if self.how.layout == "bmm":
                    return torch.bmm(q, k).view(batch, heads, length, -1)
                start = torch.empty(batch * heads, length, k.shape[-1], dtype=q.dtype, device=q.device)
                alpha = WIDTH**-0.5 if self.how.scale in ("scores", "divide") else 1.0
                return torch.baddbmm(start, q, k, beta=0, alpha=alpha).view(batch, heads, length, -1)
            case "einsum bhid":
                return torch.einsum("b h i d, b h j d -> b h i j", q.transpose(1, 2), k.transpose(1, 2))
            case "einsum bihd":
                return torch.einsum("bihd,bjhd->bhij", q, k)
            case "einsum ibhd":
                scores = torch.einsum("ibhd,jbhd->ijbh", q.transpose(0, 1), k.transpose(0, 1))
                return scores.permute(2, 3, 0, 1)
            case "einsum groups":
                q, k = (t.unflatten(2, (2, -1)) for t in (q, k))
                return torch.einsum("...qghd,...kghd->...ghqk", q, k).flatten(1, 2)
            case "transposed":
                return (k.permute(0, 2, 1, 3) @ q.permute(0, 2, 3, 1)).mT
        raise AssertionError(self.how.layout)

    def weigh(self, weights: Tensor, v: Tensor) -> Tensor:
        """(batch, queries, heads, width)."""
        batch, heads, length, columns = weights.shape
        match self.how.layout:
            case "matmul":
                return (weights @ v.transpose(1, 2)).transpose(1, 2).contiguous()
            case "bmm" | "baddbmm":
                v = v.transpose(1, 2).reshape(batch * heads, columns, -1)
                out = torch.bmm(weights.view(batch * heads, length, columns), v)
                return out.view(batch, heads, length, -1).permute(0, 2, 1, 3)
            case "einsum bhid":
                return torch.einsum("b h i j, b h j d -> b h i d", weights, v.transpose(1, 2)).transpose(1, 2)
            case "einsum bihd":
                return torch.einsum("bhij,bjhd->bihd", weights, v)
            case "einsum ibhd":
                return torch.einsum("ijbh,jbhd->ibhd", weights.permute(2, 3, 0, 1), v.transpose(0, 1)).transpose(0, 1)
            case "einsum groups":
                weights, v = weights.unflatten(1, (2, -1)), v.unflatten(2, (2, -1))
                return torch.einsum("...ghqk,...kghd->...qghd", weights, v).flatten(2, 3)
            case "transposed":
                return (v.permute(0, 2, 3, 1) @ weights.mT).permute(0, 3, 1, 2)
        raise AssertionError(self.how.layout)

    def masked(self, scores: Tensor) -> Tensor:
        rows, columns = scores.shape[-2:]
        lowest = torch.finfo(scores.dtype).min
        ones = torch.ones(rows, columns, device=scores.device)
        match self.how.mask:
            case "where":
                return torch.where(ones.tril().bool(), scores, torch.tensor(lowest, dtype=scores.dtype))
            case "fill":
                return scores.masked_fill(ones.triu(1) == 1, -math.inf)
            case "fill_in_place":
                scores = scores.clone()
                scores.masked_fill_(ones.triu(1).bool(), -1e9)
                return scores
            case "infinite":
                mask = torch.full((rows, columns), -math.inf, dtype=scores.dtype, device=scores.device)
                return scores + mask.triu(1)
            case "lowest":
                return scores + (1.0 - ones.tril().to(scores.dtype)) * lowest
            case "soft":
                return scores + (1.0 - ones.tril().to(scores.dtype))[None, None] * -10000.0
            case "tril_buffer":
                keep = self.bias[:, :, columns - rows : columns, :columns]
                return torch.where(keep, scores, torch.full([], lowest, dtype=scores.dtype))
            case "multiply":
                keep = ones.tril().to(scores.dtype)
                return scores * keep - 1e4 * (1 - keep)
            case "multiply_buffer":
                keep = self.bias[:, :, columns - rows : columns, :columns].to(scores.dtype)
                return scores * keep - 1e4 * (1 - keep)
            case "arange":
                i, j = torch.arange(rows, device=scores.device), torch.arange(columns, device=scores.device)
                return scores.masked_fill(~(j[None, :] <= i[:, None]), lowest)
            case "maximum":
                mask = torch.zeros(rows, columns, dtype=scores.dtype).masked_fill(ones.triu(1).bool(), lowest)
                return torch.max(scores + mask, torch.tensor(lowest, dtype=scores.dtype))
            case "sdpa_like":
                mask = torch.zeros(rows, columns, dtype=scores.dtype, device=scores.device)
                mask.masked_fill_(ones.tril().bool().logical_not(), float("-inf"))
                scores += mask
                return scores
            case "logarithm":
                return scores + ones.tril().to(scores.dtype).log()
            case "slopes":  # a bias of which each row sees the same slope of zero, and a mask, in one constant table
                distance = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
                slopes = torch.tensor([0.0] * scores.shape[1], dtype=scores.dtype)
                return scores + (distance * slopes[:, None, None]).masked_fill(ones.triu(1).bool(), -math.inf)
        return scores

    def softmax(self, scores: Tensor) -> Tensor:
        dtype = torch.float32 if self.how.cast == "dtype" and scores.dtype != torch.float64 else None
        if self.how.cast == "float" and scores.dtype != torch.float64:
            scores = scores.float()
        match self.how.softmax:
            case "functional":
                return F.softmax(scores, dim=-1, dtype=dtype)
            case "method":
                return scores.softmax(3) if dtype is None else scores.softmax(3, dtype=dtype)
            case "module":
                return self.normalize(scores if dtype is None else scores.to(dtype))
            case "by hand":
                scores = scores if dtype is None else scores.to(dtype)
                weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
                return weights / weights.sum(dim=-1, keepdim=True)
            case "logsumexp":
                scores = scores if dtype is None else scores.to(dtype)
                return (scores - scores.logsumexp(-1, keepdim=True)).exp()
            case "log_softmax":
                return F.log_softmax(scores, dim=-1, dtype=dtype).exp()
            case "subtract_max":
                scores = scores - scores.max(dim=-1, keepdim=True).values
                return torch.softmax(scores, dim=-1, dtype=dtype)
        raise AssertionError(self.how.softmax)

    def drop(self, weights: Tensor) -> Tensor:
        match self.how.dropout:
            case "functional":
                return F.dropout(weights, p=0.1, training=self.training)
            case "module":
                return self.attn_dropout(weights)
        return weights


def covering(strength: int, seed: int = 0) -> tuple[Spelling, ...]:
    """Spellings in which every combination of `strength` choices of different kinds occurs; the fewest that a greedy
    search finds. Reproducible."""
    shuffled = random.Random(seed)
    names = tuple(CHOICES)
    todo: dict[tuple[tuple[int, str], ...], None] = {}
    for places in itertools.combinations(range(len(names)), strength):
        for values in itertools.product(*(CHOICES[names[p]] for p in places)):
            todo[tuple(zip(places, values))] = None
    found: list[Spelling] = []
    while todo:
        start = dict(next(iter(todo)))  # so that every round covers something
        best: tuple[str, ...] = ()
        gain = -1
        for _ in range(24):
            row = tuple(start.get(p) or shuffled.choice(CHOICES[name]) for p, name in enumerate(names))
            covered = sum(c in todo for c in itertools.combinations(tuple(enumerate(row)), strength))
            if covered > gain:
                best, gain = row, covered
        for combination in itertools.combinations(tuple(enumerate(best)), strength):
            todo.pop(combination, None)
        found.append(Spelling(*best))
    return tuple(found)


def everything() -> tuple[Spelling, ...]:
    """Every combination."""
    return tuple(Spelling(*row) for row in itertools.product(*CHOICES.values()))
