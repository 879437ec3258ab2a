"""The linear case of a neural memory (Titans): a gradient step on |M^T k - v|^2 a token, with forgetting.

    M[t] = (1 - alpha[t]) M[t-1] - theta[t] k[t] (k[t]^T M[t-1] - v[t])

A change of rank one. With a momentum of the gradients, a second state, it is no recurrence of this kind, and declined.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refocus
from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import inputs, outer, read, zero


def surprise(memory: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The gradient of half the squared error of what the memory has for a key."""
    return outer(k, read(k, memory) - v)


def forgetting(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Rates made for all tokens at once, before the loop."""
    k, memory, rows = F.normalize(k, dim=-1), zero(q, v), []
    alpha, theta = g[..., :2].sigmoid().unbind(-1)
    for t in range(q.shape[2]):
        kept = (1 - alpha[:, :, t, None, None]) * memory
        memory = kept - theta[:, :, t, None, None] * surprise(memory, k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], memory))
    return torch.stack(rows, 2)


def through_a_module(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """One minus the rate is made before the loop as well, and scaled; the error is taken the other way round."""
    k, memory, rows = F.normalize(k, dim=-1), zero(q, v), []
    rates = nn.Sigmoid()(g[..., :2])
    kept, theta = 0.9 * (1.0 - rates[..., 0]), 0.5 * rates[..., 1]
    for t in range(q.shape[2]):
        error = v[:, :, t] - torch.einsum("bhd,bhde->bhe", k[:, :, t], memory)
        memory = memory * kept[:, :, t, None, None]
        memory = memory + torch.einsum("bhd,bhe,bh->bhde", k[:, :, t], error, theta[:, :, t])
        rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], memory))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("function", [forgetting, through_a_module], ids=lambda f: f.__name__)
def test_without_momentum(function: Function) -> None:
    (site,) = check(Module(function), inputs(4), family="linear", sites=1, lower=False, gradients=True).report.sites
    assert "lookup" in site.notation


def test_rates_of_one_forget_everything() -> None:
    """1 - sigmoid(x) is 0 where x is large: what came before counts nothing, and no gradient is NaN."""

    def certain(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return forgetting(q, k, v, g.masked_fill(g > 1.0, 200.0))

    check(Module(certain), inputs(4), family="linear", sites=1, lower=False, gradients=True)


def with_momentum(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    k, memory, rows = F.normalize(k, dim=-1), zero(q, v), []
    momentum = torch.zeros_like(memory)
    alpha, theta, eta = g[..., :3].sigmoid().unbind(-1)
    for t in range(q.shape[2]):
        step = theta[:, :, t, None, None] * surprise(memory, k[:, :, t], v[:, :, t])
        momentum = eta[:, :, t, None, None] * momentum - step
        memory = (1 - alpha[:, :, t, None, None]) * memory + momentum
        rows.append(read(q[:, :, t], memory))
    return torch.stack(rows, 2)


def momentum_of_writes(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    memory, rows = zero(q, v), []
    momentum = torch.zeros_like(memory)
    for t in range(q.shape[2]):
        momentum = 0.5 * momentum + outer(k[:, :, t], v[:, :, t])
        memory = g[:, :, t, :1, None].sigmoid() * memory + momentum
        rows.append(read(q[:, :, t], memory))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("function", [with_momentum, momentum_of_writes], ids=lambda f: f.__name__)
def test_a_momentum_is_declined(function: Function) -> None:
    (site,) = refocus.explain(function, *inputs(4)).sites
    assert not site.recognized
    assert site.reason == "a state of a loop is changed by another one, as with a momentum"
