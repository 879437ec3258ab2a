"""Keys and values that a model copies together are read in place: rolled, gathered, routed, in windows that overlap."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.lift import op_name
from refocus.testing import check
from tests.test_bands import HEADS, TOKENS, WIDTH, Attend, Attention, graph_of

GROUP = 12


def softmax_of(scores: Tensor) -> Tensor:
    return (scores / math.sqrt(WIDTH)).softmax(-1)


def clamped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Near the border one token is read several times, and counts as often."""
    place = (torch.arange(q.shape[2])[:, None] + torch.arange(-3, 4)).clamp(0, q.shape[2] - 1)
    k, v = k[:, :, place], v[:, :, place]
    weights = softmax_of((q.unsqueeze(3) * k).sum(-1) + bias[:, None])
    return (weights.unsqueeze(-1) * v).sum(3)


def shifted_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """LongLoRA: half of the heads see groups that are shifted by half a group."""

    def shift(x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([first, second.roll(-GROUP // 2, 2)], 1).unflatten(2, (-1, GROUP))

    q, k, v = shift(q), shift(k), shift(v)
    out = (softmax_of(q @ k.mT) + 0 * bias.sum()) @ v
    first, second = out.flatten(2, 3).chunk(2, 1)
    return torch.cat([first, second.roll(GROUP // 2, 2)], 1)


def halo(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Blocks of queries with their own and the next block of keys."""
    q = q.unflatten(2, (-1, GROUP))
    k, v = (F.pad(t, (0, 0, 0, GROUP)).unfold(2, 2 * GROUP, GROUP).mT for t in (k, v))
    return ((softmax_of(q @ k.mT) + 0 * bias.sum()) @ v).flatten(2, 3)


def routed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """BiFormer: a group of queries sees the two groups of keys that its mean is most alike."""
    q, k, v = (t.unflatten(2, (-1, GROUP)) for t in (q, k, v))
    chosen = (q.mean(3) @ k.mean(3).mT).topk(2, -1).indices
    at = chosen[..., None, None].expand(*chosen.shape, GROUP, WIDTH)
    k, v = (t.unsqueeze(2).expand(*t.shape[:3], *t.shape[2:]).gather(3, at).flatten(3, 4) for t in (k, v))
    return ((softmax_of(q @ k.mT) + 0 * bias.sum()) @ v).flatten(2, 3)


def turned(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Keys in reverse, from the middle on."""
    k, v = (t.flip(2).roll(TOKENS // 2, 2) for t in (k, v))
    return (softmax_of(q @ k.mT) + 0 * bias.sum()) @ v


COPIES = ("unfold", "index", "gather", "flip", "expand")


@pytest.mark.parametrize("attend", [clamped, shifted_heads, halo, routed, turned], ids=lambda f: f.__name__)
def test_keys_are_read_where_they_lie(attend: Attend) -> None:
    report = check(Attention(attend), (torch.randn(2, TOKENS, 16),), lower=False, gradients=True).report
    assert [site.fused for site in report.sites] == [True]
    graph = graph_of(attend).gm.graph
    (call,) = (n for n in graph.nodes if "attend" in str(n.target))
    for operand in call.args[0]:
        assert op_name(operand) not in COPIES
        size = operand.meta["val"].numel()
        assert size <= 2 * HEADS * (TOKENS + GROUP) * WIDTH  # no token twice
