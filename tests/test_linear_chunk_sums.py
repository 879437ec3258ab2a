"""Loops over chunks in which running sums go on from chunk to chunk, as in Performer's: spellings and near misses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import inputs, outer, zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

EPSILON = 1e-6


def performer(q: Tensor, k: Tensor, v: Tensor, chunks: int = 3, row: int = -1) -> Tensor:
    """As published: sums begin as the number 0, and an epsilon is added to the keys of each feature."""
    last_k_cumsum: Tensor | int = 0
    last_context_cumsum: Tensor | int = 0
    outs = []
    parts = [t.chunk(chunks, dim=-2) for t in (q, k, v)]
    for q, k, v in zip(*parts):
        k_cumsum = last_k_cumsum + k.cumsum(dim=-2)
        inverse = 1.0 / torch.einsum("...nd,...nd->...n", q, k_cumsum.type_as(q) + EPSILON)
        context = torch.einsum("...nd,...ne->...nde", k, v)
        context_cumsum = last_context_cumsum + context.cumsum(dim=-3)
        out = torch.einsum("...nde,...nd,...n->...ne", context_cumsum, q, inverse)
        last_k_cumsum = k_cumsum[:, :, row : row + 1 or None]
        last_context_cumsum = context_cumsum[:, :, row : row + 1 or None]
        outs.append(out)
    return torch.cat(outs, dim=-2)


def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positions before heads, chunks cut out by hand, sums from zeros."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    total, sums, outs = torch.zeros_like(k[:, :1]), k.new_zeros(2, 1, 3, 8, 8), []
    for start in range(0, q.shape[1], 2):
        query, key, value = (x[:, start : start + 2] for x in (q, k, v))
        keys = total + key.cumsum(1)
        found = sums + torch.cumsum(torch.einsum("bnhd,bnhe->bnhde", key, value), dim=1)
        outs.append(torch.einsum("bnhd,bnhde->bnhe", query, found) / ((query * keys).sum(-1, keepdim=True) + EPSILON))
        total, sums = keys[:, -1:], found[:, -1:]
    return torch.cat(outs, 1)


def bounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Divided by a function of what was summed up, of which each feature is a little larger."""
    state, total, outs = zero(q, v)[:, :, None], torch.zeros_like(k[:, :, :1]), []
    for query, key, value in zip(*(x.chunk(3, 2) for x in (q, k, v))):
        keys, sums = total + key.cumsum(2), state + outer(key, value).cumsum(2)
        over = (query * (keys + 0.3)).sum(-1, keepdim=True).abs() + 1
        outs.append(torch.einsum("bhnd,bhnde->bhne", query, sums) / over)
        total, state = keys[:, :, -1:], sums[:, :, -1:]
    return torch.cat(outs, 2)


def squeezed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sums that are handed on have no dimension of positions; nothing is divided."""
    state, outs = zero(q, v), []
    for start in range(0, q.shape[2], 2):
        query, key, value = (x[:, :, start : start + 2] for x in (q, k, v))
        sums = outer(key, value).cumsum(2) + state.unsqueeze(2)
        outs.append((query.unsqueeze(-2) @ sums).squeeze(-2))
        state = sums.select(2, -1)
    return torch.cat(outs, 2)


def decaying(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """One decay for each head and step, as exponentials of what is summed up in the chunk."""
    state, outs = zero(q, v).unsqueeze(2), []
    for query, key, value, gate in zip(*(x.chunk(3, 2) for x in (q, k, v, -g[..., :1]))):
        passed = gate.cumsum(2)
        sums = passed.exp().unsqueeze(-1) * (state + outer(key * (-passed).exp(), value).cumsum(2))
        outs.append(torch.einsum("bhnd,bhnde->bhne", query, sums))
        state = sums[:, :, -1:]
    return torch.cat(outs, 2)


def decaying_channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, outs = zero(q, v).unsqueeze(2), []
    for query, key, value, gate in zip(*(x.chunk(3, 2) for x in (q, k, v, -g))):
        passed = gate.cumsum(2).exp()
        sums = state + outer(key / passed, value).cumsum(2)
        outs.append(torch.einsum("bhnd,bhnde->bhne", query * passed, sums))
        state = sums[:, :, -1:] * passed[:, :, -1:, :, None]
    return torch.cat(outs, 2)


def carried(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What was summed up before a chunk is the first row of what is summed up in it."""
    state, outs = zero(q, v).unsqueeze(2), []
    for query, key, value in zip(*(x.split(2, 2) for x in (q, k, v))):
        sums = torch.cat([state, outer(key, value)], 2).cumsum(2)
        outs.append(torch.einsum("bhnd,bhnde->bhne", query, sums[:, :, 1:]))
        state = sums[:, :, -1:]
    return torch.cat(outs, 2)


