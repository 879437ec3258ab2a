"""Numbers that Python computes from sizes while the graph runs: scales, slopes, temperatures, widths of windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import refocus
from refocus.backend import compile_graph
from refocus.options import Options
from refocus.testing import rewritten

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def root_of_the_width(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v


def on_the_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bhij", q * q.size(-1) ** -0.5, k).softmax(-1) @ v


def of_both_sizes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blank = q.new_zeros(1, 1, 1)
    scores = torch.baddbmm(blank, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.0, alpha=k.size(2) / (9.5 * k.size(3)))
    return (scores.softmax(-1) @ v.flatten(0, 1)).view_as(v)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cap = 2.5 * q.size(-1)
    return (torch.tanh(q @ k.mT / cap) * cap).softmax(-1) @ v


def a_slope(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(k.size(-2))
    return (q @ k.mT).sub((place[:, None] - place).abs(), alpha=3 / k.size(-2)).softmax(-1) @ v


def a_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(k.size(-2))
    far = (place[:, None] - place).abs() > k.size(-2) / 4
    return (q @ k.mT).masked_fill(far, -math.inf).softmax(-1) @ v


def of_the_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    "function",
    [root_of_the_width, on_the_queries, of_both_sizes, softcapped, a_slope, a_window, of_the_kernel],
    ids=lambda f: f.__name__,
)
def test_numbers_made_of_sizes(function: Function) -> None:
    found: list[refocus.Report] = []
    run = rewritten(function, engine="tiled", dynamic=True, require=True, report=found.append)
    torch.manual_seed(0)
    with torch.no_grad():
        for tokens, width in ((40, 8), (56, 8), (33, 16)):
            given = torch.randn(3, 2, 3, tokens, width).unbind()
            torch.testing.assert_close(run(*given), function(*given))
    assert len(found) == 1  # compiled once, for all sizes


def test_a_number_is_as_exact_as_the_operation_that_reads_it() -> None:
    """A tensor that the model makes of it in half precision is another."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = k.size(-2) / 7
        rounded = torch.scalar_tensor(scale, dtype=torch.float16)
        return (q @ k.mT * scale).softmax(-1) @ v * rounded

    run = rewritten(function, engine="tiled", dynamic=True, require=True)
    given = torch.randn(3, 2, 3, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        torch.testing.assert_close(run(*given), function(*given), rtol=1e-12, atol=1e-12)


def test_lowered_numbers() -> None:
    run = refocus.optimize(on_the_queries, engine="tiled", dynamic=True, require=True)
    with torch.no_grad():
        for width in (8, 12):
            given = torch.randn(3, 2, 3, 40, width).unbind()
            torch.testing.assert_close(run(*given), on_the_queries(*given))


def _rounded_up(n: int) -> int:
    return math.ceil(n / 16) * 16


def _rounded_down(n: int) -> int:
    return math.floor(n / 16) * 16


def _cut_off(n: int) -> int:
    return int(n / 16) * 16


@pytest.mark.parametrize("length", [_rounded_up, _rounded_down, _cut_off])
def test_a_quotient_of_floats_that_is_rounded_is_one_of_integers(length: Callable[[int], int]) -> None:
    """Windows whose number is a rounded n / 16."""

    def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = length(q.shape[1])
        q, k, v = (F.pad(x, (0, 0, 0, 16))[:, :n].unflatten(1, (n // 16, 16)) for x in (q, k, v))
        return ((q @ k.mT).softmax(-1) @ v).flatten(1, 2)

    torch._dynamo.reset()
    reports: list = []
    run = rewritten(windows, engine="tiled", dynamic=True, report=reports.append)
    for n in (40, 59, 48):
        given = torch.randn(3, 2, n, 6).unbind()
        torch.testing.assert_close(run(*given), windows(*given), rtol=1e-4, atol=1e-5)
    assert reports and all(report.sites and all(site.fused for site in report.sites) for report in reports)


def in_parts(*parts: Tensor) -> Tensor:
    return torch.cat([(x @ x.mT * 0.3).softmax(-1) @ x for x in parts], -2)


def each_from_the_one_before(x: Tensor, *parts: Tensor) -> Tensor:
    for part in parts:
        x = (part @ x.mT * 0.3).softmax(-1) @ x
    return x


@pytest.mark.parametrize("function", [in_parts, each_from_the_one_before])
def test_sizes_are_not_held_to_differ(function: Callable[..., Tensor]) -> None:
    """What is alike of several attentions is looked for; whether their sizes are is no question for this call alone."""
    found: list[refocus.Report] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        options = Options.of({"engine": "tiled", "report": found.append})
        return compile_graph(gm, inputs, options, lambda graph, _: graph.forward)

    compiled = torch.compile(function, backend=backend, dynamic=True)
    for sizes in ((10, 14, 12), (11, 11, 11), (9, 20, 9)):
        parts = [torch.randn(2, n, 8) for n in sizes]
        torch.testing.assert_close(compiled(*parts), function(*parts))
    (report,) = found
    assert all(site.fused for site in report.sites), report


def looked_up(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (1, 4)).transpose(1, 2) for t in F.linear(x, weight).chunk(3, -1))
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


def summed_up(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (1, 4)).transpose(1, 2) for t in F.linear(x, weight).chunk(3, -1))
    return ((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("function", [looked_up, summed_up])
@pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")
def test_a_size_that_turns_out_to_be_a_number(function: Callable[..., Tensor]) -> None:
    run = rewritten(function, engine="tiled", dynamic=True)
    for tokens in (9, 20):
        given = torch.randn(2, tokens, 4), torch.randn(12, 4)
        torch.testing.assert_close(run(*given), function(*given), rtol=1e-4, atol=1e-4)


def the_last_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(k.size(-2))
    own = places[-q.size(-2) :]
    later = places > own[:, None]
    return (q @ k.mT - 0.1 * (places - own[:, None]).abs()).masked_fill(later & (places > 3), -math.inf).softmax(-1) @ v


def narrowed_from_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places, n = torch.arange(k.size(-2)), q.size(-2)
    own, first = places.narrow(0, -n, n), places[-n]
    return (q @ k.mT - 0.1 * (places - own[:, None]).abs() - 0.2 * (places - first).abs()).softmax(-1) @ v


def the_last_or_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Where it begins may lie before the first."""
    own = torch.arange(q.size(-2))[-k.size(-2) :]
    return (q @ k.mT - 0.1 * (own[:, None] - torch.arange(k.size(-2))).abs()).softmax(-1) @ v


@pytest.mark.parametrize("function", [the_last_rows, narrowed_from_the_end, the_last_or_all])
def test_places_counted_from_the_end_by_a_size(function: Function) -> None:
    """x[-n:] where n is a size: the start is below zero, whatever n is."""
    run = refocus.optimize(lambda *given: function(*given), engine="tiled", require=True, dynamic=True)
    for queries, keys in ((7, 12), (5, 5), (9, 31)):
        given = tuple(torch.randn(2, n, 8) for n in (queries, keys, keys))
        with torch.no_grad():
            torch.testing.assert_close(run(*given), function(*given))
