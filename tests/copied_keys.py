"""Attention whose keys are copied together before they are used: as offsets from the query, in groups, by routing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.testing import rewritten
from tests.attended import attending
from tests.region_cases import Case

HEADS, TOKENS, WIDTH, REACH, GROUP = 2, 48, 8, 3, 12
WINDOW = 2 * REACH + 1

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def softmax_of(scores: Tensor, bias: Tensor) -> Tensor:
    return (scores / math.sqrt(WIDTH) + bias[:, None]).softmax(-1)


def unfolded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Zeros past the border, which take part in the softmax."""
    k, v = (F.pad(t, (0, 0, REACH, REACH)).unfold(2, WINDOW, 1) for t in (k, v))
    return torch.einsum("bhnw,bhndw->bhnd", softmax_of(torch.einsum("bhnd,bhndw->bhnw", q, k), bias), v)


def unfolded_and_masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    k, v = (F.pad(t, (0, 0, REACH, REACH)).unfold(2, WINDOW, 1) for t in (k, v))
    place = torch.arange(q.shape[2])[:, None] + torch.arange(-REACH, REACH + 1)
    scores = torch.einsum("bhnd,bhndw->bhnw", q, k).masked_fill((place < 0) | (place >= q.shape[2]), -math.inf)
    return torch.einsum("bhnw,bhndw->bhnd", softmax_of(scores, bias), v)


def slices_stacked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The window as a list of shifted copies."""
    k, v = (F.pad(t, (0, 0, REACH, REACH)) for t in (k, v))
    k, v = (torch.stack([t[:, :, w : w + q.shape[2]] for w in range(WINDOW)], 3) for t in (k, v))
    return (softmax_of((q.unsqueeze(3) * k).sum(-1), bias).unsqueeze(-1) * v).sum(3)


def inward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The window slides inward at the borders (NATTEN)."""
    place = torch.arange(q.shape[2]).clamp(REACH, q.shape[2] - 1 - REACH)[:, None] + torch.arange(-REACH, REACH + 1)
    k, v = k[:, :, place], v[:, :, place]
    weights = softmax_of((q.unsqueeze(3) @ k.mT).squeeze(3), bias)
    return (weights.unsqueeze(3) @ v).squeeze(3)


