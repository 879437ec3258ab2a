"""Scores and weights that are written over in part, and masks that are products of numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import refocus
from refocus.testing import check
from tests.drawn import Attention, drawn, fuses, scores, stays

# ------------------------------------------------------------------------------------------------ parts written over


def head_without_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    logits[:, 1, :] = 0
    return logits.softmax(-1) @ v


def first_key_counts_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).masked_fill(torch.ones(24, 10).triu(1) == 1, -1e9).softmax(-1).clone()
    p[..., 0] = p[..., 0] * 1.7
    return (p / p.sum(-1, keepdim=True)) @ v


def some_keys_shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k).clone()
    logits[..., 5:9] = float("-inf")
    logits[..., :2] += 1.5
    return logits.softmax(-1) @ v


def one_head_less(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1).clone()
    p[:, 1] *= 0.3
    return p @ v


def nobody_sees_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    logits.diagonal(dim1=-2, dim2=-1).fill_(float("-inf"))
    return logits.softmax(-1) @ v


def one_head_that_does_not_see_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)[0, 0]
    logits.fill_diagonal_(-1e9)
    return logits.softmax(-1) @ v[0, 0]


def numbers_next_to_the_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.diagonal_scatter(scores(q, k), q[..., :10, 0], -2, 2, 3)
    return logits.softmax(-1) @ v


WRITTEN = [
    head_without_scores, first_key_counts_more, some_keys_shifted, one_head_less, nobody_sees_itself,
    one_head_that_does_not_see_itself, numbers_next_to_the_diagonal,
]  # fmt: skip


@pytest.mark.parametrize("function", WRITTEN, ids=lambda f: f.__name__)
def test_parts_of_scores_and_weights_that_are_written_over(function: Callable[..., Tensor]) -> None:
    fuses(function, 10)


def test_writes_through_other_views_are_not_followed() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = scores(q, k)
        logits.permute(0, 1, 3, 2)[:, :, 3].fill_(0.5)
        return logits.softmax(-1) @ v

    stays(function, r"scores are written in place \(by `fill_`\)", 10)


# ------------------------------------------------------------------------------------------------ normalised in parts


def heads_normalised_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k)
    half = p.shape[1] // 2
    p[:, half:] = p[:, half:].softmax(-1)
    p[:, :half] = p[:, :half].softmax(-1)
    return p @ v


def rows_normalised_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).masked_fill(torch.ones(24, 10).triu(1) == 1, -1e9)
    for start in range(0, 24, 9):
        p[..., start : start + 9, :] = torch.softmax(p[..., start : start + 9, :], -1)
    return p @ v


def heads_normalised_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    return torch.cat([logits[:, :1].softmax(-1), logits[:, 1:].softmax(-1)], 1) @ v


def each_head_of_the_other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    return torch.cat([logits[:, 1:].softmax(-1), logits[:, :1].softmax(-1)], 1) @ v


def each_head_with_its_own_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    return torch.stack([(logits[:, h] * (2.0 + h)).softmax(-1) for h in range(2)], 1) @ v


@pytest.mark.parametrize(
    "function",
    [
        heads_normalised_in_place,
        rows_normalised_in_place,
        heads_normalised_apart,
        each_head_of_the_other,
        each_head_with_its_own_scale,
    ],
    ids=lambda f: f.__name__,
)
def test_weights_that_are_normalised_part_by_part(function: Callable[..., Tensor]) -> None:
    fuses(function, 10)


def a_bias_of_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias that the second head alone has is not read at the first."""
    logits = scores(q, k)
    bias = torch.arange(10.0).expand(2, 1, 24, 10).clone() * q[:, :1, :, :1]
    return torch.cat([logits[:, :1].softmax(-1), (logits[:, 1:] + bias).softmax(-1)], 1) @ v


