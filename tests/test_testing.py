"""`refocus.testing.check` fails when it should, and the tolerances measure what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refocus import testing
from refocus.testing import Checked, CheckFailed, check, check_gradients, refocus_check, rewritten  # noqa: F401
from refocus.tolerances import TABLE, agree, allowed_error, difference, magnitude, tolerance


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float = 0.25) -> Tensor:
        return (q @ k.mT * scale).softmax(-1) @ v


class Gated(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * k).sigmoid() * v


def tensors(length: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, length, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    return q, k, v


def test_a_good_attention() -> None:
    found = check(Attention(), tensors(), {"scale": 0.5}, lower=False)
    assert found.report.sites[0].fused and found.errors["tiled"] < 1e-5
    assert "tiled" in str(found) and "eager" in str(found)


def test_the_fixture(refocus_check: Callable[..., Checked]) -> None:  # noqa: F811
    assert refocus_check is check


def test_what_is_not_attention_fails() -> None:
    with pytest.raises(CheckFailed, match="no attention was found"):
        check(Gated(), tensors(), lower=False)
    assert check(Gated(), tensors(), fused=False, lower=False).errors["tiled"] < 1e-5


def test_another_family_or_count_fails() -> None:
    with pytest.raises(CheckFailed, match="family 'softmax', not 'linear'"):
        check(Attention(), tensors(), family="linear", lower=False)
    with pytest.raises(CheckFailed, match="2 attention sites were expected, 1 were found"):
        check(Attention(), tensors(), sites=2, lower=False)


def test_what_an_engine_does_not_take_fails() -> None:
    class Capped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).tanh().softmax(-1) @ v

    with pytest.raises(CheckFailed, match=r"engine 'sdpa': attention0 .* was not fused: "):
        check(Capped(), tensors(), engines=("tiled", "sdpa"), lower=False)


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_gradients(Attention(), tensors(), lower=False)["tiled"] < 1e-5

    def wrong(module: Any, **options: Any) -> Callable[..., Any]:
        run = rewritten(module, **options)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = run(q, k, v)
            return out + 1e-3 * (out - out.detach())

        return call

    monkeypatch.setattr(testing, "rewritten", wrong)
    with pytest.raises(CheckFailed, match="the gradient of input 0 differs"):
        check(Attention(), tensors(), lower=False, gradients=True)
    with pytest.raises(CheckFailed, match="no attention was found"):
        check_gradients(Gated(), tensors(), lower=False)


def test_a_gradient_of_zero_may_be_none() -> None:
    """That of a mask of floats: the eager code multiplies before it compares, and returns zeros."""

    class Masked(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
            fill = out[:, None] * out
            fill = fill.masked_fill(fill != 0, -100.0).masked_fill(fill == 0, 0.0)
            return (q @ k.mT + fill).softmax(-1) @ v

    q, k, v = tensors()
    check(Masked(), (q, k, v, (torch.arange(q.shape[1]) > 5).float()), lower=False, gradients=True)


def test_a_gradient_that_is_lost_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(module: Any, **options: Any) -> Callable[..., Any]:
        run = rewritten(module, **options)
        return lambda q, k, v: run(q, k, v.detach())

    monkeypatch.setattr(testing, "rewritten", losing)
    with pytest.raises(CheckFailed, match="the gradient of input 2 differs"):
        check_gradients(Attention(), tensors(), lower=False)


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, **options: Any) -> Callable[..., Any]:
        run = rewritten(module, **options)
        return lambda *args, **kwargs: run(*args, **kwargs) * (1 + 1e-4)

    monkeypatch.setattr(testing, "rewritten", wrong)
    with pytest.raises(CheckFailed, match="differs from the float64 result"):
        check(Attention(), tensors(), lower=False)


def test_a_stored_score_matrix_fails() -> None:
    small = check(Attention(), tensors(512), memory_share=0.5, lower=False)
    assert small.largest["eager"] == 2 * 512 * 512 * 4 > 2 * small.largest["tiled"]
    with pytest.raises(CheckFailed, match="bytes was made"):
        check(Attention(), tensors(512), memory_share=0.001, lower=False)


def test_inputs_are_left_as_they_are() -> None:
    class Writes(Attention):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float = 0.25) -> Tensor:
            out = super().forward(q, k, v, scale)
            v.zero_()
            return out

    inputs = tensors()
    check(Writes(), inputs, lower=False)
    assert inputs[2].abs().max() > 0


def test_difference() -> None:
    nan, inf = math.nan, math.inf
    a = torch.tensor([1.0, nan, inf, -inf])
    assert difference(a, a) == 0.0
    assert difference(a + 0.5, a) == 0.5
    for b in ([nan, nan, inf, -inf], [1.0, 2.0, inf, -inf], [1.0, nan, -inf, -inf], [1.0, nan, 3.0, -inf]):
        assert difference(torch.tensor(b), a) == inf
        assert difference(a, torch.tensor(b)) == inf
    assert difference(a, a[:3]) == inf
    assert difference(torch.tensor([]), torch.tensor([])) == 0.0
    assert difference(torch.tensor([3, 4]), torch.tensor([3, 5])) == 1.0
    assert magnitude(torch.tensor([1.0, -4.0, inf, nan])) == 4.0 and magnitude(torch.tensor([nan])) == 0.0


def test_tolerances() -> None:
    assert allowed_error(torch.float32, 1e-3, 10.0) == pytest.approx(1.5e-3 + 10 * TABLE[torch.float32].floor)
    assert tolerance(torch.int64).floor == 0.0
    floors = [TABLE[d].floor for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert floors == sorted(floors) and all(t.floor < t.pairwise and t.reason for t in TABLE.values())
    x = torch.ones(4)
    assert agree(x, x * (1 + 1e-6)) and not agree(x, x * 1.01) and not agree(x, x.double())
    assert agree(torch.arange(4), torch.arange(4)) and not agree(torch.arange(4), torch.arange(4) + 1)
