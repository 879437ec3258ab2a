"""Loops are linear attention where every step is proved the same: spellings, and near misses that are left."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import inputs, outer, read, zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

# ---------------------------------------------------------------------------------------------------- spellings


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = zero(q, v), torch.zeros_like(v)
    for t in range(q.shape[2]):
        state.mul_(0.9).add_(outer(k[:, :, t], v[:, :, t]))
        out[:, :, t] = read(q[:, :, t], state)
    return out


def before_its_own_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        rows.append(read(q[:, :, t], state))
        state = state + outer(k[:, :, t], v[:, :, t])
    return torch.stack(rows, 2)


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, total, rows = zero(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        state, total = state + outer(k[:, :, t], v[:, :, t]), total + k[:, :, t]
        rows.append(read(q[:, :, t], state) / ((q[:, :, t] * total).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(rows, 2)


def gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Decays are made before the loop, one for each channel."""
    decay, state, rows = torch.sigmoid(g), zero(q, v), []
    for t in range(q.shape[2]):
        state = decay[:, :, t].unsqueeze(-1) * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def unbound(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for query, key, value, gate in zip(q.unbind(2), k.unbind(2), v.unbind(2), g.unbind(2)):
        state = (-gate[..., :1, None]).exp() * state + outer(key, value)
        rows.append(read(query, state))
    return torch.stack(rows, 2)


def started(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = torch.ones_like(zero(q, v)), []
    for t in range(q.shape[2]):
        state = state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2).sum() + state.sum()


def merged_heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Each step puts its heads side by side before it gives them out; the state is looked up before it is written."""
    state, rows = zero(q, v), []
    k = k / k.norm(dim=-1, keepdim=True)
    for t in range(q.shape[2]):
        new = g[:, :, t, :1] * (v[:, :, t] - read(k[:, :, t], state))
        state = state + outer(k[:, :, t], new)
        rows.append(read(q[:, :, t], state).flatten(1))
    return torch.stack(rows, 1)


def merged_heads_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, total, rows = zero(q, v), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        state, total = state + outer(k[:, :, t], v[:, :, t]), total + k[:, :, t]
        out = read(q[:, :, t], state) / ((q[:, :, t] * total).sum(-1, keepdim=True) + 1e-6)
        rows.append(out.reshape(1, out.shape[0], -1))
    return torch.cat(rows)


def converted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Memory that is made, and converted to what it is already, before it is written to."""
    state, out = torch.zeros(2, 3, 8, 8).to(v), torch.zeros(v.shape).to(v)
    for t in range(q.shape[2]):
        state = state + outer(k[:, :, t], v[:, :, t])
        out[:, :, t] = read(q[:, :, t], state)
    return out


def added_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What it starts from is put together as each step puts its state together."""
    state, rows = zero(q, v) + outer(q[:, :, 0], v[:, :, 1]), []
    for t in range(q.shape[2]):
        state = state * 0.9 + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def _decaying(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = decay[:, :, t].unsqueeze(-1) * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def forgotten(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return _decaying(q, k, v, 1 - torch.sigmoid(g))


def bounded(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return _decaying(q, k, v, 0.3 + 0.7 * torch.sigmoid(g))


def rooted(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return _decaying(q, k, v, torch.sigmoid(g) ** (1 / 16))


def below_a_bound(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Which may have any sign."""
    return _decaying(q, k, v, 0.6 - torch.sigmoid(g))


def _first_step_apart(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """What the first step writes stands before the loop, and the decay of that step is not read."""
    state = outer(k[:, :, 0], v[:, :, 0])
    rows = [read(q[:, :, 0], state)]
    for t in range(1, q.shape[2]):
        state = decay[:, :, t] * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def first_step_apart(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return _first_step_apart(q, k, v, torch.sigmoid(g[..., :1, None]))


def first_step_apart_channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return _first_step_apart(q, k, v, torch.exp(-g[..., None]))


def starts_from_a_share(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The first step writes half of what the others would."""
    state = outer(k[:, :, 0], v[:, :, 0]) * 0.5
    rows = [read(q[:, :, 0], state)]
    for t in range(1, q.shape[2]):
        state = torch.sigmoid(g[:, :, t, :, None]) * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def moving_average(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        rate = torch.sigmoid(g[:, :, t, :1, None])
        state = state + rate * (outer(k[:, :, t], v[:, :, t]) - state)
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def interpolated(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = torch.lerp(outer(k[:, :, t], v[:, :, t]), state, torch.sigmoid(g[:, :, t, :, None]))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def interpolated_by_the_rest(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What is kept is one minus one minus a decay that is known as such."""
    state, rows, keep = zero(q, v), [], torch.exp(-g)
    for t in range(q.shape[2]):
        state = torch.lerp(state, outer(k[:, :, t], v[:, :, t]), 1 - keep[:, :, t, :, None])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def interpolated_by_a_quotient(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What is kept is exp(g) / (1 + exp(g)), of which the part that is lost is known."""
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        kept = torch.exp(g[:, :, t, :, None])
        state = torch.lerp(state, outer(k[:, :, t], v[:, :, t]), 1 - kept / (1 + kept))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def folded(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Batch and heads are one dimension of the state."""
    state, rows = state.flatten(0, 1), []
    for t in range(q.shape[2]):
        query, key, value = (x[:, :, t].flatten(0, 1) for x in (q, k, v))
        state = torch.baddbmm(state, key[:, :, None], value[:, None], beta=0.9)
        rows.append(torch.bmm(query[:, None], state).view(v[:, :, 0].shape))
    return torch.stack(rows, 2), state


SPELLINGS = [
    moving_average, interpolated, interpolated_by_the_rest, interpolated_by_a_quotient,
    first_step_apart,
    first_step_apart_channels,
    merged_heads,
    merged_heads_normalised,
    started,
    returned,
    summed,
    in_place,
    before_its_own_step,
    normalised,
    gated,
    unbound,
    converted,
    added_to,
    forgotten,
    bounded,
    rooted,
]


@pytest.mark.parametrize("function", SPELLINGS, ids=[f.__name__ for f in SPELLINGS])
def test_spelling(function: Function) -> None:
    given = inputs(function.__code__.co_argcount)
    trains = function is not in_place  # which eager code itself cannot differentiate
    report = check(Module(function), given, family="linear", sites=1, lower=False, gradients=trains).report
    assert report.sites[0].mask == ("j < i" if function is before_its_own_step else "j <= i")


def test_a_state_whose_batch_and_heads_are_one_dimension() -> None:
    q, k, v = inputs(3)
    check(Module(folded), [q, k, v, zero(q, v) + 0.5], family="linear", sites=1, lower=False, gradients=True)


# ---------------------------------------------------------------------------------------------------- near misses


def squared_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = state * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def squashed_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = torch.tanh(state + outer(k[:, :, t], v[:, :, t]))
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def one_step_differs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        at = 0 if t == 3 else t
        state = state + outer(k[:, :, at], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def another_factor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = state + outer(k[:, :, t], v[:, :, t]) * (0.5 + 0.1 * t * t)
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def any_sign(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = g[:, :, t].unsqueeze(-1) * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def late_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The delta rule, its state read as the step before left it, before it decays."""
    k, state, rows = torch.nn.functional.normalize(k, dim=-1), zero(q, v), []
    for t in range(q.shape[2]):
        rows.append(read(q[:, :, t], state))
        state = (-g[:, :, t, :1]).exp().unsqueeze(-1) * state
        state = state + outer(k[:, :, t], (v[:, :, t] - read(k[:, :, t], state)) * 0.5)
    return torch.stack(rows, 2)


def reflected(q: Tensor, k: Tensor, v: Tensor, b: Tensor, other: bool = False) -> Tensor:
    """The delta rule as a product with a matrix: S (1 - b k k^T) + b v k^T."""
    state, rows = zero(v, q), []
    for t in range(q.shape[2]):
        key, value, rate = k[:, :, t, :, None], v[:, :, t, :, None], b[:, :, t, :1, None]
        matrix = torch.eye(8) - rate * (key @ (q[:, :, t, :, None] if other else key).mT)
        state = state @ matrix + rate * value @ key.mT
        rows.append((state @ q[:, :, t, :, None]).squeeze(-1))
    return torch.stack(rows, 2)


def other_reflection(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return reflected(q, k, v, b, other=True)


def blended(q: Tensor, k: Tensor, v: Tensor, b: Tensor, share: float = 1.0) -> Tensor:
    """What a key finds is taken away, and a blend of it and the value is written instead."""
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        key, rate = k[:, :, t, :, None], b[:, :, t, :1]
        found = read(k[:, :, t], state)
        new = (1 - rate) * found + rate * v[:, :, t]
        state = state - share * key * found.unsqueeze(-2) + key * new.unsqueeze(-2)
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def blended_twice(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """Less is taken away than is written again."""
    return blended(q, k, v, b, 0.5)


@pytest.mark.parametrize("function", [reflected, blended, other_reflection, blended_twice])
def test_delta_rule(function: Function) -> None:
    q, k, v, b = inputs(4)
    given = [q, torch.nn.functional.normalize(k, dim=-1), v, b]
    (site,) = check(Module(function), given, family="linear", sites=1, lower=False, gradients=True).report.sites
    assert "erase" in site.notation
    assert ("lookup" in site.notation) == (function in (other_reflection, blended_twice))


NEAR_MISSES = [
    (squared_state, "not linear in its state"),
    (squashed_state, "not linear in its state"),
    (one_step_differs, "not the same function"),
    (another_factor, "not the same function"),
    (any_sign, "not known to be a positive decay"),
    (below_a_bound, "not known to be a positive decay"),
    (late_delta, "lack the gate of the query's own step"),
    (starts_from_a_share, "the first step of a loop is not the same function"),
]


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES, ids=[f.__name__ for f, _ in NEAR_MISSES])
def test_near_miss(function: Function, reason: str) -> None:
    given = inputs(function.__code__.co_argcount)
    report = check(Module(function), given, fused=False, sites=1, lower=False).report
    assert reason in report.sites[0].reason


# ---------------------------------------------------------------------------------------------------- filled tensors


def read_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for t in range(v.shape[2]):
        out[:, :, t] = v[:, :, t] + out.sum((2, 3))[..., None]
    return out


def written_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for t in [*range(v.shape[2]), 2]:
        out[:, :, t] = q[:, :, t] * (t + 1)
    return out


def with_a_gap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.ones_like(v)
    for t in range(1, v.shape[2]):
        out[:, :, t] = q[:, :, t] * 2
    return out


def changed_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, row = torch.zeros_like(v), torch.zeros_like(v[:, :, 0])
    for t in range(v.shape[2]):
        row += q[:, :, t]
        out[:, :, t] = row
    return out


@pytest.mark.parametrize("function", [read_between, written_twice, with_a_gap, changed_afterwards])
def test_what_is_filled_in_another_way_stays_right(function: Function) -> None:
    """Beside an attention that is fused, so that the graph is rewritten."""

    def beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v + function(q, k, v)

    check(Module(beside), inputs(3), lower=False)


def crosswise(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Each of two results is made of the other's operands: neither is the step after the other."""
    return torch.stack([q @ k.mT, k @ q.mT]).softmax(-1) @ v


def crosswise_features(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, k = torch.cat([q * g + k, k * g + q], -1), torch.cat([k * g + q, q * g + k], -1)
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("function", [crosswise, crosswise_features])
def test_two_results_that_are_made_crosswise_are_no_loop(function: Function) -> None:
    check(Module(function), inputs(4), family="softmax", sites=1, lower=False)


def forgets(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Some steps forget everything: their decay is exactly zero."""
    gate = (-g[..., 0]).masked_fill(g[..., 0] > 0.6, torch.finfo(g.dtype).min).masked_fill(g[..., 0] > 0.8, -math.inf)
    state, rows = zero(q, v), []
    for t in range(q.shape[2]):
        state = gate[:, :, t].exp()[..., None, None] * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def forgets_channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    gate, state, rows = (-1e3 * g).masked_fill(g > 0.6, -math.inf), zero(q, v), []
    for t in range(q.shape[2]):
        state = gate[:, :, t].exp()[..., None] * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def channel_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The delta rule, what it looks up decays each channel in its own way."""
    k, state, rows = torch.nn.functional.normalize(k, dim=-1), zero(q, v), []
    for t in range(q.shape[2]):
        state = (-g[:, :, t]).exp()[..., None] * state
        found = read(k[:, :, t], state)
        state = state + outer(k[:, :, t], (v[:, :, t] - found) * 0.5)
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("function", [forgets, forgets_channels, channel_delta])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strong_gates(function: Function, dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in inputs(4)]
    check(Module(function), given, family="linear", sites=1, lower=False, gradients=dtype == torch.float32)


def test_branches_beside_one_another_are_no_loop() -> None:
    """The first of them may start from something else, and hands it to none."""

    def branches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for t in range(4):
            x = q[:, :, 0].relu() if t == 0 else q[:, :, 0] * v[:, :, t]
            parts.append((x[..., None, :] @ k.mT) @ k)
        return torch.cat(parts, 2)

    check(Module(branches), inputs(3), sites=0, fused=False, lower=False)
