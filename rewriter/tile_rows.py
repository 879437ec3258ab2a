"""Tile maps by ranges of query tiles, where a whole map would take too much memory.

    tile_rows(...)      (first query tile, state of each tile of some rows), range after range
    count_tiles(...)    how many tiles are empty, partial and full: a million tokens in a few megabytes

A range is the same mask over other positions of the query. To write `start + i` in the query's place would simplify one
mask for each range, and leave all of them in the simplifier's memory: forty megabytes at a million tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import NamedTuple

from torch import Tensor

from refocus import debug
from refocus.evaluate import size_of
from refocus.ir import Expr
from refocus.refine import leaves_open, refine
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
    block = tiling.block_q
    full = [size_of(b.size, tiling.sizes) for b in tiling.batch]
    is_open = leaves_open(mask, tiling.query, tiling.key, (block, tiling.block_k))
    if not is_exact(mask) or not is_open or debug.disabled("refined-tiles"):
        budget = 0
    across = max(1, -(-tiling.keys // tiling.block_k) * prod(full))
    count, rows = max(1, at_once // across), -(-tiling.queries // block)
    if rows <= count:
        state = tile_states(mask, tiling)
        yield 0, refine(state, mask, tiling, budget) if budget else state
        return
    share = budget // -(-rows // count)
    grid: TileGrid | None = None
    for first in range(0, rows, count):
        ends = first * block, min((first + count) * block, tiling.queries)
        part = replace(tiling, rows=(tiling.first + ends[0], tiling.first + ends[1]))
        grid = TileGrid(part) if grid is None else grid.of_rows(part)
        state = grid.states(mask)
        yield first, refine(state, mask, part, share) if share else state


def count_tiles(mask: Expr, tiling: Tiling) -> Counts:
    """How many tiles are in each state, over all distinct maps."""
    total = [0, 0, 0]
    for _, state in tile_rows(mask, tiling, budget=_COUNTED_PAIRS):
        kept, full = int(state.count_nonzero()), int((state == 2).count_nonzero())
        total = [total[0] + state.numel() - kept, total[1] + kept - full, total[2] + full]
    return Counts(*total)
