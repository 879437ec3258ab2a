"""Whichever way softmax attention is spelled, it is recognised, and forced through the tiled engine it is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from refocus.testing import check
from refocus.tolerances import difference
from tests.spellings import CHOICES, Spelled, Spelling, covering, everything, inputs, plain

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

PAIRS = covering(2)
SAMPLE = PAIRS[::4]


def run(spelling: Spelling) -> None:
    report = check(Spelled(spelling).eval(), inputs(spelling), family="softmax", sites=1, lower=False).report
    assert (report.sites[0].mask == "") == (spelling.mask == "none")


@pytest.mark.parametrize("spelling", SAMPLE, ids=str)
def test_spelling(spelling: Spelling) -> None:
    run(spelling)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", [s for s in PAIRS if s not in SAMPLE], ids=str)
def test_every_pair_of_choices(spelling: Spelling) -> None:
    run(spelling)


@pytest.mark.parametrize("kind", list(CHOICES))
def test_every_choice_alone(kind: str) -> None:
    for choice in CHOICES[kind]:
        run(Spelling(**{kind: choice}))


def test_the_spellings_themselves_compute_one_thing() -> None:
    for spelling in (*PAIRS, *everything()[::997]):
        with torch.no_grad():
            tensors = inputs(spelling, torch.float64)
            got = Spelled(spelling).double().eval()(*(t.clone() for t in tensors))
        assert difference(got, plain(spelling, *tensors)) < 1e-6, spelling


def test_covering_covers() -> None:
    import itertools

    names = tuple(CHOICES)
    for a, b in itertools.combinations(range(len(names)), 2):
        seen = {(getattr(s, names[a]), getattr(s, names[b])) for s in PAIRS}
        assert seen == set(itertools.product(CHOICES[names[a]], CHOICES[names[b]]))


class MaskedRows(nn.Module):
    """Rows that are padding get a fill at every key: their scores are lost in it, and the values' mean is left."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = q @ k.mT + torch.where(keep, 0.0, self.fill)[:, :, None]
        return scores.softmax(-1) @ v


@pytest.mark.parametrize(("fill", "mask"), [(torch.finfo(torch.float32).min, "t0[b,i]"), (-50.0, "")])
def test_a_row_is_masked_by_what_is_added_to_all_of_it(fill: float, mask: str) -> None:
    """A fill that leaves the scores as they are cancels in the softmax."""
    keep = torch.arange(12)[None] < torch.tensor([[12], [7]])
    model, tensors = MaskedRows(fill), (*torch.randn(3, 2, 12, 8).unbind(), keep)
    (site,) = check(model, tensors, lower=False, gradients=True).report.sites
    assert site.mask == mask


def test_one_query_of_heads_with_keys_of_their_own_and_one_value_head() -> None:
    """The heads are all that the weights have and the values have not; they are no queries."""

    class Decode(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.repeat_interleave(2, dim=1).mT).softmax(-1) @ v[:, :1].repeat(1, 4, 1, 1)

    k, v = torch.randn(2, 2, 2, 12, 8).unbind()
    (site,) = check(Decode(), (torch.randn(2, 4, 1, 8), k, v), lower=False, gradients=True).report.sites
    assert "k[b,h//2,j,d]" in site.notation


@pytest.mark.parametrize("mixed", ["before", "after", "both"])
def test_one_query_whose_heads_are_mixed(mixed: str) -> None:
    """Without a query axis, what is a weight is told by what it is made of, through mixtures of heads too."""

    class Summary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(3, 1, 8))
            self.blend = nn.Parameter(torch.randn(2, 3, 3))

        def forward(self, k: Tensor, v: Tensor) -> Tensor:
            weights = self.query @ k.mT
            if mixed != "after":
                weights = torch.einsum("bgij,hg->bhij", weights, self.blend[0])
            weights = weights.softmax(-1)
            if mixed != "before":
                weights = torch.einsum("bgij,hg->bhij", weights, self.blend[1])
            return weights @ v

    check(Summary(), torch.randn(2, 2, 3, 14, 8).unbind(), sites=1, lower=False, gradients=True)


@pytest.mark.parametrize("heads", [3, 4, 6])
def test_as_many_heads_are_mixed_as_there_are_queries(heads: int) -> None:
    """What the weights have and the values have not are queries, and the heads before the mixture; keys have these."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blend = nn.Parameter(torch.randn(heads, heads))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.einsum("bhwij,hg->bgwij", (q @ k.mT).softmax(-1), self.blend) @ v

    k, v = torch.randn(2, 2, heads, 5, 7, 8).unbind()
    check(Windows(), (torch.randn(2, heads, 5, 4, 8), k, v), sites=1, lower=False, gradients=True)
