"""Selections of blocks: the mask is a tensor read at i // T and j // T, however it is spelled, and tiles follow it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import refocus
from refocus import simplify as s
from refocus.ir import BOOL, Axis, Const, Load
from refocus.masks import EMPTY, FULL, Tiling, classify
from refocus.report import Report

T, BLOCKS = 32, 8
N = T * BLOCKS


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def interleaved(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    return attend(q, k, v, chosen.repeat_interleave(T, -2).repeat_interleave(T, -1))


def expanded(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    wide = chosen[:, :, :, None, :, None].expand(-1, -1, -1, T, -1, T)
    return attend(q, k, v, wide.reshape(*chosen.shape[:2], N, N))


def kronecker(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    return attend(q, k, v, torch.kron(chosen.float(), torch.ones(T, T)) > 0)


def indexed(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    block = torch.arange(N) // T
    return attend(q, k, v, chosen[:, :, block[:, None], block[None, :]])


def routed(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
    """The best blocks by the products of block means, and each block's own."""
    means = [x.unflatten(2, (-1, T)).mean(3) for x in (q, k)]
    best = (means[0] @ means[1].mT).topk(3, -1).indices
    kept = torch.zeros(chosen.shape, dtype=torch.bool).scatter(-1, best, True) | chosen
    return attend(q, k, v, kept.repeat_interleave(T, -2).repeat_interleave(T, -1))


@pytest.mark.parametrize("spelled", [interleaved, expanded, kronecker, indexed, routed])
def test_spellings(spelled: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, N, 16, generator=generator).unbind(0)
    chosen = (torch.rand(2, 2, BLOCKS, BLOCKS, generator=generator) < 0.3) | torch.eye(BLOCKS).bool()
    reports: list[Report] = []
    with torch.no_grad():
        fast = refocus.optimize(spelled, engine="tiled", report=reports.append)
        torch.testing.assert_close(fast(q, k, v, chosen), spelled(q, k, v, chosen), atol=2e-6, rtol=1e-5)
    assert f"[b,h,i//{T},j//{T}]" in reports[0].sites[0].mask


@pytest.mark.parametrize("tile", [(32, 32), (16, 32), (8, 16), (64, 64), (64, 32), (96, 32), (256, 256)])
def test_tiles_are_exact(tile: tuple[int, int]) -> None:
    h, i, j = Axis("h", Const(2)), Axis("i", Const(N)), Axis("j", Const(N))
    chosen = torch.rand(2, BLOCKS, BLOCKS, generator=torch.Generator().manual_seed(1)) < 0.4
    mask = Load("chosen", (h, s.floordiv(i, T), s.floordiv(j, T)), BOOL)
    state = classify(mask, Tiling((h,), i, j, *tile, {"chosen": chosen}, {})).state
    dense = chosen.repeat_interleave(T, 1).repeat_interleave(T, 2)
    for a, row in enumerate(dense.split(tile[0], 1)):
        for b, one in enumerate(row.split(tile[1], 2)):
            assert torch.equal(state[:, a, b] == FULL, one.flatten(1).all(1))
            assert torch.equal(state[:, a, b] == EMPTY, ~one.flatten(1).any(1))
