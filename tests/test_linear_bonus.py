"""Loops that read a state before it decays, and the current position apart (RWKV-5 and RWKV-6): spellings, misses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import inputs, outer, read, zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

SITE = {"family": "linear", "sites": 1, "lower": False}


class Bonus(nn.Module):
    """Each channel of a key decays, and the current position counts `bonus` times. `static`: one decay for each
    channel, whatever the step, as in RWKV-5; otherwise its own at each step, as in RWKV-6."""

    def __init__(self, static: bool, keeps: bool) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(1)
        self.bonus = nn.Parameter(torch.rand(3, 8, generator=drawn))
        self.decay = nn.Parameter(torch.rand(3, 8, generator=drawn))
        self.static, self.keeps = static, keeps

    def forward(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor | None = None) -> object:
        decay = torch.exp(-torch.exp(self.decay if self.static else w))
        state, rows = zero(r, v) if state is None else state, []
        for t in range(r.shape[2]):
            pair = outer(k[:, :, t], v[:, :, t])
            rows.append(read(r[:, :, t], state + self.bonus[..., None] * pair))
            state = (decay if self.static else decay[:, :, t]).unsqueeze(-1) * state + pair
        out = torch.stack(rows, 2)
        return (out, state) if self.keeps else out


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("keeps", [False, True])
def test_bonus(static: bool, keeps: bool) -> None:
    (site,) = check(Bonus(static, keeps), inputs(4), gradients=True, **SITE).report.sites  # type: ignore[arg-type]
    assert site.mask == "j <= i" and "gate[b,h,t,d]" in site.notation


@pytest.mark.parametrize("static", [True, False])
def test_bonus_from_a_state(static: bool) -> None:
    given = [*inputs(4), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))]
    check(Bonus(static, True), given, gradients=True, **SITE)  # type: ignore[arg-type]


def published(r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """As transformers has it for RWKV-5: products of matrices, results written in place, positions before heads."""
    first, decay = w[0, :, 0, :, None], torch.exp(-torch.exp(w[0, :, 1, :, None]))
    k, state = k.mT, zero(r, v)
    out = torch.zeros_like(v.transpose(1, 2))
    for t in range(r.shape[2]):
        new = k[:, :, :, t : t + 1] @ v[:, :, t : t + 1, :]
        out[:, t] = (r[:, :, t : t + 1, :] @ (first * new + state)).squeeze(2)
        state = new + decay * state
    return out


def only_before(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Without the current position."""
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        rows.append(read(q[:, :, t], state))
        state = (-g[:, :, t]).exp().unsqueeze(-1) * state + outer(k[:, :, t], v[:, :, t])
    return torch.stack(rows, 2)


def added_afterwards(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """One decay for each head; the current position is added to what was read."""
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        key, value = k[:, :, t], v[:, :, t]
        rows.append(read(q[:, :, t], state) + (q[:, :, t] * key).sum(-1, keepdim=True) * value * g[:, :, t])
        state = 0.9 * state + outer(key, value)
    return torch.stack(rows, 2)


def normalised(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The current position counts in what is divided by, too."""
    state, total, rows = zero(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        pair, decay, more = outer(k[:, :, t], v[:, :, t]), torch.exp(-g[:, :, t]), g[0, 0, 0].exp()
        above = read(q[:, :, t], state + more[:, None] * pair)
        rows.append(above / (q[:, :, t] * (total + more * k[:, :, t])).sum(-1, keepdim=True))
        state, total = decay[..., None] * state + pair, decay * total + k[:, :, t]
    return torch.stack(rows, 2)


SPELLINGS = [published, only_before, added_afterwards, normalised]


@pytest.mark.parametrize("function", SPELLINGS, ids=[f.__name__ for f in SPELLINGS])
def test_spelling(function: Function) -> None:
    check(Module(function), inputs(4), gradients=function is not published, **SITE)  # type: ignore[arg-type]


def adds_a_matrix(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Whatever the position, each query reads a matrix beside the state."""
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        rows.append(read(q[:, :, t], state + (g[0, 0, 0, :, None] + g[0, 0, 1]).exp()))
        state = 0.9 * state + outer(k[:, :, t], v[:, :, t])
    return torch.stack(rows, 2)


def squashed(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        pair = outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], torch.tanh(state + 0.5 * pair)))
        state = (-g[:, :, t]).exp().unsqueeze(-1) * state + pair
    return torch.stack(rows, 2)


def other_bonus_below(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What is divided by does not decay."""
    state, total, rows = zero(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        pair, decay = outer(k[:, :, t], v[:, :, t]), torch.exp(-g[:, :, t])
        above = read(q[:, :, t], state + g[0, 0, 0, :, None] * pair)
        rows.append(above / (q[:, :, t] * (total + 2 * k[:, :, t])).sum(-1, keepdim=True))
        state, total = decay[..., None] * state + pair, total + k[:, :, t]
    return torch.stack(rows, 2)


NEAR_MISSES = [
    (adds_a_matrix, "more than a value of the query's position"),
    (squashed, "itself a function of a state"),
]


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES, ids=[f.__name__ for f, _ in NEAR_MISSES])
def test_near_miss(function: Function, reason: str) -> None:
    report = check(Module(function), inputs(4), fused=False, sites=1, lower=False).report
    assert reason in report.sites[0].reason


def test_a_divisor_of_other_weights_is_a_loop_of_its_own() -> None:
    check(Module(other_bonus_below), inputs(4), family="linear", sites=2, lower=False, gradients=True)


def per_channel(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """RWKV-4, as transformers has it: each channel is a softmax of its own, with a running maximum."""
    above, below, most = (torch.zeros_like(k[:, 0], dtype=torch.float32) for _ in range(3))
    most, decay, out = most - 1e38, -torch.exp(decay), torch.zeros_like(k)
    for t in range(k.shape[1]):
        key, value = k[:, t].float(), v[:, t]
        now = torch.maximum(most, key + first)
        old, new = torch.exp(most - now), torch.exp(key + first - now)
        out[:, t] = ((old * above + new * value) / (old * below + new)).to(k.dtype)
        now = torch.maximum(most + decay, key)
        old, new = torch.exp(most + decay - now), torch.exp(key - now)
        above, below, most = old * above + new * value, old * below + new, now
    return out


def recurrent(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """No attention: what is divided is a state, and what it is divided by is made of the same."""
    state, rows = torch.zeros_like(k[:, 0]), []
    for t in range(k.shape[1]):
        state = state * decay.exp() + k[:, t] * v[:, t]
        rows.append(state / (1 + state.abs()) * first)
    return torch.stack(rows, 1)


def test_weights_of_each_channel_are_reported() -> None:
    drawn = torch.Generator().manual_seed(0)
    given = [torch.rand(shape, generator=drawn) for shape in ((2, 6, 8), (2, 6, 8), (8,), (8,))]
    (site,) = check(Module(per_channel), given, fused=False, lower=False).report.sites
    assert "each channel has weights of its own" in site.reason
    check(Module(recurrent), given, fused=False, sites=0, lower=False)
