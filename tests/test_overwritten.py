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


def looked_up_again(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same operation on a memory that has changed in between is another value."""
    before = (q @ (k / 2).mT).softmax(-1) @ v
    k.select(1, 3).fill_(0.3)
    return before, (q @ (k / 2).mT).softmax(-1) @ v


def looked_up_in_views(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    seen = k.transpose(0, 1)
    first = (q @ (seen / 2).transpose(0, 1).mT).softmax(-1) @ v
    k[:, 2:4] *= 3
    second = (q @ (seen / 2).transpose(0, 1).mT).softmax(-1) @ v
    k.mul_(0.5)
    return first, second, (q @ (seen / 2).transpose(0, 1).mT).softmax(-1) @ v


@pytest.mark.parametrize("function", [looked_up_again, looked_up_in_views])
def test_what_is_made_of_a_memory_once_more(function: Callable[..., tuple[Tensor, ...]]) -> None:
    given = torch.randn(3, 2, 12, 8, generator=torch.Generator().manual_seed(0)).unbind()
    reports: list[refocus.Report] = []
    got = rewritten(function, engine="tiled", report=reports.append)(*(x.clone() for x in given))
    for a, b in zip(got, function(*(x.clone() for x in given)), strict=True):
        assert difference(a, b) < 1e-5
    assert all(site.fused for site in reports[0].sites) and len(reports[0].sites) == len(got)


def test_gradients_of_what_is_written_afterwards() -> None:
    """In training, the backward of a fused attention reads queries, keys and values as they were."""

    def gradient(run: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        x = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out, after = run(x * 1.0)
        (out.square().sum() + after.sum()).backward()
        assert x.grad is not None
        return x.grad

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in x.chunk(3, -1))
        out = (q @ k.mT).softmax(-1) @ v  # matmul itself copies heads that lie apart
        x.mul_(0.5)
        return out, x

    reports: list[refocus.Report] = []
    run = refocus.optimize(model, engine="tiled", require=True, report=reports.append)
    assert difference(gradient(run), gradient(model)) < 1e-5
    assert reports[0].sites[0].fused
