"""Loops whose states are forgotten where a flag says so: documents in one sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import STEPS, inputs, outer, read

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


def given() -> list[Tensor]:
    """q, k, v, gates, where documents begin, a state to start from. The first step goes on with that, in one row."""
    begins = torch.zeros(2, STEPS, dtype=torch.bool)
    begins[0, 2:4] = begins[1, ::3] = True
    return [*inputs(4), begins, torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))]


def _loop(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decays: Tensor) -> tuple[Tensor, Tensor]:
    rows = []
    for t in range(q.shape[2]):
        state = decays[:, :, t] * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2), state


def spread(flags: Tensor) -> Tensor:
    return flags[:, None, :, None, None]


def filled(q: Tensor, k: Tensor, v: Tensor, g: Tensor, begins: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """By channel."""
    return _loop(q, k, v, state, torch.sigmoid(g[..., None]).masked_fill(spread(begins), 0))


def chosen(q: Tensor, k: Tensor, v: Tensor, g: Tensor, begins: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Or by a number, instead of nothing."""
    decays = torch.where(spread(begins), 0.25, torch.exp(-g[..., :1, None]))
    return _loop(q, k, v, state, decays)


def multiplied(q: Tensor, k: Tensor, v: Tensor, g: Tensor, begins: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return _loop(q, k, v, state, torch.exp(-g[..., :1, None]) * ~spread(begins))


def subtracted(q: Tensor, k: Tensor, v: Tensor, g: Tensor, begins: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return _loop(q, k, v, state, torch.exp(-g[..., :1, None]) * (1 - spread(begins).to(g.dtype)))


def without_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor, begins: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return _loop(q, k, v, state, spread(~begins))


def in_the_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, begins: Tensor, state: Tensor) -> Tensor:
    """The delta rule, of a state that is set to zero before a step."""
    k, rows = torch.nn.functional.normalize(k, dim=-1), []
    for t in range(q.shape[2]):
        state = torch.where(begins[:, t, None, None, None], 0.0, state)
        state = state + outer(k[:, :, t], g[:, :, t, :1] * (v[:, :, t] - read(k[:, :, t], state)))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("function", [filled, chosen, multiplied, subtracted, without_decay, in_the_loop])
def test_spelling(function: Function) -> None:
    check(Module(function), given(), family="linear", sites=1, lower=False, gradients=True)


def any_sign(q: Tensor, k: Tensor, v: Tensor, g: Tensor, begins: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return _loop(q, k, v, state, torch.where(spread(begins), -0.5, torch.exp(-g[..., :1, None])))


def of_numbers(q: Tensor, k: Tensor, v: Tensor, g: Tensor, begins: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What is subtracted from one is no flag."""
    return _loop(q, k, v, state, torch.exp(-g[..., :1, None]) * (1 - 2 * spread(begins).to(g.dtype)))


@pytest.mark.parametrize("function", [any_sign, of_numbers])
def test_near_miss(function: Function) -> None:
    report = check(Module(function), given(), fused=False, sites=1, lower=False).report
    assert "not known to be a positive decay" in report.sites[0].reason
