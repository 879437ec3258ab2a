"""REFOCUS_DISABLE: each rule leaves out what it names, and the result stays right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import refocus
from refocus import debug, simplify
from refocus.codegen import choose, tile_lists
from refocus.errors import UnknownOption
from refocus.masks import Tiling, classify
from refocus.testing import rewritten
from tests import region_cases as cases

CPU = torch.device("cpu")


class Masked(nn.Module):
    def __init__(self, n: int = 64) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(n, n, dtype=torch.bool).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / 4).masked_fill(~self.mask, -torch.inf)
        return scores.softmax(-1) @ v


def disable(patch: pytest.MonkeyPatch, rules: str) -> None:
    torch._dynamo.reset()
    patch.setenv("REFOCUS_DISABLE", rules)


def site(engine: str = "tiled") -> refocus.report.Site:
    torch._dynamo.reset()
    inputs = torch.randn(3, 1, 2, 64, 16).unbind(0)
    return refocus.explain(Masked(), *inputs, engine=engine).sites[0]


@pytest.mark.parametrize("rule", ["softmax", "tiled"])
def test_a_site_is_left_and_says_so(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site().fused
    disable(monkeypatch, rule)
    found = site()
    assert found.recognized and not found.fused and found.reason.endswith(f"REFOCUS_DISABLE names {rule!r}")


def test_linear_attention_is_left_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Linear(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).tril() @ v

    inputs = torch.randn(3, 1, 2, 64, 16).unbind(0)
    (found,) = refocus.explain(Linear(), *inputs, engine="tiled").sites
    assert found.fused
    disable(monkeypatch, "linear")
    (found,) = refocus.explain(Linear(), *inputs, engine="tiled").sites
    assert found.family == "linear" and not found.fused and found.reason == "REFOCUS_DISABLE names 'linear'"


def test_other_engines_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    disable(monkeypatch, " triton, cpp ")
    assert site().fused
    region = cases.causal()[0]
    assert choose.unsupported("triton", region) == "REFOCUS_DISABLE names 'triton'"
    assert choose.unsupported("sdpa", region) is None
    assert choose.plan_part(region, {}, torch.device("cuda"), None, False).reason.endswith("names 'triton'")


def test_closed_forms_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "closed form" in site().mask_source
    disable(monkeypatch, "closed-forms")
    assert "dense tensor" in site().mask_source
    model, inputs = Masked(), torch.randn(3, 1, 2, 64, 16).unbind(0)
    torch.testing.assert_close(rewritten(model, engine="tiled", require=True)(*inputs), model(*inputs))


def test_regions_that_train_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    region = cases.causal()[0]
    arguments = (region, {}, CPU, "tiled", False, ["q"])
    assert choose.plan_part(*arguments).reason == "engine='tiled' was asked for"
    disable(monkeypatch, "training")
    assert choose.plan_part(*arguments).reason == "needs gradients, and REFOCUS_DISABLE names 'training'"


def test_tiles_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    s = cases.Setting(torch.float32, 64, 64, 8, 8)
    crossing = simplify.sub(s.i, s.j), simplify.add(s.i, s.j)
    mask = simplify.and_(*(simplify.eq(simplify.mod(x, 13), 0) for x in crossing))

    def visited() -> int:
        return int((classify(mask, Tiling((), s.i, s.j, 8, 8, {}, {})).state != 0).sum())

    found = visited()
    disable(monkeypatch, "refined-tiles")
    assert visited() > found


def test_kernels_loop_between_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    region = cases.documents(n=1024)[0]
    assert tile_lists.pays(region, 64, 64)
    disable(monkeypatch, "tile-lists")
    assert not tile_lists.pays(region, 64, 64)


def test_a_name_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    disable(monkeypatch, "softmax,sofmax")
    with pytest.raises(UnknownOption, match="sofmax"):
        debug.disabled("softmax")


def test_the_table_of_the_docs_names_every_rule() -> None:
    text = (Path(__file__).parents[1] / "docs" / "debugging.md").read_text()
    assert all(f"`{rule}`" in text for rule in debug.RULES)