SPELLINGS = [bounded, carried, performer, sliced, squeezed, decaying, decaying_channels]


@pytest.mark.parametrize("function", SPELLINGS, ids=[f.__name__ for f in SPELLINGS])
def test_spelling(function: Function) -> None:
    given = inputs(4 if function.__name__.startswith("decaying") else 3)
    (site,) = check(Module(function), given, family="linear", sites=1, lower=False, gradients=True).report.sites
    assert site.mask == "j <= i" and ("exp(" in site.notation) == (len(given) == 4)


def test_a_shorter_last_chunk() -> None:
    drawn = torch.Generator().manual_seed(0)
    given = [torch.rand(2, 3, 15, 8, generator=drawn) for _ in range(3)]
    check(Module(performer, chunks=4), given, family="linear", sites=1, lower=False, gradients=True)


def forgets_a_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sums that are handed on are those before the last position of a chunk."""
    return performer(q, k, v, row=-2)


def other_normaliser(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Half of what was divided by is forgotten between chunks."""
    state, total, outs = zero(q, v)[:, :, None], torch.zeros_like(k[:, :, :1]), []
    for query, key, value in zip(*(x.chunk(3, 2) for x in (q, k, v))):
        keys, sums = total + key.cumsum(2), state + outer(key, value).cumsum(2)
        outs.append(torch.einsum("bhnd,bhnde->bhne", query, sums) / (query * keys).sum(-1, keepdim=True))
        total, state = 0.5 * keys[:, :, -1:], sums[:, :, -1:]
    return torch.cat(outs, 2)


def chunk_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is divided by are the sums of a chunk alone: no normaliser, but something else that is done afterwards."""
    state, outs = zero(q, v)[:, :, None], []
    for query, key, value in zip(*(x.chunk(3, 2) for x in (q, k, v))):
        sums = state + outer(key, value).cumsum(2)
        total = (query * key.cumsum(2)).sum(-1, keepdim=True)
        outs.append(torch.einsum("bhnd,bhnde->bhne", query, sums) / total)
        state = sums[:, :, -1:]
    return torch.cat(outs, 2)


def decays_by_the_first(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Between chunks, a state decays by the first step of each alone."""
    state, outs = zero(q, v).unsqueeze(2), []
    for query, key, value, gate in zip(*(x.chunk(3, 2) for x in (q, k, v, -g))):
        passed = gate.cumsum(2).exp()
        sums = state + outer(key / passed, value).cumsum(2)
        outs.append(torch.einsum("bhnd,bhnde->bhne", query * passed, sums))
        state = sums[:, :, -1:] * passed[:, :, :1, :, None]
    return torch.cat(outs, 2)


NEAR_MISSES = [
    (forgets_a_row, "other queries, keys or values between chunks"),
    (decays_by_the_first, "a decay is no sum of the gates between key and query"),
]


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES, ids=[f.__name__ for f, _ in NEAR_MISSES])
def test_near_miss(function: Function, reason: str) -> None:
    given = inputs(function.__code__.co_argcount)
    report = check(Module(function), given, fused=False, lower=False).report
    assert [site.reason for site in report.sites if reason in site.reason], report


@pytest.mark.parametrize("function", [chunk_alone, other_normaliser])
def test_what_is_no_normaliser_is_divided_by_afterwards(function: Function) -> None:
    given = inputs(function.__code__.co_argcount)
    report = check(Module(function), given, fused=False, lower=False, gradients=True).report
    (site,) = (site for site in report.sites if site.fused)
    assert "Z[" not in site.notation


def test_chunks_of_one_position() -> None:
    """`chunk` is told how many there are."""
    check(Module(performer, chunks=6), inputs(3), family="linear", sites=1, lower=False, gradients=True)
