"""Tile maps by ranges of query tiles, where a whole map would take too much memory.

    tile_rows(...)      (first query tile, state of each tile of some rows), range after range
    count_tiles(...)    how many tiles are empty, partial and full: a million tokens in a few megabytes

A range of queries is the mask itself with `start + i` in place of `i`, so nothing else has to know about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from refocus import debug
from refocus.evaluate import size_of
from refocus.ir import Axis, Const, Expr, Sym
from refocus.refine import refine
from refocus.simplify import add, substitute
from refocus.tile_grid import is_exact, tile_states

# Tiles at once: interval arithmetic keeps some ten numbers of eight bytes for each.
_AT_ONCE = 1 << 18
# Pairs that may be looked at to count tiles.
_COUNTED_PAIRS = 1 << 22


class Counts(NamedTuple):
    empty: int
    partial: int
    full: int


def tile_rows(
    mask: Expr,
    batch: Iterable[Axis],
    query: Axis,
    key: Axis,
    block_q: int,
    block_k: int,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[Sym, int],
    device: torch.device | str | None = None,
    at_once: int = _AT_ONCE,
    budget: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """What `tile_states` gives, for as many query tiles at a time as make no more than `at_once` tiles; with a budget
    of pairs, tiles that are open are decided by looking at so many (`refocus.refine`)."""
    used = tuple(b for b in batch if b in mask.axes)
    queries, keys = size_of(query.size, sizes), size_of(key.size, sizes)
    budget = budget if is_exact(mask) and not debug.disabled("refined-tiles") else 0

    def refined(state: Tensor, here: Expr, part: Axis, length: int, share: int) -> Tensor:
        if not share:
            return state
        return refine(state, here, used, part, key, (block_q, block_k), (length, keys), tensors, sizes, share)

    across = max(1, -(-keys // block_k) * prod(size_of(b.size, sizes) for b in used))
    count, rows = max(1, at_once // across), -(-queries // block_q)
    if rows <= count:
        state = tile_states(mask, used, query, key, block_q, block_k, tensors, sizes, device)
        yield 0, refined(state, mask, query, queries, budget)
        return
    share = budget // -(-rows // count)
    for first in range(0, rows, count):
        start = first * block_q
        length = min(count * block_q, queries - start)
        part = Axis(query.name, Const(length))
        here = substitute(mask, {query: add(part, start)})
        # What the range decides may take batch axes out of the mask; the shape stays.
        state = tile_states(here, used, part, key, block_q, block_k, tensors, sizes, device)
        shape = [size_of(b.size, sizes) if b in here.axes else 1 for b in used]
        full = [size_of(b.size, sizes) for b in used]
        state = state.reshape(*shape, *state.shape[-2:]).expand(*full, *state.shape[-2:])
        yield first, refined(state, here, part, length, share)


def count_tiles(
    mask: Expr,
    batch: Iterable[Axis],
    query: Axis,
    key: Axis,
    block_q: int,
    block_k: int,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[Sym, int],
    device: torch.device | str | None = None,
) -> Counts:
    """How many tiles are in each state, over all distinct maps."""
    total = [0, 0, 0]
    rows = tile_rows(mask, tuple(batch), query, key, block_q, block_k, tensors, sizes, device, budget=_COUNTED_PAIRS)
    for _, state in rows:
        partial, full = int((state == 1).sum()), int((state == 2).sum())
        total = [total[0] + state.numel() - partial - full, total[1] + partial, total[2] + full]
    return Counts(*total)
