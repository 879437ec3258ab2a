"""Numbers as tensors hold them: bytes come round, floats of few bits round, and masks are made of both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refocus import simplify as s
from refocus.ir import Axis, Const, Load
from refocus.testing import check
from refocus.widths import narrowed, recast
from tests.drawn import Attention, drawn, fuses, scores

N = 24


def difference_of_bytes(i: Tensor, j: Tensor) -> Tensor:
    return (j < 10).byte() - (i < 7).byte() > 0  # 0 - 1 is 255


def small_integers(i: Tensor, j: Tensor) -> Tensor:
    return (i * 10).to(torch.int8) - (j * 10).to(torch.int8) >= 0


def mixed_integers(i: Tensor, j: Tensor) -> Tensor:
    return i.int() * 200_000_000 + j.int() * 100_000_000 >= 0


def a_hash(i: Tensor, j: Tensor) -> Tensor:
    return (i * 0x2545F4914F6CDD1D + j * 0x5851F42D4C957F2D) % 3 == 0


def positions_of_few_bits(i: Tensor, j: Tensor) -> Tensor:
    return (i + 250).to(torch.bfloat16) >= (j + 250).to(torch.bfloat16)  # 257 is 256


def tenths(i: Tensor, j: Tensor) -> Tensor:
    return i.to(torch.bfloat16) * 0.1 - j.to(torch.bfloat16) * 0.1 < 0.3


@pytest.mark.parametrize(
    "allowed",
    [difference_of_bytes, small_integers, mixed_integers, a_hash, positions_of_few_bits, tenths],
    ids=lambda f: f.__name__,
)
def test_masks_made_of_numbers_that_do_not_fit(allowed: Callable[[Tensor, Tensor], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(N)[:, None], torch.arange(N)
        return scores(q, k).masked_fill(~(allowed(i, j) | (i == j)), float("-inf")).softmax(-1) @ v

    fuses(function, N)


def test_bytes_that_are_given() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return scores(q, k).masked_fill((one - other)[:, None, None] > 1, -1e9).softmax(-1) @ v

    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 2, (2, N), generator=generator).byte() for _ in range(2))
    fuses(function, N, more=(one, other))


def test_what_fits_stays_as_it_is() -> None:
    i, x = Axis("i", Const(100)), Load("x", (Const(0),), "int64")
    assert narrowed(i, torch.int8) == i and narrowed(s.mul(i, 1000), torch.int32) == s.mul(i, 1000)
    assert narrowed(s.add(x, i, 4096), torch.int32) == s.add(x, i, 4096)
    assert narrowed(s.mul(x, 1 << 20), torch.int32) != s.mul(x, 1 << 20)
    assert narrowed(s.add(x, i), torch.int8) == s.sub(s.mod(s.add(x, i, 128), 256), 128)
    assert narrowed(s.mul(i, 2), torch.int8) != s.mul(i, 2)
    assert narrowed(s.mul(i, 1 << 60), torch.int64) is None
    assert narrowed(i, torch.bfloat16) == i and narrowed(s.mul(i, 3), torch.bfloat16) is None
    assert recast(x, torch.int64, torch.int64) == x and recast(x, torch.uint8, torch.int16) == x
    assert recast(x, torch.int64, torch.uint8) == s.mod(x, 256)


def test_powers_of_integers_are_not_those_of_floats() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(N)[:, None], torch.arange(N)
        return scores(q, k).masked_fill((3 ** (i - j).abs() > 9) | ((i - j) ** 2 > 7), float("-inf")).softmax(-1) @ v

    report = check(Attention(function), drawn(N), sites=1, lower=False).report
    assert "**" not in report.sites[0].mask
