"""Which tiles of keys each tile of queries needs, as two int32 tensors for a kernel to read.

    counts   [mask's batch axes, query tiles, 2]           how many tiles are full; how many are not empty
    indices  [mask's batch axes, query tiles, key tiles]   full tiles in ascending order, then partial ones, then empty

The other way round for a kernel that loops over queries (KEYS); the state of each tile for one of pairs (PAIRS).

A closed form's lists are made once for each size. Those of a mask that loads something are made on each call, from the
least and the greatest element of each tile (see `refocus.tile_grid`): O(N) for vectors, and dense masks are remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from refocus import debug
from refocus.codegen.plan import Plan
from refocus.evaluate import size_of
from refocus.ir import FALSE, TRUE, Const, Expr, Region, Sym
from refocus.key_bounds import first_query, key_bounds, last_query
from refocus.masks import EMPTY, FULL, Tiling, classify, count_tiles
from refocus.simplify import substitute

# What a program has a tile of.
QUERIES, KEYS, PAIRS = "queries", "keys", "pairs"
Lists = tuple[Tensor, ...]
# Below so many tiles of keys, finding them takes as long as visiting them.
_FEW_TILES = 8
# Lists pay where bounds would visit so many more tiles than there are.
_IN_VAIN = 1.15
_TYPICAL = 2048  # positions, where a size is not known


def pays(region: Region, block_q: int, block_k: int) -> bool:
    """Whether loop bounds would visit many more tiles of `region.mask` than lists do."""
    if region.mask in (TRUE, FALSE) or debug.disabled("tile-lists"):
        return False
    sizes = {s: _TYPICAL if s in _lengths(region) else 2 for s in region.syms}
    if -(-size_of(region.key.size, sizes) // block_k) < _FEW_TILES:
        return False
    if region.mask.loads:
        bounds = key_bounds(region.mask, region.query, region.key, loads=True)
        solved = bounds.hi is not None and all(region.key not in load.axes for load in region.mask.loads)
        return not solved or any(region.query in load.axes for load in region.mask.loads)
    return _visited(region, block_q, block_k, sizes) > _IN_VAIN


def _lengths(region: Region) -> set[Expr]:
    return {n for axis in (region.query, region.key) for n in axis.size.walk() if isinstance(n, Sym)}


def _visited(region: Region, block_q: int, block_k: int, sizes: Mapping[Sym, int]) -> float:
    """Tiles that loop bounds visit, for each that is not empty."""
    batch = [a for a in region.batch if a in region.mask.axes]
    bounds = key_bounds(region.mask, region.query, region.key)
    fixed: dict[Expr, Expr] = {s: Const(v) for s, v in sizes.items()} | {a: Const(0) for a in batch}
    queries, keys = size_of(region.query.size, sizes), size_of(region.key.size, sizes)
    one = substitute(region.mask, {a: Const(0) for a in batch})
    tiles = count_tiles(one, Tiling((), region.query, region.key, block_q, block_k, {}, sizes))
    visited = 0
    for start in range(0, queries, block_q):
        last = min(start + block_q, queries) - 1
        at: dict[Expr, Expr] = {first_query(region.query): Const(start), last_query(region.query): Const(last)}
        low, high = (
            default if end is None else size_of(substitute(substitute(end, fixed), at), sizes)
            for end, default in ((bounds.lo, 0), (bounds.hi, keys))
        )
        visited += max(0, -(-high // block_k) - low // block_k)
    return visited / max(1, tiles.partial + tiles.full)


def lists_of(
    region: Region,
    plan: Plan,
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    device: torch.device,
    own: str = QUERIES,
) -> Lists:
    """The lists of one call, for programs with a tile of `own`."""
    if not region.mask.loads:
        return _closed(region, plan.block_q, plan.block_k, tuple(sizes), device, own)
    tensors = {o.name: t for o, t in zip(region.operands, operands)}
    return _lists(region, plan.block_q, plan.block_k, tensors, dict(zip(region.syms, sizes)), device, own)


@lru_cache(maxsize=64)
def _closed(
    region: Region, block_q: int, block_k: int, sizes: tuple[int, ...], device: torch.device, own: str
) -> Lists:
    return _lists(region, block_q, block_k, {}, dict(zip(region.syms, sizes)), device, own)


def _lists(
    region: Region,
    block_q: int,
    block_k: int,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[Sym, int],
    device: torch.device,
    own: str,
) -> Lists:
    state = classify(region.mask, Tiling.of(region, block_q, block_k, tensors, sizes, device)).state
    if own not in (QUERIES, KEYS):
        return (state.to(torch.int32).contiguous(),)
    state = state.mT if own == KEYS else state
    order = torch.argsort(state, dim=-1, descending=True, stable=True).to(torch.int32)
    counts = torch.stack(((state == FULL).sum(-1), (state != EMPTY).sum(-1)), -1).to(torch.int32)
    return counts.contiguous(), order.contiguous()
