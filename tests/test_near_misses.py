"""One operation away from softmax attention: left alone, for the right reason, with the result as it was.

Every near miss is the base module with one step replaced. A few are not misses at all but look like it (`POSITIVE`):
the rewrite is exact, so they are to be fused.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refocus
from refocus.testing import check
from tests.linear_cases import Module

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

HEADS, LENGTH, WIDTH = 3, 40, 8


def causal(scores: Tensor) -> Tensor:
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~keep, float("-inf"))


class Base(nn.Module):
    """softmax(causal(q k^T / sqrt d)) v, each step a method."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(HEADS, HEADS, 3, padding=1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) * WIDTH**-0.5

    def mask(self, scores: Tensor) -> Tensor:
        return causal(scores)

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def weigh(self, weights: Tensor, v: Tensor) -> Tensor:
        return weights @ v

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.weigh(self.weights(self.mask(self.scores(q, k))), v)


class OverQueries(Base):
    """The softmax runs over the queries."""

    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-2)


class OverHeads(Base):
    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(1)


class OverHeadsAndKeys(Base):
    """One softmax over the keys of all heads together."""

    def weights(self, scores: Tensor) -> Tensor:
        flat = scores.transpose(1, 2).flatten(2)
        return flat.softmax(-1).unflatten(2, (HEADS, -1)).transpose(1, 2)


class ClippedNormaliser(Base):
    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        exponentials = scores.exp()
        return exponentials / exponentials.sum(-1, keepdim=True).clamp(min=60.0)


class NormaliserPlusEpsilon(Base):
    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        exponentials = scores.exp()
        return exponentials / (exponentials.sum(-1, keepdim=True) + 5.0)


class OtherNormaliser(Base):
    """Numerator and denominator hold different scores."""

    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        return scores.exp() / (2 * scores).exp().sum(-1, keepdim=True)


class MaximumOverQueries(Base):
    """A shift that is not constant along the keys does not cancel."""

    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        exponentials = (scores - scores.amax(-2, keepdim=True)).exp()
        return exponentials / scores.exp().sum(-1, keepdim=True)


class SquaredWeights(Base):
    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1).square()


class ThresholdedWeights(Base):
    def weights(self, scores: Tensor) -> Tensor:
        weights = scores.softmax(-1)
        return torch.where(weights > 0.05, weights, 0.0)


class ConvolvedScores(Base):
    """Multi-token attention: the scores go through a convolution over queries and keys."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.mix(super().scores(q, k))


class ConvolvedWeights(Base):
    def weights(self, scores: Tensor) -> Tensor:
        return self.mix(super().weights(scores))


class CumulativeScores(Base):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k).cumsum(-1)


class TopScores(Base):
    """Only the four best keys of a row count: the mask depends on the whole row."""

    def mask(self, scores: Tensor) -> Tensor:
        best = scores.topk(4, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < best, float("-inf"))


class SortedScores(Base):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k).sort(-1).values


class NormedScores(Base):
    """The scores are standardised along the keys first."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return F.layer_norm(super().scores(q, k), (LENGTH,))


class SparseMax(Base):
    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        ordered = scores.sort(-1, descending=True).values
        ranks = torch.arange(1, LENGTH + 1, device=scores.device)
        sums = ordered.cumsum(-1) - 1
        support = (ordered * ranks > sums).sum(-1, keepdim=True)
        return (scores - sums.gather(-1, support - 1) / support).clamp(min=0)


class TransposedWeights(Base):
    """The weights are normalised over the keys, then summed over the queries."""

    def weigh(self, weights: Tensor, v: Tensor) -> Tensor:
        return weights.transpose(-1, -2) @ v


class SoftmaxTwice(Base):
    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1).softmax(-1)


class LogWeights(Base):
    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)


class MaxNormaliser(Base):
    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        exponentials = scores.exp()
        return exponentials / exponentials.amax(-1, keepdim=True)


class TwoNormalisers(Base):
    """The product of two softmaxes, each with its own normaliser."""

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1) * (2 * scores).softmax(-1)


DECLINED: dict[type[Base], str] = {
    OverQueries: "not normalised over the keys",
    OverHeads: "not normalised over the keys",
    OverHeadsAndKeys: "not normalised over the keys",
    ClippedNormaliser: "the normaliser is changed",
    NormaliserPlusEpsilon: "added to the normaliser",
    OtherNormaliser: "exponents of the weights and of the normaliser differ",
    MaximumOverQueries: "exponents of the weights and of the normaliser differ",
    SquaredWeights: "not normalised",
    ThresholdedWeights: "",
    ConvolvedScores: "",
    ConvolvedWeights: "",
    CumulativeScores: "no product of queries and keys",
    TopScores: "topk",
    SortedScores: "",
    NormedScores: "",
    SparseMax: "",
    TransposedWeights: "not normalised over the keys",
    SoftmaxTwice: "",
    LogWeights: "not normalised over the keys",
    MaxNormaliser: "the normaliser is a max",
    TwoNormalisers: "normalised more than once",
}


