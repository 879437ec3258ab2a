"""Loops of few steps whose results or states are read one by one, as in decoding several tokens at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.testing import check, rewritten
from tests.linear_cases import Function, Module
from tests.loop_cases import STEPS, inputs, outer, read, zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

TOKENS = 3


def updated(state: Tensor, k: Tensor, v: Tensor, g: Tensor, t: int) -> Tensor:
    return state * torch.sigmoid(g[:, :, t, 0, None, None]) + outer(k[:, :, t], v[:, :, t])


def corrected(state: Tensor, k: Tensor, v: Tensor, g: Tensor, t: int) -> Tensor:
    """The gated delta rule."""
    state, key = state * torch.sigmoid(g[:, :, t, 0, None, None]), F.normalize(k[:, :, t], dim=-1)
    return state + outer(key, (v[:, :, t] - read(key, state)) * torch.sigmoid(g[:, :, t, 1:2]))


def listed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    rows = []
    for t in range(TOKENS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
    return *rows, state


def two_listed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    rows = []
    for t in range(2):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
    return *rows, state


def corrections(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    rows = []
    for t in range(TOKENS):
        state = corrected(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
    return *rows, state


def each_on_its_way(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """A head for each of the next tokens."""
    rows = []
    for t in range(TOKENS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
    return rows[0].relu(), rows[1] @ g[0, 0].mT, rows[2].sum(), state


def summed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    rows = []
    for t in range(STEPS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows).mean(0) + rows[-1], state


def stacked_and_apart(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    rows = []
    for t in range(STEPS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2), rows[1].relu(), rows[-1].exp()


def backwards_and_apart(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    state, rows = zero(q, v), []
    for t in reversed(range(STEPS)):
        state = updated(state, k, v, g, t)
        rows.insert(0, read(q[:, :, t], state))
    return torch.stack(rows, 2), rows[1] * 2


def chunks_apart(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Results of a whole chunk."""
    state, rows = zero(q, v), []
    for t in range(0, STEPS, 2):
        a, b, c = (x[:, :, t : t + 2] for x in (q, k, v))
        rows.append((a @ b.mT).tril() @ c + a @ state)
        state = state + b.mT @ c
    return torch.cat(rows, 2), rows[1] * 2


def squashed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Each step does more with what it read, and only then results are put together."""
    rows = []
    for t in range(STEPS):
        state = updated(state, k, v, g, t)
        rows.append(torch.relu(read(q[:, :, t], state)))
    return torch.stack(rows, 2), state


def normalised(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(STEPS):
        state = updated(state, k, v, g, t)
        rows.append(F.layer_norm(read(q[:, :, t], state), v.shape[-1:]) * torch.sigmoid(g[:, :, t]))
    return torch.stack(rows, 2)


def of_one_size(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """By what its own size says."""
    state, rows = zero(q, v), []
    for t in range(STEPS):
        state = corrected(state, k, v, g, t)
        row = read(q[:, :, t], state)
        rows.append(row * torch.rsqrt(row.square().mean(-1, keepdim=True) + 1e-5))
    return torch.stack(rows, 2)


def projected(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A cell, which is given one position after the other."""
    state, rows, w = zero(q, v), [], torch.linspace(-1, 1, 64, dtype=q.dtype).view(8, 8)
    for t in range(STEPS):
        x = k[:, :, t]
        key, value, gate = x @ w, F.linear(x, w + 0.1), F.linear(x, w[:1])
        state = torch.sigmoid(gate)[..., None] * state + outer(key, value)
        rows.append(read(q[:, :, t].softmax(-1), state))
    return torch.stack(rows, 2)


