"""Which reading of a site is least work, before any engine is chosen: how many pairs its tiles hold.

Keys that a model gathers for each query, at offsets from it, are read in two ways: over the offsets, as written, or
over the tokens that they reach, under a mask (see `refocus.bands`). Both give equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from refocus import simplify
from refocus.evaluate import size_of
from refocus.ir import TRUE, Call, Const, Expr, Region, Sym
from refocus.masks import Tiling, count_tiles
from refocus.simplify import conjuncts


def prefers_tokens(tokens: Region, offsets: Region, numbers: Mapping[Sym, int]) -> bool:
    """Whether a region over tokens under a mask is less work than the same over an axis of offsets.

    The first visits whole tiles for the few pairs that its mask keeps; the second reads keys anew for every query, and
    products of fewer than 16 rows cost as much as 16."""
    return _tile_pairs(tokens, numbers, offsets) <= _tile_pairs(offsets, numbers)


def pairs_of(region: Region, numbers: Mapping[Sym, int]) -> int:
    return math.prod(size_of(a.size, numbers) for a in (*region.batch, region.query, region.key))


def _tile_pairs(region: Region, numbers: Mapping[Sym, int], written: Region | None = None) -> float:
    batch = math.prod(size_of(a.size, numbers) for a in region.batch)
    queries, keys = (max(16, size_of(a.size, numbers)) for a in (region.query, region.key))
    return batch * queries * keys * live_share(region, 64, 64, numbers, written)


def _reads_pairs(part: Expr, region: Region) -> bool:
    """Whether a tensor is read for each pair: a dense mask says nothing about tiles before it is read."""
    return any({region.query, region.key} <= load.axes for load in part.loads)


def _spill(part: Expr, region: Region, block_q: int, block_k: int) -> float:
    """How many pairs a visited tile holds for each pair of a chosen block in it, roughly."""
    spill = 1.0
    for axis, tile in ((region.query, block_q), (region.key, block_k)):
        found = [n.args[1] for n in part.walk() if isinstance(n, Call) and n.op == "floordiv" and n.args[0] == axis]
        block = max((int(b.value) for b in found if isinstance(b, Const)), default=1)
        spill *= 1.0 if block % tile == 0 else tile / block if tile % block == 0 else 1 + tile / block
    return spill


def live_share(
    region: Region, block_q: int, block_k: int, numbers: Mapping[Sym, int], written: Region | None = None
) -> float:
    """The share of tiles that are not empty: counted for the closed part of the mask, guessed for what is loaded.

    `written`: the same over an axis of offsets, which holds the pairs that the mask keeps and no others."""
    closed: Expr = TRUE
    loaded = 1.0
    kept = None if written is None else pairs_of(written, numbers) / max(1, pairs_of(region, numbers))
    for part in conjuncts(region.mask):
        if not part.loads:
            closed = simplify.and_(closed, part)
        elif region.query in part.axes and region.key in part.axes and not _reads_pairs(part, region):
            # documents, clusters; blocks that were chosen
            loaded *= 0.7 if kept is None else min(1.0, kept * _spill(part, region, block_q, block_k))
    if closed == TRUE or isinstance(closed, Const):
        return loaded
    batch = [a for a in region.batch if a in closed.axes and size_of(a.size, numbers) <= 64]
    if any(a in closed.axes and a not in batch for a in region.batch):
        return loaded
    tiles = count_tiles(closed, Tiling(tuple(batch), region.query, region.key, block_q, block_k, {}, numbers))
    return loaded * (1 - tiles.empty / max(1, sum(tiles)))
