"""Masks: where a predicate over (batch, query, key) leaves tiles empty, full or partial, and which keys a query needs.

    Tiling(...)        the space of a mask, cut into tiles, and what it reads
    classify(...)      a `TileMap`: the state of every tile, by interval arithmetic (`refocus.tile_grid`)
    tile_states(...)   the same as one plain tensor, traceable
    count_tiles(...)   how many tiles are in which state, where the map would be too large (`refocus.tile_rows`)
    key_bounds(...)    the range of keys that a run of queries needs, as index expressions (`refocus.key_bounds`)
    never_empty(...)   a proof that every query keeps some key

Empty and full are proofs. Partial is always allowed, and costs time only: the predicate is then applied to each
element.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from refocus import debug
from refocus.evaluate import arange_env, evaluate
from refocus.ir import FALSE, TRUE, Axis, Call, Const, Expr, Sym
from refocus.key_bounds import KeyBounds, first_query, key_bounds, last_query
from refocus.simplify import add, floordiv, is_nonneg, mul, or_, sub, substitute
from refocus.tile_grid import is_exact, tile_states
from refocus.tile_rows import Counts, count_tiles, tile_rows
from refocus.tiling import Tiling

__all__ = [
    "EMPTY", "FULL", "MASK_FILL", "PARTIAL", "BlockLists", "Counts", "KeyBounds", "TileMap", "Tiling", "block_lists",
    "classify", "count_tiles", "first_query", "key_bounds", "last_query", "never_empty", "tile_rows", "tile_states",
]  # fmt: skip

# A finite fill this low removes a key in every row that keeps one: exp(fill + 88) is 0 in every float dtype unless
# scores differ by thousands. Softer fills (Swin's -100) stay in the score as they are.
MASK_FILL = -1.0e4

EMPTY, PARTIAL, FULL = 0, 1, 2

# Up to this many (batch, query, key) elements a closed form is simply tried out at compile time.
_ENUMERABLE = 1 << 22

# Pairs that may be looked at in each call, where tensors decide.
_RUN_TIME_PAIRS = 1 << 18


class BlockLists(NamedTuple):
    """Tiles by query tile, as FlexAttention's `BlockMask` takes them: int32 counts [.., query tiles] and indices
    [.., query tiles, key tiles], of which the first `count` are the tiles in ascending order."""

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor


@dataclass(frozen=True, eq=False)
class TileMap:
    """The state of each tile: int8 [*axes, query tiles, key tiles] of EMPTY, PARTIAL and FULL.

    `axes` are the batch axes that the mask depends on; it is the same for all others.
    """

    state: Tensor
    axes: tuple[Axis, ...]
    block_q: int
    block_k: int

    def counts(self) -> Counts:
        """How many tiles are empty, partial and full, over all distinct maps."""
        return Counts(*torch.bincount(self.state.flatten().long(), minlength=3).tolist())

    def lists(self) -> BlockLists:
        """The partial and the full key tiles of each query tile."""
        return block_lists(self.state)

    def by_key(self) -> BlockLists:
        """The partial and the full query tiles of each key tile (for a backward pass over keys)."""
        return block_lists(self.state.mT)

    def key_range(self, q_tile: int) -> tuple[int, int]:
        """First and last + 1 key tile that is not empty for a query tile, over all maps; (0, 0) when there is none."""
        used = (self.state[..., q_tile, :] != EMPTY).reshape(-1, self.state.shape[-1]).any(0).nonzero()
        return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)


def classify(mask: Expr, tiling: Tiling) -> TileMap:
    """The tile map of a mask: interval arithmetic, then `refocus.refine` on what that leaves open."""
    tiling = tiling.seen_by(mask)
    if not mask.loads and all(type(n) is int for n in tiling.sizes.values()):
        numbers = tuple(sorted(tiling.sizes.items(), key=lambda item: item[0].name))
        budget = 0 if debug.disabled("refined-tiles") else _ENUMERABLE
        state = _closed_states(mask, tiling.batch, tiling.query, tiling.key, tiling.blocks, numbers, budget)
        state = state.to(tiling.device)
    else:
        state = _states(mask, tiling, _RUN_TIME_PAIRS)
    return TileMap(state, tiling.batch, tiling.block_q, tiling.block_k)


def _states(mask: Expr, tiling: Tiling, budget: int) -> Tensor:
    parts = [state for _, state in tile_rows(mask, tiling, budget=budget)]
    return torch.cat(parts, -2) if len(parts) > 1 else parts[0]


@lru_cache(maxsize=16)
def _closed_states(
    mask: Expr,
    batch: tuple[Axis, ...],
    query: Axis,
    key: Axis,
    blocks: tuple[int, int],
    numbers: tuple[tuple[Sym, int], ...],
    budget: int,
) -> Tensor:
    """The states of a mask that no tensor decides: found once for each size, for a region runs many times."""
    with _disable_current_modes(), torch.inference_mode(False):  # what is kept is an ordinary tensor
        return _states(mask, Tiling(batch, query, key, *blocks, {}, dict(numbers)), budget)


def block_lists(state: Tensor) -> BlockLists:
    """`BlockLists` of a tensor of tile states; plain tensor operations, traceable."""

    def listed(which: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(which.to(torch.int8), dim=-1, descending=True, stable=True)
        return which.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return BlockLists(*listed(state == PARTIAL), *listed(state == FULL))


# ------------------------------------------------------------------------------------------ rows that are never empty


def never_empty(mask: Expr, batch: Iterable[Axis], query: Axis, key: Axis) -> bool:
    """Prove that every query keeps at least one key, for all positions, sizes and tensors.

    A witness is a key, as a function of the query, for which the mask simplifies to true. A closed form of known
    sizes that has no simple witness is tried out element by element.
    """
    if mask == TRUE:
        return is_nonneg(sub(key.size, 1))
    if mask == FALSE:
        return False
    kept: Expr = FALSE
    for witness in _witnesses(mask, query, key):
        kept = or_(kept, substitute(mask, {key: witness}))
        if kept == TRUE:
            return True
    return _tried_out(mask, tuple(b for b in batch if b in mask.axes), query, key)


def _witnesses(mask: Expr, query: Axis, key: Axis) -> Iterator[Expr]:
    """Keys that are in range for each query."""
    last = sub(key.size, 1)
    candidates = [query, add(query, key.size, mul(-1, query.size)), Const(0), last]
    yield from (c for c in candidates if is_nonneg(c) and is_nonneg(sub(last, c)))
    if is_nonneg(sub(last, query)):
        blocks = [n.args[1] for n in mask.walk() if isinstance(n, Call) and n.op in ("floordiv", "mod")]
        for block in dict.fromkeys(blocks):
            if isinstance(block, Const) and block.value > 0:  # the start of the query's block lies in 0..query
                yield mul(floordiv(query, block), block)


def _tried_out(mask: Expr, batch: tuple[Axis, ...], query: Axis, key: Axis) -> bool:
    axes = [*batch, query, key]
    if mask.loads or not is_exact(mask) or not all(isinstance(a.size, Const) for a in axes):
        return False
    if any(isinstance(n, Sym) for n in mask.walk()):
        return False
    total = 1
    for axis in axes:
        total *= int(axis.size.value)  # type: ignore[attr-defined]
    if total > _ENUMERABLE:
        return False
    return bool(evaluate(mask, arange_env(axes, {}), {}, {}).any(-1).all())
