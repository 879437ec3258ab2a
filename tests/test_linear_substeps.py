"""Loops that change their state several times in a step (products of reflections for each token), and near misses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import outer, read

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

STEPS = 5


def inputs(changes: int = 2) -> list[Tensor]:
    """q, and for each of the changes of a step k, v, and what is erased; a decay for each step."""
    drawn = torch.Generator().manual_seed(0)
    q = torch.rand(2, 3, STEPS, 8, generator=drawn)
    k, v = (torch.randn(2, 3, STEPS, changes, width, generator=drawn) for width in (8, 6))
    b, g = torch.rand(2, 3, STEPS, changes, generator=drawn), torch.rand(2, 3, STEPS, generator=drawn)
    return [q, F.normalize(k, dim=-1), v, 2 * b, -g]


def start(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(2, 3, q.shape[-1], v.shape[-1])


def reflected(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor) -> Tensor:
    state, rows = start(q, v), []
    for t in range(STEPS):
        for n in range(k.shape[3]):
            key, share = k[:, :, t, n], b[:, :, t, n, None]
            state = state + outer(key, share * (v[:, :, t, n] - read(key, state)))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def gated(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The first change decays the state; it begins with something, and is read at the end."""
    state, rows = start(q, v) + 0.1, []
    for t in range(STEPS):
        state = state * g[:, :, t, None, None].exp()
        for n in range(k.shape[3]):
            key, share = k[:, :, t, n], b[:, :, t, n, None]
            state = state + outer(key, share * (v[:, :, t, n] - read(key, state)))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2), state


def of_other_keys(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """Each change looks up the key of the other."""
    state, rows = start(q, v), []
    for t in range(STEPS):
        for n in range(2):
            found = read(k[:, :, t, 1 - n], state)
            state = state + outer(k[:, :, t, n], 0.3 * (b[:, :, t, n, None] * v[:, :, t, n] - found))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


@pytest.mark.parametrize(
    ("function", "changes"), [(reflected, 2), (reflected, 3), (gated, 2), (of_other_keys, 2)],
    ids=["two", "three", "gated", "of other keys"],
)  # fmt: skip
def test_spelling(function: Function, changes: int) -> None:
    given = inputs(changes)
    (site,) = check(Module(function), given, family="linear", sites=1, lower=False, gradients=True).report.sites
    assert "erase" in site.notation and ("lookup" in site.notation) == (function is of_other_keys)
    assert ("exp(gate" in site.notation) == (function is gated)


# ---------------------------------------------------------------------------------------------------- near misses


def read_between(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """The result is read before the last change."""
    state, rows = start(q, v), []
    for t in range(STEPS):
        for n in range(2):
            key, share = k[:, :, t, n], b[:, :, t, n, None]
            rows += [read(q[:, :, t], state)] if n == 1 else []
            state = state + outer(key, share * (v[:, :, t, n] - read(key, state)))
    return torch.stack(rows, 2)


def squashed_between(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor) -> Tensor:
    state, rows = start(q, v), []
    for t in range(STEPS):
        for n in range(2):
            key, share = k[:, :, t, n], b[:, :, t, n, None]
            state = torch.tanh(state + outer(key, share * (v[:, :, t, n] - read(key, state))))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def at_once(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """Both changes look up the state before the step: nothing is between them."""
    state, rows = start(q, v), []
    for t in range(STEPS):
        new = state
        for n in range(2):
            key, share = k[:, :, t, n], b[:, :, t, n, None]
            new = new + outer(key, share * (v[:, :, t, n] - read(key, state)))
        state = new
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def of_other_steps(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """One step reads another step's key for its second change."""
    state, rows = start(q, v), []
    for t in range(STEPS):
        for n in range(2):
            key, share = k[:, :, 0 if (t, n) == (2, 1) else t, n], b[:, :, t, n, None]
            state = state + outer(key, share * (v[:, :, t, n] - read(key, state)))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def decayed_equally(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor, number: bool = False, each: bool = False
) -> tuple[Tensor, Tensor]:
    """Decays that are the same in all steps, of heads or a number: of a step, or of each of its changes."""
    decay = 0.875 if number else torch.sigmoid(g[:1, :, 0])[..., None, None]
    state, rows = start(q, v), []
    for t in range(STEPS):
        for n in range(k.shape[3]):
            if each or n == 0:
                state = state * decay
            key, share = k[:, :, t, n], b[:, :, t, n, None]
            state = state + outer(key, 0.5 * share * (v[:, :, t, n] - read(key, state)))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2), state


@pytest.mark.parametrize("number", [False, True], ids=["head", "number"])
@pytest.mark.parametrize("each", [False, True], ids=["step", "change"])
def test_decays_that_are_the_same_in_all_steps(number: bool, each: bool) -> None:
    module = Module(decayed_equally, number=number, each=each)
    (site,) = check(module, inputs(), family="linear", sites=1, lower=False, gradients=True).report.sites
    assert "erase" in site.notation and "lookup" not in site.notation and "exp(gate" in site.notation


@pytest.mark.parametrize("function", [read_between, squashed_between, at_once, of_other_steps])
def test_near_miss(function: Function) -> None:
    report = check(Module(function), inputs(), fused=False, sites=1, lower=False).report
    assert not report.sites[0].recognized
