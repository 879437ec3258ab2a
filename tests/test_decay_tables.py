"""Decays of all pairs of positions that a model keeps as a buffer: read back as powers of the distance, or declined."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import refocus
from refocus.errors import StaleMask
from refocus.testing import check

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

RATES = (0.5, 0.9, 1 - 1e-5)


def table(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The decay of each head to the distance of query and key."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    powers = torch.tensor(RATES, dtype=dtype)[:, None, None] ** distance.clamp(min=0)
    return powers * (distance >= 0)


class Kept(nn.Module):
    """`normaliser`: what the weights are divided by."""

    def __init__(self, decay: Tensor, normaliser: str = "none") -> None:
        super().__init__()
        self.register_buffer("decay", decay)
        self.normaliser = normaliser

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        weights = (q @ k.mT) * self.decay[..., :length, :length]
        if self.normaliser == "cut off":
            return weights / weights.detach().sum(-1, keepdim=True).abs().clamp(min=1) @ v
        total = weights.sum(-1, keepdim=True)
        if self.normaliser == "sum":
            return weights / (total + 1e-3) @ v
        return weights @ v / total.abs().clamp(min=1) if self.normaliser == "size" else weights @ v


def inputs(length: int = 40, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, length, 8, generator=drawn, dtype=torch.float64).to(dtype) for _ in range(3)]


def by_rows(length: int) -> Tensor:
    """Each row divided by the root of its sum: a factor of the query besides."""
    decay = table(length)
    return decay / decay.sum(-1, keepdim=True).sqrt()


MODULES = {
    "plain": lambda: Kept(table(40)),
    "one head": lambda: Kept(table(40)[1]),
    "a part of it": lambda: Kept(table(64)),
    "normalised": lambda: Kept(table(40), "sum"),
    "divided by its size": lambda: Kept(table(40), "size"),
    "nothing flows back through its size": lambda: Kept(table(40), "cut off"),
    "rows": lambda: Kept(by_rows(40)),
    "rows, normalised": lambda: Kept(by_rows(40), "size"),
    "turned": lambda: Kept(table(40).mT.contiguous().mT),
}


@pytest.mark.parametrize("name", MODULES)
def test_spelling(name: str) -> None:
    report = check(MODULES[name](), inputs(), family="linear", sites=1, lower=False, gradients=True).report
    assert "exp(sum_{j<t<=i} gate" in report.sites[0].notation


def test_long_memories_are_as_exact_as_the_table() -> None:
    """Told from pairs at a distance: the decay of one step alone is rounded, and would be off by as much each step."""
    check(Kept(table(256)), inputs(256), family="linear", sites=1, lower=False)


def test_float64() -> None:
    check(Kept(table(40, torch.float64)), inputs(dtype=torch.float64), family="linear", sites=1, lower=False)


def changed(at: tuple[int, ...], by: float) -> Tensor:
    decay = table(40)
    decay[at] *= by
    return decay


NEAR_MISSES = {
    "one element": lambda: changed((1, 9, 4), 1 + 1e-5),
    "the far corner": lambda: changed((2, 39, 0), 1 + 1e-5),
    "above the diagonal": lambda: table(40) + table(40).mT.triu(1),
    "too coarse": lambda: table(40).bfloat16().float(),
    "no power": lambda: table(40) / (1 + (torch.arange(40)[:, None] - torch.arange(40)).abs()),
    "a key's factor": lambda: table(40) * (1 + torch.arange(40) / 40),
    "a negative decay": lambda: table(40) * (-1.0) ** (torch.arange(40)[:, None] - torch.arange(40)),
    "not a number": lambda: changed((0, 20, 20), float("nan")),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    # (what is no number in the table is none in the results, which nothing can be compared with)
    finite = name != "not a number"
    module = Kept(NEAR_MISSES[name]())
    (site,) = refocus.explain(module, *inputs(), engine="tiled").sites
    assert site.family == "pairwise"  # a number for each pair, and no decay
    if finite:
        check(module, inputs(), fused=False, sites=1, lower=False)


def test_a_table_that_changes() -> None:
    module, given = Kept(table(40)), inputs()
    run = refocus.optimize(module, engine="tiled", require=True)
    with torch.no_grad():
        torch.testing.assert_close(run(*given), module(*given))
        module.decay.mul_(1.5)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.testing.assert_close(run(*given), module(*given))
        assert any(issubclass(w.category, StaleMask) for w in seen)
        module.load_state_dict({"decay": table(40) ** 2})
        torch.testing.assert_close(run(*given), module(*given))


def test_a_trained_table_stays() -> None:
    module = Kept(table(40))
    del module.decay
    module.decay = nn.Parameter(table(40))
    (site,) = refocus.explain(module, *inputs(), engine="tiled").sites
    assert site.family == "pairwise"
