"""Weights of some of the keys of one softmax, applied to values: the other keys count in the normaliser.

One child process (this file as a program) runs the generated kernels under Triton's interpreter, as in
tests/test_triton_flash.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import refocus
from refocus.testing import check
from tests.attended import attending
from tests.children import interpreted, settle
from tests.drawn import Attention, drawn, fuses, fuses_once, scores, stays

Function = Callable[..., Tensor]

# Each function takes 24 queries, 10 keys and values, and 7 keys and values of another source.


def both(q: Tensor, k: Tensor, k2: Tensor) -> Tensor:
    return torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1)


def first(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return both(q, k, k2)[..., :10] @ v


def second(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return both(q, k, k2).narrow(-1, 10, 7) @ v2


def split(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, _ = both(q, k, k2).split((10, 7), -1)
    return torch.einsum("bhij,bhjd->bihd", near, v).flatten(2)


def in_the_middle(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return both(q, k, k2)[..., 4:10] @ v[:, :, 4:]


def across_sources(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return both(q, k, k2)[..., 4:14] @ v


def every_other(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return scores(q, k).softmax(-1)[..., 1::2] @ v[:, :, 1::2]


def but_one(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return scores(q, k).softmax(-1)[..., 1:] @ v[:, :, 1:]


def null_key(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """Its keys are put together before the product, of which each query and each key then has one."""
    keys = torch.cat((k2[:1, :, :1].expand(2, -1, -1, -1), k), 2)
    return (q @ keys.mT).softmax(-1)[..., 1:] @ v


def after_a_sink(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    logits = torch.cat((k2[:, :, :1, :1].expand(-1, -1, 24, -1), scores(q, k), scores(q, k2)), -1)
    return logits.softmax(-1)[..., 1:11] @ v


def before_a_sink(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    logits = torch.cat((scores(q, k), scores(q, k2), k2[:, :, :1, :1].expand(-1, -1, 24, -1)), -1)
    return logits.softmax(-1)[..., 10:17] @ v2


def under_a_mask(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    later = torch.arange(10) > torch.arange(24)[:, None]
    near = scores(q, k).masked_fill(later, float("-inf"))
    return torch.cat((near, scores(q, k2)), -1).softmax(-1)[..., :10] @ v


def causal_over_all(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    logits = torch.cat((scores(q, k2), scores(q, k)), -1)
    later = torch.arange(17) > torch.arange(24)[:, None]
    return logits.masked_fill(later, torch.finfo(q.dtype).min).softmax(-1)[..., 7:] @ v


def rows_without_keys(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """Rows of which the part, or all, has no keys: zeros, and zeros in the place of no numbers."""
    logits = torch.cat((scores(q, k), scores(q, k2)), -1)
    rows, keys = torch.arange(24)[:, None] % 3, torch.arange(17)
    hidden = ((rows == 0) & (keys < 10)) | (rows == 1)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num()[..., :10] @ v


def kept_by_where(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    hidden = torch.arange(17) > torch.arange(24)[:, None]
    p = torch.cat((scores(q, k2), scores(q, k)), -1).masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.where(hidden, 0.0, p)[..., 7:] @ v


def times_a_gate_of_keys(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return (both(q, k, k2)[..., :10] * torch.sigmoid(k[..., 0])[:, :, None]) @ v


def normalised_again(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near = both(q, k, k2)[..., :10]
    return near / near.sum(-1, keepdim=True) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    logits = torch.cat((scores(q, k), scores(q, k2)), -1)
    e = (logits - logits.amax(-1, keepdim=True)).exp()
    return e[..., 10:] @ v2 / e.sum(-1, keepdim=True)


def split_by_hand(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    logits = torch.cat((scores(q, k), scores(q, k2)), -1)
    e = (logits - logits.amax(-1, keepdim=True)).exp()
    near, _ = (e / e.sum(-1, keepdim=True)).split((10, 7), -1)
    return near @ v


def of_a_difference(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return (both(q, k, k2) - 0.3 * both(q.sin(), k, k2))[..., 10:] @ v2


def values_of_groups(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """One softmax over the keys of two groups, and a result of each."""
    p = scores(q, k).softmax(-1).unflatten(-1, (2, 5))
    return torch.einsum("bhigj,bhgjd->bhgid", p, v.unflatten(2, (2, 5)))


def low(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    logits = torch.cat((q @ k.mT, q @ k2.mT), -1)
    return logits.softmax(-1, dtype=torch.float32)[..., :10].to(v.dtype) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return F.dropout(both(q, k, k2), 0.5, training=False)[..., :10] @ v


def columns(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return scores(k, q).softmax(-2)[:, :, 3:].mT @ v[:, :, 3:]


PARTS = [
    first, second, split, in_the_middle, across_sources, every_other, but_one, null_key, after_a_sink, before_a_sink,
    under_a_mask, causal_over_all, rows_without_keys, kept_by_where, times_a_gate_of_keys, normalised_again, by_hand,
    split_by_hand, of_a_difference, values_of_groups, dropped, columns,
]  # fmt: skip


@pytest.mark.parametrize("function", PARTS, ids=lambda f: f.__name__)
def test_weights_of_some_keys(function: Function) -> None:
    fuses(function, 10, 7)


def test_in_low_precision() -> None:
    check(Attention(low), [t.bfloat16() for t in drawn(10, 7)], sites=1, lower=False, gradients=True)


def test_keys_that_are_together_are_not_copied_apart() -> None:
    """The product was over one tensor of keys: the region reads that."""
    with attending() as calls:
        fuses(null_key, 10, 7)
    assert calls and all([o.shape[-1].value for o in c.region.operands if o.name == "k"] == [11] for c in calls)


def test_nothing_in_values_outside_of_the_part() -> None:
    """What is no number there is none of the result's business."""
    q, k, v, k2, v2 = drawn(10, 7)
    run = refocus.testing.rewritten(Attention(first), engine="tiled", require=True)
    assert not run(q, k, v, k2, torch.full_like(v2, torch.nan)).isnan().any()
    v[:, :, -1] = torch.inf
    torch.testing.assert_close(run(q, k, v, k2, v2), first(q, k, v, k2, v2))


