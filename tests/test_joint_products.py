"""One softmax over keys of several sources: products with parts of its weights, attentions merged by their shares."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refocus.testing import check
from tests.attended import attending
from tests.drawn import Attention, fuses, fuses_once, scores, stays

# ---------------------------------------------------------------------------------------------------- joint products


def two_parts(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    return p[..., :10] @ v + p[..., 10:] @ v2


def split_and_seen_otherwise(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    near, far = p.split((10, 7), -1)
    out = torch.einsum("bhij,bhjd->bihd", near, v) + torch.bmm(far.flatten(0, 1), v2.flatten(0, 1)).unflatten(
        0, (2, 2)
    ).transpose(1, 2)
    return out.flatten(2)


def three_in_another_order(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, k3: Tensor, v3: Tensor) -> Tensor:
    p = torch.cat((scores(q, k3), scores(q, k), scores(q, k2)), -1).softmax(-1)
    out = p[..., -7:] @ v2
    out += p[..., 5:15] @ v
    return out + p[..., :5] @ v3


def beside_a_residual(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    return q + p[..., :10] @ v + p[..., 10:] @ v2


def one_column_dropped(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    sink = torch.zeros_like(q[..., :1])
    p = torch.cat((sink, scores(q, k), scores(q, k2)), -1).softmax(-1)
    return p[..., 1:11] @ v + p[..., 11:] @ v2


def added_after(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    learned = torch.tanh(q[..., :1]) * torch.arange(10, dtype=q.dtype)
    return (p[..., :10] + learned) @ v + p[..., 10:] @ v2


def taken_away(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    return torch.sub(p[..., :10] @ v, p[..., 10:] @ v2, alpha=0.5)


def counted_otherwise(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    return torch.add(q, 3 - (-(p[..., :10] @ v) - torch.rsub(p[..., 10:] @ v2 / 4, q, alpha=2)), alpha=0.1)


def one_multiplied_by_hand(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, far = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1).split((10, 7), -1)
    return (far.unsqueeze(-1) * v2.unsqueeze(-3)).sum(-2) + near @ v


def causal_within_the_first(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near = scores(q, k).masked_fill(torch.ones(24, 24).triu(1) > 0, float("-inf"))
    p = torch.cat((near, scores(q, k2)), -1).softmax(-1)
    return p[..., :24] @ v + p[..., 24:] @ v2


@pytest.mark.parametrize(
    "function",
    [
        two_parts, split_and_seen_otherwise, beside_a_residual, one_column_dropped, added_after, taken_away,
        counted_otherwise, one_multiplied_by_hand,
    ],
)  # fmt: skip
def test_products_with_parts_of_the_weights_are_one_attention(function: Callable[..., Tensor]) -> None:
    fuses(function, 10, 7)


def test_three_parts_and_a_mask() -> None:
    fuses(three_in_another_order, 10, 7, 5)
    fuses(causal_within_the_first, 24, 7)


def apart_by_length(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    n = k.shape[-2]
    return p[..., n:] @ v2 + p[..., :n] @ v


def split_by_lengths(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, k3: Tensor, v3: Tensor) -> Tensor:
    sink = torch.zeros_like(q[..., :1])
    later = torch.arange(k.shape[2])[None] > torch.arange(q.shape[2])[:, None]
    near = scores(q, k).masked_fill(later, float("-inf"))
    p = torch.cat((sink, scores(q, k3), near, scores(q, k2)), -1).softmax(-1)
    _, third, first, second = p.split((1, k3.shape[2], k.shape[2], k2.shape[2]), -1)
    return first @ v + second @ v2 + third @ v3


@pytest.mark.parametrize(("function", "parts"), [(apart_by_length, 2), (split_by_lengths, 3)])
def test_parts_of_lengths_that_change(function: Callable[..., Tensor], parts: int) -> None:
    """Each tensor has a symbol of its own for its length: parts follow each other by what they are made of."""
    fuses_once(function, *(lengths[:parts] for lengths in ((10, 7, 5), (10, 11, 17), (9, 33, 4))))


def returned_too(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)
    return p[..., :10] @ v + p[..., 10:] @ v2, p


def test_parts_that_are_returned_stay() -> None:
    stays(returned_too, "the probabilities are read elsewhere", 10, 7)


def crossed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every place of an image looks at its column and its row: it has keys and values of its own."""
    column = torch.einsum("bhwd,bgwd->bhwg", q, k).masked_fill(torch.eye(6).bool()[:, None], -torch.inf)
    row = torch.einsum("bhwd,bhud->bhwu", q, k)
    p = torch.cat((column, row), -1).softmax(-1)
    return torch.einsum("bhwg,bgwd->bhwd", p[..., :6], v) + torch.einsum("bhwu,bhud->bhwd", p[..., 6:], v)