def normalised_keys(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The delta rule; keys are normalised by each step, results squashed."""
    state, rows = zero(q, v), []
    for t in range(STEPS):
        key = k[:, :, t] / k[:, :, t].norm(dim=-1, keepdim=True)
        state = state + outer(key, (v[:, :, t] - read(key, state)) * torch.sigmoid(g[:, :, t, :1]))
        rows.append(torch.tanh(read(q[:, :, t], state)))
    return torch.stack(rows, 2)


ONE = [
    listed, two_listed, corrections, each_on_its_way, summed, stacked_and_apart, backwards_and_apart, chunks_apart,
    squashed, normalised, of_one_size, projected, normalised_keys,
]  # fmt: skip


def given(function: Function) -> list[Tensor]:
    every = inputs(4)
    return [*every, zero(every[0], every[2]) + 0.5][: function.__code__.co_argcount]


@pytest.mark.parametrize("function", ONE, ids=[f.__name__ for f in ONE])
def test_one_loop(function: Function) -> None:
    report = check(Module(function), given(function), family="linear", sites=1, lower=False, gradients=True).report
    assert len(report.sites) == 1


def slots(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """Keys and values are written to slots that forget; what the keys' gave asks the values', as a softmax."""
    f, rows = torch.sigmoid(f), []
    keys, values = zero(k, f), zero(f, v)
    for t in range(q.shape[2]):
        keys = keys * f[:, :, t, None] + outer(k[:, :, t], 1 - f[:, :, t])
        shares = read(q[:, :, t], keys).softmax(-1)
        values = values * f[:, :, t, :, None] + outer(1 - f[:, :, t], v[:, :, t])
        rows.append(read(shares, values))
    return torch.stack(rows, 2)


def two_layers(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What the first state gave is written to the second."""
    one, other, rows = zero(q, v), zero(q, v), []
    for t in range(STEPS):
        one = updated(one, k, v, g, t)
        row = torch.relu(read(q[:, :, t], one))
        other = other * 0.9 + outer(k[:, :, t], row)
        rows.append(read(q[:, :, t], other))
    return torch.stack(rows, 2)


def normalised_from_a_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, total, rows = torch.ones_like(zero(q, v)), torch.ones_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        state, total = state + outer(k[:, :, t], v[:, :, t]), total + k[:, :, t]
        rows.append(read(q[:, :, t], state) / (q[:, :, t] * total).sum(-1, keepdim=True))
    return torch.stack(rows, 2)


def other_total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, total, rows = zero(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        state, total = state + outer(k[:, :, t], v[:, :, t]), 0.5 * total + k[:, :, t]
        rows.append(read(q[:, :, t], state) / ((q[:, :, t] * total).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(rows, 2)


TWO = [slots, two_layers, normalised_from_a_state, other_total]


@pytest.mark.parametrize("function", TWO, ids=[f.__name__ for f in TWO])
def test_two_states_that_are_read_apart(function: Function) -> None:
    check(Module(function), given(function), family="linear", sites=2, lower=False, gradients=True)


# ---------------------------------------------------------------------------------------------------- states


def every_state(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """To go back to the last token that was accepted."""
    rows, states = [], [state]
    for t in range(TOKENS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
        states.append(state)
    return torch.stack(rows, 2), torch.stack(states, 2)


def every_corrected_state(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    rows, states = [], []
    for t in range(TOKENS):
        state = corrected(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
        states.append(state)
    return torch.stack(rows, 2), *states


def one_from_another(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What is written next is made of what was read."""
    rows, value = [], v[:, :, 0]
    for t in range(TOKENS):
        state = state * torch.sigmoid(g[:, :, t, 0, None, None]) + outer(k[:, :, t], value)
        value = torch.tanh(read(q[:, :, t], state))
        rows.append(value)
    return torch.stack(rows, 2), state


def in_the_middle(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """Two loops, one after the other."""
    rows, states = [], []
    for t in range(STEPS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
        states.append(state)
    return torch.stack(rows, 2), states[2], state


def in_the_middle_from_nothing(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    state, rows, states = zero(q, v), [], []
    for t in range(STEPS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
        states.append(state)
    return torch.stack(rows, 2), states[3]


def two_sums(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """The states of numerator and denominator come from a cache: a loop each."""
    rows, total = [], state.sum(-1)
    for t in range(TOKENS):
        state, total = state + outer(k[:, :, t], v[:, :, t]), total + k[:, :, t]
        rows.append(read(q[:, :, t], state) / (q[:, :, t] * total).sum(-1, keepdim=True))
    return torch.stack(rows, 2), state, total


SEVERAL = [
    (every_state, TOKENS), (every_corrected_state, TOKENS), (one_from_another, TOKENS), (in_the_middle, 2),
    (in_the_middle_from_nothing, 2), (two_sums, 2),
]  # fmt: skip


@pytest.mark.parametrize(("function", "sites"), SEVERAL, ids=[f.__name__ for f, _ in SEVERAL])
def test_states_that_are_read(function: Function, sites: int) -> None:
    check(Module(function), given(function), family="linear", sites=sites, lower=False, gradients=True)


# ---------------------------------------------------------------------------------------------------- shared states


def grouped(x: Tensor) -> Tensor:
    return torch.cat([x, x * 2], 1)[:, [0, 3, 1, 4, 2, 5]]


def repeated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Two heads read each state, which is repeated for them."""
    q, rows = grouped(q), []
    for t in range(STEPS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state.repeat_interleave(2, 1)))
    return torch.stack(rows, 2), state


def repeated_corrections(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    q, rows = grouped(q), []
    for t in range(2):
        state = corrected(state, k, v, g, t)
        rows.append(read(q[:, :, t], state[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)))
    return *rows, state


def repeated_once(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = updated(state, k, v, g, 0)
    return read(grouped(q)[:, :, 0], state.repeat_interleave(2, 1)), state


@pytest.mark.parametrize("function", [repeated, repeated_corrections, repeated_once])
def test_heads_that_share_a_state(function: Function) -> None:
    (site,) = check(
        Module(function), given(function), family="linear", sites=1, lower=False, gradients=True
    ).report.sites  # fmt: skip
    assert "k[b,h," in site.notation and "q[b,h,g," in site.notation


# ---------------------------------------------------------------------------------------------------- near misses


def one_step_differs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """Steps are attentions by themselves, but no loop."""
    rows = []
    for t in range(STEPS):
        state = updated(state, k.flip(1) if t == 2 else k, v, g, t)
        rows.append(read(q[:, :, t], state))
    return *rows, state


def test_steps_that_differ_are_none_of_a_loop() -> None:
    tensors = given(one_step_differs)
    report = check(Module(one_step_differs), tensors, family="linear", sites=STEPS, lower=False, gradients=True).report
    assert all("exp(sum_{t<=i} gate" in site.notation for site in report.sites)


def nonlinear(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    state, rows = zero(q, v), []
    for t in range(STEPS):
        state = torch.tanh(updated(state, k, v, g, t))
        rows.append(torch.relu(read(q[:, :, t], state)))
    return torch.stack(rows, 2), rows[1]


def test_a_loop_that_is_none_is_left_as_it_was() -> None:
    """The graph is put back: beside an attention that is fused, it runs as the model has it."""

    def beside(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return (q @ k.mT).softmax(-1) @ v, *nonlinear(q, k, v, g)

    report = check(Module(beside), inputs(4), fused=False, lower=False, gradients=True).report
    assert [site.family for site in report.sites if site.fused] == ["softmax"]
    assert [site.reason for site in report.sites if not site.fused] == ["a loop's update is not linear in its state"]


def test_a_cache_that_is_written_in_place() -> None:
    """Step after step, while results are read apart."""

    def decode(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> list[Tensor]:
        rows = []
        for t in range(TOKENS):
            cache.mul_(0.9).add_(outer(k[:, :, t], v[:, :, t]))
            rows.append(read(q[:, :, t], cache))
        return rows

    q, k, v, state = [*inputs(3), zero(*inputs(2)) + 0.5]
    mine = state.clone()
    run = rewritten(Module(decode), engine="tiled", require=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(q, k, v, mine), decode(q, k, v, state))
            torch.testing.assert_close(mine, state)


# ---------------------------------------------------------------------------------------------------- writes


def changed_rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    rows = []
    for t in range(TOKENS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
    together = torch.stack(rows, 2)
    rows[1].add_(1)
    return together, *rows, state


def changed_states(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    rows, states = [], []
    for t in range(TOKENS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
        states.append(state)
    states[1].zero_()
    return *rows, *states


def used_up(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """Keys are gone once they are written."""
    k, rows = k.clone(), []
    for t in range(TOKENS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
        k[:, :, t].zero_()
    return *rows, state, k


def written_on(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """What was read is added to the next value."""
    v, rows = v.clone(), []
    for t in range(TOKENS):
        state = updated(state, k, v, g, t)
        rows.append(read(q[:, :, t], state))
        v[:, :, t + 1].add_(rows[-1])
    return *rows, state, v


WRITES = [changed_rows, changed_states, used_up, written_on]


@pytest.mark.parametrize("function", WRITES, ids=[f.__name__ for f in WRITES])
def test_what_is_written_between_steps_is_seen(function: Function) -> None:
    tensors, run = given(function), rewritten(Module(function), engine="tiled", require=True)
    with torch.no_grad():
        torch.testing.assert_close(run(*tensors), function(*given(function)))
