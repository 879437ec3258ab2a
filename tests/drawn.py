"""A function of drawn queries, keys and values as a module, and whether it is fused."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

import refocus
from refocus.testing import check


class Attention(nn.Module):
    """`function` of queries, keys and values (batch, heads, tokens, head_dim) that are drawn with a fixed seed."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


def drawn(*keys: int) -> tuple[Tensor, ...]:
    """Queries (24 of them), then keys and values of each source."""
    generator = torch.Generator().manual_seed(0)
    sizes = (24, *(n for count in keys for n in (count, count)))
    return tuple(torch.randn(2, 2, n, 8, generator=generator) for n in sizes)


def fuses(function: Callable[..., object], *keys: int, sites: int = 1, more: tuple[Tensor, ...] = ()) -> None:
    check(Attention(function), (*drawn(*keys), *more), sites=sites, lower=False, gradients=True)


def fuses_once(function: Callable[..., Tensor], *lengths: tuple[int, ...]) -> None:
    """One graph serves all of these numbers of keys, each of them a symbol of its own."""
    module, reports = Attention(function), list[refocus.Report]()
    run = refocus.optimize(module, engine="tiled", require=True, report=reports.append)
    for keys in lengths:
        given = drawn(*keys)
        for tensor in given:
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
        with torch.no_grad():
            torch.testing.assert_close(run(*given), module(*given))
    assert len(reports) == 1 and reports[0].sites[0].fused


def stays(function: Callable[..., object], reason: str, *keys: int, more: tuple[Tensor, ...] = ()) -> None:
    report = check(Attention(function), (*drawn(*keys), *more), fused=False, lower=False).report
    assert not any(site.fused for site in report.sites), report
    assert any(re.search(reason, site.reason) for site in report.sites), report


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.3
