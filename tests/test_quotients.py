"""Attention that is divided after the product with the values: in one piece, in chunks of keys with running maxima."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refocus
from refocus.testing import check, rewritten

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
BATCH, HEADS, TOKENS, WIDTH = 2, 2, 40, 8
SCALE = WIDTH**-0.5
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
CHUNKS = [(0, 16), (16, 32), (32, TOKENS)]  # the last one is shorter


class Attention(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("causal", CAUSAL)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v)


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, BATCH, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()


# --------------------------------------------------------------------------------------------------------- one product


def after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights @ v / weights.sum(-1, keepdim=True)


def reciprocal_and_layouts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(SCALE).exp()
    total = weights.sum(-1).transpose(1, 2)
    return torch.einsum("bhij,bhjd->bihd", weights, v) * total.reciprocal()[..., None]


def masked_by_multiplication(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * CAUSAL.float()
    return weights @ v / weights.sum(-1, keepdim=True)


def with_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    most = scores.amax(-1, keepdim=True).clamp(min=0)
    weights = (scores - most).exp()
    return weights @ v / (weights.sum(-1, keepdim=True) + (-most).exp())


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[0, 0], k[0, 0], v[0, 0]
    weights = torch.tensordot(k, q, ([1], [1])).mul(SCALE).exp()
    return torch.tensordot(weights, v, ([0], [0])) / weights.sum(0).unsqueeze(1)


def renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).softmax(-1) * CAUSAL
    return weights / weights.sum(-1, keepdim=True) @ v


def by_its_norm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).exp()
    return weights / torch.linalg.vector_norm(weights, ord=1, dim=-1, keepdim=True) @ v


def normalised_from_its_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum is one at least, and no smaller one is put in its place."""
    scores = q @ k.mT * SCALE
    return F.normalize((scores - scores.amax(-1, keepdim=True)).exp(), p=1.0, dim=-1) @ v


# --------------------------------------------------------------------------------------------------------------- chunks


def running(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    most = q.new_full((*q.shape[:-1], 1), -math.inf)
    total, result = torch.zeros_like(most), torch.zeros_like(q)
    for begin, end in CHUNKS:
        scores = q @ k[:, :, begin:end].mT * SCALE
        before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
        weights, rescale = (scores - most).exp(), (before - most).exp()
        total = total * rescale + weights.sum(-1, keepdim=True)
        result = result * rescale + weights @ v[:, :, begin:end]
    return result / total


def running_causal_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result, total = torch.zeros_like(q), q.new_zeros(q.shape[:-1])
    most = q.new_full(q.shape[:-1], -1e30)
    for begin, end in CHUNKS:
        scores = torch.einsum("bhid,bhjd->bhij", q, k[:, :, begin:end]) * SCALE
        scores = scores.masked_fill(~CAUSAL[:, begin:end], -1e30)
        new = torch.max(most, scores.max(-1).values)
        weights = torch.exp2((scores - new[..., None]) * math.log2(math.e)) * CAUSAL[:, begin:end]
        result.mul_((most - new).exp()[..., None]).add_(torch.einsum("bhij,bhjd->bhid", weights, v[:, :, begin:end]))
        total = total * (most - new).exp() + weights.sum(-1)
        most = new
    return result.div_(total[..., None])


def stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rabe and Staats: every chunk by itself, then all of them together."""
    parts = []
    for begin, end in CHUNKS:
        scores = torch.einsum("bhid,bhjd->bhij", q * SCALE, k[:, :, begin:end])
        most = scores.amax(-1, keepdim=True).detach()
        weights = (scores - most).exp()
        values = torch.einsum("bhij,bhjd->bhid", weights, v[:, :, begin:end])
        parts.append((values, weights.sum(-1), most.squeeze(-1)))
    values, totals, most = (torch.stack(x) for x in zip(*parts))
    rescale = (most - most.amax(0, keepdim=True)).exp()
    return (values * rescale[..., None]).sum(0) / (totals * rescale).sum(0)[..., None]


def rows_and_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rabe and Staats, some rows after the other: the first ones see but one chunk, which is stacked all the same."""
    out = []
    for first in range(0, TOKENS, 20):
        parts = []
        for begin in range(0, first + 1, 20):
            scores = q[:, :, first : first + 20] @ k[:, :, begin : begin + 20].mT * SCALE
            if begin == first:
                scores = scores.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -1e30)
            most = scores.amax(-1).detach()
            weights = (scores - most[..., None]).exp()
            parts.append((weights @ v[:, :, begin : begin + 20], weights.sum(-1), most))
        values, totals, most = (torch.stack(x, -1) for x in zip(*parts))
        rescale = (most - most.amax(-1, keepdim=True)).exp()
        out.append((values * rescale[..., None, :]).sum(-1) / (totals * rescale).sum(-1)[..., None])
    return torch.cat(out, 2)


