"""The log-sum-exp that is left at the end of a softmax in chunks of keys: the last maximum, and the last sum."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import refocus
from refocus.testing import check, rewritten
from tests.drawn import Attention

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 40, 8
SCALE = WIDTH**-0.5
CHUNKS = [(0, 16), (16, 32), (32, TOKENS)]  # the last one is shorter
Results = tuple[Tensor, ...]
Function = Callable[[Tensor, Tensor, Tensor], Results]


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, BATCH, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()


def _mask(kept: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    positions = torch.arange(TOKENS)
    return kept(positions[:, None], positions)


def _loop(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, fill: float = -math.inf, guarded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash attention by hand: the sum of values, the last shift, and the sum of weights."""
    most = q.new_full((*q.shape[:-1], 1), -math.inf)
    total, result = torch.zeros_like(most), torch.zeros_like(q)
    shift = most
    for begin, end in CHUNKS:
        scores = q @ k[:, :, begin:end].mT * SCALE
        if mask is not None:
            scores = scores.masked_fill(~mask[:, begin:end], fill)
        before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
        shift = torch.where(most == -math.inf, 0.0, most) if guarded else most
        weights, rescale = (scores - shift).exp(), (before - shift).exp()
        total = total * rescale + weights.sum(-1, keepdim=True)
        result = result * rescale + weights @ v[:, :, begin:end]
    return result, shift, total


