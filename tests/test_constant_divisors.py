"""Quotients of positions by constants as products and shifts: the same numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refocus import simplify as s
from refocus.codegen.quotients import divided
from refocus.evaluate import evaluate
from refocus.ir import Axis, Call, Const, Expr


def positions(size: int) -> torch.Tensor:
    ends = torch.randint(0, size, (2000,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.arange(min(size, 300)), size - 1 - torch.arange(min(size, 300)), ends])


def value(expr: Expr, axes: dict[Axis, torch.Tensor]) -> torch.Tensor:
    read = {}
    changed, parts = divided(expr)
    for part in parts:
        read[part.held.tensor] = part.of(evaluate(part.dividend, axes, read, {}))
    return evaluate(changed, axes, read, {})


def divides(expr: Expr) -> bool:
    return any(isinstance(n, Call) and n.op in ("floordiv", "mod") for n in divided(expr)[0].walk())


@settings(deadline=None, max_examples=200)
@given(st.integers(2, (1 << 31) - 1), st.sampled_from([1, 7, 300, 1 << 20, (1 << 31) - 1]))
def test_each_divisor(d: int, size: int) -> None:
    i = Axis("i", Const(size))
    at = positions(size)
    for expr, wanted in ((s.floordiv(i, d), at // d), (s.mod(i, d), at % d)):
        assert not divides(expr)
        assert torch.equal(value(expr, {i: at}).expand(len(at)), wanted)


@pytest.mark.parametrize("d", [2, 8, 3, 12])
def test_what_may_be_negative(d: int) -> None:
    i, j = Axis("i", Const(60)), Axis("j", Const(60))
    axes = {i: torch.arange(60)[:, None], j: torch.arange(60)}
    apart = axes[i] - axes[j]
    for expr, wanted in ((s.floordiv(s.sub(i, j), d), apart // d), (s.mod(s.sub(i, j), d), apart % d)):
        assert torch.equal(value(expr, axes), wanted)
        assert divides(expr) == (d & (d - 1) > 0)  # no more than a shift is known of negative numbers


def test_quotients_of_quotients() -> None:
    i = Axis("i", Const(4 * 7 * 9))
    inner = s.mod(s.floordiv(i, 7), 9)
    expr = s.add(s.floordiv(s.mod(s.add(s.mul(5, inner), s.mod(i, 7)), 11), 4), s.mod(inner, 5))
    at = torch.arange(4 * 7 * 9)
    within = at // 7 % 9
    assert torch.equal(value(expr, {i: at}), (5 * within + at % 7) % 11 // 4 + within % 5)
    assert not divides(expr)
    assert len(divided(s.add(s.floordiv(i, 7), s.mul(2, s.mod(i, 7))))[1]) == 1  # one quotient for both
