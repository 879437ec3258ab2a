"""Loops whose states begin with the number 0, are vectors, or are read with what another state gave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import refocus
from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import inputs, outer, read, zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Random features' causal attention, step by step, from two numbers."""
    state, total, rows = 0, 0, []
    for t in range(q.shape[2]):
        state, total = state + outer(k[:, :, t], v[:, :, t]), total + k[:, :, t]
        rows.append(read(q[:, :, t], state) / ((q[:, :, t] * total).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(rows, 2)


def decaying(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What decays before the first step is the number, in a tensor of the decay's shape."""
    state, rows = 0, []
    for t in range(q.shape[2]):
        state = torch.sigmoid(g[:, :, t, :1])[..., None] * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def decaying_backwards(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """By channel, from the last position to the first."""
    state, rows = 0, []
    for t in reversed(range(q.shape[2])):
        state = state * torch.sigmoid(g[:, :, t, :, None]) + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows[::-1], 2)


def ending(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state, rows = 0, []
    for t in range(q.shape[2]):
        state = state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2), state


def in_two_loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Numerator and denominator, each in a loop of its own, positions first; the second has a vector for a state."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    above, below = [], []
    sums = torch.zeros_like(torch.einsum("bhd,bhe->bhde", k[0], v[0]))
    for t in range(q.shape[0]):
        sums = sums + torch.einsum("bhd,bhe->bhde", k[t], v[t])
        above.append(torch.einsum("bhde,bhd->bhe", sums, q[t])[None])
    sums = torch.zeros_like(k[0])
    for t in range(q.shape[0]):
        sums = sums + k[t]
        below.append((q[t] * sums).sum(2)[None])
    return (torch.cat(above) / torch.cat(below)[..., None]).permute(1, 2, 0, 3)


@pytest.mark.parametrize(("function", "sites"), [(normalised, 1), (ending, 1), (in_two_loops, 2)])
def test_spelling(function: Function, sites: int) -> None:
    report = check(Module(function), inputs(3), family="linear", sites=sites, lower=False, gradients=True).report
    assert all(site.mask == "j <= i" for site in report.sites)


@pytest.mark.parametrize("function", [decaying, decaying_backwards])
def test_the_number_0_may_decay(function: Function) -> None:
    check(Module(function), inputs(4), family="linear", sites=1, lower=False, gradients=True)


def rolled_gates(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The first step decays by the last gate, and what the loop starts from with it."""
    decays, rows = torch.exp(-g[..., :1, None]).roll(1, 2), []
    for t in range(q.shape[2]):
        state = decays[:, :, t] * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2), state


def test_the_first_gate_is_read_where_it_is() -> None:
    given = [*inputs(4), torch.rand(2, 3, 8, 8)]
    check(Module(rolled_gates), given, family="linear", sites=1, lower=False, gradients=True)
    from_zero = Module(lambda q, k, v, g: rolled_gates(q, k, v, g, zero(q, v))[0])
    check(from_zero, given[:4], family="linear", sites=1, lower=False, gradients=True)


# ---------------------------------------------------------------------------------------------------- near misses


def first_step_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What it begins with is another function of other tensors."""
    state = torch.sin(outer(q[:, :, 0], v[:, :, 0]))
    rows = [read(q[:, :, 0], state)]
    for t in range(1, q.shape[2]):
        state = state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def first_key_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The number 0, but the first step writes the second key."""
    state, rows = 0, []
    for t in range(q.shape[2]):
        state = state + outer(k[:, :, max(t, 1)], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def first_decay_apart(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """As from the number 0, but for a first step that is another one."""
    state = torch.sigmoid(g[:, :, 0, :1])[..., None] * 0.5 + outer(k[:, :, 0], v[:, :, 0])
    rows = [read(q[:, :, 0], state)]
    for t in range(1, q.shape[2]):
        state = torch.sigmoid(g[:, :, t, :1])[..., None] * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def asks_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a state gave is looked up in it once more."""
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = 0.9 * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(torch.tanh(read(q[:, :, t], state)), state))
    return torch.stack(rows, 2)


NEAR_MISSES = [
    (first_step_apart, "the first step of a loop"),
    (first_key_apart, "the first step of a loop"),
    (first_decay_apart, "the first step of a loop"),
    (asks_again, "itself a function of a state"),
]


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES, ids=[f.__name__ for f, _ in NEAR_MISSES])
def test_near_miss(function: Function, reason: str) -> None:
    given = inputs(function.__code__.co_argcount)
    sites = refocus.explain(Module(function), *given, engine="tiled").sites
    assert reason in sites[-1].reason and not sites[-1].recognized
    check(Module(function), given, fused=False, engines=(), lower=False)