def running(q: Tensor, k: Tensor, v: Tensor) -> Results:
    result, most, total = _loop(q, k, v)
    return result / total, (most + total.log()).squeeze(-1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Results:
    result, most, total = _loop(q, k, v, mask=_mask(lambda i, j: j <= i))
    return result / total, most + total.log()


def guarded(q: Tensor, k: Tensor, v: Tensor) -> Results:
    result, shift, total = _loop(q, k, v, mask=_mask(lambda i, j: (j <= i) & (i - j < 8)), guarded=True)
    return result / total, shift + total.log()


def guarded_empty_rows(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """Rows 5, 17 and 29 have no key."""
    result, shift, total = _loop(q, k, v, mask=_mask(lambda i, j: (j <= i) & (i % 12 != 5)), guarded=True)
    return result / total, shift + total.log()


def filled_rows(q: Tensor, k: Tensor, v: Tensor) -> Results:
    result, most, total = _loop(q, k, v, mask=_mask(lambda i, j: (j <= i) & (i % 12 != 5)), fill=-1e9)
    return result / total, most + total.log()


def finite_where_there_is_no_key(q: Tensor, k: Tensor, v: Tensor) -> Results:
    result, rows = guarded_empty_rows(q, k, v)
    return result, torch.where(rows == -math.inf, 0.0, rows)


def base_two(q: Tensor, k: Tensor, v: Tensor) -> Results:
    most = q.new_full(q.shape[:-1], -1e30)
    total, result = q.new_zeros(q.shape[:-1]), torch.zeros_like(q)
    for begin, end in CHUNKS:
        scores = torch.einsum("bhid,bhjd->bhij", q, k[:, :, begin:end]) * (SCALE * math.log2(math.e))
        new = torch.maximum(most, scores.amax(-1))
        rescale, weights = torch.exp2(most - new), torch.exp2(scores - new[..., None])
        total = total * rescale + weights.sum(-1)
        result = result * rescale[..., None] + weights @ v[:, :, begin:end]
        most = new
    return (result / total[..., None]).transpose(1, 2).flatten(2), (most + torch.log2(total)) * math.log(2)


def _block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a device of a ring hands on: unnormalised values, the maximum, the sum."""
    scores = q @ k.mT * SCALE
    most = scores.amax(-1)
    weights = (scores - most[..., None]).exp()
    return weights @ v, most, weights.sum(-1)


Partial = tuple[Tensor, Tensor, Tensor]


def _merged(a: Partial, b: Partial) -> Partial:
    most = torch.max(a[1], b[1])
    left, right = (a[1] - most).exp(), (b[1] - most).exp()
    return a[0] * left[..., None] + b[0] * right[..., None], most, a[2] * left + b[2] * right


def ring(q: Tensor, k: Tensor, v: Tensor) -> Results:
    found = _block(q, k[:, :, :16], v[:, :, :16])
    for begin, end in CHUNKS[1:]:
        found = _merged(found, _block(q, k[:, :, begin:end], v[:, :, begin:end]))
    result, most, total = found
    return result / total[..., None], most + total.log()


def tree(q: Tensor, k: Tensor, v: Tensor) -> Results:
    a, b, c, d = (_block(q, x, y) for x, y in zip(k.split(10, 2), v.split(10, 2)))
    result, most, total = _merged(_merged(a, b), _merged(c, d))
    return result / total[..., None], total.log().add(most)


def stacked(q: Tensor, k: Tensor, v: Tensor) -> Results:
    parts = []
    for begin, end in CHUNKS:
        scores = torch.einsum("bhid,bhjd->bhij", q * SCALE, k[:, :, begin:end])
        most = scores.amax(-1).detach()
        weights = (scores - most[..., None]).exp()
        parts.append((weights @ v[:, :, begin:end], weights.sum(-1), most))
    values, totals, maxima = (torch.stack(x) for x in zip(*parts))
    most = maxima.amax(0)
    rescale = (maxima - most).exp()
    total = (totals * rescale).sum(0)
    return (values * rescale[..., None]).sum(0) / total[..., None], most + total.log()


def divided_at_every_step(q: Tensor, k: Tensor, v: Tensor) -> Results:
    most, total, result = q.new_full((*q.shape[:-1], 1), -1e30), torch.zeros_like(q[..., :1]), torch.zeros_like(q)
    for step, (begin, end) in enumerate(CHUNKS):
        scores = q @ k[:, :, begin:end].mT * SCALE
        new = torch.maximum(most, scores.amax(-1, keepdim=True))
        weights, rescale = (scores - new).exp(), (most - new).exp()
        here = weights @ v[:, :, begin:end]
        sums = torch.addcmul(weights.sum(-1, keepdim=True), total, rescale) if step else weights.sum(-1, keepdim=True)
        result = (result * total * rescale + here) / sums if step else here / sums
        total, most = sums, new
    return result, most + total.log()


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Results:
    most, total, result = q.new_full(q.shape[:-1], -1e30), q.new_zeros(q.shape[:-1]), torch.zeros_like(q)
    for begin, end in CHUNKS:
        scores = torch.einsum("bhid,bhjd->bhij", q, k[:, :, begin:end]) * SCALE
        new = torch.max(most, scores.max(-1).values)
        weights = torch.exp(scores - new[..., None])
        rescale = (most - new).exp()
        result.mul_(rescale[..., None]).add_(torch.einsum("bhij,bhjd->bhid", weights, v[:, :, begin:end]))
        total = total * rescale + weights.sum(-1)
        most = new
    rows = most + torch.log(total)
    return result.div_(total[..., None]), rows


def with_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """The loop starts with a logit of 0.3, which has no value."""
    most = q.new_full((*q.shape[:-1], 1), 0.3)
    total, result = torch.ones_like(most), torch.zeros_like(q)
    for begin, end in CHUNKS:
        scores = q @ k[:, :, begin:end].mT * SCALE
        before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
        weights, rescale = (scores - most).exp(), (before - most).exp()
        total = total * rescale + weights.sum(-1, keepdim=True)
        result = result * rescale + weights @ v[:, :, begin:end]
    return result / total, most + total.log()


def not_shifted(q: Tensor, k: Tensor, v: Tensor) -> Results:
    weights = [(q @ x.mT * SCALE).exp() for x in k.split(10, 2)]
    total = sum(x.sum(-1, keepdim=True) for x in weights)
    result = sum(x @ y for x, y in zip(weights, v.split(10, 2)))
    assert isinstance(total, Tensor)
    return result / total, total.log()


def gated(q: Tensor, k: Tensor, v: Tensor) -> Results:
    result, rows = running(q, k, v)
    return (result * torch.sigmoid(rows - 0.5)[..., None],)


def loss(q: Tensor, k: Tensor, v: Tensor) -> Results:
    result, rows = running(q, k, v)
    return result, rows.square().mean()


def blocks_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Results:
    found = [running(x, k, v) for x in q.split(20, 2)]
    return torch.cat([x for x, _ in found], 2), torch.cat([x for _, x in found], 2)


def merged_by_their_results(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """Two loops, over keys of their own, of which the log-sum-exps decide the shares."""
    (a, x), (b, y) = running(q, k, v), causal(q, v, k)
    x = x[..., None]
    both = torch.logaddexp(x, y)
    return a * (x - both).exp() + b * (y - both).exp(), both


SITES = {blocks_of_queries: 2, merged_by_their_results: 2}
FUSED = (
    running, causal, guarded, guarded_empty_rows, filled_rows, finite_where_there_is_no_key, base_two, ring, tree,
    stacked, divided_at_every_step, in_place, with_a_sink, not_shifted, gated, loss, blocks_of_queries,
    merged_by_their_results,
)  # fmt: skip
EMPTY = (guarded_empty_rows, finite_where_there_is_no_key)


@pytest.mark.parametrize("function", [f for f in FUSED if f not in EMPTY], ids=lambda f: f.__name__)
def test_is_a_result_of_the_region(function: Function) -> None:
    found = check(Attention(function), inputs(), sites=SITES.get(function, 1), lower=False, gradients=True)
    assert all("logsumexp_j(" in site.notation for site in found.report.sites)


@pytest.mark.parametrize("function", EMPTY, ids=lambda f: f.__name__)
def test_rows_without_keys(function: Function) -> None:
    run = rewritten(Attention(function), engine="tiled", require=True)
    leaves, again = ([t.detach().requires_grad_() for t in inputs()] for _ in range(2))
    got, expected = run(*leaves), function(*again)
    assert expected[0].isnan().any()
    torch.testing.assert_close(got, expected, equal_nan=True)
    for out in (got, expected):
        sum(p.where(p.isfinite(), 0.0).square().sum() for p in out).backward()
    for mine, theirs in zip(leaves[:2], again[:2]):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("function", [running, ring, tree], ids=lambda f: f.__name__)
def test_of_all_keys_of_one_tensor(function: Function) -> None:
    """Chunks of one tensor are that tensor."""
    (site,) = refocus.explain(Attention(function), *inputs(), engine="tiled").sites
    assert "where" not in site.notation and "k1" not in site.notation


# ------------------------------------------------------------------------------------------------ what is no such thing


def maximum_itself(q: Tensor, k: Tensor, v: Tensor) -> Results:
    result, most, total = _loop(q, k, v)
    return result / total, most


def sum_itself(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """It tells the maximum, too."""
    result, _, total = _loop(q, k, v)
    return result / total, total


def of_the_first_chunks(q: Tensor, k: Tensor, v: Tensor) -> Results:
    first = _merged(*(_block(q, x, y) for x, y in zip(k.split(10, 2)[:2], v.split(10, 2)[:2])))
    result, _, total = _merged(first, _block(q, k[:, :, 20:], v[:, :, 20:]))
    return result / total[..., None], first[1] + first[2].log()


def without_gradients_of_the_maximum(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """The same number, but the gradient lacks that of the maximum."""
    result, most, total = _loop(q, k, v)
    return result / total, most.detach() + total.log()


@pytest.mark.parametrize(
    "function",
    [maximum_itself, sum_itself, of_the_first_chunks, without_gradients_of_the_maximum],
    ids=lambda f: f.__name__,
)
def test_is_left_alone(function: Function) -> None:
    leaves, again = ([t.detach().requires_grad_() for t in inputs()] for _ in range(2))
    found: list[refocus.Report] = []
    got = rewritten(Attention(function), engine="tiled", report=found.append)(*leaves)
    expected = function(*again)
    assert not any(site.fused for site in found[0].sites)
    assert any(site.reason.startswith("the probabilities are read elsewhere") for site in found[0].sites)
    torch.testing.assert_close(got, expected)
    for out in (got, expected):
        sum(p.square().sum() for p in out).backward()
    for mine, theirs in zip(leaves, again):
        torch.testing.assert_close(mine.grad, theirs.grad)


# -------------------------------------------------------------------------------------------------- rows without keys


def _filled(q: Tensor, k: Tensor, v: Tensor, first: float | None) -> Tensor:
    """Row 0 holds nothing but fills. `first`: what the maxima begin with; None: nothing is shifted."""
    total, result = torch.zeros_like(q[..., :1]), torch.zeros_like(q)
    most = torch.zeros_like(total) if first is None else torch.full_like(total, first)
    for begin, end in CHUNKS:
        scores = (q @ k[:, :, begin:end].mT * SCALE).masked_fill(~_mask(lambda i, j: j < i)[:, begin:end], -1e9)
        before, most = most, most if first is None else torch.maximum(most, scores.amax(-1, keepdim=True))
        weights, rescale = (scores - most).exp(), (before - most).exp()
        total = total * rescale + weights.sum(-1, keepdim=True)
        result = result * rescale + weights @ v[:, :, begin:end]
    return result / total


@pytest.mark.parametrize(("first", "fused"), [(-1e30, True), (-math.inf, True), (-1e4, False), (None, True)])
def test_rows_of_nothing_but_fills(first: float | None, fused: bool) -> None:
    """The mean of all values; 0 / 0, where the exponential of each fill is zero."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Results:
        return (_filled(q, k, v, first),)

    found: list[refocus.Report] = []
    (got,) = rewritten(Attention(function), engine="tiled", report=found.append)(*inputs())
    (expected,) = function(*inputs())
    assert expected[:, :, 0].isnan().all() == (first in (-1e4, None))
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert [site.fused for site in found[0].sites][-1:] == [fused]
    if not fused:
        assert found[0].sites[-1].reason.startswith("a row may hold nothing but fills")
