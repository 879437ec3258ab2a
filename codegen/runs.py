"""Runs of query tiles that need the same tiles of keys, or such as move along with them.

    a window of 48 in tiles of 32      query tile      0     1     2     3    ...
                                       keys            0-31  0-63  0-95  32-127  64-159  ...

From tile 2 on every tile of queries needs 96 keys, each 32 further than the one before: one run, which is computed in
one go, as products of matrices that overlap in memory. The same holds for blocks on the diagonal, for tokens that all
attend to (which do not move), and for whole rows. What keys alone decide (a border of zeros) is part of what must be
the same, so that in the inside of a run nothing is asked of it; and so is which of its tiles are partial: only there is
the mask evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from refocus.evaluate import Scope, arange_env, size_of
from refocus.ir import BOOL, Axis, Call, Dot, Expr, Region, Sym
from refocus.masks import EMPTY, PARTIAL
from refocus.tile_grid import is_exact

# Keys of one column, at most: a row of keys without gaps is cut at these.
WIDEST = 512


@dataclass(frozen=True)
class Column:
    """`length` keys from `start` on for the first tile of a run, and `step` keys further for each next one. `masked`:
    (first, count) of those keys of them that are in partial tiles; all pairs with any other are kept."""

    start: int
    step: int
    length: int
    masked: tuple[tuple[int, int], ...] = ()

    @property
    def is_masked_throughout(self) -> bool:
        return self.masked == ((0, self.length),)


@dataclass(frozen=True)
class Run:
    """`tiles` tiles of `length` queries, from `start` on, each with all of these columns."""

    start: int
    tiles: int
    length: int
    columns: tuple[Column, ...]

    @property
    def queries(self) -> int:
        return self.tiles * self.length

    @property
    def widest(self) -> int:
        return max((c.length for c in self.columns), default=0)

    @property
    def overlaps(self) -> bool:
        """Whether one key is in several tiles at once."""
        return any(0 < c.step < c.length for c in self.columns)

    @property
    def pairs(self) -> int:
        """How many pairs of queries and keys it computes."""
        return self.queries * sum(c.length for c in self.columns)

    def cut(self, most: int) -> list[Run]:
        """The same in runs of at most `most` tiles."""
        if self.tiles <= most:
            return [self]
        return [
            Run(
                self.start + first * self.length,
                min(most, self.tiles - first),
                self.length,
                tuple(replace(c, start=c.start + first * c.step) for c in self.columns),
            )
            for first in range(0, self.tiles, most)
        ]


@dataclass(frozen=True)
class Tiled:
    """Queries and keys in tiles; `query_kinds` and `key_kinds`: a number for each tile, the same where what is decided
    by position alone is."""

    queries: int
    keys: int
    block_q: int
    block_k: int
    query_kinds: tuple[int, ...]
    key_kinds: tuple[int, ...]

    @staticmethod
    def of(region: Region, block_q: int, block_k: int, sizes: Mapping[Sym, int]) -> Tiled:
        queries, keys = (size_of(a.size, sizes) for a in (region.query, region.key))
        rows, columns = (
            _kinds(_decided_by(region, axis), axis, block, sizes)
            for axis, block in ((region.query, block_q), (region.key, block_k))
        )
        return Tiled(queries, keys, block_q, block_k, rows, columns)

    def everything(self) -> tuple[Column, ...]:
        """All keys, for each query."""
        step = max(self.block_k, WIDEST // self.block_k * self.block_k)
        return tuple(Column(k, 0, min(step, self.keys - k)) for k in range(0, self.keys, step))

    def runs(self, state: Tensor) -> list[Run]:
        """Runs for the states [query tiles, key tiles] of a mask. Tiles without any key are in runs, too."""
        rows: list[list[tuple[int, int]]] = [[] for _ in range(state.shape[0])]
        live = (state != EMPTY).nonzero()
        for (row, column), what in zip(live.tolist(), state[live[:, 0], live[:, 1]].tolist()):
            rows[row].append((column, what))
        found: list[Run] = []
        kinds: list[int] = []
        for row, tiles in enumerate(rows):
            start = row * self.block_q
            one = Run(start, 1, min(self.block_q, self.queries - start), self._columns(tiles))
            longer = _longer(found[-1], one) if found and kinds[-1] == self.query_kinds[row] else None
            if longer is None:
                found.append(one)
                kinds.append(self.query_kinds[row])
            else:
                found[-1] = longer
        return found

    def _columns(self, tiles: Sequence[tuple[int, int]]) -> tuple[Column, ...]:
        """Columns without gaps, of one kind of keys, no longer than `WIDEST`."""
        most = max(1, WIDEST // self.block_k)
        out = []
        gaps = groupby(enumerate(tiles), key=lambda item: (item[1][0] - item[0], self.key_kinds[item[1][0]]))
        for _, group in gaps:
            side_by_side = [tile for _, tile in group]
            for first in range(0, len(side_by_side), most):
                some = side_by_side[first : first + most]
                start, end = some[0][0] * self.block_k, min(self.keys, (some[-1][0] + 1) * self.block_k)
                out.append(Column(start, 0, end - start, self._masked(some, start, end)))
        return tuple(out)

    def _masked(self, tiles: Sequence[tuple[int, int]], start: int, end: int) -> tuple[tuple[int, int], ...]:
        """(first, count) of the keys in partial tiles, from `start` on."""
        out = []
        for what, group in groupby(tiles, key=lambda tile: tile[1]):
            side_by_side = [tile for tile, _ in group]
            if what == PARTIAL:
                first = side_by_side[0] * self.block_k
                out.append((first - start, min(end, (side_by_side[-1] + 1) * self.block_k) - first))
        return tuple(out)


def _longer(run: Run, row: Run) -> Run | None:
    """A run with one more tile; None where that differs."""
    if row.length != run.length or len(row.columns) != len(run.columns):
        return None
    columns = []
    for old, new in zip(run.columns, row.columns):
        step = old.step if run.tiles > 1 else new.start - old.start
        if step < 0 or new != Column(old.start + run.tiles * step, 0, old.length, old.masked):
            return None
        columns.append(replace(old, step=step))
    return Run(run.start, run.tiles + 1, run.length, tuple(columns))


def _decided_by(region: Region, axis: Axis) -> list[Expr]:
    """Conditions and clamps within what is loaded that the position on one axis decides."""
    dots = [node for e in region.expressions for node in e.walk() if isinstance(node, Dot)]
    loads = [x for dot in dots for x in (dot.query, dot.key)]
    found = dict.fromkeys(node for e in (region.values, *loads) for node in e.walk() if isinstance(node, Call))
    out: dict[Expr, None] = {}
    for node in found:
        if node.op == "where":
            out[node.args[0]] = None
        elif node.op in ("min", "max") and node.is_int:
            out.update((Call("eq", (node, a), BOOL), None) for a in node.args if a.axes)
    return [e for e in out if e.axes == {axis} and not e.loads and is_exact(e)]


def _kinds(conditions: Sequence[Expr], axis: Axis, block: int, sizes: Mapping[Sym, int]) -> tuple[int, ...]:
    """A number for each tile, the same where each condition holds for all of it, none of it, or some of it."""
    size = size_of(axis.size, sizes)
    count = -(-size // block)
    kind = torch.zeros(count, dtype=torch.int64)
    if conditions and size:
        scope = Scope(arange_env((axis,), sizes), {}, sizes)
        for condition in conditions:
            holds = scope.tensor(condition).expand(size)
            padded = torch.cat([holds, holds[-1:].expand(count * block - size)]).view(count, block)
            kind = 3 * kind + padded.all(1).long() + padded.any(1).long()
            kind = kind.unique(return_inverse=True)[1]
    return tuple(kind.tolist())
