"""A value from inside the region is also read outside of it: it must be there, and it must be right.

Where fusing would lose the value the site is left alone, with that reason; where the value is no N x N tensor of the
region (inputs, the mask, the result itself) the site is fused as ever.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refocus
from refocus.testing import check

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

HEADS, LENGTH, WIDTH = 2, 40, 8


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, LENGTH, WIDTH, generator=numbers) for _ in range(3))
    return q * 1.5, k * 1.5, v


class Escape(nn.Module):
    """Returns the attention's result and what `extra` makes of the values inside."""

    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        scores = q @ k.transpose(-1, -2) * WIDTH**-0.5
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        masked = scores.masked_fill(~keep, float("-inf"))
        weights = masked.softmax(-1)
        out = weights @ v
        return out, self.extra(q, scores, masked, weights, out)


class Weights(Escape):
    """`output_attentions=True`."""

    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return weights


class WeightsView(Escape):
    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return weights[:, 0, :, 0].detach()


class MeanWeights(Escape):
    """What `nn.MultiheadAttention` returns with its weights."""

    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return weights.mean(1)


class Scores(Escape):
    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return scores


class MaskedScores(Escape):
    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return masked


class LogSumExp(Escape):
    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return masked.logsumexp(-1)


class Largest(Escape):
    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return masked.amax(-1)


class ColumnSums(Escape):
    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return weights.sum((0, 1, 2))


class Entropy(Escape):
    """A loss on the weights."""

    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return -(weights * (weights + 1e-9).log()).sum(-1).mean()


class InDictionary(Escape):
    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return {"attentions": (weights,), "hidden": [out]}


@pytest.mark.parametrize(
    "kind",
    [Weights, WeightsView, MeanWeights, Scores, MaskedScores, Largest, ColumnSums, Entropy, InDictionary],
    ids=lambda kind: kind.__name__,
)
def test_left_alone(kind: type[Escape]) -> None:
    report = check(kind().eval(), tensors(), fused=False, lower=False).report
    assert len(report.sites) == 1 and not report.sites[0].fused
    assert report.sites[0].reason and report.sites[0].blame
    forced = refocus.explain(kind().eval(), *tensors(), engine="tiled")
    assert not forced.sites[0].fused and "read elsewhere" in forced.sites[0].reason


class Query(Escape):
    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return q * 2


class Sizes(Escape):
    """The shape of the scores is read, not their values."""

    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return out * weights.shape[-1] + scores.dim()


class Result(Escape):
    """The result is returned twice, once as a view."""

    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        return out.transpose(1, 2), out


class Unused(Escape):
    """Computed from the weights, but thrown away."""

    def extra(self, q: Tensor, scores: Tensor, masked: Tensor, weights: Tensor, out: Tensor) -> Any:
        _ = weights.mean() + scores.sum()
        return None


@pytest.mark.parametrize("kind", [Query, Sizes, Result, Unused, LogSumExp], ids=lambda kind: kind.__name__)
def test_fused_all_the_same(kind: type[Escape]) -> None:
    check(kind().eval(), tensors(), sites=1, lower=False)


class Remembers(nn.Module):
    """Keeps the last weights as an attribute, as visualisation tools do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(2, HEADS, LENGTH, LENGTH))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        self.last = weights.detach()
        return weights @ v


class WritesIntoBuffer(Remembers):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        self.last.copy_(weights)
        return weights @ v


@pytest.mark.parametrize("kind", [Remembers, WritesIntoBuffer], ids=lambda kind: kind.__name__)
def test_a_module_that_keeps_its_weights(kind: type[Remembers]) -> None:
    from refocus.testing import rewritten

    module, other = kind().eval(), kind().eval()
    run = rewritten(module, engine="tiled")
    with torch.no_grad():
        for scale in (1.0, 0.5):
            q, k, v = tensors()
            got, expected = run(q * scale, k, v), other(q * scale, k, v)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(module.last, other.last, atol=1e-5, rtol=1e-4)


class TwoValues(nn.Module):
    """One softmax weighs two values: two sites over the same scores."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v, weights @ (v * 2 + 1)


class SharedMask(nn.Module):
    """Two layers read one mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        bias = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill(~keep, torch.finfo(q.dtype).min)
        x = (q @ k.mT + bias).softmax(-1) @ v
        return (x @ k.mT + bias).softmax(-1) @ v, bias


def test_one_softmax_two_values() -> None:
    report = refocus.explain(TwoValues().eval(), *tensors(), engine="tiled")
    fused = all(site.fused for site in report.sites)
    check(TwoValues().eval(), tensors(), fused=fused, lower=False)


def test_two_sites_one_mask() -> None:
    check(SharedMask().eval(), tensors(), sites=2, lower=False)


def test_multihead_attention_weights() -> None:
    class WithWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out, weights = self.attn(x, x, x, need_weights=True)
            return out, weights

    torch.manual_seed(0)
    report = check(WithWeights().eval(), (torch.randn(2, 24, 16),), fused=False, lower=False).report
    assert not any(site.fused for site in report.sites)


def test_a_graph_break_before_the_softmax_is_named() -> None:
    """Scores that another graph has made cannot be fused, and the report says so; so it does of weights returned."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        torch._dynamo.graph_break()
        return scores.softmax(-1) @ v

    report = refocus.explain(attend, *tensors())
    assert not report.sites
    [note] = report.notes
    assert "graph break" in note and "test_escapes.py" in note

    def gates(x: Tensor) -> Tensor:
        return x.mean(1).softmax(-1).unsqueeze(1) * x

    assert not refocus.explain(gates, tensors()[0]).notes

    def features(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 3, stride=1, padding=1).softmax(-1) * x

    assert not refocus.explain(features, tensors()[0]).notes


def test_a_softmax_over_features_is_no_note() -> None:
    """Queries and keys that come into the graph as they are, and a softmax of their features: linear attention."""

    def weighed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.softmax(-1) @ k.softmax(-1).mT).tril() @ v

    def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)

    for function in (weighed, summed):
        report = refocus.explain(function, *(torch.randn(1, 2, 64, 8) for _ in range(3)))
        assert [site.family for site in report.sites] == ["linear"] and not report.notes
    [site] = refocus.explain(Weights(), *tensors()).sites
    assert site.reason.endswith("and the graph returns them")


class MixedHeads(nn.Module):
    """Talking heads. `broken`: a graph break stands before the mixture."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.before, self.broken = nn.Linear(HEADS, HEADS, bias=False), broken
        self.after = nn.Parameter(torch.eye(HEADS) + 0.1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.mT
        if self.broken:
            torch._dynamo.graph_break()
        mixed = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + bias
        weights = mixed.softmax(-1 if self.broken else -2)
        return torch.einsum("hg,bhij->bgij", self.after, weights) @ v


def test_a_graph_break_before_heads_are_mixed_is_named() -> None:
    bias = torch.randn(2, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    with torch.no_grad():
        [site] = refocus.explain(MixedHeads(True), *tensors(), bias).sites
        assert not site.fused and "graph break stands between them" in site.reason
        # The product is in the graph: whatever keeps it from being fused, here another axis, it is no graph break.
        sites = refocus.explain(MixedHeads(False), *tensors(), bias).sites
    assert sites and not any(site.fused or "graph break" in site.reason for site in sites)
