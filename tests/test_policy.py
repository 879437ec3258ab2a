"""Which engine the CPU policy picks: the orderings that were measured, not its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx

from benchmarks import windows
from benchmarks.engines_cpu import region_of
from refocus.backend import compile_graph
from refocus.codegen import cpp
from refocus.codegen.plan import Chosen, Leave
from refocus.codegen.policy import choose_cpu
from refocus.options import Options
from refocus.report import Report
from tests import region_cases as cases

pytestmark = pytest.mark.skipif(cpp.machine_reason() is not None, reason=str(cpp.machine_reason()))


def picked(kind: str, n: int, *, kv_heads: int = 8, was_sdpa: bool = False) -> str:
    region = region_of(kind, 8, kv_heads, 1 if kind == "decode" else n, n, 64)
    outcome = choose_cpu(region, {}, was_sdpa)
    return outcome.plan.engine if isinstance(outcome, Chosen) else "leave"


@pytest.mark.parametrize(
    "kind, n, engine",
    [
        ("window", 4096, "cpp"), ("window", 1024, "cpp"), ("causal", 1024, "cpp"), ("causal", 8192, "sdpa"),
        ("dense", 4096, "sdpa"), ("bias", 2048, "sdpa"), ("bias", 64, "leave"), ("dense", 64, "leave"),
    ],
)  # fmt: skip
def test_measured_orderings(kind: str, n: int, engine: str) -> None:
    assert picked(kind, n) == engine


def test_what_gains_less_than_can_be_measured_is_left() -> None:
    assert picked("causal", 128) == "leave"
    assert picked("window", 128) == "leave"


def test_decoding_does_not_repeat_grouped_keys() -> None:
    assert picked("decode", 4096, kv_heads=2) == "sdpa"


def test_what_calls_sdpa_already_is_replaced_only_for_sparsity() -> None:
    assert picked("dense", 4096, was_sdpa=True) == "leave"
    assert picked("causal", 4096, was_sdpa=True) == "leave"
    assert picked("window", 4096, was_sdpa=True) == "cpp"


def test_tiles_follow_the_mask() -> None:
    narrow = choose_cpu(region_of("window", 8, 8, 4096, 4096, 64), {})
    assert isinstance(narrow, Chosen) and (narrow.plan.block_q, narrow.plan.block_k) == (64, 64)
    causal = choose_cpu(region_of("causal", 8, 8, 1024, 1024, 64), {})
    assert isinstance(causal, Chosen) and (causal.plan.block_q, causal.plan.block_k) == (128, 128)


@pytest.mark.parametrize(
    ("kind", "fused"), [("unfold", True), ("grouped_unfold", True), ("grouped_gather", True), ("blocks", False)]
)
def test_overlapping_windows_are_trained_where_few_queries_read_each_copy(kind: str, fused: bool) -> None:
    """What they gather goes back element by element: 2.5 to 6 times slower than our backward, but for whole blocks."""
    found: list[Report] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, inputs, Options.of({"report": found.append}), lambda graph, _: gm.forward)

    grouped = (1, 2, 4) if kind.startswith("grouped") else (1, 8)
    query, key, value = (torch.randn(*heads, 4096, 64, requires_grad=True) for heads in (grouped, (1, 2), (1, 2)))
    if len(grouped) == 2:
        key, value = (t.repeat(1, 4, 1, 1) for t in (key, value))
    torch.compile(getattr(windows, kind), backend=backend)(query, key, value)
    assert [site.fused for report in found for site in report.sites] == [fused]


@pytest.mark.parametrize("name", cases.all_names())
def test_every_case_has_an_answer(name: str) -> None:
    region, _, sizes = cases.CASES[name]()
    outcome = choose_cpu(region, dict(zip(region.syms, sizes)))
    assert outcome.reason


def test_what_no_engine_takes_is_left_with_the_reason() -> None:
    outcome = choose_cpu(cases.dense(torch.float64)[0], {})
    assert isinstance(outcome, Leave) and "float64" in outcome.reason
