"""Heads mixed by a convolution of kernel size 1: a product over channels, by another name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from refocus.testing import check, rewritten

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")


class Mixed(nn.Module):
    """Causal attention of which scores, probabilities or both pass through a convolution."""

    def __init__(self, before: nn.Module | None, after: nn.Module | None) -> None:
        super().__init__()
        self.project = nn.Linear(12, 72)
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = self.before(q @ k.mT * 6**-0.5).masked_fill(later, -torch.inf).softmax(-1)
        return (self.after(weights) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("places", ["before", "after", "both"])
def test_heads_are_mixed_by_a_convolution(places: str, groups: int, bias: bool) -> None:
    convolutions = [nn.Conv2d(4, 4, 1, bias=bias, groups=groups) for _ in range(2)]
    before = convolutions[0] if places != "after" else None
    after = convolutions[1] if places != "before" else None
    check(Mixed(before, after), (torch.randn(2, 19, 12),), family="softmax", sites=1, lower=False, gradients=True)


@pytest.mark.parametrize("wide", [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, (1, 3), padding=(0, 1))], ids=str)
def test_a_wider_kernel_mixes_more_than_heads(wide: nn.Module) -> None:
    model, reports, x = Mixed(wide, None).eval(), [], torch.randn(1, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(model, engine="tiled", report=reports.append)(x), model(x))
    assert not any(site.fused for site in reports[0].sites)


STRIDES = [{"stride": 2}, {"padding": 1}, {"stride": (1, 2)}, {"padding": (0, 1), "stride": (2, 1)}]


class Strided(nn.Module):
    """Of the scores only some are kept, or keys of score zero are put around them."""

    def __init__(self, options: dict[str, object]) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1, bias=False, **options)  # type: ignore[arg-type]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self.mix(q @ k.mT).softmax(-1)
        return weights @ v[..., : weights.shape[-1], :]


@pytest.mark.parametrize("options", STRIDES, ids=str)
def test_steps_and_borders_are_not_a_product(options: dict[str, object]) -> None:
    q, k, v = torch.randn(2, 3, 8, 5), torch.randn(2, 3, 8, 5), torch.randn(2, 3, 10, 5)
    report = check(Strided(options), (q, k, v), fused=False, lower=False).report
    assert not any(site.fused for site in report.sites)


def test_same_padding_pads_nothing() -> None:
    q, k, v = (torch.randn(2, 3, 8, 5) for _ in range(3))
    check(Strided({"padding": "same", "dilation": 2}), (q, k, v), sites=1, lower=False)
