"""Numbers drawn in the image of the scores: only the shape of these is read, so that they need not be there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refocus.testing import rewritten

Q, K, V = (torch.randn(2, 3, 21, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))


def noisy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores + torch.randn_like(scores)).softmax(-1) @ v


def gumbel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.gumbel_softmax(q @ k.mT, tau=0.7, dim=-1) @ v


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    noise = scores.new_empty(scores.shape).uniform_(-1, 1)
    return (scores + noise).softmax(-1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return (weights * (torch.rand_like(weights) > 0.2) / 0.8) @ v


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", [noisy, gumbel, written, dropped])
def test_only_the_shape_of_scores_is_read(spelling: Callable[..., Tensor], dynamic: bool) -> None:
    torch._dynamo.reset()
    reports: list = []
    run = rewritten(spelling, engine="tiled", dynamic=dynamic, report=reports.append)
    results = []
    for call in (spelling, run):
        inputs = [x.clone().requires_grad_() for x in (Q, K, V)]
        torch.manual_seed(5)
        out = call(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert [site.fused for site in reports[0].sites] == [True]
    for ours, eager in zip(results[1], results[0]):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (k @ q.mT).mT
    return (scores + torch.rand_like(scores)).softmax(-1) @ v


def test_numbers_are_drawn_in_the_order_of_memory() -> None:
    torch._dynamo.reset()
    torch.manual_seed(5)
    eager = transposed(Q, K, V)
    torch.manual_seed(5)
    torch.testing.assert_close(rewritten(transposed, engine="tiled")(Q, K, V), eager, rtol=1e-4, atol=1e-5)
