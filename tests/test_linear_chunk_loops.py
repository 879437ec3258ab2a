"""Loops over chunks that carry a state are linear attention where both parts decay alike: spellings and near misses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import refocus
from refocus.report import Report
from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import inputs, zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


def chunked(
    q: Tensor, k: Tensor, v: Tensor, reads: float = 1, writes: float = 1, keeps: float = 1, ahead: int = 0
) -> Tensor:
    """Decays by a quarter, in chunks of two. What the numbers ask for makes the two parts disagree."""
    index = torch.arange(2)[:, None]
    inside = torch.where(index >= index.T - ahead, torch.exp(-0.25 * (index - index.T)), 0.0)
    state, rows = zero(q, v), []
    for start in range(0, q.shape[2], 2):
        query, key, value = (x[:, :, start : start + 2] for x in (q, k, v))
        rows.append((query @ key.mT * inside) @ value + (query * torch.exp(-0.25 * reads * (index + 1))) @ state)
        state = state * math.exp(-0.5 * keeps) + (key * torch.exp(-0.25 * writes * (1 - index))).mT @ value
    return torch.cat(rows, 2)


def other_values_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for start in range(0, q.shape[2], 2):
        query, key, value = (x[:, :, start : start + 2] for x in (q, k, v))
        rows.append((query @ key.mT).tril() @ value + query @ state)
        state = state + key.mT @ key
    return torch.cat(rows, 2)


def chunk_by_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last chunk is all that is remembered."""
    state, rows = zero(q, v), []
    for start in range(0, q.shape[2], 2):
        query, key, value = (x[:, :, start : start + 2] for x in (q, k, v))
        rows.append((query @ key.mT).tril() @ value + query @ state)
        state = key.mT @ value
    return torch.cat(rows, 2)


def test_a_loop_over_chunks() -> None:
    report = check(Module(chunked), inputs(3), family="linear", sites=1, lower=False, gradients=True).report
    assert report.sites[0].mask == "j <= i" and "exp(" in report.sites[0].notation


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reads": 2}, "decays otherwise between chunks"),
        ({"writes": 0.5}, "decays otherwise between chunks"),
        ({"keeps": 1.1}, "decays otherwise between chunks"),
        ({"ahead": 1}, "without a causal mask"),
    ],
)
def test_chunks_that_disagree(change: dict[str, float], reason: str) -> None:
    _left_for(lambda q, k, v: chunked(q, k, v, **change), reason)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "reason"),
    [(other_values_between, "other queries, keys or values"), (chunk_by_chunk, "no running sum")],
)
def test_no_loop_over_chunks(function: Function, reason: str) -> None:
    _left_for(function, reason)


def _left_for(function: Function, reason: str) -> None:
    """The loop is left with this reason; what is inside of its chunks may be fused."""
    report = check(Module(function), inputs(3), fused=False, engines=(), lower=False).report
    assert any(reason in site.reason for site in report.sites if not site.recognized), report


def padded_chunks(x: Tensor, columns: bool = False) -> Tensor:
    """In whole chunks of four, as many as it takes; what they give out is written into one tensor."""
    length = x.shape[2]
    x = torch.nn.functional.pad(x, (0, 0, 0, -length % 4))
    q, k, v = (part.reshape(x.shape[0], x.shape[1], -1, 4, 8) for part in x.split(8, -1))
    state, out = zero(q[:, :, 0], v[:, :, 0]), torch.zeros_like(v.mT.contiguous().mT if columns else v.contiguous())
    for t in range(x.shape[2] // 4):
        query, key, value = (part[:, :, t] for part in (q, k, v))
        out[:, :, t] = (query @ key.mT).tril() @ value + query @ state
        state = state + key.mT @ value
    return out.flatten(2, 3)[:, :, :length]


def by_column(x: Tensor) -> Tensor:
    """What they give out is written to a tensor that lies in memory column by column."""
    return padded_chunks(x, columns=True)


def shorter_last(x: Tensor) -> Tensor:
    """Chunks of four, of which the last ends where the sequence does; it decays by as many steps as it has."""
    length = x.shape[2]
    q, k, v = x.split(8, -1)
    index = torch.arange(4)
    pairs = torch.where(index[:, None] >= index, 0.9 ** (index[:, None] - index).clamp(min=0), 0.0)
    state, rows = zero(q, v), []
    for t in range((length + 3) // 4):
        start, end = 4 * t, min(4 * t + 4, length)
        query, key, value = (part[:, :, start:end] for part in (q, k, v))
        inside = (query @ key.mT * pairs[: end - start, : end - start]) @ value
        rows.append(inside + query @ state * 0.9 ** (index[: end - start, None] + 1))
        state = 0.9 ** (end - start) * state + (key * 0.9 ** (3 - index[4 - (end - start) :, None])).mT @ value
    return torch.cat(rows, 2)


@pytest.mark.parametrize("function", [padded_chunks, by_column, shorter_last])
def test_symbolic_lengths(function: Function) -> None:
    """The tracer unrolls a loop for one number of chunks; within it, lengths are free."""
    reports: list[Report] = []
    run = refocus.optimize(Module(function), engine="tiled", dynamic=True, report=reports.append)
    with torch.no_grad():
        for length in (15, 14):
            x = torch.rand(2, 3, length, 24, generator=torch.Generator().manual_seed(length)) / 3
            torch.testing.assert_close(run(x), function(x), atol=1e-4, rtol=1e-4)
    (report,) = reports
    assert [(site.fused, site.family) for site in report.sites] == [(True, "linear")]