# ---------------------------------------------------------------------------------------------------- several parts


def sink_with_a_value(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k), k2[:, :, :1, :1].expand(-1, -1, 24, -1)), -1).softmax(-1)
    return p[..., :-1] @ v + p[..., -1:] * v2[:, :, :1]


def one_of_each_head(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((k2[0, :, 0, 0, None, None].expand(2, -1, 24, 1), scores(q, k)), -1).softmax(-1)
    return v2[0, :, 0, None] * p[..., 0, None] + p[..., 1:] @ v


def of_a_key_with_scores(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = both(q, k, k2[:, :, :1])
    return p[..., :-1] @ v - 0.5 * (p[..., -1:] * v2[:, :, :1])


def by_einsum(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = both(q, k, k2[:, :, :1])
    return torch.einsum("bhi,hd->bhid", p[..., -1], v2[0, :, 0]) + p[..., :-1] @ v


def two_of_one_key(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((scores(q, k2[:, :, :1]), scores(q, k), k2[:, :, :1, :1].expand(-1, -1, 24, -1)), -1).softmax(-1)
    return p[..., :1] * v2[:, :, :1] + p[..., 1:-1] @ v + p[..., -1:] * v2[:, :, 1:2]


def by_hand_with_a_sink(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    logits = torch.cat((scores(q, k), k2[:, :, :1, :1].expand(-1, -1, 24, -1)), -1)
    e = (logits - logits.amax(-1, keepdim=True)).exp()
    p = e / e.sum(-1, keepdim=True)
    return p[..., 10:] * v2[:, :, :1] + p[..., :10] @ v


def split_with_a_sink(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    logits = torch.cat((scores(q, k), k2[:, :, :1, :1].expand(-1, -1, 24, -1), scores(q, k2)), -1)
    near, sink, far = logits.softmax(-1).split((10, 1, 7), -1)
    return near @ v + sink * v2[:, :, :1] + far @ v2


def with_a_gap(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = both(q, k, k2)
    return p[..., 1:8] @ v[:, :, 1:8] + p[..., 10:16] @ v2[:, :, :6]


def last_key_and_first_keys(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """What the parts have of the first source is a single key."""
    p = both(q, k, k2)
    return p[..., 9:10] @ v[:, :, 9:] + p[..., 10:] @ v2


SEVERAL = [
    sink_with_a_value, one_of_each_head, of_a_key_with_scores, by_einsum, two_of_one_key, by_hand_with_a_sink,
    with_a_gap, last_key_and_first_keys, split_with_a_sink,
]  # fmt: skip


@pytest.mark.parametrize("function", SEVERAL, ids=lambda f: f.__name__)
def test_several_parts_and_single_keys(function: Function) -> None:
    fuses(function, 10, 7)


def side_by_side(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = both(q, k, k2)
    return torch.cat((p[..., :10] @ v, p[..., 10:] @ v2), -1)


def overlapping(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = both(q, k, k2)
    return p[..., :8] @ v[:, :, :8] + p[..., 7:14] @ v2


def rows_exchanged(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = both(q, k, k2)
    return p[..., :10] @ v + p.flip(2)[..., 10:] @ v2


def single_keys_apart(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of a key, scaled for each query, with a value of their own."""
    p = both(q, k, k2)
    return p[..., :10] @ v, torch.tanh(q[..., :1]) * (p[..., 12:13] * v2[:, :, :1])


def a_sink_apart(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    logits = torch.cat((k2[:, :, :1, :1].expand(-1, -1, 24, -1), scores(q, k)), -1)
    p = logits.softmax(-1) * torch.sigmoid(q[..., 1:2])
    return torch.cat((p[..., :1] * v2[:, :, :1], p[..., 1:] @ v), -1)


@pytest.mark.parametrize("function", [single_keys_apart, a_sink_apart], ids=lambda f: f.__name__)
def test_the_weights_of_one_key_are_those_of_an_attention(function: Function) -> None:
    fuses(function, 10, 7, sites=2)


def other_weights_of_one_key(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of queries and keys that are divided by different numbers."""
    a, b = q / (k[:, :, :1].abs() + 1), q / (k[:, :, 1:2].abs() + 1)
    total = torch.cat((scores(a, k), scores(a, k2)), -1)
    p = total.exp() / total.exp().sum(-1, keepdim=True)
    r = torch.cat((scores(b, k), scores(b, k2)), -1).exp() / total.exp().sum(-1, keepdim=True)
    return p[..., :10] @ v, r[..., 12:13] * v2[:, :, :1]


def test_what_is_divided_by_the_same_sum_may_be_of_other_scores() -> None:
    """One attention, whose log-sum-exps what stays outside is made of."""
    report = check(Attention(other_weights_of_one_key), drawn(10, 7), sites=1, lower=False, gradients=True).report
    assert "L[b,h,i]" in str(report)


@pytest.mark.parametrize("function", [side_by_side, overlapping, rows_exchanged], ids=lambda f: f.__name__)
def test_parts_that_are_no_whole_are_two_attentions(function: Function) -> None:
    fuses(function, 10, 7, sites=2)


def part_of_lengths(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return both(q, k, k2)[..., : k.shape[2]] @ v


def last_of_lengths(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.cat((k2[:, :, :1, :1].expand(-1, -1, 24, -1), scores(q, k), scores(q, k2)), -1).softmax(-1)
    return p[..., -k2.shape[2] :] @ v2 + p[..., :1] * v2[:, :, :1]


@pytest.mark.parametrize("function", [part_of_lengths, last_of_lengths])
def test_parts_of_lengths_that_change(function: Function) -> None:
    fuses_once(function, (10, 7), (10, 11), (9, 33))


# ---------------------------------------------------------------------------------------------------- near misses


def returned_too(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
    p = both(q, k, k2)
    return p[..., :10] @ v, p[..., 10:]


def of_two_softmaxes(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """One over all keys, the other over those of the part."""
    return (both(q, k, k2)[..., :10] + scores(q, k).softmax(-1)) @ v


def in_another_order(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return scores(q, k).softmax(-1)[..., torch.randperm(10)[:5]] @ v[:, :, :5]


def over_other_keys(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """The sum leaves keys out that the weights are of."""
    e = scores(q, k).exp()
    return e @ v / e[..., :8].sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (returned_too, "the probabilities are read elsewhere"),
        (of_two_softmaxes, "softmaxes over different keys are added up"),
        (in_another_order, "the exponents of the weights and of the normaliser differ"),
        (over_other_keys, "the softmax runs over another axis than the keys"),
    ],
)
def test_near_misses(function: Callable[..., object], reason: str) -> None:
    stays(function, reason, 10, 7)


# ---------------------------------------------------------------------------------------------------- generated kernels

GENERATED = (first, second, every_other, causal_over_all, times_a_gate_of_keys, sink_with_a_value, two_of_one_key)


def child() -> dict[str, bool]:
    settle()
    for function in GENERATED:
        module = Attention(function)
        check(module, drawn(10, 7), engines=("triton",), sites=1, lower=False, gradients=True)
    return {function.__name__: True for function in GENERATED}


def test_generated_kernels() -> None:
    assert interpreted("tests.test_key_parts") == {function.__name__: True for function in GENERATED}


if __name__ == "__main__":
    print(json.dumps(child()))
