"""What stands in a captured graph: attention kept whole beside autocast, kernels taken apart, numbers left open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import refocus
from refocus.native_layers import expansion_of
from refocus.options import Options
from refocus.pipeline import rewrite
from refocus.testing import check, rewritten
from refocus.tolerances import agree as close


@pytest.mark.parametrize("enabled", [False, True], ids=["off", "on"])
def test_a_call_to_attention_beside_autocast_stays_whole(enabled: bool) -> None:
    """Rotary tables are often made where autocast is switched off; PyTorch's kernel would stand in the graph."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            angles = torch.arange(q.shape[2])[:, None] * 0.1
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            q, k = q * angles.cos(), k * angles.cos()
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=-angles.T.abs(), scale=0.3)

    q, k, v = torch.randn(3, 2, 2, 12, 8).unbind()
    for trains in (False, not enabled):  # a region that casts, and torch.no_grad(), are left alone together
        leaf = q.clone().requires_grad_(trains)
        found: list[refocus.Report] = []
        fast = rewritten(attend, engine="tiled", report=found.append)
        with torch.set_grad_enabled(trains):
            expected, got = attend(leaf, k, v), fast(leaf, k, v)
        assert [site.fused for site in found[0].sites] == [True]
        assert got.dtype == expected.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert (got - expected).abs().max() <= (0.02 if enabled else 1e-5)
        if trains:
            assert close(*(torch.autograd.grad(x.square().sum(), leaf)[0] for x in (got, expected)))


PADDED = torch.arange(12)[None] >= torch.tensor([[12], [7]])
LATER = nn.Transformer.generate_square_subsequent_mask(12)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "masks",
    [{}, {"src_key_padding_mask": PADDED}, {"mask": LATER, "is_causal": True}],
    ids=["plain", "padded", "causal"],
)
def test_an_encoder_layer_is_seen_through_its_kernel(masks: dict[str, Any], norm_first: bool) -> None:
    """In inference PyTorch's layer is one operation."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first, activation="gelu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    checked = check(model, (torch.randn(2, 12, 32),), masks, sites=2, lower=False)
    assert all(site.fused for site in checked.report.sites)


def test_only_the_kernel_of_plain_tensors_is_taken_apart() -> None:
    kernel = torch.ops.aten._transformer_encoder_layer_fwd.default
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])
    assert expansion_of(kernel, (torch.randn(2, 3, 8), 8, 2)) is not None
    assert expansion_of(kernel, (nested, 8, 2)) is None
    assert expansion_of(torch.ops.aten.linear.default, (torch.randn(2, 3, 8),)) is None


def test_a_number_that_the_model_is_called_with_may_be_negative() -> None:
    """Nothing is known of it where it is left open: a row may then have no key."""

    def attend(q: Tensor, k: Tensor, v: Tensor, shift: int) -> Tensor:
        rows, columns = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
        return (q @ k.mT).masked_fill(columns > rows + shift, -1e9).softmax(-1) @ v

    found: list[refocus.Report] = []
    fast = refocus.optimize(attend, engine="tiled", require=True, dynamic=True, report=found.append)
    tensors = torch.randn(3, 2, 12, 8).unbind()
    with torch.no_grad():
        for shift in (3, -4, 20, -30):
            assert close(fast(*tensors, shift), attend(*tensors, shift))
    (site,) = found[0].sites  # compiled once
    assert len(found) == 1 and site.fused and "empty row" in site.notation


def test_a_graph_without_tensors_among_its_inputs() -> None:
    """Before a graph break a model may only have made a table or a state to start from."""

    def function(steps: int) -> Tensor:
        table = torch.arange(steps * 4.0).sin().view(steps, 4)
        torch._dynamo.graph_break()
        return table @ table.T

    found: list[refocus.Report] = []
    assert torch.equal(rewritten(function, engine="tiled", report=found.append)(6), function(6))
    assert found and not any(report.notes for report in found)


def test_a_graph_of_which_nothing_is_left() -> None:
    """What is computed before a graph break may be asked for by nobody: no tensor is left in such a graph."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    torch.compile(lambda steps: torch.arange(steps * 4.0).sin(), backend=backend)(6)
    (gm,) = graphs
    gm.graph.output_node().args = ((),)
    done = rewrite(gm, Options())
    assert done.gm is gm and not done.report.sites and not done.report.notes
