"""The sdpa engine: regions as calls of PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from refocus import oracle, simplify
from refocus.codegen import sdpa
from refocus.codegen.plan import Plan
from refocus.ir import Load
from refocus.tolerances import FACTOR, magnitude, tolerance
from tests import region_cases as cases

PLAN = Plan("sdpa")
PLAIN = {
    "dense", "causal", "causal_bfloat16", "gqa", "gated", "cross", "two_dots", "merged_heads", "windows_2d",
    "unbatched",
}  # fmt: skip
REASONS = {
    "dropout": "gate", "pairwise": "gate", "softcap": "function", "sinks": "extra logits",
    "empty_added": "extra logits",
}  # fmt: skip


@pytest.mark.parametrize("name", cases.all_names())
def test_case(name: str) -> None:
    region, tensors, sizes = cases.CASES[name]()
    reason = sdpa.supports(region)
    if name in REASONS:
        assert reason is not None and REASONS[name] in reason
        return
    assert reason is None
    assert sdpa.plain(region) == (name in PLAIN)
    out, expected = sdpa.run(region, PLAN, tensors, sizes), oracle.run(region, tensors, sizes)
    assert out.shape == expected.shape and out.is_contiguous() and out.dtype == getattr(torch, region.out_dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    dense = oracle.run(region, tensors, sizes, torch.float32)
    allowed = FACTOR * float((dense - expected).abs().nan_to_num().max())
    allowed += tolerance(out.dtype).floor * magnitude(expected)
    assert float((out - expected).abs().nan_to_num().max()) <= allowed


def traced(case: cases.Case) -> torch.fx.GraphModule:
    region, tensors, sizes = case
    return make_fx(lambda *t: sdpa.attend(region, PLAN, t, sizes), pre_dispatch=True, tracing_mode="fake")(*tensors)


def calls(graph: torch.fx.GraphModule, target: object) -> list[torch.fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=target)


def test_plain_regions_are_one_call() -> None:
    """Causal stays a flag, and repeated key heads stay few."""
    [node] = calls(traced(cases.gqa()), torch.ops.aten.scaled_dot_product_attention.default)
    assert node.kwargs["enable_gqa"] is True
    assert True in node.args  # is_causal
    assert node.args[1].meta["val"].shape[1] == 2  # type: ignore[union-attr, index]


def test_mask_is_written_over_the_axes_it_has() -> None:
    [node] = calls(traced(cases.alibi(n=40)), torch.ops.aten.scaled_dot_product_attention.default)
    assert node.args[3].meta["val"].shape == (1, cases.H, 40, 40)  # type: ignore[union-attr, index]
    [node] = calls(traced(cases.window(n=40)), torch.ops.aten.scaled_dot_product_attention.default)
    assert node.args[3].meta["val"].shape == (1, 1, 40, 40)  # type: ignore[union-attr, index]


def test_rows_that_need_a_look_go_through_the_operator() -> None:
    graph = traced(cases.empty_min())
    assert calls(graph, torch.ops.refocus.attend.default)
    assert not calls(graph, torch.ops.aten.scaled_dot_product_attention.default)


def test_causal_is_from_the_first_key() -> None:
    region, *_ = cases.symbolic()  # the last n of m positions
    assert not sdpa.is_causal(region)
    assert sdpa.is_causal(cases.causal()[0])


def test_bias_that_holds_the_score_is_no_bias() -> None:
    s = cases.Setting(torch.float32, 20, 20, 8, 8)
    score = cases.add(s.score, cases.call("tanh", s.score))
    assert "function" in str(sdpa.supports(s.region(score)))
    bias = cases.add(s.score, cases.call("tanh", Load("q", (s.b, s.h, s.i, simplify.expr(0)), s.f)))
    assert sdpa.supports(s.region(bias)) is None
