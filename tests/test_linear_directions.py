"""Attention to later positions, or earlier ones alone: backward loops, exclusive and reverse sums, upper triangles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import inputs, outer, read, zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


def _reads(q: Tensor, sums: Tensor) -> Tensor:
    return torch.einsum("bhnd,bhnde->bhne", q, sums)


# ---------------------------------------------------------------------------------------------------- loops


def backward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in reversed(range(q.shape[2])):
        state = 0.9 * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows[::-1], 2)


def backward_in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A decay for each channel; results are written where they belong."""
    decay, state, out = torch.sigmoid(g), zero(q, v), torch.zeros_like(v)
    for t in range(q.shape[2] - 1, -1, -1):
        state = decay[:, :, t].unsqueeze(-1) * state + outer(k[:, :, t], v[:, :, t])
        out[:, :, t] = read(q[:, :, t], state)
    return out


def backward_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """From a state that is not counted, each result put before the others; heads are merged in every step."""
    state, total, rows = zero(q, v), torch.zeros_like(k[:, :, 0]), []
    for query, key, value in zip(*(x.flip(2).unbind(2) for x in (q, k, v))):
        state, total = state + outer(key, value), total + key
        out = read(query, state) / ((query * total).sum(-1, keepdim=True) + 1e-6)
        rows.insert(0, out.flatten(1).unsqueeze(1))
    return torch.cat(rows, 1)


def backward_with_states(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Begins with a state, and returns the one that it ends with."""
    state, rows = outer(k[:, :, 2], v[:, :, 1]), []
    for t in reversed(range(q.shape[2])):
        state = 0.8 * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows[::-1], 2).sum((1, 2)) @ state.sum(1)


def backward_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    k, state, rows = torch.nn.functional.normalize(k, dim=-1), zero(q, v), []
    for t in reversed(range(q.shape[2])):
        state = state + outer(k[:, :, t], g[:, :, t, :1] * (v[:, :, t] - read(k[:, :, t], state)))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows[::-1], 2)


def both_ways(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in vision: the same scan over the tokens and over the tokens in reverse order."""

    def scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, rows = zero(q, v), []
        for t in range(q.shape[2]):
            state = 0.9 * state + outer(k[:, :, t], v[:, :, t])
            rows.append(read(q[:, :, t], state))
        return torch.stack(rows, 2)

    return scan(q, k, v) + scan(*(x.flip(2) for x in (q, k, v))).flip(2)


# ---------------------------------------------------------------------------------------------------- sums


def earlier_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pairs = outer(k, v)
    return _reads(q, pairs.cumsum(2) - pairs)


def later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pairs = outer(k, v)
    return _reads(q, pairs.sum(2, keepdim=True) - pairs.cumsum(2) + pairs)


def later_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pairs = outer(k, v)
    return _reads(q, pairs.sum(2, keepdim=True) - torch.cumsum(pairs, 2))


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _reads(q, outer(k, v).flip(2).cumsum(2).flip(2))


def turned_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Without its own position, which is pushed out by a row of zeros."""
    sums = torch.einsum("bhnd,bhne->bhnde", k, v).flip(2).cumsum(2).flip(2)
    return _reads(q, torch.nn.functional.pad(sums[:, :, 1:], (0, 0, 0, 0, 0, 1)))


def counted_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query's own position counts twice."""
    pairs = outer(k, v)
    return _reads(q, pairs.cumsum(2) + pairs)


def beside_it(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is taken away of its own position is another product."""
    return _reads(q, outer(k, v).cumsum(2) - outer(k * k, q))


def others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All positions but the query's own: what comes before it, and what comes after it."""
    pairs = outer(k, v)
    return _reads(q, pairs.sum(2, keepdim=True) - pairs)


# ---------------------------------------------------------------------------------------------------- pairs


def upper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).triu() @ v


def upper_decaying(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    decay = torch.exp(math.log(0.9) * (i - i[:, None]).clamp(min=0)).triu(1)
    return (q @ k.mT * decay) @ v


def upper_gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Decays from each key back to the query, as differences of running sums."""
    passed = (-g[..., 0]).cumsum(-1)
    return (q @ k.mT * torch.exp(passed[..., None, :] - passed[..., :, None]).triu()) @ v


def upper_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).triu()
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-6)


SPELLINGS = {
    "j <= i": [
        backward, backward_in_place, backward_normalised, backward_with_states, backward_delta, later, turned,
        counted_twice, beside_it, upper, upper_gated, upper_normalised,
    ],
    "j < i": [earlier_alone, later_alone, turned_alone, upper_decaying],
    "": [others],
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "mask"), [(f, mask) for mask, functions in SPELLINGS.items() for f in functions],
    ids=[f.__name__ for functions in SPELLINGS.values() for f in functions],
)  # fmt: skip
def test_spelling(function: Function, mask: str) -> None:
    given = inputs(function.__code__.co_argcount)
    trains = function is not backward_in_place  # which eager code itself cannot differentiate
    (site,) = check(Module(function), given, family="linear", sites=1, lower=False, gradients=trains).report.sites
    assert site.mask == mask
    backwards = function.__name__.startswith(("backward", "later", "turned", "upper"))
    assert ("O[b,h,-t + 5,e]" in site.notation) == backwards


def test_both_ways() -> None:
    check(Module(both_ways), inputs(3), family="linear", sites=2, lower=False, gradients=True)


# ---------------------------------------------------------------------------------------------------- near misses


def half_of_the_earlier(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pairs = outer(k, v)
    return _reads(q, pairs.sum(2, keepdim=True) - 0.5 * pairs.cumsum(2))


def two_attentions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _reads(q, outer(k, v).cumsum(2) - outer(v, k).cumsum(2))


def a_matrix_beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _reads(q, outer(k, v).cumsum(2) - (k[0, 0, 0, :, None] + v[0, 0, 0]).exp())


def upper_band(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).triu().tril(2) @ v


def backward_other_way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Steps run from the last to the first, but for the queries."""
    state, rows = zero(q, v), []
    for t in reversed(range(q.shape[2])):
        state = state * 0.9 + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, (t * t) % q.shape[2]], state))
    return torch.stack(rows[::-1], 2)


def backward_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for query, key, value in [*zip(*(x.split(2, 2) for x in (q, k, v)))][::-1]:
        rows.append((query @ key.mT).triu() @ value + query @ state)
        state = state + key.mT @ value
    return torch.cat(rows[::-1], 2)


NEAR_MISSES = [
    (half_of_the_earlier, "keys before and after a query are weighted differently"),
    (two_attentions, "several attentions are added up in one sum"),
    (a_matrix_beside, "more than a value of the query's position"),
    (backward_other_way, "not the same function"),
    (backward_chunks, "runs from the last to the first"),
]


def test_a_band_is_a_mask_of_pairs() -> None:
    (site,) = check(Module(upper_band), inputs(3), family="pairwise", sites=1, lower=False).report.sites
    assert site.mask


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES, ids=[f.__name__ for f, _ in NEAR_MISSES])
def test_near_miss(function: Function, reason: str) -> None:
    report = check(Module(function), inputs(3), fused=False, lower=False).report
    assert [site.reason for site in report.sites if reason in site.reason], report
