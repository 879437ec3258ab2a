"""Loops of two steps: the state is updated once, so that no other update tells how it depends on the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.testing import check
from tests.linear_cases import Function, Module
from tests.loop_cases import inputs, outer, read, zero
from tests.test_linear_chunk_loops import chunked, padded_chunks, shorter_last

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :, :2], x[:, :, 2:]


def first_tokens(function: Function, count: int) -> Function:
    return lambda *tensors: function(*(x[:, :, :count] for x in tensors))


def delta_rule(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
    """Two chunks of three: what each writes is solved for before the loop, and put together in it."""
    parts = (F.pad(x[:, :, :5], (0, 0, 0, 1)) for x in (q, k * 0.5, v, rates[..., :1]))
    q, k, v, rate = (x.unflatten(2, (2, 3)) for x in parts)
    system = ((k * rate) @ k.mT).tril(-1)
    values = torch.linalg.solve_triangular(system, v * rate, upper=False, unitriangular=True)
    keys = torch.linalg.solve_triangular(system, k * rate, upper=False, unitriangular=True)
    state, out = zero(q[:, :, 0], v[:, :, 0]), torch.zeros_like(v)
    for t in range(2):
        new = values[:, :, t] - keys[:, :, t] @ state
        out[:, :, t] = (q[:, :, t] @ k[:, :, t].mT).tril() @ new + q[:, :, t] @ state
        state = state + k[:, :, t].mT @ new
    return out.flatten(2, 3)[:, :, :5]


def step_by_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = zero(q, v), []
    for t in range(2):
        state = 0.9 * state + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], state))
    return torch.stack(rows, 2)


def one_chunk_of_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and queries are the first half of their features: what is read there is no first chunk."""
    return first_tokens(chunked, 4)(q[..., :4], k[..., :4], v)


CASES = {
    "chunked": (first_tokens(chunked, 4), 3),
    "delta_rule": (delta_rule, 4),
    "step_by_step": (step_by_step, 3),
    "features": (one_chunk_of_features, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_two_steps_are_a_recurrence(case: str) -> None:
    function, count = CASES[case]
    check(Module(function), inputs(count), family="linear", sites=1, lower=False, gradients=True)


@pytest.mark.parametrize("length", [5, 8])
def test_two_chunks_that_are_padded(length: int) -> None:
    x = torch.rand(2, 3, length, 24)
    check(Module(padded_chunks), [x], family="linear", sites=1, lower=False, gradients=True)


def test_a_shorter_second_chunk() -> None:
    check(Module(shorter_last), [torch.rand(2, 3, 7, 24)], fused=False, lower=False, gradients=True)


def ahead(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Near miss: the first chunk hands on what the second one holds."""
    (q0, q1), (k0, k1), (v0, v1) = halves(q[:, :, :4]), halves(k[:, :, :4]), halves(v[:, :, :4])
    state = zero(q, v)
    first = (q0 @ k0.mT).tril() @ v0 + q0 @ state
    state = state + k1.mT @ v1
    return torch.cat([first, (q1 @ k1.mT).tril() @ v1 + q1 @ state], 2)


def other_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Near miss: what is handed on is made of other values."""
    (q0, q1), (k0, k1), (v0, v1) = halves(q[:, :, :4]), halves(k[:, :, :4]), halves(v[:, :, :4])
    state = zero(q, v)
    first = (q0 @ k0.mT).tril() @ v0 + q0 @ state
    state = state + k0.mT @ v0.square()
    return torch.cat([first, (q1 @ k1.mT).tril() @ v1 + q1 @ state], 2)


@pytest.mark.parametrize("function", [ahead, other_values])
def test_near_misses_of_two_steps(function: Function) -> None:
    found = check(Module(function), inputs(3), fused=False, lower=False).report
    [whole] = [site for site in found.sites if site.blame == "cat"]
    assert not whole.fused and "other queries, keys or values" in whole.reason
