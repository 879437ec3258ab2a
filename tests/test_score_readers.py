"""Who reads scores: nothing that a region reads may be made of the scores that it computes itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refocus.testing import check
from tests.drawn import Attention, drawn, fuses, scores, stays


def a_part_with_its_own_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Relative positions for all tokens but the first, added in place, as multi-scale vision models do it."""
    logits = scores(q, k)
    rows = torch.einsum("bhic,kc->bhik", q[:, :, 1:], v[0, 0, 1:])
    logits[:, :, 1:, 1:] = (logits[:, :, 1:, 1:].view(2, -1, 23, 3, 3) + rows.view(2, 2, 23, 3, 3)).view(2, -1, 23, 9)
    return logits.softmax(-1) @ v


def test_a_part_of_a_part_that_is_written_over_is_read_by_nobody_else() -> None:
    fuses(a_part_with_its_own_bias, 10)


def test_stacked_parts_of_scores_are_read_by_nobody_else() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = scores(q, k)
        windows = torch.stack([logits[:, :, n : n + 20] for n in range(3)], 2)
        return windows.softmax(-1) @ v[:, :, None]

    def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        logits = scores(q, k)
        windows = torch.stack([logits[:, :, n : n + 20] for n in range(3)], 2)
        return windows.softmax(-1) @ v[:, :, None], logits

    fuses(function, 10)
    stays(returned, "a score is read elsewhere", 10)


def below_the_median(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    return logits.masked_fill(logits < logits.median(-1, keepdim=True).values, float("-inf")).softmax(-1) @ v


def in_a_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The comparison is written into a part of the mask."""
    other = scores(k, k).mean(1, keepdim=True)
    low = other < other.median(-1, keepdim=True).values
    mask = torch.zeros(2, 1, 24, k.shape[2], dtype=torch.bool)
    mask[:, :, 10:20, :4] = low[:, :, :10, :4]
    return scores(q, k).masked_fill(mask, float("-inf")).softmax(-1) @ v


def below_what_the_token_gives_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(k, k)
    own = logits.diagonal(dim1=-2, dim2=-1)
    return logits.masked_fill(logits > own[..., None], float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("function", [below_the_median, below_what_the_token_gives_itself], ids=lambda f: f.__name__)
def test_scores_that_are_compared_with_one_of_them(function) -> None:  # type: ignore[no-untyped-def]
    stays(function, "a score is read elsewhere", 10)


def test_scores_that_are_compared_with_one_of_their_equals() -> None:
    """The tenth greatest of a row is among its scores: it must be computed as they are, to the last bit."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            least = scores(q, k).topk(4, -1).values[..., -1:]
        logits = scores(q, k)
        return logits.masked_fill(logits < least, float("-inf")).softmax(-1) @ v

    stays(function, "compared with what is made of a second product", 10)


def test_scores_that_are_compared_with_a_number_of_their_own() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits, least = scores(q, k), (q @ v.new_ones(8, 1)) - 3.0
        return torch.where(logits < least, -9.0, logits).softmax(-1) @ v

    fuses(function, 10)


# ---------------------------------------------------------------------------------------------- one of several products


def by_the_least_of_the_greatest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query chooses blocks of four keys: those whose score is no less than the second greatest (MoBA)."""
    blocks = scores(q, k.unflatten(2, (-1, 4)).mean(3))
    least = blocks.topk(2, -1).values.amin(-1, keepdim=True)
    mask = torch.zeros_like(blocks).masked_fill(blocks < least, float("-inf")).repeat_interleave(4, -1)
    return (scores(q, k) + mask).softmax(-1) @ v


def by_blocks_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blocks = scores(q.unflatten(2, (-1, 6)).mean(3), k.unflatten(2, (-1, 4)).mean(3))
    keep = (blocks >= blocks.median(-1, keepdim=True).values).repeat_interleave(6, -2).repeat_interleave(4, -1)
    return scores(q, k).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def and_as_a_bias(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient flows back through them, and from a loss on them, too."""
    blocks = scores(q, k.unflatten(2, (-1, 4)).mean(3))
    return (scores(q, k) + blocks.tanh().repeat_interleave(4, -1)).softmax(-1) @ v, blocks.logsumexp(-1)


def by_labels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A product of a few channels chooses the keys, by a threshold among these products (double sparsity)."""
    labels = scores(q[..., ::3], k[..., ::3])
    least = labels.topk(4, -1).values[..., -1:]
    return scores(q, k).masked_fill(labels < least, float("-inf")).softmax(-1) @ v


def beside_a_loss_on_one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    positions = scores(q.sin(), k)
    return (scores(q, k) + positions).softmax(-1) @ v, positions.square().mean()


@pytest.mark.parametrize(
    "function",
    [by_the_least_of_the_greatest, by_blocks_of_queries, and_as_a_bias, by_labels, beside_a_loss_on_one, in_a_part],
)
def test_a_product_that_others_read_is_loaded(function) -> None:  # type: ignore[no-untyped-def]
    fuses(function, 12)


def test_scores_that_are_read_for_several_keys_and_by_others() -> None:
    """There are no others for single keys: these would be all that is stored."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        logits = scores(q, k)
        return logits.repeat_interleave(2, -1).softmax(-1) @ v.repeat_interleave(2, 2), logits

    stays(function, "a score is read elsewhere", 12)


def test_products_that_others_read_together() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        logits = scores(q, k) + scores(q.sin(), k)
        return logits.softmax(-1) @ v, logits.amax(-1)

    stays(function, "a score is read elsewhere", 12)


def test_a_product_that_two_attentions_read_is_loaded_by_neither() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        both = scores(q, k)
        return (both + scores(q.sin(), k)).softmax(-1) @ v, (both + scores(q, k.cos())).softmax(-1) @ v

    report = check(Attention(function), drawn(12), lower=False, gradients=True).report
    assert [site.notation.count("sum_d") for site in report.sites] == [2, 2]


def multiplied_by_hand(weights: Tensor, values: Tensor) -> Tensor:
    return (weights[..., None] * values.unsqueeze(-3)).sum(-2)


def heads_in_one(weights: Tensor, values: Tensor) -> Tensor:
    return (weights.flatten(0, 1) @ values.flatten(0, 1)).unflatten(0, (2, 2))


@pytest.mark.parametrize("product", [multiplied_by_hand, heads_in_one])
def test_weights_in_two_shapes_are_two_attentions(product) -> None:  # type: ignore[no-untyped-def]
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k).softmax(-1)
        return product(weights, v) - weights @ v.flip(2)

    def also_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores(q, k).softmax(-1)
        return product(weights, v), weights[..., None]

    fuses(function, 10, sites=2)
    stays(also_returned, "the probabilities are read elsewhere", 10)


def test_weights_in_two_shapes_of_which_one_is_no_attention() -> None:
    """Where one product is left, the weights are stored, and the other one is left with it."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores(q, k).softmax(-1)
        return weights @ v, (weights.flatten(0, 1) + v.sum()) @ v.flatten(0, 1).cumsum(-1).sin()

    fuses(function, 10, sites=2)
