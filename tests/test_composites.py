"""Operations that are made of others read as these are, whichever way a model spells scores, keys and values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refocus.composites import definitions
from refocus.testing import check
from tests.drawn import Attention, scores

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


def _drawn(queries: int = 12, keys: int = 20) -> list[Tensor]:
    """One head: queries, keys and values of a first source, and of a second one with a quarter as many."""
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(n, 8, generator=drawn) for n in (queries, keys, keys, keys // 4, keys // 4)]


def side_by_side(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.hstack((scores(q, k), scores(q, k2))).softmax(-1) @ torch.vstack((v, v2))


def in_columns(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.column_stack((scores(q, k), scores(q, k2))).softmax(1) @ torch.row_stack((v, v2))


def in_depth(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    p = torch.dstack((scores(q, k)[None], scores(q, k2)[None])).softmax(-1)
    return (p @ torch.cat((v, v2))).squeeze(0)


def flipped(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.fliplr(scores(q, k)).softmax(-1) @ torch.flipud(v)


def cut_in_two(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    near, far = torch.hsplit(scores(q, k).softmax(-1), 2)
    first, second = torch.vsplit(v, 2)
    return near @ first + far @ second


def cosine(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return (10 * F.cosine_similarity(q[:, None], k, dim=-1)).softmax(-1) @ v


def cosine_of_columns(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """Along the first of three dimensions, by a module."""
    return (10 * nn.CosineSimilarity(0)(q.T[:, :, None], k.T[:, None])).softmax(-1) @ v


def vector_products(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.linalg.vecdot(q[:, None], k).softmax(-1) @ v


def products(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.linalg.multi_dot((q, k.T)).softmax(-1) @ v


def summed_to_size(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return (q[:, None] * k).sum_to_size(len(q), len(k), 1).squeeze(-1).softmax(-1) @ v


def by_special_functions(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    s = torch.special.erf(scores(q, k)) + torch.arctan(scores(q, k)) - torch.special.sinc(scores(q, k))
    return torch.exp(s - torch.special.logsumexp(s, -1, keepdim=True)) @ v


def by_rare_functions(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    s = torch.where(torch.isfinite(scores(q, k).log10()), 1.0, -torch.inf) + torch.erfc(scores(q, k))
    s = s.masked_fill(torch.isneginf(s) | torch.isposinf(s), -2.0) + torch.frac(scores(q, k))
    s = s + torch.tan(torch.tanh(scores(q, k)))
    return torch.softmax(s + torch.atanh(scores(q, k).clamp(-0.9, 0.9)), -1) @ v


def scores_made_twice(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """The model multiplies queries and keys once for the weights and once for their sum."""
    return torch.exp(scores(q, k) - torch.logsumexp(scores(q, k), -1, keepdim=True)) @ v


@pytest.mark.parametrize(
    "function",
    [
        side_by_side, in_columns, in_depth, flipped, cut_in_two, cosine, cosine_of_columns, vector_products, products,
        summed_to_size, by_special_functions, by_rare_functions, scores_made_twice,
    ],
)  # fmt: skip
def test_reads_as_what_it_is_made_of(function: Callable[..., Tensor]) -> None:
    check(Attention(function), _drawn(), sites=1, lower=False, gradients=True)


COSINES = [
    ((3, 1, 4), (5, 4), -1, 1e-8),
    ((4, 3), (4, 3), 0, 1e-8),
    ((3, 4), (4,), 1, 1e-8),
    ((2, 3, 1), (3, 4), 2, 1e-8),  # one number beside four
    ((3, 4), (2, 1, 4), 0, 1e-8),  # a dimension that one of them lacks
    ((3, 4), (3, 4), 1, 1e3),  # norms below their bound
]


@pytest.mark.parametrize(("one", "other", "dim", "eps"), COSINES)
def test_our_cosine_similarity_is_theirs(one: tuple[int, ...], other: tuple[int, ...], dim: int, eps: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, generator=drawn, dtype=torch.float64).requires_grad_() for n in (one, other))
    mine = definitions()[torch.ops.aten.cosine_similarity.default](x, y, dim, eps)
    theirs = F.cosine_similarity(x, y, dim, eps)
    flow = torch.randn(theirs.shape, generator=drawn, dtype=torch.float64)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(z, (x, y), flow) for z in (mine, theirs)))


@pytest.mark.parametrize("other", [torch.float16, torch.float32])
def test_norms_that_overflow_and_mixed_dtypes(other: torch.dtype) -> None:
    """Of vectors whose norms are beyond half precision, the similarity is zero; other dtypes are converted first."""
    drawn = torch.Generator().manual_seed(0)
    x, y = torch.full((3, 1, 8), 6e4).half(), torch.randn(1, 5, 8, generator=drawn).to(other)
    mine = definitions()[torch.ops.aten.cosine_similarity.default](x, y, -1)
    torch.testing.assert_close(mine, F.cosine_similarity(x, y, -1), rtol=0, atol=0)
