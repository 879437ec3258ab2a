"""States that are looked up by other keys than are written: spellings of generalised delta rules, and near misses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import inputs, outer, read, zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


def _rank_one(q: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A decay for each channel, a key of unit length that is looked up, and how much of that is taken away."""
    return torch.exp(-0.6 * torch.sigmoid(g)), F.normalize(g + q, dim=-1), torch.sigmoid(q - 0.3)


def in_context(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """S diag(w) - (S x)(x a)^T + v k^T: the state that is looked up has not decayed yet, its values come first."""
    (w, x, a), state, rows = _rank_one(q, g), zero(v, q), []
    for t in range(q.shape[2]):
        found = state @ -x[:, :, t].unsqueeze(-1)
        state = state * w[:, :, t].unsqueeze(-2) + found @ (x * a)[:, :, t].unsqueeze(-2)
        state = state + v[:, :, t].unsqueeze(-1) @ k[:, :, t].unsqueeze(-2)
        rows.append((state @ q[:, :, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(rows, 2)


def by_matrices(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    (w, x, a), state, rows = _rank_one(q, g), zero(v, q), []
    for t in range(q.shape[2]):
        matrix = torch.diag_embed(w[:, :, t]) - x[:, :, t].unsqueeze(-1) @ (x * a)[:, :, t].unsqueeze(-2)
        state = state @ matrix + v[:, :, t].unsqueeze(-1) @ k[:, :, t].unsqueeze(-2)
        rows.append((state @ q[:, :, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(rows, 2)


def another_key(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What one key finds is taken from what another one is written with; it has decayed, a number for each head."""
    g, k, state, rows = F.normalize(g, dim=-1), F.normalize(k, dim=-1), zero(q, v), []
    for t in range(q.shape[2]):
        state = torch.sigmoid(v[:, :, t, :1, None]) * state
        state = state + outer(k[:, :, t], v[:, :, t] - 0.5 * read(g[:, :, t], state))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def added_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The delta rule with the other sign."""
    k, state, rows = F.normalize(k, dim=-1), zero(q, v), []
    for t in range(q.shape[2]):
        state = state + outer(k[:, :, t], v[:, :, t] + 0.2 * read(k[:, :, t], state))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def decays_after(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The keys that are written look up what has not decayed yet, of channels that decay each in its own way."""
    k, state, rows = F.normalize(k, dim=-1), zero(q, v), []
    for t in range(q.shape[2]):
        found = read(k[:, :, t], state)
        state = torch.sigmoid(g[:, :, t, :, None]) * state + outer(k[:, :, t], v[:, :, t] - found)
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def before_its_own_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    k, g, state, rows = F.normalize(k, dim=-1), F.normalize(g, dim=-1), zero(q, v), []
    for t in range(q.shape[2]):
        rows.append(read(q[:, :, t], state))
        state = state + outer(k[:, :, t], v[:, :, t]) - outer(g[:, :, t], read(k[:, :, t], state))
    return torch.stack(rows, 2)


def continued(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A state to start from, and the last one, with fewer values than features."""
    (w, x, a), v, rows = _rank_one(q, g), v[..., :5], []
    state = outer(k[:, :, 0] + 1, v[:, :, 0] - 0.5)
    for t in range(q.shape[2]):
        found = torch.einsum("bhd,bhde->bhe", x[:, :, t], state)
        state = w[:, :, t].unsqueeze(-1) * state - outer((x * a)[:, :, t], found) + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2), state


def in_two_terms(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What one key finds is taken away along two others."""
    k, g, state, rows = F.normalize(k, dim=-1), F.normalize(g, dim=-1), zero(q, v), []
    for t in range(q.shape[2]):
        found = read(g[:, :, t], state)
        state = state - 0.3 * outer(k[:, :, t], found) - 0.5 * outer(q[:, :, t], found) + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


SPELLINGS = [
    in_context, by_matrices, another_key, added_back, decays_after, before_its_own_step, continued, in_two_terms,
]  # fmt: skip


@pytest.mark.parametrize("function", SPELLINGS, ids=[f.__name__ for f in SPELLINGS])
def test_spelling(function: Function) -> None:
    given = inputs(function.__code__.co_argcount)
    (site,) = check(Module(function), given, family="linear", sites=1, lower=False, gradients=True).report.sites
    assert "lookup" in site.notation
    assert site.mask == ("j < i" if function is before_its_own_step else "j <= i")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in inputs(4)]
    check(Module(in_context), given, family="linear", sites=1, lower=False)


def strong(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Some steps forget everything, others next to nothing: products of decays vanish at once."""
    w = (-1e3 * g.square()).masked_fill(g > 0.6, -torch.inf).exp()
    x, state, rows = F.normalize(g + q, dim=-1), zero(q, v), []
    for t in range(q.shape[2]):
        found = read(x[:, :, t], state)
        state = w[:, :, t].unsqueeze(-1) * state - outer(0.7 * x[:, :, t], found) + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def test_strong_decays() -> None:
    check(Module(strong), inputs(4), family="linear", sites=1, lower=False, gradients=True)


# ---------------------------------------------------------------------------------------------------- near misses


def of_two_keys(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What two keys find is taken away along two others: a change of rank two."""
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        taken = outer(k[:, :, t], read(g[:, :, t], state)) + outer(q[:, :, t], read(k[:, :, t], state))
        state = state - taken + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def by_a_full_matrix(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        matrix = torch.sin(g[:, :, t, :, None] * k[:, :, t, None])
        state = state - matrix @ state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def along_the_values(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The state is looked up along its values, and read along its keys."""
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        found = torch.einsum("bhe,bhde->bhd", g[:, :, t], state)
        state = state - outer(found, v[:, :, t]) + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def for_each_value(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What is taken away differs between the values, more than by what is found."""
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = state + outer(k[:, :, t], v[:, :, t] - v[:, :, t] * read(g[:, :, t], state))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def any_sign(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        found = read(g[:, :, t], state)
        state = (g[:, :, t] - 0.5).unsqueeze(-1) * state + outer(k[:, :, t], v[:, :, t] - found)
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


NEAR_MISSES = [
    (of_two_keys, "more than a decay and one key"),
    (by_a_full_matrix, "not looked up there by a key"),
    (along_the_values, "not what its queries read"),
    (for_each_value, "a decay for each value channel"),
    (any_sign, "not known to be a positive decay"),
]


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES, ids=[f.__name__ for f, _ in NEAR_MISSES])
def test_near_miss(function: Function, reason: str) -> None:
    report = check(Module(function), inputs(4), fused=False, sites=1, lower=False).report
    assert reason in report.sites[0].reason