def divided_at_every_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention's first formulation keeps the result normalised."""
    most, total, result = q.new_full((*q.shape[:-1], 1), -1e30), None, None
    for begin, end in CHUNKS:
        scores = q @ k[:, :, begin:end].mT * SCALE
        new = torch.maximum(most, scores.amax(-1, keepdim=True))
        weights, rescale = (scores - new).exp(), (most - new).exp()
        here = weights @ v[:, :, begin:end]
        if total is None:
            total = weights.sum(-1, keepdim=True)
            result = here / total
        else:
            sums = total * rescale + weights.sum(-1, keepdim=True)
            result, total = (result * total * rescale + here) / sums, sums
        most = new
    return result


def two_memories(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The second chunk is of another tensor, and its scores are halved."""
    first, second = q @ k.mT * SCALE, q @ (k + v).mT * (SCALE / 2)
    most = torch.maximum(first.amax(-1, keepdim=True), second.amax(-1, keepdim=True))
    a, b = (first - most).exp(), (second - most).exp()
    return (a @ v + b @ k) / (a.sum(-1, keepdim=True) + b.sum(-1, keepdim=True))


def _infinite(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, guarded: bool = False) -> Tensor:
    """Keys that are left out are filled with -inf: a row that has met none yet is no number, unless it is guarded."""
    most = q.new_full((*q.shape[:-1], 1), -math.inf)
    total, result = torch.zeros_like(most), torch.zeros_like(q)
    for begin, end in CHUNKS:
        scores = (q @ k[:, :, begin:end].mT * SCALE).masked_fill(~mask[:, begin:end], -math.inf)
        before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
        shift = torch.where(most == -math.inf, 0.0, most) if guarded else most
        weights, rescale = (scores - shift).exp(), (before - shift).exp()
        total = total * rescale + weights.sum(-1, keepdim=True)
        result = result * rescale + weights @ v[:, :, begin:end]
    return result / total


def running_causal_infinite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _infinite(q, k, v, CAUSAL)


def guarded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _infinite(q, k, v, CAUSAL & ~CAUSAL.tril(-8), guarded=True)


def _tokens_first(q: Tensor, k: Tensor, v: Tensor, blank: Callable[[Tensor], Tensor]) -> Tensor:
    """What is zero at first has the layout of the queries, which is not that of their memory."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    most, total, result = torch.full_like(q[..., 0], -math.inf), blank(q[..., 0]), blank(q)
    for begin, end in CHUNKS:
        scores = torch.einsum("bihd,bjhd->bihj", q, k[:, begin:end] * SCALE)
        new = torch.maximum(most, scores.amax(-1))
        weights, rescale = (scores - new[..., None]).exp(), (most - new).exp()
        total = total * rescale + weights.sum(-1)
        result = result * rescale[..., None] + torch.einsum("bihj,bjhd->bihd", weights, v[:, begin:end])
        most = new
    return result / total.unsqueeze(-1)


def running_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _tokens_first(q, k, v, torch.zeros_like)


def running_zeros_by_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _tokens_first(q, k, v, lambda x: x.mT.new_zeros(x.mT.shape).mT)


def running_fills(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _tokens_first(q, k, v, lambda x: torch.full_like(x, 3.0).fill_(0.0))


ONE = (
    after, reciprocal_and_layouts, masked_by_multiplication, with_a_sink, tokens_first, renormalised, by_its_norm,
    normalised_from_its_maximum,
)  # fmt: skip
BLANKS = (running_tokens_first, running_zeros_by_size, running_fills)
SEAMLESS = (running, running_causal_in_place, running_causal_infinite, stacked, *BLANKS)
SEVERAL = (*SEAMLESS, divided_at_every_step, two_memories, guarded)


@pytest.mark.parametrize("function", [*ONE, *SEVERAL], ids=lambda f: f.__name__)
def test_is_attention(function: Function) -> None:
    report = check(Attention(function), inputs(), lower=False, gradients=True).report
    assert [site.family for site in report.sites if site.fused] == ["softmax"]
    assert len(report.sites) == 1


@pytest.mark.parametrize("function", SEAMLESS, ids=lambda f: f.__name__)
def test_chunks_of_one_tensor_are_that_tensor(function: Function) -> None:
    (site,) = refocus.explain(Attention(function), *inputs(), engine="tiled").sites
    assert "where" not in site.notation and "k1" not in site.notation, site.notation
    assert site.mask == ("j <= i" if "causal" in function.__name__ else "")


@pytest.mark.parametrize("function", [running, *BLANKS], ids=lambda f: f.__name__)
def test_chunks_of_any_length(function: Function) -> None:
    """The bounds of the chunks are numbers of the call, too."""
    found: list[refocus.Report] = []
    model = Attention(function)
    run = rewritten(model, engine="tiled", dynamic=True, require=True, report=found.append)
    with torch.no_grad():
        for width in (WIDTH, 12):
            given = torch.randn(3, BATCH, HEADS, TOKENS, width).unbind()
            torch.testing.assert_close(run(*given), model(*given))
    assert len(found) == 1 and [site.family for site in found[0].sites] == ["softmax"]


def test_chunks_of_unknown_lengths() -> None:
    """Zeros in the image of queries are zeros, however many there are."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        most, total, result = q.new_full(q.shape[:-1], -math.inf), q.new_zeros(q.shape[:-1]), torch.zeros_like(q)
        for keys, values in zip(k.chunk(2, 2), v.chunk(2, 2)):
            scores = q @ keys.mT
            before, most = most, torch.maximum(most, scores.amax(-1))
            weights, rescale = (scores - most[..., None]).exp(), (before - most).exp()
            total = total * rescale + weights.sum(-1)
            result = result * rescale[..., None] + weights @ values
        return result / total[..., None]

    found: list[refocus.Report] = []
    run = rewritten(function, engine="tiled", dynamic=True, require=True, report=found.append)
    with torch.no_grad():
        for tokens in (TOKENS, 56, 33):
            given = torch.randn(3, BATCH, TOKENS // 4, tokens, WIDTH).unbind()
            torch.testing.assert_close(run(*given), function(*given))
    assert len(found) == 1


def test_many_chunks() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        most, total, result = q.new_full((*q.shape[:-1], 1), -math.inf), 0.0, 0.0
        for keys, values in zip(k.split(5, dim=2), v.split(5, dim=2)):
            scores = q @ keys.mT
            before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
            weights, rescale = (scores - most).exp(), (before - most).exp()
            total = total * rescale + weights.sum(-1, keepdim=True)
            result = result * rescale + weights @ values
        return result / total

    (site,) = check(Attention(function), inputs(), lower=False, gradients=True).report.sites
    assert site.fused and "where" not in site.notation


# --------------------------------------------------------------------------------------------------------------- shares


SINK = torch.tensor([0.5, -1.0])


def _times_share(scores: Tensor, v: Tensor, of: Tensor) -> Tensor:
    share = (torch.logsumexp(of, -1) - SINK.to(of.dtype)[:, None]).sigmoid()
    return (scores.softmax(-1) @ v) * share.unsqueeze(-1)


def a_share_of_the_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(~CAUSAL, -math.inf)
    return _times_share(scores, v, scores)


def a_share_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE + torch.where(CAUSAL, 0.0, torch.finfo(torch.float32).min)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    return (torch.sigmoid(-SINK.to(q.dtype)[:, None, None] + lse) * (weights @ v)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("function", [a_share_of_the_row, a_share_by_hand], ids=lambda f: f.__name__)
def test_a_share_is_an_extra_logit(function: Function) -> None:
    (site,) = check(Attention(function), inputs(), lower=False, gradients=True).report.sites
    assert site.fused and "extra" in site.notation and site.mask == "j <= i"


def share_of_other_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return _times_share(scores, v, 2 * scores)


def share_of_rows_without_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No number where there is no key, which a softmax with a sink would be."""
    scores = (q @ k.mT * SCALE).masked_fill(~CAUSAL.tril(-1), -math.inf)
    return _times_share(scores, v, scores)


# ---------------------------------------------------------------------------------------------------------- near misses


def with_epsilon(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).exp()
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def other_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).exp()
    return weights @ v / (q @ k.mT).exp().sum(-1, keepdim=True)


def other_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).exp()
    return (weights * CAUSAL) @ v / weights.sum(-1, keepdim=True)


