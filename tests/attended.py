"""What fused regions run on: records each call of the tiled engine, and reads its mask and tiles back densely."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.codegen import operator, tiled
from refocus.codegen.plan import Plan
from refocus.evaluate import Scope, arange_env, evaluate, size_of
from refocus.ir import Expr, Region, Sym
from refocus.masks import TileMap, Tiling, classify


@dataclass(frozen=True, eq=False)
class Attended:
    """One region with the tensors and sizes it ran on."""

    region: Region
    operands: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {o.name: t for o, t in zip(self.region.operands, self.operands)}

    @property
    def numbers(self) -> dict[Sym, int]:
        return dict(zip(self.region.syms, self.sizes))

    def mask(self) -> Tensor:
        """Which pairs are kept: bool (*batch, queries, keys), every element evaluated."""
        region = self.region
        axes = (*region.batch, region.query, region.key)
        kept = evaluate(region.mask, arange_env(axes, self.numbers), self.tensors, self.numbers)
        return kept.expand([size_of(a.size, self.numbers) for a in axes])

    def tiles(self, rows: int, columns: int) -> TileMap:
        """The tile map as an engine gets it at run time."""
        return classify(self.region.mask, Tiling.of(self.region, rows, columns, self.tensors, self.numbers, "cpu"))

    def visits(self, rows: int, columns: int) -> tuple[int, int]:
        """How many tiles the engine computes scores of, and on how many of them it evaluates the mask."""
        counts: dict[Expr, int] = {}
        tensor: Callable[[Scope, Expr], Tensor] = Scope.tensor
        tiles = self.tiles(rows, columns)

        def counting(scope: Scope, expr: Expr) -> Tensor:
            counts[expr] = counts.get(expr, 0) + 1
            return tensor(scope, expr)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scope, "tensor", counting)
            patch.setattr(tiled, "classify", lambda *_: tiles)  # its own evaluations do not count
            tiled.run(self.region, Plan("tiled", block_q=rows, block_k=columns), self.operands, self.sizes)
        return counts.get(self.region.score, 0), counts.get(self.region.mask, 0)


@contextmanager
def attending() -> Iterator[list[Attended]]:
    """Collects every region that runs meanwhile."""
    calls: list[Attended] = []
    find = operator.engine_named

    def named(name: str) -> operator.Engine:
        run = find(name)

        def recorded(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int] = ()) -> Tensor:
            calls.append(Attended(region, tuple(t.detach().clone() for t in operands), tuple(sizes)))
            return run(region, plan, operands, sizes)

        return recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "engine_named", named)
        yield calls


def tile_states(allowed: Tensor, rows: int, columns: int) -> Tensor:
    """int8 (..., query tiles, key tiles) of a dense mask (..., queries, keys), by looking at every pair: 0 none is
    allowed, 2 all are, else 1. Positions past the end do not count."""
    margin = (0, -allowed.shape[-1] % columns, 0, -allowed.shape[-2] % rows)

    def tiles(padding: bool) -> Tensor:
        return F.pad(allowed, margin, value=padding).unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))

    return tiles(False).any(-1).any(-2).to(torch.int8) + tiles(True).all(-1).all(-2).to(torch.int8)


def merged(states: Tensor) -> Tensor:
    """The states (query tiles, key tiles) of an engine that takes all batch positions at once."""
    flat: Any = states.reshape(-1, *states.shape[-2:])
    low, high = flat.amin(0), flat.amax(0)
    return torch.where(low == high, low, 1)