def batches_with_keys_of_their_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two halves of the batch have keys of their own."""
    first, last = torch.tanh(k[:1]), torch.cos(k[1:])
    return torch.cat([scores(q[:1], first).softmax(-1), scores(q[1:], last).softmax(-1)]) @ v


def one_head_as_it_is(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k)
    p[:, 1:] = p[:, 1:].softmax(-1)
    return p @ v


def weights_before_they_are_squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    return torch.cat([p[:, :1], p[:, 1:] ** 2], 1) @ v


@pytest.mark.parametrize(
    "function",
    [one_head_as_it_is, weights_before_they_are_squared, a_bias_of_one_head],
    ids=lambda f: f.__name__,
)
def test_weights_of_which_a_part_is_something_else(function: Callable[..., Tensor]) -> None:
    stays(function, "", 10)


def test_a_weight_of_another_key_written_over() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = scores(q, k).softmax(-1).clone()
        p[..., 1] = p[..., 0] * 0.3
        return p @ v

    stays(function, "", 10)


def test_weights_that_count_negative() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = scores(q, k).softmax(-1).clone()
        p[..., 0] *= -0.3
        return (p / p.sum(-1, keepdim=True)) @ v

    stays(function, "exponents", 10)


def test_a_product_of_three_matrices_is_one_of_two() -> None:
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(5))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhic,cd,bhjd->bhij", q, matrix.to(q.dtype), k).softmax(-1) @ v

    found = check(Attention(function), drawn(10), sites=1, lower=False, gradients=True)
    assert "sum_d q[b,h,i,d] * k[b,h,j,d]" in str(found.report)


def test_scores_normalised_by_head() -> None:
    norm = nn.BatchNorm2d(2)
    nn.init.uniform_(norm.weight)
    norm.running_var = torch.tensor([0.5, 2.0])

    class Normalised(Attention):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: None)
            self.norm = norm

        def forward(self, *inputs: Tensor) -> Tensor:
            q, k, v = inputs
            return self.norm(scores(q, k)).softmax(-1) @ v

    check(Normalised().eval(), drawn(10), sites=1, lower=False)
    report = refocus.explain(Normalised().train(), *drawn(10), engine="tiled")
    assert not any(site.fused for site in report.sites)  # with the statistics of the batch, each depends on all


# ------------------------------------------------------------------------------------------------ masks in floats


def test_a_mask_of_two_products() -> None:
    """Causal and padding, both in floats; a row of padding only sees all keys the same, as in eager code."""

    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        both = torch.ones(24, 10).tril() * padding[:, None, :]
        return (scores(q, k) + (1.0 - both[:, None]) * -1e9).softmax(-1) @ v

    padding = (torch.arange(10) < torch.tensor([[10], [6]])).float()
    padding[1, 0] = 0.0
    found = check(Attention(function), (*drawn(10), padding), sites=1, lower=False)
    assert "j <= i and not" in found.report.sites[0].mask


def test_a_mask_of_rows_and_columns_is_no_mask_of_keys() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        both = torch.ones(24, 24).tril() * padding[:, None, :] * padding[:, :, None]
        return (scores(q, k) + (1.0 - both[:, None]) * -1e9).softmax(-1) @ v

    fuses(function, 24, more=((torch.arange(24) < torch.tensor([[24], [17]])).float(),))


def test_a_prefix_that_the_data_decide() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        first = (labels >= 0).int().argmax(-1)
        prefix = (torch.arange(24)[None, None, :] < first[:, None, None]).float()
        mask = torch.maximum(torch.ones(24, 24).tril()[None], prefix)[:, None].to(q.dtype)
        return (scores(q, k) + (1 - mask) * torch.finfo(q.dtype).min).softmax(-1) @ v

    labels = torch.arange(24) - torch.tensor([[5], [9]])
    found = check(Attention(function), (*drawn(24), labels), sites=1, lower=False)
    assert "j <= i or j < t0[b]" in str(found.report)


# ------------------------------------------------------------------------------------------------ numbers put at places


def put_where_the_mask_says(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    logits[:, :, torch.ones(24, 10).triu(1) == 1] = float("-inf")
    return logits.softmax(-1) @ v


def put_in_all_of_it(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    logits[(torch.ones(24, 10).triu(1) == 1).expand_as(logits)] = -1e9
    return logits.softmax(-1) @ v


def put_at_three_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    logits[..., [1, 3, -2]] = float("-inf")
    return logits.softmax(-1) @ v


def put_at_the_token_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(k, k)
    logits[:, :, torch.arange(10), torch.arange(10)] = float("-inf")
    return logits.softmax(-1) @ v


def put_in_one_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    logits[:, 1, torch.tensor([[2], [3]]), torch.tensor([4, 5])] = q.sum() * 0.01
    return logits.softmax(-1) @ v


@pytest.mark.parametrize(
    "function",
    [put_where_the_mask_says, put_in_all_of_it, put_at_three_keys, put_at_the_token_itself, put_in_one_block],
    ids=lambda f: f.__name__,
)
def test_a_number_that_is_put_at_places(function: Callable[..., Tensor]) -> None:
    fuses(function, 10)


def put_several(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    logits[..., torch.tensor([4, 5])] = torch.tensor([1.0, 2.0], dtype=q.dtype)
    return logits.softmax(-1) @ v


def put_and_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    places = (torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0]))
    return logits.index_put(places, logits.new_tensor(1.0), accumulate=True).softmax(-1) @ v


@pytest.mark.parametrize("function", [put_several, put_and_added], ids=lambda f: f.__name__)
def test_what_is_put_at_places_otherwise_is_not_followed(function: Callable[..., Tensor]) -> None:
    stays(function, "`index_put` is not understood", 10)


def test_places_that_are_only_known_when_the_graph_runs() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        logits = scores(q, k)
        logits[..., places] = float("-inf")
        return logits.softmax(-1) @ v

    stays(function, "`index_put` is not understood", 10, more=(torch.tensor([1, 3]),))


# ------------------------------------------------------------------------------------------------ activations of scores


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: torch.nn.functional.leaky_relu(x, 0.2),
        torch.nn.functional.gelu,
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        lambda x: torch.nn.functional.elu(x * 400.0, 0.7) / 100.0,  # of what has no exponential
        torch.nn.functional.selu,
        lambda x: torch.nn.functional.hardtanh(x, -0.5, 0.7),
        torch.nn.functional.relu6,
        torch.nn.functional.softsign,
        torch.nn.functional.logsigmoid,
        torch.nn.functional.hardsigmoid,
        torch.nn.functional.hardswish,
        torch.nn.functional.mish,
    ],
)
def test_activations_of_scores(activation: Callable[[Tensor], Tensor]) -> None:
    fuses(lambda q, k, v: activation(scores(q, k)).softmax(-1) @ v, 10)


def plus_product(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.addcmul(x, rows, columns, value=0.5)


def plus_quotient(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return x.addcdiv(rows, columns + 3.0, value=-2)


def between(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return x.lerp(rows * columns, 0.3)


def between_by_tensors(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.lerp(rows.expand_as(x), x, columns.sigmoid())


@pytest.mark.parametrize("combined", [plus_product, plus_quotient, between, between_by_tensors])
def test_operators_of_three_tensors(combined: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    rows, columns = torch.linspace(-1, 1, 24)[:, None], torch.linspace(-1, 1, 10)
    fuses(lambda q, k, v, a, b: combined(scores(q, k), a, b).softmax(-1) @ v, 10, more=(rows, columns))


# ------------------------------------------------------------------------------------------------ biases of mixed heads

MIXTURE = ((0.9, -0.3), (0.2, 0.7))


def mixed_by_a_product(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("gh,bhij->bgij", w, x)


def mixed_along_the_last_axis(x: Tensor, w: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) @ w.T).permute(0, 3, 1, 2)


def mixed_by_a_convolution(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(x, w[..., None, None], w[0])


@pytest.mark.parametrize("mixed", [mixed_by_a_product, mixed_along_the_last_axis, mixed_by_a_convolution])
@pytest.mark.parametrize("shape", [(2, 24, 10), (2, 2, 24, 10), (2, 1, 10), (2, 24, 1)], ids=str)
def test_a_bias_is_mixed_with_the_scores_of_its_heads(
    mixed: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, w: Tensor) -> Tensor:
        return mixed(mixed(scores(q, k) + bias, w).softmax(-1), w) @ v

    bias = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    fuses(function, 10, more=(bias, torch.tensor(MIXTURE)))


# ------------------------------------------------------------------------------------------ products of each of a batch


def of_each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([scores(x, y).softmax(-1) for x, y in zip(q, k)]) @ v


def of_each_with_the_keys_of_the_other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([scores(q[n : n + 1], k[1 - n, None]).softmax(-1) for n in range(2)]) @ v


@pytest.mark.parametrize("function", [of_each, of_each_with_the_keys_of_the_other, batches_with_keys_of_their_own])
def test_products_of_each_of_a_batch_are_one(function: Callable[..., Tensor]) -> None:
    fuses(function, 10)


def test_products_over_other_channels_are_others() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q[0], k[0]).softmax(-1), scores(q[1, ..., :4], k[1, ..., 4:]).softmax(-1)
        return torch.stack(weights) @ v

    stays(function, "the weights are not normalised over the keys", 10)


# --------------------------------------------------------------------------------------- a bias of a part of the scores


def bias_past_the_first(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Positions on a grid, and one that stands for all of them: it has no place, and no bias."""
    s = scores(q, k)
    s[:, :, 1:, 1:] += (rows[1:, :3, None] + columns[1:, None, :3]).flatten(1)
    return s.softmax(-1) @ v


