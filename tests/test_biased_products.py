"""Products with values that are more than a product: a bias is added, or a tensor, and the sum may be scaled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.testing import check
from tests.linear_cases import Module

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

Function = Callable[..., Tensor]
TOKENS = 12


def inputs() -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [*torch.randn(6, 2, TOKENS, 8, generator=drawn)]


def halves(q: Tensor, k: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """Probabilities of keys, and of more keys: one softmax over both."""
    return torch.cat([q @ k.mT, q @ m.mT], -1).softmax(-1).split(TOKENS, -1)


# ---------------------------------------------------------------------------------------------------- one product


def memory(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor, x: Tensor) -> Tensor:
    """A layer's weights as keys, another's as values, with biases: external attention; CTC that feeds itself."""
    return F.linear(F.linear(q, k[0], m[0, :, 0]).softmax(-1), v[0].mT, x[0, 0])


def added(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor, x: Tensor) -> Tensor:
    return torch.baddbmm(x, torch.softmax(torch.bmm(q, k.transpose(1, 2)), 2), v)


def scaled(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor, x: Tensor) -> Tensor:
    return torch.baddbmm(x, (q @ k.mT).softmax(-1), v, beta=0.5, alpha=3.0)


def weighed(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor, x: Tensor) -> Tensor:
    """What is added counts for nothing."""
    return torch.addmm(x[0, 0], (q[0] @ k[0].mT).softmax(-1), v[0], beta=0, alpha=2)


# --------------------------------------------------------------------------------------- two, of parts of a softmax


def two(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor, x: Tensor) -> Tensor:
    p, r = halves(q, k, m)
    return torch.baddbmm(x, p, v) + torch.bmm(r, n)


def two_scaled(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor, x: Tensor) -> Tensor:
    p, r = halves(q, k, m)
    return 0.5 * torch.bmm(r, n) + torch.baddbmm(x, p / 4, v, beta=2.0, alpha=3.0)


def two_layers(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor, x: Tensor) -> Tensor:
    p, r = halves(q, k, m)
    return F.linear(p, v[0].mT, x[0, 0]) + F.linear(r, n[0].mT)


@pytest.mark.parametrize("function", [memory, added, scaled, weighed, two, two_scaled, two_layers])
def test_bias(function: Function) -> None:
    check(Module(function), inputs(), family="softmax", sites=1, lower=False, gradients=function is not weighed)


# ------------------------------------------------------------------------------------------------------ near misses


def of_the_weights(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor, x: Tensor) -> Tensor:
    """What is added is made of the same probabilities."""
    p = (q @ k.mT).softmax(-1)
    return torch.baddbmm(p[..., :8].square(), p, v)


def parts_that_differ(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor, x: Tensor) -> Tensor:
    """How much one part of the probabilities counts depends on the query."""
    p, r = halves(q, k, m)
    return (p @ v) * x[..., :1].sigmoid() + r @ n


def before_the_division(q: Tensor, k: Tensor, v: Tensor, m: Tensor, n: Tensor, x: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return torch.baddbmm(x, e, v) / e.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "function, reason",
    [
        (of_the_weights, "the probabilities are read elsewhere (by `slice`)"),
        (before_the_division, "something is added to the values' sum before it is divided"),
    ],
)
def test_no_bias(function: Function, reason: str) -> None:
    report = check(Module(function), inputs(), fused=False, lower=False).report
    assert [site.reason for site in report.sites] == [reason]


def test_parts_that_differ_are_two_attentions() -> None:
    check(Module(parts_that_differ), inputs(), family="softmax", sites=2, lower=False)
