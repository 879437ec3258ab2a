"""Attention and masks under `torch.vmap`, over any axes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refocus
from refocus.testing import check, rewritten

BATCH, HEADS, TOKENS, WIDTH = 2, 3, 24, 8
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.linspace(0.2, 0.5, HEADS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v) * self.scale.sum()


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, BATCH, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / math.sqrt(WIDTH)).softmax(-1) @ v

    return torch.vmap(attend, in_dims=1, out_dims=2)(q, k, v)


def with_slopes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(TOKENS, device=q.device)
    past = place <= place[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        scores = torch.einsum("id,jd->ij", q, k) - slope * (place[:, None] - place)
        return torch.einsum("ij,jd->id", scores.masked_fill(~past, -math.inf).softmax(-1), v)

    slopes = torch.arange(1, HEADS + 1, device=q.device) / HEADS
    return torch.func.vmap(torch.func.vmap(attend), in_dims=(0, 0, 0, None))(q, k, v, slopes)


def row_by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(TOKENS, device=q.device)

    def row(q: Tensor, at: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.where(place <= at, k @ q, -1e9).softmax(0) @ v

    rows = torch.vmap(row, in_dims=(0, 0, None, None))
    return torch.vmap(torch.vmap(rows, in_dims=(0, None, 0, 0)), in_dims=(0, None, 0, 0))(q, place, k, v)


def the_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), in_dims=1, out_dims=1)(q, k, v)


def a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A condition on single positions, mapped over all four axes; one of them tells documents apart."""
    document = (v[:, 0, :, 0] > 0).long().cumsum(-1)

    def allowed(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (document[batch, i] == document[batch, j])

    for axis in (3, 2, 1, 0):
        allowed = torch.vmap(allowed, in_dims=tuple(0 if k == axis else None for k in range(4)))
    mask = allowed(*(torch.arange(n, device=q.device) for n in (BATCH, HEADS, TOKENS, TOKENS)))
    return (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (over_heads, ""),
        (with_slopes, "j <= i"),
        (row_by_row, "j <= i"),
        (the_kernel, "j <= i"),
        (a_mask, "t0[b,i] == t0[b,j] and j <= i"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_attention_under_vmap(function: Function, mask: str) -> None:
    (site,) = check(Attention(function), inputs(), lower=False, gradients=True).report.sites
    assert site.fused and site.mask == mask


def test_lowered() -> None:
    check(Attention(with_slopes), inputs(), gradients=True, sites=1)


def test_sizes_that_are_not_known() -> None:
    found: list[refocus.Report] = []
    try:
        torch.compile(over_heads, backend="eager", dynamic=True)(*torch.randn(3, BATCH, HEADS, TOKENS, WIDTH).unbind())
    except torch._dynamo.exc.TorchRuntimeError:
        pytest.skip("this torch does not trace a vmap over symbolic sizes")  # 2.11, whatever the backend
    torch._dynamo.reset()
    run = rewritten(over_heads, engine="tiled", dynamic=True, require=True, report=found.append)
    with torch.no_grad():
        for tokens in (TOKENS, 33):
            given = torch.randn(3, BATCH, HEADS, tokens, WIDTH).unbind()
            torch.testing.assert_close(run(*given), over_heads(*given))
    assert len(found) == 1 and found[0].sites


def test_a_constant_and_another_attention_beside_it() -> None:
    """What stands outside of the vmap is read as ever; a literal under it is one of the graph."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scales = torch.tensor([[0.5], [2.0]]).to(q).repeat(TOKENS // 2, 1)
            return (q * scales @ k.mT).softmax(-1) @ v

        return F.scaled_dot_product_attention(q, torch.vmap(torch.vmap(attend))(q, k, v), v)

    check(Attention(function), inputs(), lower=False, gradients=True, sites=2)


def test_what_is_not_flattened_runs_as_it_is() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.no_grad():
                scores = q @ k.mT
            return scores.softmax(-1) @ v

        return torch.vmap(torch.vmap(attend))(q, k, v)

    check(Attention(function), inputs(), fused=False, lower=False, gradients=True)
    found: list[refocus.Report] = []
    rewritten(Attention(function), engine="tiled", report=found.append)(*inputs())
    assert not found[0].sites and any("switched on or off under a vmap" in note for note in found[0].notes)
