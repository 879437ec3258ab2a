"""Single steps of a recurrence, as in decoding: the state comes from a cache, and is there afterwards as eager code
leaves it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import refocus
from refocus.close_linear import LinearSite
from refocus.codegen.linear_form import LinearForm
from refocus.codegen.linear_policy import LinearWork, Passes, Sample, choose_linear
from refocus.codegen.plan import Chosen, Leave
from refocus.testing import check, rewritten
from tests.linear_cases import Function, Module

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

BATCH, HEADS, WIDTH, VALUES = 2, 3, 8, 6


def given(function: Function, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What a function asks for by name. Keys are not of unit length, decays of a channel may be of any sign."""
    drawn = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=drawn)

    every = {
        "q": rand(BATCH, HEADS, WIDTH), "k": rand(BATCH, HEADS, WIDTH), "v": rand(BATCH, HEADS, VALUES),
        "state": rand(BATCH, HEADS, WIDTH, VALUES), "total": rand(BATCH, HEADS, WIDTH), "slope": rand(HEADS) + 0.1,
        "gate": -rand(BATCH, HEADS), "gates": -rand(BATCH, HEADS, WIDTH), "factor": rand(BATCH, HEADS) - 0.5,
        "share": rand(BATCH, HEADS), "values": -rand(BATCH, HEADS, VALUES), "groups": rand(BATCH, 2 * HEADS, WIDTH),
        "cache": rand(BATCH * HEADS, VALUES, WIDTH), "rank": rand(BATCH, 1, WIDTH), "rank_k": rand(BATCH, 1, WIDTH),
    }  # fmt: skip
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return [every[name].to(dtype) for name in names]


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def read(q: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bhd,bhde->bhe", q, state)


# ---------------------------------------------------------------------------------------------------- spellings


def plain(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = state + outer(k, v)
    return read(q, state), state


def retained(q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.exp(-slope)[:, None, None] * state + outer(k, v)
    return (q[..., None] * state).sum(-2), state


def by_matrices(q: Tensor, k: Tensor, v: Tensor, state: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    state = gate.exp()[..., None, None] * state + k[..., None] @ v[..., None, :]
    return q[:, :, None] @ state, state


def by_channels(q: Tensor, k: Tensor, v: Tensor, state: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.einsum("bhd,bhe->bhde", k, v) + torch.sigmoid(gates)[..., None] * state
    return read(q, state), state


def any_factor(q: Tensor, k: Tensor, v: Tensor, state: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """It may be negative, and has no logarithm."""
    state = factor[..., None, None] * state + outer(k, v)
    return read(q, state), state


def by_values(q: Tensor, k: Tensor, v: Tensor, state: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    state = values.exp()[..., None, :] * state + outer(k, v)
    return read(q, state), state


def normalised(q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor) -> tuple[Tensor, ...]:
    state, total = state + outer(k, v), total + k
    return read(q, state) / ((q * total).sum(-1, keepdim=True) + 1e-6), state, total


def delta(q: Tensor, k: Tensor, v: Tensor, state: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    k = F.normalize(k, dim=-1)
    found = (state * k[..., None]).sum(-2)
    state = state + outer(k, (v - found) * share[..., None])
    return (state * q[..., None]).sum(-2), state


def gated_delta(q: Tensor, k: Tensor, v: Tensor, state: Tensor, gate: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    state = state * gate.exp()[..., None, None]
    k = F.normalize(k, dim=-1)
    state = state + outer(k, (v - read(k, state)) * share[..., None])
    return read(q, state), state


def channel_delta(q: Tensor, k: Tensor, v: Tensor, state: Tensor, gates: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    state = state * gates.exp()[..., None]
    k = F.normalize(k, dim=-1)
    state = state + outer(k, (v - read(k, state)) * share[..., None])
    return read(q, state), state


def in_place(q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope: Tensor) -> Tensor:
    state.mul_(torch.exp(-slope)[:, None, None]).add_(outer(k, v))
    return read(q, state)


def copied(q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope: Tensor) -> Tensor:
    state.copy_(state * torch.exp(-slope)[:, None, None] + outer(k, v))
    return read(q, state)


def grouped(groups: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = state + outer(k, v)
    return torch.einsum("bhgd,bhde->bhge", groups.unflatten(1, (HEADS, 2)), state), state


def heads_in_the_batch(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Values first; heads are one axis with the batch where the state is read."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    cache = torch.baddbmm(cache * gate.exp().flatten()[:, None, None], v[..., None], k[:, None, :])
    return torch.bmm(cache, q[..., None]).view(BATCH, HEADS, VALUES), cache


def one_key_for_all_heads(rank: Tensor, rank_k: Tensor, v: Tensor, state: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    step = F.softplus(share)[..., None, None].expand(-1, -1, WIDTH, VALUES)
    state = torch.exp(-step) * state + step * outer(rank_k, v)
    return (state * rank[..., None]).sum(-2), state


SPELLINGS: list[tuple[Function, str, bool]] = [
    (plain, "none", False), (retained, "head", False), (by_matrices, "head", False), (by_channels, "channel", False),
    (any_factor, "none", True), (by_values, "none", True), (normalised, "none", False), (delta, "none", False),
    (gated_delta, "head", False), (channel_delta, "none", True), (in_place, "head", False), (copied, "head", False),
    (grouped, "none", False), (heads_in_the_batch, "head", False), (one_key_for_all_heads, "head", False),
]  # fmt: skip


@pytest.mark.parametrize(("function", "gate", "made"), SPELLINGS, ids=[f.__name__ for f, _, _ in SPELLINGS])
def test_spelling(function: Function, gate: str, made: bool) -> None:
    """`made`: what the step starts from is the state times something, which is computed before."""
    tensors = given(function)
    writes = function in (in_place, copied)
    report = check(Module(function), tensors, family="linear", sites=1, lower=False, gradients=not writes).report
    (site,) = report.sites
    assert "S[b" in site.notation
    assert ("exp(" in site.notation) == (gate != "none")
    assert site.reason == "engine='tiled' was asked for"
