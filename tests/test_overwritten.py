"""What attention reads of a tensor that is written before the scores meet the values: a state for the next call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import refocus
from refocus.errors import RegionNotFused
from refocus.testing import rewritten
from refocus.tolerances import difference

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def delayed(q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> Tensor:
    """Values of the position before, of which the last is kept."""
    before = torch.cat([last[:, None], v[:, :-1]], 1)
    last.copy_(v[:, -1])
    return (q @ k.mT).softmax(-1) @ before


def remembered(q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> Tensor:
    """Keys of which the last is a memory, turned round, that is emptied and filled anew."""
    keys = torch.cat((k[:, :11], last.unsqueeze(1).flip(2)), dim=1)
    last.zero_().add_(k.mean(1))
    return torch.einsum("bij,bje->bie", torch.softmax(torch.einsum("bid,bjd->bij", q, keys), 2), v)


def masked(q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> Tensor:
    """A mask made of what is negated next."""
    allowed = last > 0
    last.neg_()
    return (q @ k.mT).masked_fill(~allowed[:, None], -1e4).softmax(-1) @ v


def scored(q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> Tensor:
    """Near miss: the write comes between the scores, which are products of the memory itself, and the softmax."""
    scores = q @ last.unsqueeze(1).expand(k.shape).mT
    last.copy_(v[:, -1])
    return scores.softmax(-1) @ v


def inputs() -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [*torch.randn(3, 2, 12, 12, generator=drawn), torch.randn(2, 12, generator=drawn)]


def same(function: Function, optimized: Function) -> None:
    """Results and what is kept, over two calls."""
    given, mine = inputs(), inputs()
    for _ in range(2):
        assert difference(optimized(*mine), function(*given)) < 1e-5
        assert torch.equal(mine[3], given[3])


@pytest.mark.parametrize("function", [delayed, remembered, masked])
def test_what_was_made_before_is_loaded(function: Function) -> None:
    same(function, rewritten(function, engine="tiled", require=True))


def test_scores_before_a_write() -> None:
    with pytest.raises(RegionNotFused, match="written in place before it is used"):
        rewritten(scored, engine="tiled", require=True)(*inputs())
    same(scored, refocus.optimize(scored, engine="tiled"))
