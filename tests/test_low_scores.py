"""Masks of finite fills beside scores that are as low: of a row that keeps nothing else, the fills decide."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refocus.testing import check
from tests.drawn import Attention

Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TOKENS, WIDTH = 20, 8
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
LOWEST = torch.finfo(torch.float32).min


def inputs() -> tuple[Tensor, ...]:
    """Queries, keys, values, and whether a token is padding, at the left of the second sequence."""
    q, k, v = torch.randn(3, 2, 2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()
    return q, k, v, (torch.arange(TOKENS) < torch.tensor([[0], [7]]))[:, None, None]


def numbers() -> tuple[Tensor, ...]:
    q, k, v, padding = inputs()
    return q, k, v, padding.float()


def filled_numbers(fill: float) -> tuple[Tensor, ...]:
    q, k, v, padding = inputs()
    return q, k, v, torch.zeros(()).masked_fill(padding, fill)


def added_outside(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    return (torch.where(CAUSAL, q @ k.mT, -1e4) + added).softmax(-1) @ v


def added_outside_the_lowest(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    return (torch.where(CAUSAL, q @ k.mT, LOWEST) + added).softmax(-1) @ v


def added_inside(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """Where padding is -inf, the row is a number for its fills."""
    return (q @ k.mT * 0.5 + added * 2).masked_fill(~CAUSAL, -1e4).softmax(-1) @ v


def taken_away(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    return (q @ k.mT - (0.0 - added)).masked_fill(~CAUSAL, -1e4).softmax(-1) @ v


@pytest.mark.parametrize("fill", [-1e9, LOWEST, -math.inf])
@pytest.mark.parametrize("function", [added_outside, added_outside_the_lowest, added_inside, taken_away])
def test_what_is_added_may_be_lower_than_a_fill(function: Function, fill: float) -> None:
    if fill == -math.inf and function in (added_outside, added_outside_the_lowest):
        fill = -3e38  # nothing is left of the fills, either
    (site,) = check(Attention(function), filled_numbers(fill), lower=False, gradients=True, sites=1).report.sites
    assert "-10000.0" in str(site) and site.mask


def numbers_made_fills(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    added = padding * -1e9
    return torch.where(CAUSAL, q @ k.mT + added.detach(), -1e4).softmax(-1) @ v


def test_numbers_times_a_fill() -> None:
    check(Attention(numbers_made_fills), numbers(), lower=False, gradients=True, sites=1)


def multiplied_mask(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = q @ k.mT + torch.zeros(()).masked_fill(padding, -1e9)
    return (scores * CAUSAL - 1e4 * (1 - CAUSAL.float())).softmax(-1) @ v


def multiplied_mask_of_filled_scores(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(padding, -1e9)
    return (scores * CAUSAL - 1e4 * (1 - CAUSAL.float())).softmax(-1) @ v


@pytest.mark.parametrize("function", [multiplied_mask, multiplied_mask_of_filled_scores])
def test_a_mask_under_a_mask_that_is_multiplied(function: Function) -> None:
    (site,) = check(Attention(function), inputs(), lower=False, gradients=True, sites=1).report.sites
    assert "not t0" in site.mask


def with_a_bias_that_is_learned(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return (q @ k.mT + (v @ v.mT).tanh()).masked_fill(~CAUSAL, -1e4).softmax(-1) @ v


def with_infinite_fills(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return (q @ k.mT + padding * -1e9).masked_fill(~CAUSAL, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("function", [with_a_bias_that_is_learned, with_infinite_fills])
def test_masks_that_nothing_is_as_low_as(function: Function) -> None:
    (site,) = check(Attention(function), numbers(), lower=False, sites=1).report.sites
    assert site.mask == "t0[i,j]"
