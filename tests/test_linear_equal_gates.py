"""Chunks whose gates are the same at all positions: sums of gates are multiples of one, however they were written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refocus.testing import check
from tests.linear_cases import Function
from tests.test_linear_chunks import SIZE, by_channels, delta, gated, inputs, later, zero

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


class Equal(nn.Module):
    """A function of q, k, v, gates and rates that is given gates which do not depend on the position."""

    def __init__(self, function: Function, gates: Callable[[Equal, Tensor], Tensor], slip: str = "") -> None:
        super().__init__()
        self.function, self.gates, self.slip = function, gates, slip
        drawn = torch.Generator().manual_seed(1)
        self.rates = nn.Parameter(torch.randn(3, generator=drawn))
        self.register_buffer("kept", torch.log1p(-0.5 ** (1 + torch.arange(3.0))))
        self.channels = nn.Parameter(torch.randn(3, 5, generator=drawn))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        gates = self.gates(self, q)
        more = {"slip": self.slip} if self.slip else {}
        return self.function(q, k, v, gates, *([b] if self.function in (delta, twice_a_chunk) else []), **more)


def learned(module: Equal, q: Tensor) -> Tensor:
    return F.logsigmoid(module.rates)[:, None, None].expand(q.shape)


def of_a_buffer(module: Equal, q: Tensor) -> Tensor:
    return module.kept[None, :, None, None].expand_as(q)


def numbers(module: Equal, q: Tensor) -> Tensor:
    return torch.full_like(q, -0.125)


def repeated(module: Equal, q: Tensor) -> Tensor:
    return (-module.rates.exp()).view(1, 3, 1, 1).repeat(q.shape[0], 1, q.shape[2], q.shape[3])


def of_channels(module: Equal, q: Tensor) -> Tensor:
    return F.logsigmoid(module.channels)[:, None].expand(q.shape)


def twice_a_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, slip: str = "") -> Tensor:
    """The delta rule, each step of the loop by itself: the system, its inverse, and the decays as powers."""
    k = F.normalize(k, dim=-1)
    decay, state, rows = g[:, :, :1, :1].exp(), zero(k, v), []
    at = torch.arange(SIZE, dtype=q.dtype)
    between = torch.where(later(SIZE), 0.0, decay ** (at[:, None] - at).clamp(min=0))
    for start in range(0, q.shape[2], SIZE):
        query, key, value = (x[:, :, start : start + SIZE] for x in (q, k, v))
        rate = b[:, :, start : start + SIZE, None]
        system = (rate * key @ key.mT * between).tril(-1) + torch.eye(SIZE, dtype=q.dtype)
        inverse = torch.linalg.inv(system)
        passed = decay ** (at[:, None] + 1)
        u = inverse @ (rate * value) - inverse @ (rate * key * passed) @ state
        rows.append((query * passed) @ state + (query @ key.mT * between) @ u)
        state = state * decay**SIZE + (key * decay ** (SIZE - 1 - at[:, None])).mT @ u
    return torch.cat(rows, 2)


def given() -> list[Tensor]:
    q, k, v, _, b = inputs(5)
    return [q, k, v, b]


GATES = (learned, of_a_buffer, numbers, repeated)


@pytest.mark.parametrize("gates", GATES, ids=[f.__name__ for f in GATES])
@pytest.mark.parametrize("function", [gated, delta, twice_a_chunk])
def test_gates_of_heads(function: Function, gates: Callable[[Equal, Tensor], Tensor]) -> None:
    report = check(Equal(function, gates), given(), family="linear", sites=1, lower=False, gradients=True).report
    assert ("erase" in report.sites[0].notation) == (function is not gated)


def test_gates_of_channels() -> None:
    check(Equal(by_channels, of_channels), given(), family="linear", sites=1, lower=False, gradients=True)


@pytest.mark.parametrize(
    ("slip", "reason"),
    [
        ("inside", "decays are no sums of the gates"),
        ("reads", "decays otherwise between chunks"),
        ("writes", "decays otherwise between chunks"),
        ("keeps", "decays otherwise between chunks"),
    ],
)
def test_chunks_that_decay_otherwise(slip: str, reason: str) -> None:
    report = check(Equal(gated, learned, slip), given(), fused=False, engines=(), lower=False).report
    assert any(reason in site.reason for site in report.sites if not site.recognized), report
