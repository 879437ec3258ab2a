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
from refocus.grid import Grid
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

    def visits(self, rows: int, columns: int) -> dict[tuple[tuple[int, int], ...], Tensor]:
        """What the engine does with each tile, for each part of the batch (first and last position on each axis) that
        it takes at once: int8 (query tiles, key tiles), 0 not visited, 1 with the mask evaluated, 2 without."""
        tiles, found = self.tiles(rows, columns), {}
        shape = [
            -(-size_of(a.size, self.numbers) // b) for a, b in ((self.region.query, rows), (self.region.key, columns))
        ]
        evaluated: dict[tuple[tuple[int, int], ...], Tensor] = {}  # the tiles that hold a pair it is evaluated at
        inside: list[tuple[tuple[int, int], ...]] = []
        tensor, online = Scope.tensor, tiled.Tiles._online

        def noticing(scope: Scope, expr: Expr) -> Tensor:
            if inside and expr == self.region.mask:
                at, to = (_positions(scope.axes[a]) for a in (self.region.query, self.region.key))
                evaluated[inside[-1]][torch.broadcast_tensors(at // rows, to // columns)] = True
            return tensor(scope, expr)

        def recorded(engine: tiled.Tiles, scope: Scope, like: Tensor, score: Expr, run: Any, watch: bool) -> Any:
            if score != self.region.score:
                return online(engine, scope, like, score, run, watch)
            part = tuple(_ends(scope.axes[a]) for a in self.region.batch)
            done = found.setdefault(part, torch.zeros(shape, dtype=torch.int8))
            evaluated.setdefault(part, torch.zeros(shape, dtype=torch.bool))
            first, last = (x // engine.block_q for x in _ends(scope.axes[self.region.query]))
            for column in run:
                for k in range(last - first + 1):
                    start = column.start + k * column.step
                    for begin, count, what in ((0, column.length, 2), *((b, n, 1) for b, n in column.masked)):
                        tile, past = (start + begin) // engine.block_k, start + begin + count
                        place = done[first + k, tile : -(-past // engine.block_k)]
                        assert what == 1 or not place.any()  # once
                        place.fill_(what)
            inside.append(part)
            result = online(engine, scope, like, score, run, watch)
            inside.pop()
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scope, "tensor", noticing)
            patch.setattr(tiled.Tiles, "_online", recorded)
            patch.setattr(tiled, "classify", lambda *_: tiles)  # its own evaluations do not count
            tiled.run(self.region, Plan("tiled", block_q=rows, block_k=columns), self.operands, self.sizes)
        for part, done in found.items():
            assert torch.equal(evaluated[part], done == 1), "the mask is evaluated elsewhere than in partial tiles"
        return found


def _ends(position: Any) -> tuple[int, int]:
    return position.bounds() if isinstance(position, Grid) else (int(position), int(position))


def _positions(position: Any) -> Tensor:
    return position.tensor(torch.device("cpu")) if isinstance(position, Grid) else torch.tensor(int(position))


@contextmanager
def attending() -> Iterator[list[Attended]]:
    """Collects every region that runs meanwhile."""
    calls: list[Attended] = []
    find, find_trainer = operator.engine_named, operator._trainer

    def recording(run: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int] = ()) -> Any:
            calls.append(Attended(region, tuple(t.detach().clone() for t in operands), tuple(sizes)))
            return run(region, plan, operands, sizes)

        return recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "engine_named", lambda name: recording(find(name)))
        patch.setattr(operator, "_trainer", lambda name: (recording(find_trainer(name)[0]), find_trainer(name)[1]))
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