def bias_at_both_ends(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    s = scores(q, k)
    s[..., :4] += rows[:, :4]
    s[..., 6:] -= columns[:, 6:]
    return s.softmax(-1) @ v


def bias_of_two_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.cat([s[:, :, :2] + columns[:2], 2 * rows[2:] + s[:, :, 2:]], 2).softmax(-1) @ v


def other_scores_past_the_first(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    s = scores(q, k)
    s[:, :, 1:, 1:] = scores(q[:, :, 1:].flip(-1), k[:, :, 1:]) + rows[1:, 1:]
    return s.softmax(-1) @ v


def scores_of_later_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.cat([s[:, :, 2:] + rows[2:], s[:, :, :2]], 2).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (bias_past_the_first, 1),
        (bias_at_both_ends, 1),
        (bias_of_two_rows, 1),
        (other_scores_past_the_first, 2),
        (scores_of_later_rows, 2),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_bias_of_a_part_leaves_one_product(function: Callable[..., Tensor], products: int) -> None:
    more = torch.randn(2, 24, 10, generator=torch.Generator().manual_seed(1)).unbind()
    report = check(Attention(function), (*drawn(10), *more), sites=1, lower=False, gradients=True).report
    assert report.sites[0].notation.split("softmax")[0].count("sum_") == products, report


# --------------------------------------------------------------------------------- weights that no product has a say in


def blended(s: Tensor, places: Tensor, gate: Tensor) -> Tensor:
    return (1 - gate) * s.softmax(-1) + gate * places.softmax(-1)


def blended_and_normalised(s: Tensor, places: Tensor, gate: Tensor) -> Tensor:
    weights = blended(s, places, gate)
    return weights / weights.sum(-1, keepdim=True)


def beside(s: Tensor, places: Tensor, gate: Tensor) -> Tensor:
    return s.softmax(-1) + places.softmax(-1)


@pytest.mark.parametrize("weights", [blended, blended_and_normalised, beside], ids=lambda f: f.__name__)
@pytest.mark.parametrize("most", [1.0, 60.0, 1e4], ids=str)
def test_a_softmax_that_is_applied_outside_does_not_overflow(
    weights: Callable[[Tensor, Tensor, Tensor], Tensor], most: float
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, places: Tensor, gate: Tensor) -> Tensor:
        return weights(scores(q, k), places, gate.sigmoid()) @ v

    places = torch.rand(2, 24, 10, generator=torch.Generator().manual_seed(1)) * most
    fuses(function, 10, more=(places, torch.tensor([0.3, -1.0])[:, None, None]))


@pytest.mark.parametrize("most", [1.0, 1e4], ids=str)
def test_a_softmax_that_is_added_to_scores_does_not_overflow(most: float) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        return (scores(q, k) + places.softmax(-1)).softmax(-1) @ v

    fuses(function, 10, more=(torch.rand(2, 24, 10, generator=torch.Generator().manual_seed(1)) * most,))
