"""Tile maps by ranges of query tiles, where a whole map would take too much memory.

    tile_rows(...)      (first query tile, state of each tile of some rows), range after range
    count_tiles(...)    how many tiles are empty, partial and full: a million tokens in a few megabytes

A range of queries is the mask itself with `start + i` in place of `i`, so nothing else has to know about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import NamedTuple

from torch import Tensor

from refocus import debug
from refocus.evaluate import size_of
from refocus.ir import Axis, Const, Expr
from refocus.refine import refine
from refocus.simplify import add, substitute
from refocus.tile_grid import TileGrid, is_exact, tile_states
from refocus.tiling import Tiling

# Tiles at once: interval arithmetic keeps some ten numbers of eight bytes for each.
_AT_ONCE = 1 << 18
# Pairs that may be looked at to count tiles.
_COUNTED_PAIRS = 1 << 22


class Counts(NamedTuple):
    empty: int
    partial: int
    full: int


def tile_rows(mask: Expr, tiling: Tiling, at_once: int = _AT_ONCE, budget: int = 0) -> Iterator[tuple[int, Tensor]]:
    """What `tile_states` gives, for as many query tiles at a time as make no more than `at_once` tiles; with a budget
    of pairs, tiles that are open are decided by looking at so many (`refocus.refine`)."""
    tiling = tiling.seen_by(mask)
    query, block = tiling.query, tiling.block_q
    full = [size_of(b.size, tiling.sizes) for b in tiling.batch]
    budget = budget if is_exact(mask) and not debug.disabled("refined-tiles") else 0
    across = max(1, -(-tiling.keys // tiling.block_k) * prod(full))
    count, rows = max(1, at_once // across), -(-tiling.queries // block)
    if rows <= count:
        state = tile_states(mask, tiling)
        yield 0, refine(state, mask, tiling, budget) if budget else state
        return
    share = budget // -(-rows // count)
    grid: TileGrid | None = None
    for first in range(0, rows, count):
        start = first * block
        part = Axis(query.name, Const(min(count * block, tiling.queries - start)))
        here, some = substitute(mask, {query: add(part, start)}), replace(tiling, query=part)
        # What the range decides may take batch axes out of the mask; the shape stays.
        seen = some.seen_by(here)
        grid = TileGrid(seen) if grid is None else grid.of_rows(seen)
        state = grid.states(here)
        shape = [size if b in here.axes else 1 for b, size in zip(tiling.batch, full)]
        state = state.reshape(*shape, *state.shape[-2:]).expand(*full, *state.shape[-2:])
        yield first, refine(state, here, some, share) if share else state


def count_tiles(mask: Expr, tiling: Tiling) -> Counts:
    """How many tiles are in each state, over all distinct maps."""
    total = [0, 0, 0]
    for _, state in tile_rows(mask, tiling, budget=_COUNTED_PAIRS):
        partial, full = int((state == 1).sum()), int((state == 2).sum())
        total = [total[0] + state.numel() - partial - full, total[1] + partial, total[2] + full]
    return Counts(*total)
