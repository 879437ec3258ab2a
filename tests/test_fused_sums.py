"""Operations that multiply and add at once: what they add to a product of weights and values is no part of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refocus.testing import check
from tests.drawn import drawn, fuses, scores, stays


def folded(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.flatten(0, 1) for t in tensors)


def onto_a_residual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.baddbmm(*folded(q, scores(q, k).softmax(-1), v))


def onto_half_a_residual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[0, 0], k[0, 0], v[0, 0]
    return torch.addmm(q, scores(q, k).softmax(-1), v, beta=0.5, alpha=2)


def onto_memory_that_was_not_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = folded(q, k, v)
    return torch.baddbmm(torch.full_like(q, float("nan")), scores(q, k).softmax(-1), v, beta=0, alpha=0.5)


def onto_one_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[0, 0], k[0, 0], v[0, 0]
    return F.linear(scores(q, k).softmax(-1), v.T, bias=q[0])


def of_all_heads_in_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = folded(q, k, v)
    return torch.addbmm(q[0], scores(q, k).softmax(-1), v)


@pytest.mark.parametrize(
    "function",
    [
        onto_a_residual,
        onto_half_a_residual,
        onto_memory_that_was_not_written,
        onto_one_row,
        of_all_heads_in_one,
    ],
)
def test_what_is_added_to_a_product_stays_outside(function: Callable[..., Tensor]) -> None:
    fuses(function, 10)


def parts(q: Tensor, k: Tensor, k2: Tensor) -> tuple[Tensor, Tensor]:
    near, far = torch.cat((scores(q, k), scores(q, k2)), -1).softmax(-1).split((10, 7), -1)
    return near, far


def both_onto_a_residual(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, far = parts(*folded(q, k, k2))
    q, v, v2 = folded(q, v, v2)
    return torch.baddbmm(q, near, v) + far @ v2


def one_onto_the_other(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, far = parts(*folded(q, k, k2))
    return torch.baddbmm(near @ folded(v)[0], far, folded(v2)[0])


def with_a_bias(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, far = parts(q[0, 0], k[0, 0], k2[0, 0])
    return F.linear(near, v[0, 0].T, q[0, 0, 0]) + far @ v2[0, 0]


@pytest.mark.parametrize("function", [both_onto_a_residual, one_onto_the_other, with_a_bias])
def test_products_with_parts_of_the_weights(function: Callable[..., Tensor]) -> None:
    """What one of the products added was lost, where another product was added to it."""
    fuses(function, 10, 7)


def test_products_of_which_one_is_a_layer_with_a_bias() -> None:
    class WithMemory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.Linear(10, 8)

        def forward(self, q: Tensor, k: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
            near, far = parts(q, k, k2)
            return self.memory(near) + far @ v2

    q, k, _, k2, v2 = drawn(10, 7)
    report = check(WithMemory(), (q, k, k2, v2), fused=False, lower=False).report
    assert any("adds a bias of its own" in site.reason for site in report.sites), report


def in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = folded(q, k, v)
    top, total, out = torch.full_like(q[..., :1], float("-inf")), torch.zeros_like(q[..., :1]), torch.zeros_like(q)
    for here, values in zip(k.split(5, 1), v.split(5, 1)):
        found = scores(q, here)
        higher = torch.maximum(top, found.amax(-1, keepdim=True))
        weights, kept = (found - higher).exp(), (top - higher).exp()
        total = total * kept + weights.sum(-1, keepdim=True)
        out = torch.baddbmm(out * kept, weights, values)
        top = higher
    return out / total


def test_chunks_of_keys_that_are_added_as_they_are_multiplied() -> None:
    fuses(in_chunks, 10)


def added_before_it_is_divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (scores(q, k) - scores(q, k).amax(-1, keepdim=True)).exp()
    out = torch.baddbmm(*folded(q, weights, v))
    return out / weights.sum(-1, keepdim=True).flatten(0, 1)


def other_shares(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, far = parts(q[0, 0], k[0, 0], k2[0, 0])
    return torch.addmm(far @ v2[0, 0], near, v[0, 0], alpha=0.5)


def without_a_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.baddbmm(*folded(q, scores(q, k).tril(), v), beta=0.5)


def without_a_softmax_halved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    residual, weights, values = folded(q, torch.einsum("bhid,bhjd->bhij", q, k), v)
    return residual.baddbmm(torch.tril(weights), values, alpha=0.5)


@pytest.mark.parametrize("function", [without_a_softmax, without_a_softmax_halved])
def test_linear_attention(function: Callable[..., Tensor]) -> None:
    fuses(function, 24)


def test_parts_may_count_differently() -> None:
    fuses(other_shares, 10, 7)


def test_near_misses() -> None:
    stays(added_before_it_is_divided, "added to the values' sum before it is divided", 10)
