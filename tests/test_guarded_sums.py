"""A sum of exponentials that is replaced where it is zero: o / where(l == 0, 1, l), beside maxima that are guarded."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refocus.testing import rewritten
from tests.drawn import Attention, drawn, fuses, stays

TOKENS = 24
Guard = Callable[[Tensor], Tensor]
GUARDS: dict[str, Guard] = {
    "where": lambda total: torch.where(total == 0, 1.0, total),
    "the other way round": lambda total: torch.where(total > 0, total, torch.ones_like(total)),
    "filled": lambda total: total.masked_fill(total == 0.0, 1),
    "a method": lambda total: total.where(total != 0, 1.0),
    "none": lambda total: total,
}


def chunks(
    guard: Guard, *, two: bool = False, empty: bool = False, fill: float = -math.inf, steady: bool = True
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Flash attention by hand over chunks of eight keys; with `empty`, every fifth query has none."""
    exp = torch.exp2 if two else torch.exp

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = torch.arange(TOKENS)[:, None]
        most, result = q.new_full((*q.shape[:-1], 1), -math.inf), torch.zeros_like(q)
        total = torch.zeros_like(most)
        for begin, keys, values in zip(range(0, TOKENS, 8), k.chunk(3, 2), v.chunk(3, 2)):
            scores = q @ keys.mT * (0.3 * (math.log2(math.e) if two else 1))
            kept = torch.arange(begin, begin + 8) <= rows
            scores = scores.masked_fill(~(kept & (rows % 5 != 2)) if empty else ~kept, fill)
            new = torch.maximum(most, scores.amax(-1, keepdim=True))
            shift = torch.where(new == -math.inf, 0.0, new) if steady else new
            weights, rescale = exp(scores - shift), exp(most - shift)
            total = total * rescale + weights.sum(-1, keepdim=True)
            result, most = result * rescale + weights @ values, new
        return result / guard(total)

    return attend


def at_once(guard: Guard, steady: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.3).masked_fill(torch.arange(TOKENS) > torch.arange(TOKENS)[:, None], -math.inf)
        most = scores.amax(-1, keepdim=True)
        weights = (scores - (torch.where(most == -math.inf, 0.0, most) if steady else most)).exp()
        return weights @ v / guard(weights.sum(-1, keepdim=True))

    return attend


@pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
@pytest.mark.parametrize("two", [False, True], ids=["base e", "base two"])
def test_in_chunks(guard: Guard, two: bool) -> None:
    fuses(chunks(guard, two=two), TOKENS)


@pytest.mark.parametrize("steady", [False, True], ids=["plain maxima", "guarded maxima"])
@pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
def test_at_once(guard: Guard, steady: bool) -> None:
    fuses(at_once(guard, steady), TOKENS)


@pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
def test_rows_without_keys(guard: Guard) -> None:
    """They are zeros with a guard, and no numbers without one."""
    function = chunks(guard, empty=True)
    run = rewritten(Attention(function), engine="tiled", require=True)
    leaves, again = ([t.requires_grad_() for t in drawn(TOKENS)] for _ in range(2))
    got, expected = run(*leaves), function(*again)
    assert bool(expected[:, :, 2].isnan().all()) == (guard is GUARDS["none"])
    torch.testing.assert_close(got, expected, equal_nan=True)
    if guard is not GUARDS["none"]:
        got.square().sum().backward()
        expected.square().sum().backward()
        for mine, theirs in zip(leaves, again):
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_finite_fills() -> None:
    reason = "probabilities that are no numbers are replaced, where it is not plain which these are"
    stays(chunks(GUARDS["where"], empty=True, fill=-1e9), reason, TOKENS)


def test_plain_maxima_of_rows_without_keys() -> None:
    function = chunks(GUARDS["where"], empty=True, steady=False)
    run = rewritten(Attention(function), engine="tiled")
    torch.testing.assert_close(run(*drawn(TOKENS)), function(*drawn(TOKENS)), equal_nan=True)


def test_another_guard() -> None:
    stays(chunks(lambda total: torch.where(total == 1, 2.0, total)), "changed|added", TOKENS)
