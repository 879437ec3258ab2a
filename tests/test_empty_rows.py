"""Rows that a mask leaves no key: no number, the mean of all values, or zeros, whichever the model makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import refocus
from refocus.testing import check
from tests.drawn import Attention

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
TOKENS, WIDTH = 40, 8
POSITIONS = torch.arange(TOKENS)
# Every fifth query sees nothing.
MASK = ((POSITIONS[:, None] - POSITIONS).abs() < 4) & (POSITIONS[:, None] % 5 != 0)
CAUSAL = POSITIONS <= POSITIONS[:, None]
LOWEST = torch.finfo(torch.float32).min


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, 2, 2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()


def probabilities(q: Tensor, k: Tensor, mask: Tensor = MASK, fill: float = -math.inf) -> Tensor:
    return (q @ k.mT * WIDTH**-0.5).masked_fill(~mask, fill).softmax(-1)


def no_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(q, k) @ v


def means(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(q, k, fill=LOWEST) @ v


def times_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """NaN times zero is NaN."""
    return probabilities(q, k) * MASK @ v


def filled_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(q, k).masked_fill(~MASK, 0.0) @ v


def lowest_filled_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(q, k, fill=LOWEST).masked_fill(~MASK, 0.0) @ v


def rows_with_a_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(MASK.any(-1, keepdim=True), probabilities(q, k), 0.0) @ v


def padding_filled_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Whether a row has a key is known when the model runs: a batch without any."""
    mask = (v[:, :1, :, 0] > 0)[:, :, None] & (torch.arange(2) == 0)[:, None, None, None]
    return probabilities(q, k, mask).masked_fill(~mask, 0.0) @ v


def other_rows_are_lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(q, k, fill=-1e9).masked_fill(POSITIONS[:, None] % 4 == 0, 0.0) @ v


def guarded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By hand: a row without keys is shifted by zero and divided by one."""
    scores = (q @ k.mT * WIDTH**-0.5).masked_fill(~MASK, -math.inf)
    most = scores.amax(-1, keepdim=True)
    weights = (scores - torch.where(most == -math.inf, 0.0, most)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(total == 0, 1.0, total)


def guarded_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * WIDTH**-0.5).exp() * MASK
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v


def unshifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(-1e9) is zero: 0 / 0."""
    weights = (q @ k.mT * WIDTH**-0.5).masked_fill(~MASK, -1e9).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def unshifted_and_divided_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = ((q @ k.mT * WIDTH**-0.5) + torch.zeros(()).masked_fill(~MASK, LOWEST)).exp()
    return weights @ v / weights.sum(-1, keepdim=True)


def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * WIDTH**-0.5).masked_fill(~MASK, -1e9)
    weights = torch.exp2((scores - scores.amax(-1, keepdim=True)) * math.log2(math.e))
    return weights / weights.sum(-1, keepdim=True) @ v


def normalised_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = probabilities(q, k, fill=LOWEST)
    return weights / weights.sum(-1, keepdim=True) @ v


def infinite_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is added to a whole row does not cancel if it is -inf."""
    added = torch.zeros(TOKENS, 1).masked_fill(POSITIONS[:, None] % 5 == 0, -math.inf)
    return ((q @ k.mT).masked_fill(~CAUSAL, -math.inf) + added).softmax(-1) @ v


def lowest_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Nothing is left of a score that finfo.min is added to."""
    added = torch.zeros(TOKENS, 1).masked_fill(POSITIONS[:, None] % 5 == 0, LOWEST)
    return (q @ k.mT + added).softmax(-1) @ v


def chosen_and_normalised_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros are put in the place of no numbers, and divided by their sum."""
    weights = probabilities(q, k).masked_fill(~MASK, 0.0)
    return weights / weights.sum(-1, keepdim=True) @ v


def multiplied_chosen_and_normalised_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * WIDTH**-0.5).exp() * MASK
    weights = (weights / weights.sum(-1, keepdim=True)).masked_fill(~MASK, 0.0)
    return weights / weights.sum(-1, keepdim=True) @ v


def loaded_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Whether a row is filled is known when the model runs."""
    added = torch.zeros(()).masked_fill(q[:, :1, :, :1] > 0.5, LOWEST)
    return (q @ k.mT + added).softmax(-1) @ v


def multiplied_and_chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """0 / 0, and zeros in its place."""
    weights = (q @ k.mT * WIDTH**-0.5).exp() * MASK
    return (weights / weights.sum(-1, keepdim=True)).masked_fill(~MASK, 0.0) @ v