def _chunked(q: Tensor, k: Tensor, v: Tensor, rescale_total: bool, last: int) -> Tensor:
    most = q.new_full((*q.shape[:-1], 1), -math.inf)
    total, result = torch.zeros_like(most), torch.zeros_like(q)
    for begin, end in CHUNKS:
        scores = q @ k[:, :, begin:end].mT * SCALE
        before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
        weights, rescale = (scores - most).exp(), (before - most).exp()
        total = (total * rescale if rescale_total else total) + (weights.sum(-1, keepdim=True) if end <= last else 0)
        result = result * rescale + weights @ v[:, :, begin:end]
    return result / total


def not_rescaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _chunked(q, k, v, False, TOKENS)


def a_chunk_is_missing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _chunked(q, k, v, True, 32)


def a_chunk_is_weighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = q @ k[:, :, :16].mT, q @ k[:, :, 16:].mT
    a, b = first.exp(), second.exp()
    return (a @ v[:, :, :16] + 2 * (b @ v[:, :, 16:])) / (a.sum(-1, keepdim=True) + b.sum(-1, keepdim=True))


def normalised_from_anywhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.normalize((q @ k.mT * SCALE).exp(), p=1.0, dim=-1) @ v


def normalised_of_some(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The maximum may be that of a key that is left out: the sum may be anything."""
    scores = q @ k.mT * SCALE
    return F.normalize((scores - scores.amax(-1, keepdim=True)).exp() * CAUSAL, p=1.0, dim=-1) @ v


def by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-torch.cdist(q, k)).softmax(-1) @ v


def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).exp()
    return torch.div(weights @ v, weights.sum(-1, keepdim=True), rounding_mode="floor")


def rounded_on_the_way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).exp()
    return torch.div(weights @ v, 2.0, rounding_mode="trunc") / weights.sum(-1, keepdim=True)


def late_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row from 24 on has no key in the first chunk: no number in eager code, and a number over all keys at once."""
    return _infinite(q, k, v, CAUSAL & ~CAUSAL.tril(-8))


def stacked_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first rows have no key in the second chunk, which is summed by itself."""
    scores = (q @ k.mT * SCALE).masked_fill(~CAUSAL, -math.inf)
    parts = [scores[..., begin:end] for begin, end in CHUNKS]
    most = torch.stack([x.amax(-1, keepdim=True) for x in parts])
    weights = [(x - m).exp() for x, m in zip(parts, most)]
    rescale = (most - most.amax(0)).exp()
    total = sum(w.sum(-1, keepdim=True) * c for w, c in zip(weights, rescale))
    return sum(w @ v[:, :, a:b] * c for w, c, (a, b) in zip(weights, rescale, CHUNKS)) / total


NOT_YET = "a row may have no keys in the first chunks, and is no number then"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (with_epsilon, "something other than an exponential is added to the normaliser"),
        (other_weights, "the exponents of the weights and of the normaliser differ"),
        (not_rescaled, "the exponents of the weights and of the normaliser differ"),
        (a_chunk_is_missing, "the exponents of the weights and of the normaliser differ"),
        (a_chunk_is_weighted, "a chunk of keys is weighted by more than exponentials"),
        (normalised_from_anywhere, "the normaliser is changed after the sum"),
        (normalised_of_some, "the normaliser is changed after the sum"),
        (by_distance, "the weights hold no product of queries and keys (`cdist` is not understood)"),
        (rounded, "the weights are not normalised over the keys"),
        (rounded_on_the_way, "the weights are not normalised over the keys"),
        (late_rows, NOT_YET),
        (stacked_causal, NOT_YET),
        (
            share_of_other_scores,
            "the result is multiplied with a share that is not that of its own log-sum-exp",
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_is_left_alone(function: Function, reason: str) -> None:
    report = refocus.explain(Attention(function), *inputs(), engine="tiled")
    assert report.sites and not any(site.fused for site in report.sites)
    assert reason in {site.reason for site in report.sites}


def test_a_share_of_rows_without_keys_is_applied_outside() -> None:
    """A sink would make numbers of rows that are none."""
    (site,) = check(Attention(share_of_rows_without_keys), inputs(), lower=False, gradients=True).report.sites
    assert site.fused and "extra" not in site.notation and "logsumexp_j(" in site.notation


def test_a_mask_of_the_values_alone_is_a_gate() -> None:
    report = check(Attention(other_mask), inputs(), lower=False, gradients=True).report
    (site,) = report.sites
    assert site.fused and site.mask == ""


def test_one_chunk_is_stacked_like_several() -> None:
    report = check(Attention(rows_and_chunks), inputs(), sites=2, lower=False, gradients=True).report
    assert report.sites[0].mask == "j <= i"


def test_equal_values_are_read_once() -> None:
    """The scaled query is computed in each of three turns."""
    (site,) = refocus.explain(Attention(stacked), *inputs(), engine="tiled").sites
    assert "q1" not in site.notation