def test_values_of_each_query_are_not_copied_together() -> None:
    image = tuple(torch.randn(2, 6, 7, 8) for _ in range(3))
    with attending() as calls:
        check(Attention(crossed), image, lower=False, gradients=True)
    assert calls and all(t.numel() <= image[0].numel() for call in calls for t in call.operands)


# ---------------------------------------------------------------------------------------------------- merges


def parts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logits = scores(q, k)
    return logits.softmax(-1) @ v, logits.logsumexp(-1, keepdim=True)


def merged(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, a = parts(q, k, v)
    far, b = parts(q, k2, v2)
    share = torch.sigmoid(a - b)
    return share * near + (1 - share) * far


def merged_with_a_weight(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, a = parts(q, k, v)
    far, b = parts(q, k2, v2)
    share = torch.sigmoid(b + 0.7 - a)
    return near * torch.sigmoid(a - b - 0.7) + far * share


def merged_in_groups(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, a = parts(*(t.unflatten(2, (4, -1)) for t in (q, k, v)))
    near, a = near.flatten(2, 3), a.flatten(2, 3)
    far, b = parts(q, k2, v2)
    share = torch.sigmoid(a - b)
    return share * near + (1 - share) * far


def merged_by_a_quotient(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, a = parts(q, k, v)
    far, b = parts(q, k2, v2)
    share = 1 / (1 + torch.exp(b - a))
    return share * near + b.exp() / (a.exp() + b.exp()) * far


def merged_by_their_common_sum(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, a = parts(q, k, v)
    far, b = parts(q, k2, v2)
    both = torch.logaddexp(a, b + 0.7)
    return torch.exp(a - both) * near + torch.exp(b + 0.7 - both) * far


@pytest.mark.parametrize(
    "function", [merged, merged_with_a_weight, merged_in_groups, merged_by_a_quotient, merged_by_their_common_sum]
)
def test_attentions_merged_by_their_log_sum_exps(function: Callable[..., Tensor]) -> None:
    fuses(function, 24, 7)


def other_shares(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, a = parts(q, k, v)
    far, b = parts(q, k2, v2)
    share = torch.sigmoid(2 * a - b)
    return share * near + (1 - share) * far


def other_shares_of_the_second(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, a = parts(q, k, v)
    far, b = parts(q, k2, v2)
    return torch.sigmoid(a - b) * near + torch.sigmoid(b - a + 1) * far


def the_wrong_way_round(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, a = parts(q, k, v)
    far, b = parts(q, k2, v2)
    return torch.sigmoid(b - a) * near + torch.sigmoid(a - b) * far


def more_than_the_sum(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, a = parts(q, k, v)
    far, b = parts(q, k2, v2)
    share = 1 / (2 + torch.exp(b - a))
    return share * near + (1 - share) * far


def rows_that_may_be_empty(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, a = parts(q, k, v)
    hidden = torch.arange(7) > torch.arange(24)[:, None] - 5
    logits = scores(q, k2).masked_fill(hidden, float("-inf"))
    far, b = logits.softmax(-1) @ v2, logits.logsumexp(-1, keepdim=True)
    share = torch.sigmoid(a - b)
    return share * near + (1 - share) * far


@pytest.mark.parametrize(
    "function",
    [other_shares, other_shares_of_the_second, the_wrong_way_round, more_than_the_sum, rows_that_may_be_empty],
    ids=lambda f: f.__name__,
)
def test_other_shares_are_applied_outside(function: Callable[..., Tensor]) -> None:
    """There are two attentions then, each of which yields its log-sum-exp."""
    fuses(function, 24, 7, sites=2)