def windows(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    """Seven keys around each query. What is added to those that the batch pads is read through the windows too; a query
    that is no padding keeps its own key."""
    padded = v[:, :1, :, 0] > 0.5
    added = F.pad(padded.to(q.dtype).masked_fill(padded, fill), (3, 3)).unfold(-1, 7, 1)
    k, v = (F.pad(t, (0, 0, 3, 3)).unfold(-2, 7, 1) for t in (k, v))
    inside = F.pad(torch.ones(TOKENS, dtype=torch.bool), (3, 3)).unfold(0, 7, 1)
    logits = torch.einsum("bhnd,bhndw->bhnw", q * 0.3, k) + added
    weights = logits.masked_fill(~inside, -math.inf).softmax(-1).masked_fill(padded[..., None], 0.0)
    return torch.einsum("bhnw,bhndw->bhnd", weights, v)


def padded_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return windows(q, k, v, LOWEST)


def not_shifted_by_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum is guarded, but is one at least, or no number: exp(-inf - -inf)."""
    scores = (q @ k.mT * WIDTH**-0.5).masked_fill(~MASK, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total) @ v


ALL = (
    no_numbers, means, times_the_mask, filled_again, lowest_filled_again, rows_with_a_key, padding_filled_again,
    other_rows_are_lowest, guarded, guarded_weights, unshifted, unshifted_and_divided_after, shifted, normalised_twice,
    infinite_rows, lowest_rows, chosen_and_normalised_again, loaded_rows, padded_windows,
)  # fmt: skip


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_empty_rows_are_what_the_model_makes_of_them(function: Function) -> None:
    (site,) = check(Attention(function), inputs(), lower=False, gradients=True).report.sites
    assert site.fused and bool(site.mask) == (function is not loaded_rows)


@pytest.mark.parametrize("function", [multiplied_chosen_and_normalised_again, not_shifted_by_a_number])
def test_rows_that_are_no_numbers_stay_so(function: Function) -> None:
    """The model's gradients are no numbers either, in any of these rows."""
    (site,) = check(Attention(function), inputs(), lower=False).report.sites
    assert site.fused


def test_gradients_of_the_zeros_in_place_of_a_quotient_are_zeros() -> None:
    """The model's own are no numbers there: zeros flow back into 0 / 0."""
    (site,) = check(Attention(multiplied_and_chosen), inputs(), lower=False).report.sites
    assert site.fused
    q, k, v = (x.requires_grad_() for x in inputs())
    refocus.optimize(Attention(multiplied_and_chosen), engine="tiled")(q, k, v).sum().backward()
    assert q.grad is not None and not bool(q.grad[:, :, ::5].any()) and bool(q.grad[:, :, 1::5].all())


# ---------------------------------------------------------------------------------------------------------- near misses


def other_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of rows 0, 5, 10 .. only some are made zeros."""
    return probabilities(q, k).masked_fill(POSITIONS[:, None] % 4 == 0, 0.0) @ v


def chosen_by_another_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask that is added, and loaded, may hold -inf."""
    added = torch.zeros(()).masked_fill(q[:, :1, :, :1] > 0.5, -math.inf)
    return (q @ k.mT + added).softmax(-1).masked_fill((q[:, :1, :, :1] > 0.5) | ~MASK, 0.0) @ v


def divided_by_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * WIDTH**-0.5).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(POSITIONS[:, None] < 32, total, 0.0) @ v


def by_log_sum_exp_of_added_fills(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-1e9 + log(40) is -1e9: every weight of an empty row is one, and the scores' gradients are none of a softmax."""
    scores = q @ k.mT * WIDTH**-0.5 + torch.where(MASK, 0.0, -1e9)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def sink_and_normalised_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All of an empty row goes to the sink, and zeros are divided by their sum."""
    scores = (q @ k.mT * WIDTH**-0.5).masked_fill(~MASK, -1e9)
    weights = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]
    return weights / weights.sum(-1, keepdim=True) @ v


def masked_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = probabilities(q, k, fill=LOWEST) * CAUSAL
    return weights / weights.sum(-1, keepdim=True) @ v


def infinitely_padded_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return windows(q, k, v, -math.inf)


def windows_of_halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The lowest number and a score of -16 are -inf in float16."""
    return windows(q.half(), k.half(), v.half(), torch.finfo(torch.float16).min)


UNPLAIN = "rows without keys are no numbers, and it is not plain which of them become zeros"
UNCLEAR = "a row may hold nothing but fills, and it is not plain what the model makes of these"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (by_log_sum_exp_of_added_fills, UNCLEAR),
        (sink_and_normalised_again, UNCLEAR),
        (masked_twice, UNCLEAR),
        (other_rows, UNPLAIN),
        (chosen_by_another_mask, UNPLAIN),
        (infinitely_padded_windows, UNPLAIN),
        (windows_of_halves, UNPLAIN),
        (divided_by_zero, "the normaliser is changed after the sum"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_is_left_alone(function: Function, reason: str) -> None:
    (site,) = refocus.explain(Attention(function), *inputs(), engine="tiled").sites
    assert not site.fused and site.reason == reason
