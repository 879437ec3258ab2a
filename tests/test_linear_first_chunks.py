"""The first chunk of a loop: where it is read from, and what it does without a state to read. What fills the pairs that
a chunk has no weights for."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")
SIZE = 4


def _given(*more: int) -> list[Tensor]:
    """q, k, v, and a gate for each position (and for each of as many channels as `more` says)."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(2, 3, 5 * SIZE, 8, generator=drawn) for _ in range(3))
    return [q, k, v, -torch.rand(2, 3, 5 * SIZE, *more, generator=drawn)]


def _later() -> Tensor:
    return torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1)


def over_views(q: Tensor, k: Tensor, v: Tensor, g: Tensor, fill: float = -math.inf) -> Tensor:
    """Inputs are viewed in chunks: the first one is where they begin, all others are so many positions further."""
    q, k, v, g = (x.unflatten(2, (-1, SIZE)) for x in (q, k, v, g))
    state, rows = zero(q[:, :, 0], v[:, :, 0]), []
    for n in range(q.shape[2]):
        query, key, value, sums = q[:, :, n], k[:, :, n], v[:, :, n], g[:, :, n].cumsum(2)
        between = (sums[..., :, None] - sums[..., None, :]).masked_fill(_later(), fill)
        rows.append((query @ key.mT * between.exp()) @ value + (query * sums[..., None].exp()) @ state)
        state = state * sums[..., -1, None, None].exp() + (key * (sums[..., -1:] - sums).exp()[..., None]).mT @ value
    return torch.stack(rows, 2).flatten(2, 3)


def by_channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, k, v, g = (x.view(*x.shape[:2], -1, SIZE, x.shape[-1]).movedim(2, 0) for x in (q, k, v, g))
    state, rows = zero(q[0], v[0]), []
    for query, key, value, sums in zip(q, k, v, g.cumsum(3)):
        between = (sums[..., :, None, :] - sums[..., None, :, :]).masked_fill(_later()[..., None], -1e9).exp()
        inside = torch.einsum("bhid,bhjd,bhijd->bhij", query, key, between) @ value
        rows.append(inside + (query * sums.exp()) @ state)
        state = state * sums[..., -1, :, None].exp() + (key * (sums[..., -1:, :] - sums).exp()).mT @ value
    return torch.stack(rows, 2).flatten(2, 3)


@pytest.mark.parametrize(("function", "given"), [(over_views, _given()), (by_channels, _given(8))])
def test_over_views(function: Function, given: list[Tensor]) -> None:
    check(Module(function), given, family="linear", sites=1, lower=False, gradients=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fill_that_vanishes(dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in _given()]
    report = check(Module(over_views, fill=-1e9), given, family="linear", sites=1, lower=False).report
    assert report.sites[0].mask == "j <= i"


def test_a_fill_that_counts() -> None:
    """exp(-100) is a number, although a small one."""
    report = check(Module(over_views, fill=-100.0), _given(), fused=False, engines=(), lower=False).report
    assert not any(site.fused for site in report.sites)


def without_a_state(
    q: Tensor, k: Tensor, v: Tensor, stacked: bool = False, above: int = 0, other: bool = False
) -> Tensor:
    """The first chunk reads no state, and makes it. `above`, `other`: it has another mask, or writes something else."""
    rows: list[Tensor] = []
    state: Tensor | None = None
    for start in range(0, q.shape[2], SIZE):
        query, key, value = (x[:, :, start : start + SIZE] for x in (q, k, v))
        weights = (query @ key.mT).tril(above if state is None else 0)
        rows.append(weights @ value if state is None else weights @ value + query @ state)
        written = key.mT @ (key if other and state is None else value)
        state = written if state is None else state + written
    return torch.stack(rows, 2).flatten(2, 3) if stacked else torch.cat(rows, 2)


@pytest.mark.parametrize("function", [without_a_state, partial(without_a_state, stacked=True)])
def test_without_a_state(function: Function) -> None:
    check(Module(function), _given()[:3], family="linear", sites=1, lower=False, gradients=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"above": -1}, "the first step of a loop is not the same function"),
        ({"above": 1}, "the first step of a loop is not the same function"),
        ({"other": True}, "starts from a state that is not zero"),
    ],
)
def test_another_first_chunk(change: dict[str, int], reason: str) -> None:
    """What is in the chunks may be fused, each by itself; the loop is no attention."""
    report = check(Module(without_a_state, **change), _given()[:3], fused=False, lower=False).report
    assert any(reason in site.reason for site in report.sites if not site.recognized), report