class MeanOverHeads(Base):
    """All heads share the mean of their scores: still one product, summed over heads and width."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k).mean(1, keepdim=True)


class MaskedAfterwards(Base):
    """Weights dropped after the softmax, not renormalised: a gate."""

    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1).tril()


class SoftmaxOffByOne(Base):
    """One more logit of zero, written with the shift by the maximum."""

    def mask(self, scores: Tensor) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        shift = scores.amax(-1, keepdim=True)
        exponentials = (scores - shift).exp()
        return exponentials / ((-shift).exp() + exponentials.sum(-1, keepdim=True))


class CappedScores(Base):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k).clamp(-2.0, 2.0)


class ScoreMask(Base):
    """The mask reads the score itself, one pair at a time."""

    def mask(self, scores: Tensor) -> Tensor:
        return torch.where(scores > -3.0, scores, torch.finfo(scores.dtype).min)


class NegatedScores(Base):
    def weights(self, scores: Tensor) -> Tensor:
        return F.softmin(-scores, dim=-1)


class TwoProducts(Base):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + torch.einsum("bhid,bhjd->bhij", k, q) * 0.1


class Distances(Base):
    """The negative squared distance, expanded: |q - k|^2 = |q|^2 - 2 q.k + |k|^2."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        squares = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]
        return -(squares - 2 * q @ k.transpose(-1, -2)) * 0.1


POSITIVE: tuple[type[Base], ...] = (
    Base,
    MeanOverHeads,
    MaskedAfterwards,
    SoftmaxOffByOne,
    CappedScores,
    ScoreMask,
    NegatedScores,
    TwoProducts,
    Distances,
)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, LENGTH, WIDTH, generator=numbers) for _ in range(3))
    return q * 1.5, k * 1.5, v


@pytest.mark.parametrize("kind", DECLINED, ids=lambda kind: kind.__name__)
def test_left_alone(kind: type[Base]) -> None:
    torch.manual_seed(0)
    report = check(kind().eval(), tensors(), fused=False, lower=False).report
    assert not any(site.fused or site.recognized for site in report.sites), str(report)
    for site in report.sites:
        assert site.reason and DECLINED[kind] in site.reason
    forced = refocus.explain(kind().eval(), *tensors(), engine="tiled")
    assert not any(site.fused for site in forced.sites)


class NormedHeads(Base):
    """The probabilities of each pair are mixed over the heads, and standardised over them."""

    def __init__(self) -> None:
        super().__init__()
        self.blend = nn.Linear(HEADS, HEADS)

    def weights(self, scores: Tensor) -> Tensor:
        mixed = self.blend(super().weights(scores).permute(0, 2, 3, 1))
        return F.layer_norm(mixed, (HEADS,)).permute(0, 3, 1, 2)


class NormedResult(Base):
    """The same operation after the values hides nothing."""

    def weights(self, scores: Tensor) -> Tensor:
        return super().weights(scores).sigmoid()

    def weigh(self, weights: Tensor, v: Tensor) -> Tensor:
        return F.layer_norm(weights @ v, (WIDTH,)) @ v.mT


BLOCKED: dict[type[Base], str] = {
    ConvolvedScores: "`conv2d` is not understood",
    ConvolvedWeights: "`conv2d` is not understood",
    NormedScores: "`layer_norm` is not understood",
    NormedHeads: "`layer_norm` is not understood",
    NormedResult: "the weights are not normalised over the keys",
}


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.__name__)
def test_what_stands_in_the_way_is_named(kind: type[Base]) -> None:
    [site] = refocus.explain(kind().eval(), *tensors()).sites
    assert not site.recognized
    assert site.reason == BLOCKED[kind]


@pytest.mark.parametrize("kind", POSITIVE, ids=lambda kind: kind.__name__)
def test_fused(kind: type[Base]) -> None:
    check(kind().eval(), tensors(), family="softmax", sites=1, lower=False)


class Noisy(Base):
    """Gumbel noise on the scores, the same as eager code draws it from the same seed."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = super().scores(q, k)
        return scores + torch.rand_like(scores)


def test_random_numbers_stay_as_they_are() -> None:
    from refocus.testing import rewritten

    module = Noisy().eval()
    run: Callable[..., Tensor] = rewritten(module, engine="tiled")
    with torch.no_grad():
        run(*tensors())
        torch.manual_seed(1)
        got = run(*tensors())
        torch.manual_seed(1)
        expected = module(*tensors())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


class WrittenAfterwards(Base):
    """The scores are overwritten after the softmax has read them, and then read again."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.scores(q, k)
        out = scores.softmax(-1) @ v
        scores.mul_(2.0)
        return out + scores.mean(-1, keepdim=True)


class WrittenBetween(Base):
    """The keys are overwritten between the product and the softmax: the product must not be moved past that."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        scores = self.scores(q, k)
        k.zero_()
        return self.weights(scores) @ (v + k)


class ValuesWrittenBetween(Base):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v.clone()
        weights = self.weights(self.scores(q, k))
        v += 1.0
        return weights @ v


class InputWritten(Base):
    """The user's own tensor is changed after it was used as a key: the caller must see the change."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().forward(q, k, v)
        k.add_(1.0)
        return out


@pytest.mark.parametrize(
    "kind", [WrittenAfterwards, WrittenBetween, ValuesWrittenBetween, InputWritten], ids=lambda kind: kind.__name__
)
def test_writes_keep_their_order(kind: type[Base]) -> None:
    """Fused or not, the result is that of the order in the source."""
    from refocus.testing import rewritten

    module = kind().eval()
    run = rewritten(module, engine="tiled")
    mine, theirs = tensors(), tensors()
    with torch.no_grad():
        torch.testing.assert_close(run(*mine), module(*theirs), atol=1e-5, rtol=1e-4)
    for a, b in zip(mine, theirs):
        assert torch.equal(a, b)


def beside_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the first chunk of a recurrence reads of its state."""
    decayed = q * (q @ k.mT).sum(-1, keepdim=True).tanh().exp()
    return (q @ k.mT).softmax(-1) @ v + decayed @ q.new_zeros(WIDTH, WIDTH)


def test_a_product_with_zeros_is_no_site() -> None:
    inputs = tuple(torch.randn(2, HEADS, LENGTH, WIDTH) for _ in range(3))
    check(Module(beside_nothing), inputs, sites=1, lower=False)
