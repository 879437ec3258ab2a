"""Loops over several states whose reads are added up are as many loops, one of them the delta rule or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import inputs, outer, read, zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


def delta_and_sum(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Keys and values of a step are cut out once, for both."""
    precise, plain, rows = zero(q, v), zero(q, v), []
    unit = normalize(k, dim=-1)
    for t in range(q.shape[2]):
        key, value = unit[:, :, t], v[:, :, t]
        precise = precise + outer(key, g[:, :, t, :1] * (value - read(key, precise)))
        plain = 0.9 * plain + outer(key, value)
        rows.append(read(q[:, :, t], precise) + read(k[:, :, t], plain))
    return torch.stack(rows, 2)


def two_sums(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A fast one and a slow one, of which one is taken away from the other; written in place."""
    fast, slow, out = zero(q, v), zero(q, v), torch.zeros_like(v)
    for t in range(q.shape[2]):
        new = outer(k[:, :, t], v[:, :, t])
        fast, slow = 0.5 * fast + new, 0.99 * slow + new
        out[:, :, t] = read(q[:, :, t], slow) - read(g[:, :, t], fast)
    return out


def backward_deltas(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Two delta rules, over the steps in reverse order."""
    one, other, rows = zero(q, v), zero(q, v), []
    a, b = normalize(k, dim=-1), normalize(g, dim=-1)
    for t in reversed(range(q.shape[2])):
        one = one + outer(a[:, :, t], v[:, :, t] - read(a[:, :, t], one))
        other = other + outer(b[:, :, t], v[:, :, t] - read(b[:, :, t], other))
        rows.append(read(q[:, :, t], one) + read(q[:, :, t], other))
    return torch.stack(rows[::-1], 2)


def one_is_squashed(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What one of the two gives is squashed before it is added."""
    one, other, rows = zero(q, v), zero(q, v), []
    unit = normalize(k, dim=-1)
    for t in range(q.shape[2]):
        one = one + outer(unit[:, :, t], v[:, :, t] - read(unit[:, :, t], one))
        other = 0.9 * other + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], one) + torch.tanh(read(k[:, :, t], other)))
    return torch.stack(rows, 2)


def normalised(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The delta rule, its results divided by what a sum of keys gives."""
    state, total, rows = zero(q, v), torch.zeros_like(k[:, :, 0]), []
    unit = normalize(k, dim=-1)
    for t in range(q.shape[2]):
        state = state + outer(unit[:, :, t], v[:, :, t] - read(unit[:, :, t], state))
        total = total + k[:, :, t]
        rows.append(read(q[:, :, t], state) / (q[:, :, t] * total).sum(-1, keepdim=True))
    return torch.stack(rows, 2)


SPELLINGS = [delta_and_sum, two_sums, backward_deltas, one_is_squashed, normalised]


@pytest.mark.parametrize("function", SPELLINGS, ids=[f.__name__ for f in SPELLINGS])
def test_spelling(function: Function) -> None:
    trains = function is not two_sums  # which eager code itself cannot differentiate
    check(Module(function), inputs(4), family="linear", sites=2, lower=False, gradients=trains)


def one_writes_the_other(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What is looked up in one state is written to the other."""
    one, other, rows = zero(q, v), zero(q, v), []
    unit = normalize(k, dim=-1)
    for t in range(q.shape[2]):
        one = one + outer(unit[:, :, t], v[:, :, t] - read(unit[:, :, t], one))
        other = 0.9 * other + one
        rows.append(read(q[:, :, t], one) + read(k[:, :, t], other))
    return torch.stack(rows, 2)


NEAR_MISSES = [
    (one_writes_the_other, "changed by another one"),
]


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES, ids=[f.__name__ for f, _ in NEAR_MISSES])
def test_near_miss(function: Function, reason: str) -> None:
    """Beside an attention that is fused, so that the graph is rewritten."""

    def beside(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v + function(q, k, v, g)

    report = check(Module(beside), inputs(4), fused=False, sites=2, lower=False, gradients=True).report
    assert [site.fused for site in report.sites if site.family == "softmax"] == [True]
    assert [site.reason for site in report.sites if reason in site.reason], report


def test_steps_may_be_read_beside_the_loop() -> None:
    """Keys that each step makes for itself are results, too."""

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        state, rows, keys = zero(q, v), [], []
        for t in range(q.shape[2]):
            key = k[:, :, t].square() + 0.1
            state = state + outer(key, v[:, :, t])
            rows.append(read(q[:, :, t], state))
            keys.append(key)
        return torch.stack(rows, 2), torch.stack(keys, 2)

    check(Module(both), inputs(3), family="linear", sites=1, lower=False, gradients=True)
