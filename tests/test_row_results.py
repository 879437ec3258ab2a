"""Log-sum-exps that a model reads beside an attention: the region yields them, where they are all that is read."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import refocus
from refocus.testing import check, rewritten
from tests.drawn import Attention

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 24, 8
POSITIONS = torch.arange(TOKENS)
# Rows 5 and 17 have no key.
EMPTY = (POSITIONS <= POSITIONS[:, None]) & (POSITIONS[:, None] % 12 != 5)
Results = Tensor | tuple[Tensor, ...]
Function = Callable[[Tensor, Tensor, Tensor], Results]


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, BATCH, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()


def scores_of(q: Tensor, k: Tensor, fill: float = -math.inf) -> Tensor:
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT * WIDTH**-0.5).masked_fill(hidden, fill)


def beside_softmax(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def within_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    lse = torch.logsumexp(x, -1, keepdim=True)
    return (x - lse).exp() @ v, lse.squeeze(-1) * 2


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    most = x.amax(-1, keepdim=True)
    weights = (x - most).exp()
    total = weights.sum(-1, keepdim=True)
    return weights @ v / total, most + total.log()


def detached_maximum(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    most, _ = x.max(-1)
    total = torch.exp(x - most.detach()[..., None]).sum(-1)
    return x.softmax(-1) @ v, torch.log(total) + most.detach()


def not_shifted(q: Tensor, k: Tensor, v: Tensor) -> Results:
    weights = scores_of(q, k).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total @ v, total.log()


def of_base_two(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k) * math.log2(math.e)
    most = x.amax(-1, keepdim=True)
    weights = torch.exp2(x - most)
    total = weights.sum(-1, keepdim=True)
    return weights / total @ v, most + total.log2()


def normaliser_itself(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    return x.softmax(-1) @ v, x.exp().sum(-1)


def with_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = torch.cat([torch.full_like(q[..., :1], 0.3), scores_of(q, k)], -1)
    return x.softmax(-1)[..., 1:] @ v, x.logsumexp(-1)


def with_a_sink_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Results:
    weights = scores_of(q, k).exp()
    total = weights.sum(-1, keepdim=True) + 1
    return weights / total @ v, total.log()


def in_another_order(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    return torch.einsum("bhij,bhjd->bihd", x.softmax(-1), v).flatten(2), torch.logsumexp(x, -1).transpose(1, 2)


def grouped_heads(q: Tensor, k: Tensor, v: Tensor) -> Results:
    q, k, v = (torch.cat([q, q + 1], 1), *(t.repeat_interleave(2, 1) for t in (k, v)))
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    x = torch.bmm(q, k.mT)
    return torch.bmm(x.softmax(-1), v), x.logsumexp(-1)


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = q[:, :, -1:] @ k.mT
    return x.softmax(-1) @ v, x.logsumexp(-1)


def loss_on_the_normaliser(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    return x.softmax(-1) @ v, x.logsumexp(-1).square().mean()


def two_values(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    weights = x.softmax(-1)
    return weights @ v, weights @ (v * 2 + 1), x.logsumexp(-1)


def gate_of_another_attention(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """The log-sum-exp of one is the queries of the next."""
    x = scores_of(q, k)
    y = (q * x.logsumexp(-1, keepdim=True) @ k.mT).softmax(-1) @ v
    return x.softmax(-1) @ v + y


def values_come_later(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """What is read of a row is read before the values are there."""
    x = scores_of(q, k)
    scale = x.logsumexp(-1, keepdim=True).tanh()
    return x.softmax(-1) @ (v * 2 + 1).tanh() + scale


def rounds(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """Two rounds of sorted chunks, brought back to their places and merged by their log-sum-exps (Reformer)."""
    order = torch.stack([q.sum(-1), q.square().sum(-1)], 2).argsort(-1)  # (b, h, 2, n)
    back = order.argsort(-1)

    def chunks(t: Tensor) -> Tensor:
        index = order.flatten(2)[..., None].expand(-1, -1, -1, WIDTH)
        return t.gather(2, index).unflatten(2, (-1, 8))

    def look_back(t: Tensor) -> Tensor:
        return torch.cat([torch.cat([t[:, :, -1:], t[:, :, :-1]], 2), t], 3)

    place = order.flatten(2).unflatten(2, (-1, 8))
    queries, keys, values = chunks(q), look_back(chunks(k)), look_back(chunks(v))
    x = queries @ keys.mT * WIDTH**-0.5
    own, theirs = place[..., None], look_back(place[..., None]).mT
    x = torch.where(own >= theirs, x, torch.tensor(-1e9))
    x = torch.where(own != theirs, x, torch.tensor(-1e5))
    lse = x.logsumexp(-1, keepdim=True)
    out = (torch.exp(x - lse) @ values).flatten(2, 3)
    index = (back + TOKENS * torch.arange(2)[:, None]).flatten(2)
    out = out.gather(2, index[..., None].expand(-1, -1, -1, WIDTH)).unflatten(2, (2, TOKENS))
    lse = lse.flatten(2).gather(2, index).unflatten(2, (2, TOKENS))[..., None]
    return (out * (lse - lse.logsumexp(2, keepdim=True)).exp()).sum(2)


def partial_results(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """Chunks of keys, whose results are handed on with their log-sum-exps."""
    found: list[Tensor] = []
    for begin in (0, 8, 16):
        x = q @ k[:, :, begin : begin + 8].mT
        found += [x.softmax(-1) @ v[:, :, begin : begin + 8], x.logsumexp(-1)]
    return tuple(found)


def windows(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """Of rolled tokens, put together again."""
    queries, keys, values = (t.roll(-4, 2).unflatten(2, (-1, 8)) for t in (q, k, v))
    x = queries @ keys.mT
    return (x.softmax(-1) @ values).flatten(2, 3).roll(4, 2), x.logsumexp(-1).flatten(2).roll(4, 2)


def unfolded(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """One attention over tokens, under a mask."""
    keys, values = (nn.functional.pad(t, (0, 0, 3, 3)).unfold(2, 7, 1) for t in (k, v))
    x = torch.einsum("bhid,bhidw->bhiw", q, keys)
    lse = x.logsumexp(-1, keepdim=True)
    return torch.einsum("bhiw,bhidw->bhid", (x - lse).exp(), values), lse.squeeze(-1)


def chosen_blocks(q: Tensor, k: Tensor, v: Tensor) -> Results:
    keys, values = (t.unflatten(2, (-1, 8)) for t in (k, v))
    best = torch.einsum("bhd,bhcd->bhc", q.mean(2), keys.mean(3)).topk(2, -1).indices
    index = best[..., None, None].expand(-1, -1, -1, 8, WIDTH)
    keys, values = (t.gather(2, index).flatten(2, 3) for t in (keys, values))
    x = q @ keys.mT
    return x.softmax(-1) @ values, x.logsumexp(-1)


SITES = {two_values: 2, gate_of_another_attention: 2, partial_results: 3}
FUSED = (
    beside_softmax, within_the_weights, by_hand, detached_maximum, not_shifted, of_base_two, normaliser_itself,
    with_a_sink, with_a_sink_by_hand, in_another_order, grouped_heads, one_query, loss_on_the_normaliser, two_values,
    gate_of_another_attention, values_come_later, rounds, partial_results, windows, unfolded, chosen_blocks,
)  # fmt: skip


@pytest.mark.parametrize("function", FUSED, ids=lambda f: f.__name__)
def test_is_a_result_of_the_region(function: Function) -> None:
    found = check(Attention(function), inputs(), sites=SITES.get(function, 1), lower=False, gradients=True)
    assert any("logsumexp_j(" in site.notation for site in found.report.sites)


def test_scores_over_which_two_attentions_run_are_summed_once() -> None:
    sites = check(Attention(two_values), inputs(), lower=False).report.sites
    assert [site.notation.count("logsumexp_j(") for site in sites] == [1, 0]


def test_what_only_other_weights_are_made_of_is_no_result() -> None:
    def two_spellings(q: Tensor, k: Tensor, v: Tensor) -> Results:
        x = scores_of(q, k)
        return x.softmax(-1) @ v, (x - x.logsumexp(-1, keepdim=True)).exp() @ (v + 1)

    sites = check(Attention(two_spellings), inputs(), sites=2, lower=False).report.sites
    assert not any("logsumexp_j(" in site.notation for site in sites)


def test_nothing_of_queries_times_keys_is_stored() -> None:
    large = torch.randn(3, 1, 2, 512, WIDTH).unbind()
    check(Attention(within_the_weights), large, sites=1, lower=False, memory_share=0.3)


def test_through_inductor_with_symbolic_lengths() -> None:
    run = refocus.optimize(Attention(by_hand), engine="tiled", dynamic=True, require=True)
    for length in (24, 40):
        leaves = [t.requires_grad_() for t in torch.randn(3, 1, 2, length, WIDTH).unbind()]
        out, lse = run(*leaves)
        (out.sum() + lse.square().sum()).backward()
        got = [t.grad for t in leaves]
        again = [t.detach().requires_grad_() for t in leaves]
        other, expected = by_hand(*again)
        (other.sum() + expected.square().sum()).backward()
        torch.testing.assert_close((out, lse, *got), (other, expected, *(t.grad for t in again)), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ rows without a key


def emptied(q: Tensor, k: Tensor, fill: float) -> Tensor:
    return (q @ k.mT).masked_fill(~EMPTY, fill)


def minus_infinity(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = emptied(q, k, -math.inf)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def no_number(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """exp(-inf - -inf)"""
    x = emptied(q, k, -math.inf)
    most = x.amax(-1)
    return x.softmax(-1) @ v, most + (x - most[..., None]).exp().sum(-1).log()


def guarded(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = emptied(q, k, -math.inf)
    most = x.amax(-1)
    most = torch.where(most == -math.inf, 0.0, most)
    return x.softmax(-1) @ v, most + (x - most[..., None]).exp().sum(-1).log()


def low(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = emptied(q, k, -1e5)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def lowest(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = emptied(q, k, torch.finfo(torch.float32).min)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def lost(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """exp(-1e9) is zero, and its logarithm -inf."""
    weights = emptied(q, k, -1e9).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total @ v, total.log()


def rounded(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """-1e9 + log(24) is -1e9: every weight of an empty row is one."""
    x = emptied(q, k, -1e9)
    lse = x.logsumexp(-1, keepdim=True)
    return (x - lse).exp() @ v, lse


def rounded_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = emptied(q, k, -1e9)
    most = x.amax(-1, keepdim=True)
    lse = most + (x - most).exp().sum(-1, keepdim=True).log()
    return (x - lse).exp() @ v, lse


def rounded_in_part(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """-1e6 + log(24) is rounded to a sixteenth."""
    x = emptied(q, k, -1e6)
    return (x - x.logsumexp(-1, keepdim=True)).exp() @ v


@pytest.mark.parametrize(
    "function",
    [minus_infinity, no_number, guarded, low, lowest, lost, rounded, rounded_by_hand, rounded_in_part],
    ids=lambda f: f.__name__,
)
def test_rows_without_a_key_are_as_in_eager_code(function: Function) -> None:
    run = rewritten(Attention(function), engine="tiled", require=True)
    leaves, again = ([t.detach().requires_grad_() for t in inputs()] for _ in range(2))
    got, expected = run(*leaves), function(*again)
    torch.testing.assert_close(got, expected, equal_nan=True)
    for out in (got, expected):
        parts = out if isinstance(out, tuple) else (out,)
        sum(p.where(p.isfinite() & (p > -1e4), 0.0).square().sum() for p in parts).backward()  # type: ignore[union-attr]
    for mine, theirs in zip(leaves, again):
        torch.testing.assert_close(mine.grad, theirs.grad, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_rows_of_sums_hold_the_sum_of_all_values() -> None:
    q, k, v = inputs()
    got = rewritten(Attention(rounded), engine="tiled", require=True)(q, k, v)[0]
    torch.testing.assert_close(got[:, :, 5], v.sum(-2))


# ------------------------------------------------------------------------------------------------ what is no such thing


def largest(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    return x.softmax(-1) @ v, x.amax(-1)


def shifted_sum(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """exp(L - max x) tells the maximum, too."""
    x = scores_of(q, k)
    return x.softmax(-1) @ v, (x - x.amax(-1, keepdim=True)).exp().sum(-1)


def of_scaled_scores(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    return x.softmax(-1) @ v, (x * 2).logsumexp(-1)


def of_some_keys(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    return x.softmax(-1) @ v, x[..., :12].logsumexp(-1)


def of_all_queries(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = q @ k.mT
    return x.softmax(-1) @ v, x.logsumexp(-2)


def without_the_sink(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    padded = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
    return padded.softmax(-1)[..., :-1] @ v, x.logsumexp(-1)


def with_what_is_read_of_pairs(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = scores_of(q, k)
    lse = x.logsumexp(-1, keepdim=True)
    return (x - lse).exp() @ v, (lse + x.relu()).mean(-1)


def other_fills(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """A row of fills is the mean of all values, and log(sum(exp(-1e9))) is -inf."""
    x = emptied(q, k, -1e9)
    return x.softmax(-1) @ v, x.exp().sum(-1).log()


def zeroed(q: Tensor, k: Tensor, v: Tensor) -> Results:
    x = emptied(q, k, -1e9)
    return x.softmax(-1).masked_fill(~EMPTY, 0.0) @ v, x.logsumexp(-1)


def number_beside_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """Rows without a key have weights, for there is a sink, and no log-sum-exp: exp(-inf - -inf)."""
    x = emptied(q, k, -math.inf)
    most = x.amax(-1, keepdim=True)
    total = (x - most).exp().sum(-1, keepdim=True) + (-most).exp()
    padded = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
    return padded.softmax(-1)[..., :-1] @ v, most + total.log()


def stopped_beside_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Results:
    """The log-sum-exp, but for the gradient of the maximum."""
    x = scores_of(q, k)
    most = x.amax(-1, keepdim=True)
    total = (x - most).exp().sum(-1, keepdim=True)
    return x.softmax(-1) @ v, most.detach() + total.log()


OTHERS = "the log-sum-exp of a row of nothing but fills is another one than that of its weights"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (largest, "a score is read elsewhere (by `amax`)"),
        (shifted_sum, "a score is read elsewhere"),
        (of_scaled_scores, "a score is read elsewhere (by `mul`)"),
        (of_some_keys, "a score is read elsewhere"),
        (of_all_queries, "a score is read elsewhere (by `logsumexp`)"),
        (without_the_sink, "a score is read elsewhere (by `logsumexp`)"),
        (with_what_is_read_of_pairs, "a score is read elsewhere"),
        (other_fills, OTHERS),
        (zeroed, OTHERS),
        (number_beside_a_sink, "a log-sum-exp that is read elsewhere is no number where a row has no keys"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_is_left_alone(function: Function, reason: str) -> None:
    (site,) = refocus.explain(Attention(function), *inputs(), engine="tiled").sites
    assert not site.fused and site.reason.startswith(reason)
    got, expected = rewritten(Attention(function), engine="tiled")(*inputs()), function(*inputs())
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_a_maximum_without_its_gradient_is_another_one() -> None:
    leaves, again = ([t.detach().requires_grad_() for t in inputs()] for _ in range(2))
    found: list[refocus.Report] = []
    got = rewritten(Attention(stopped_beside_the_weights), engine="tiled", report=found.append)(*leaves)
    assert not found[0].sites[0].fused
    for out in (got, stopped_beside_the_weights(*again)):
        sum(p.square().sum() for p in out).backward()  # type: ignore[union-attr]
    for mine, theirs in zip(leaves, again):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_half_precision_rounds_otherwise() -> None:
    halves = [t.bfloat16() for t in inputs()]
    (site,) = refocus.explain(Attention(rounded), *halves, engine="tiled").sites
    assert not site.fused and site.reason.startswith("a row may hold nothing but fills")
