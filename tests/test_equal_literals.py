"""Tensors that a model makes of the same numbers, again and again, are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import refocus
from refocus.capture import capture
from refocus.testing import check
from tests.linear_cases import Function, Module

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


def captured(function: Function, *inputs: Tensor) -> fx.GraphModule:
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        found.append(capture(gm))
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*inputs)
    return found[0]


def literals(function: Function) -> int:
    return len(captured(function, torch.zeros(2)).graph.find_nodes(op="get_attr"))


def test_equal_ones_are_one() -> None:
    assert literals(lambda x: x * torch.tensor([0.5, 2.0]) + torch.tensor([0.5, 2.0])) == 1


@pytest.mark.parametrize("other", [[0.5, 3.0], [[0.5, 2.0]], [0.5]], ids=str)
def test_others_are_not(other: list[Any]) -> None:
    assert literals(lambda x: x * torch.tensor([0.5, 2.0]) + torch.tensor(other)) == 2


def test_neither_are_zeros_of_different_signs() -> None:
    assert literals(lambda x: x.copysign(torch.tensor([0.0, 1.0])) + x.copysign(torch.tensor([-0.0, 1.0]))) == 2


def test_each_that_is_given_out_is_a_tensor_of_its_own() -> None:
    def twice(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])

    torch._dynamo.reset()
    _, one, two = refocus.optimize(twice)(torch.zeros(2))
    one.add_(1)
    assert two.tolist() == [1.0, 2.0]


def test_one_that_is_written_to_is_no_other() -> None:
    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.tensor([0.0, 1.0, 2.0, 3.0])
        bias.add_(torch.arange(4.0))
        return (q @ k.mT + bias).softmax(-1) @ v + torch.tensor([0.0, 1.0, 2.0, 3.0])

    check(Module(written), tuple(torch.randn(2, 3, 4, 4) for _ in range(3)), sites=1, lower=False)


def by_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = k.new_zeros(2, 3, 4, 4), []
    for t in range(6):
        decay = torch.tensor([0.5, 0.75, 0.875], dtype=q.dtype)
        state = state * decay[:, None, None] + k[:, :, t, :, None] * v[:, :, t, None]
        rows.append((q[:, :, t, None] @ state)[:, :, 0] * torch.tensor(0.5))
    return torch.stack(rows, 2)


def by_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = k.new_zeros(2, 3, 4, 4), []
    for start in range(0, 6, 2):
        query, key, value = (x[:, :, start : start + 2] for x in (q, k, v))
        seen = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=q.dtype)
        rows.append(query @ state + (query @ key.mT * seen) @ value)
        state = state + key.mT @ value
    return torch.cat(rows, 2)


@pytest.mark.parametrize("function", [by_steps, by_chunks])
def test_loops_that_make_their_constants_in_each_turn(function: Function) -> None:
    given = tuple(torch.randn(2, 3, 6, 4) for _ in range(3))
    check(Module(function), given, family="linear", sites=1, lower=False, gradients=True)
