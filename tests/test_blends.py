"""Attentions over parts of the keys that are put together by their log-sum-exps: one attention over all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import refocus
import refocus.backend
from refocus.testing import check, rewritten
from tests.drawn import Attention

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
BATCH, HEADS, TOKENS, WIDTH = 2, 2, 40, 8
SCALE = WIDTH**-0.5
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, BATCH, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()


def _parts(q: Tensor, k: Tensor, v: Tensor, *bounds: int) -> list[tuple[Tensor, Tensor]]:
    """What a kernel returns for each chunk of keys: the attention over it, and its log-sum-exp."""
    found = []
    for begin, end in zip((0, *bounds), (*bounds, TOKENS)):
        scores = q @ k[:, :, begin:end].mT * SCALE
        found.append((scores.softmax(-1) @ v[:, :, begin:end], torch.logsumexp(scores, -1, keepdim=True)))
    return found


def by_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (first, a), (second, b) = _parts(q, k, v, 16)
    return (a.exp() * first + b.exp() * second) / (a.exp() + b.exp())


def by_shifted_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = _parts(q, k, v, 8, 16, 30)
    most = parts[0][1]
    for _, lse in parts[1:]:
        most = torch.maximum(most, lse)
    shares = [(lse - most).exp() for _, lse in parts]
    return sum(share * x for share, (x, _) in zip(shares, parts)) * sum(shares).reciprocal()


def of_two_memories(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (first, a), (second, b) = _parts(q, k, v)[0], _parts(q, k.flip(-1), v + k)[0]
    most = torch.max(a, b)
    a, b = (torch.exp2((x - most) * math.log2(math.e)) for x in (a, b))
    return (first * a + second * b) / (a + b)


def by_difference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (first, a), (second, b) = _parts(q, k, v, 16)
    return first - torch.sigmoid(b - a) * (first - second)


def interpolated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (first, a), (second, b) = ((x.transpose(1, 2), lse.transpose(1, 2)) for x, lse in _parts(q, k, v, 16))
    return torch.lerp(second, first, 1 - torch.sigmoid(b - a)).flatten(2)


BLENDS = (by_exponentials, by_shifted_exponentials, of_two_memories, by_difference, interpolated)


@pytest.mark.parametrize("function", BLENDS, ids=lambda f: f.__name__)
def test_attentions_that_are_blended_by_their_sums_are_one(function: Function) -> None:
    (site,) = check(Attention(function), inputs(), lower=False, gradients=True).report.sites
    assert site.fused and site.notation.count("softmax_j(") == 1


def blended_by_other_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (first, a), (second, b) = _parts(q, k, v, 16)
    return (a.exp() * first + (2 * b).exp() * second) / (a.exp() + (2 * b).exp())


def blended_the_wrong_way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (first, a), (second, b) = _parts(q, k, v, 16)
    return (b.exp() * first + a.exp() * second) / (a.exp() + b.exp())


def blended_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (first, a), (second, b) = _parts(q, k, v, 16)
    return first - 2 * torch.sigmoid(b - a) * (first - second)


def blended_without_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first rows have no key in the second part, which is no number, whatever its share."""
    scores = (q @ k.mT * SCALE).masked_fill(~CAUSAL, -math.inf)
    parts = [(scores[..., a:b], v[:, :, a:b]) for a, b in ((0, 16), (16, TOKENS))]
    sums = [x.logsumexp(-1, keepdim=True).exp() for x, _ in parts]
    return sum(total * (x.softmax(-1) @ y) for total, (x, y) in zip(sums, parts)) / sum(sums)


def stacked_shares(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = _parts(q, k, v, 16)
    results, sums = (torch.stack(x) for x in zip(*parts))
    return (results * sums.softmax(0)).sum(0)


@pytest.mark.parametrize(
    "function",
    [blended_by_other_sums, blended_the_wrong_way, blended_twice, blended_without_keys, stacked_shares],
    ids=lambda f: f.__name__,
)
def test_other_blends_stay_right(function: Function) -> None:
    run = rewritten(Attention(function), engine="tiled")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", refocus.backend.FallbackWarning)
        torch.testing.assert_close(run(*inputs()), function(*inputs()), equal_nan=True)
