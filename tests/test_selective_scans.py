"""Recurrences in which each element of the state decays by itself: a channel of the values is a head of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import refocus
from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import outer

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

CHANNELS, STATES, LENGTH = 6, 4, 20


def _given() -> list[Tensor]:
    """Inputs and steps (batch, channels, time), decays (channels, states), what is written and read (batch, states,
    time), and what a channel adds of itself."""
    drawn = torch.Generator().manual_seed(0)
    x, step = (torch.randn(2, CHANNELS, LENGTH, generator=drawn) for _ in range(2))
    written, read_by = (torch.randn(2, STATES, LENGTH, generator=drawn) for _ in range(2))
    decay = -torch.rand(CHANNELS, STATES, generator=drawn)
    return [x, step, decay, written, read_by, torch.randn(CHANNELS, generator=drawn)]


def scan(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Mamba's selective scan (Gu and Dao 2023), channels first, its last state returned."""
    step = F.softplus(step)
    kept = torch.exp(decay[None, :, None] * step[..., None])
    added = step[..., None] * b.mT[:, None] * x[..., None]
    state, rows = x.new_zeros(*x.shape[:2], b.shape[1]), []
    for t in range(x.shape[2]):
        state = kept[:, :, t] * state + added[:, :, t]
        rows.append((state @ c[:, :, t, None])[..., 0])
    return torch.stack(rows, -1) + x * skip[:, None], state


def time_first(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """By einsum, each step's decay made in the loop, results written into a tensor."""
    x, step, b, c = (y.permute(2, 0, 1) for y in (x, F.softplus(step), b, c))
    state, out = torch.zeros(*x.shape[1:], b.shape[2]), torch.zeros_like(x)
    for t in range(len(x)):
        kept = torch.exp(torch.einsum("bc,cn->bcn", step[t], decay))
        state = state * kept + torch.einsum("bc,bn,bc->bcn", step[t], b[t], x[t])
        out[t] = torch.einsum("bcn,bn->bc", state, c[t])
    return (out + x * skip).permute(1, 2, 0)


def slots(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """Each channel of the values forgets at its own rate, whatever the key."""
    forget, state, rows = torch.sigmoid(step), x.new_zeros(len(x), b.shape[1], x.shape[1]), []
    for t in range(x.shape[2]):
        state = state * forget[:, None, :, t] + outer(b[..., t], x[..., t])
        rows.append((c[:, None, :, t] @ state).squeeze(1))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("function", [scan, time_first, slots])
def test_each_channel_is_a_head(function: Function) -> None:
    report = check(Module(function), _given(), family="linear", sites=1, lower=False, gradients=True).report
    assert "gate[b,h,t" in report.sites[0].notation, report


def test_they_stay_a_loop_where_that_is_cheap() -> None:
    """On a CPU, short scans are no faster in chunks."""
    (site,) = refocus.explain(Module(time_first), *_given()).sites
    assert site.recognized and not site.fused and "no slower than in chunks" in site.reason


def squashed(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    state, rows = x.new_zeros(*x.shape[:2], b.shape[1]), []
    for t in range(x.shape[2]):
        state = torch.exp(decay * step[:, :, t, None]) * state.tanh() + b[:, None, :, t] * x[:, :, t, None]
        rows.append(torch.einsum("bcn,bn->bc", state, c[..., t]))
    return torch.stack(rows, -1)


def one_step_apart(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    state, rows = x.new_zeros(*x.shape[:2], b.shape[1]), []
    for t in range(x.shape[2]):
        kept = torch.exp(decay * step[:, :, t if t != 7 else 6, None])
        state = kept * state + b[:, None, :, t] * x[:, :, t, None]
        rows.append(torch.einsum("bcn,bn->bc", state, c[..., t]))
    return torch.stack(rows, -1)


@pytest.mark.parametrize("function", [squashed, one_step_apart])
def test_near_miss(function: Function) -> None:
    report = check(Module(function), _given(), fused=False, engines=(), lower=False).report
    assert report.sites and not any(site.recognized for site in report.sites), report