def around(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The last tokens see the first."""
    place = (torch.arange(q.shape[2])[:, None] + torch.arange(WINDOW)) % q.shape[2]
    k, v = (t.index_select(2, place.flatten()).unflatten(2, place.shape) for t in (k, v))
    return (softmax_of((q.unsqueeze(3) * k).sum(-1), bias).unsqueeze(-2) @ v).squeeze(-2)


def dilated(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    k, v = (F.pad(t, (0, 0, 3 * REACH, 3 * REACH)).unfold(2, 3 * WINDOW - 2, 1)[..., ::3] for t in (k, v))
    return torch.einsum("bhnw,bhndw->bhnd", softmax_of(torch.einsum("bhnd,bhndw->bhnw", q, k), bias), v)


def in_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """3 x 3 neighbours of an image of 8 x 6, in two axes of keys."""
    q, k, v = (t.unflatten(2, (8, 6)) for t in (q, k, v))
    k, v = (F.pad(t, (0, 0, 1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1) for t in (k, v))
    scores = torch.einsum("bhyxd,bhyxduv->bhyxuv", q, k).flatten(-2) / math.sqrt(WIDTH) + 0 * bias.sum()
    weights = scores.softmax(-1).unflatten(-1, (3, 3))
    return torch.einsum("bhyxuv,bhyxduv->bhyxd", weights, v).flatten(2, 3)


def columns(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """3 x 3 neighbours of an image of 8 x 6 by torch's unfold of images, which pads with zeros."""
    k, v = (F.unfold(t.mT.flatten(0, 1).unflatten(-1, (8, 6)), 3, padding=1) for t in (k, v))
    k, v = (t.unflatten(0, (-1, HEADS)).unflatten(2, (WIDTH, 9)) for t in (k, v))
    weights = (torch.einsum("bhnd,bhdwn->bhnw", q, k) / math.sqrt(WIDTH) + 0 * bias.sum()).softmax(-1)
    return torch.einsum("bhnw,bhdwn->bhnd", weights, v)


def strided(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Overlapping windows as strides over memory (Longformer's chunks)."""
    k, v = (F.pad(t, (0, 0, REACH, REACH)) for t in (k, v))
    size, row = (*q.shape[:3], WINDOW, WIDTH), k.shape[2] * WIDTH
    k, v = (t.as_strided(size, (HEADS * row, row, WIDTH, WIDTH, 1)) for t in (k, v))
    weights = softmax_of(torch.einsum("bhnd,bhnwd->bhnw", q, k), bias)
    return torch.einsum("bhnw,bhnwd->bhnd", weights, v)


def clamped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Near miss: the border token is reached several times, and counts as often."""
    place = (torch.arange(q.shape[2])[:, None] + torch.arange(-REACH, REACH + 1)).clamp(0, q.shape[2] - 1)
    k, v = k[:, :, place], v[:, :, place]
    return (softmax_of((q.unsqueeze(3) * k).sum(-1), bias).unsqueeze(-1) * v).sum(3)


def other_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Near miss: the values of a window are read backwards."""
    k, v = (F.pad(t, (0, 0, REACH, REACH)).unfold(2, WINDOW, 1) for t in (k, v))
    v = v.flip(-1)
    return torch.einsum("bhnw,bhndw->bhnd", softmax_of(torch.einsum("bhnd,bhndw->bhnw", q, k), bias), v)


def scaled_keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Near miss: a key's length depends on where it stands in the window."""
    k, v = (F.pad(t, (0, 0, REACH, REACH)).unfold(2, WINDOW, 1) for t in (k, v))
    k = k * bias[:, None, None]
    return torch.einsum("bhnw,bhndw->bhnd", softmax_of(torch.einsum("bhnd,bhndw->bhnw", q, k), bias), v)


# ---------------------------------------------------------------------------------------------------- in groups


def weights_of(scores: Tensor) -> Tensor:
    return (scores / math.sqrt(WIDTH)).softmax(-1)


def shifted_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """LongLoRA: half of the heads see groups that are shifted by half a group."""

    def shift(x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([first, second.roll(-GROUP // 2, 2)], 1).unflatten(2, (-1, GROUP))

    q, k, v = shift(q), shift(k), shift(v)
    out = weights_of(q @ k.mT) @ v
    first, second = out.flatten(2, 3).chunk(2, 1)
    return torch.cat([first, second.roll(GROUP // 2, 2)], 1)


def halo(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Blocks of queries with their own and the next block of keys."""
    q = q.unflatten(2, (-1, GROUP))
    k, v = (F.pad(t, (0, 0, 0, GROUP)).unfold(2, 2 * GROUP, GROUP).mT for t in (k, v))
    return (weights_of(q @ k.mT) @ v).flatten(2, 3)


def routed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, group: int = GROUP) -> Tensor:
    """BiFormer: a group of queries sees the two groups of keys that its mean is most alike."""
    q, k, v = (t.unflatten(2, (-1, group)) for t in (q, k, v))
    chosen = (q.mean(3) @ k.mean(3).mT).topk(2, -1).indices
    at = chosen[..., None, None].expand(*chosen.shape, group, WIDTH)
    k, v = (t.unsqueeze(2).expand(*t.shape[:3], *t.shape[2:]).gather(3, at).flatten(3, 4) for t in (k, v))
    return (weights_of(q @ k.mT) @ v).flatten(2, 3)


def turned(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Keys in reverse, from the middle on."""
    k, v = (t.flip(2).roll(TOKENS // 2, 2) for t in (k, v))
    return weights_of(q @ k.mT) @ v


def tensors() -> tuple[Tensor, ...]:
    return *torch.randn(3, 2, HEADS, TOKENS, WIDTH).unbind(), torch.randn(HEADS, WINDOW)


def captured(attend: Attend) -> Case:
    """The region that is read in these, its result in order, and what it ran on."""
    torch.manual_seed(0)
    with attending() as calls:
        rewritten(attend, engine="tiled", require=True)(*tensors())
    region = replace(calls[0].region, output=None)  # results in place are tested in tests/test_triton_outputs.py
    return region, list(calls[0].operands), list(calls[0].sizes)


def _case(attend: Attend) -> Callable[..., Case]:
    def make(*_: object) -> Case:
        return captured(attend)

    return make


# Regions that read in place, or over tokens, for the suites of the generated kernels; their sizes are fixed.
CAPTURED: dict[str, Callable[..., Case]] = {
    f"{f.__name__}_keys": _case(f) for f in (clamped, shifted_heads, halo, routed, turned, around, in_rows)
}
