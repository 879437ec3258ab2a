"""Masks that a model keeps or makes from constants: taken for their closed form, for as long as they have it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refocus
from refocus import assumptions
from refocus.errors import StaleMask
from refocus.report import Report

N = 128


class Masked(nn.Module):
    """Attention under a mask kept as a buffer, spelled in one of the usual ways."""

    def __init__(self, mask: Tensor, spelling: str = "fill") -> None:
        super().__init__()
        self.spelling = spelling
        kinds: dict[str, Callable[[], Tensor]] = {
            "fill": lambda: mask, "zeros": lambda: mask.float(), "add": lambda: torch.where(mask, 0.0, -torch.inf),
            "minus": lambda: mask.half().float(), "integers": lambda: mask.int(), "sdpa": lambda: mask,
        }  # fmt: skip
        self.register_buffer("mask", kinds[spelling]()[None, None])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        scores = q @ k.mT / 4
        mask = self.mask[:, :, :n, :n]
        match self.spelling:
            case "fill":
                scores = scores.masked_fill(~mask, -torch.inf)
            case "zeros" | "integers":
                scores = scores.masked_fill(mask == 0, -torch.inf)
            case "add":
                scores = scores + mask
            case "minus":
                scores = scores * mask - 1e9 * (1 - mask)
            case "sdpa":
                return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return scores.softmax(-1) @ v


def tensors(n: int = N) -> list[Tensor]:
    return list(torch.randn(3, 2, 2, n, 16, generator=torch.Generator().manual_seed(n)).unbind(0))


def compiled(model: Any, **options: Any) -> tuple[Any, list[Report]]:
    torch._dynamo.reset()
    reports: list[Report] = []
    return refocus.optimize(model, engine="tiled", report=reports.append, **options), reports


def agree(fast: Any, model: Any, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), atol=2e-6, rtol=1e-5)


def tril(n: int = N) -> Tensor:
    return torch.ones(n, n).tril().bool()


@pytest.mark.parametrize("spelling", ["fill", "zeros", "add", "minus", "integers", "sdpa"])
def test_a_buffer_is_its_closed_form(spelling: str) -> None:
    model = Masked(tril(), spelling)
    fast, reports = compiled(model)
    agree(fast, model, *tensors())
    [site] = reports[0].sites
    assert site.mask == "j <= i" and site.tiles is not None and site.tiles.empty == 1


def test_lengths_that_vary() -> None:
    model = Masked(tril(256))
    fast, reports = compiled(model, dynamic=True)
    for n in (64, 100, 200):
        agree(fast, model, *tensors(n))
    assert [r.sites[0].mask for r in reports] == ["j <= i"]


@pytest.mark.parametrize("how", ["in place", "other tensor", "load_state_dict", "same values"])
def test_a_change_is_noticed(how: str) -> None:
    model = Masked(tril())
    fast, _ = compiled(model)
    inputs = tensors()
    agree(fast, model, *inputs)
    changed = tril()
    changed[5, 77] = True
    if how == "in place":
        model.mask[0, 0, 5, 77] = True
    elif how == "other tensor":
        model.mask = changed[None, None]
    elif how == "load_state_dict":
        model.load_state_dict({"mask": changed[None, None]})
    else:
        model.mask = tril()[None, None]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        agree(fast, model, *inputs)
        agree(fast, model, *inputs)
    assert sum(issubclass(w.category, StaleMask) for w in seen) == (how != "same values")
    model.mask[0, 0, :, 3] = False
    agree(fast, model, *inputs)


def test_tensors_that_take_turns_are_proved_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[int] = []
    real = assumptions.agrees

    def counted(*given: Any) -> bool:
        proofs.append(1)
        return real(*given)

    monkeypatch.setattr(assumptions, "agrees", counted)
    model = Masked(tril())
    fast, _ = compiled(model)
    both = [model.mask, model.mask.clone()]
    for k in range(6):
        model.mask = both[k % 2]
        agree(fast, model, *tensors())
    assert len(proofs) == 1


def test_memory_shared_with_others_is_not_taken_for_granted() -> None:
    numpy = pytest.importorskip("numpy")
    values = numpy.tril(numpy.ones((N, N), dtype=bool))
    model = Masked(torch.from_numpy(values))
    model.mask = torch.from_numpy(values)[None, None]
    fast, reports = compiled(model)
    agree(fast, model, *tensors())
    assert "j <= i" not in reports[0].sites[0].mask
    values[5, 77] = True
    agree(fast, model, *tensors())


def test_masks_filled_piece_by_piece() -> None:
    def looped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        mask = torch.zeros(n, n, dtype=torch.bool, device=q.device)
        for start in range(0, n, 32):
            mask[start : start + 32, start : start + 32] = True
        return (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    fast, reports = compiled(looped)
    agree(fast, looped, *tensors())
    assert reports[0].sites[0].mask == "i//32 == j//32"


def test_memory_that_is_written_between_reads_is_read_when_it_was() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n = q.shape[-2]
        mask = torch.zeros(n, n, dtype=torch.bool)
        mask[:, :8] = True
        first = (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v
        mask[:, 16:] = True
        return first, (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    fast, reports = compiled(twice)
    with torch.no_grad():
        torch.testing.assert_close(fast(*tensors()), twice(*tensors()), atol=2e-6, rtol=1e-5)
    assert len(reports[0].sites) == 2


def irregular(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[-2]
    position = torch.arange(n, device=q.device)
    mask = (torch.cumsum(position * position * 7919, 0) % 101)[:, None] * position[None] % 7 < 3
    mask = mask | (position[:, None] == position[None])
    return (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def test_a_constant_without_a_form_is_the_same_tensor_on_every_call() -> None:
    from refocus.tile_cache import CACHE

    fast, reports = compiled(irregular)
    agree(fast, irregular, *tensors())
    before = len(CACHE)
    for _ in range(3):
        agree(fast, irregular, *tensors())
    assert reports[0].sites[0].fused and len(CACHE) == before


class Filled(nn.Module):
    """A mask and the number that it fills with are both buffers; rows that it empties are set to zero afterwards."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.register_buffer("mask", tril())
        self.register_buffer("fill", torch.tensor(fill))
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.where(self.mask, q @ k.mT / self.scale, self.fill).softmax(-1)
        return torch.where(p.isnan(), torch.zeros_like(p), p) @ v


def test_a_number_that_a_mask_fills_with() -> None:
    model = Filled(-math.inf)
    fast, reports = compiled(model)
    agree(fast, model, *tensors())
    [site] = reports[0].sites
    assert site.mask == "j <= i" and site.tiles is not None and site.tiles.empty == 1
    model.fill.fill_(-0.5)
    with pytest.warns(StaleMask):
        agree(fast, model, *tensors())
    agree(fast, model, *tensors())


def test_a_number_that_leaves_a_share_is_no_fill() -> None:
    model = Filled(-3.0)
    fast, _ = compiled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleMask)
        agree(fast, model, *tensors())
        model.fill.fill_(2.0)
        agree(fast, model, *tensors())


def test_a_bias_that_is_zero_today_is_no_mask() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.zeros(1, 1, N, N))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT / 4 + self.bias).softmax(-1) @ v

    model = Biased()
    fast, _ = compiled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleMask)
        agree(fast, model, *tensors())
        model.bias.normal_()
        agree(fast, model, *tensors())
