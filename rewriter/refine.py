"""Tiles that interval arithmetic could not decide, decided by looking at their pairs.

An interval of a conjunction is as wide as its parts allow: two conditions that hold somewhere on a tile need not hold
together anywhere. A few pairs of each open tile are tried out first, which settles nearly all that are partial; then
every pair of what is left. Both have a budget of pairs, so that this costs a fraction of what it may save; tiles that
it does not reach stay partial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refocus.evaluate import evaluate
from refocus.ir import Axis, Call, Const, Expr
from refocus.polynomial import poly_sub, to_poly
from refocus.simplify import conjuncts
from refocus.tiling import Tiling

_SAMPLES = (8, 48)  # pairs of a tile that are tried first, and next
_CHUNK = 1 << 20  # pairs evaluated at once


def leaves_open(mask: Expr, query: Axis, key: Axis, blocks: tuple[int, int] = (0, 0)) -> bool:
    """Whether interval arithmetic may leave a tile open that pairs decide. Not so where one linear form of query and
    key is bounded: it takes every value between its ends on a tile. Nor of parts that are the same for a whole tile of
    `blocks` queries and keys (0: not known), as lists of chosen blocks are."""
    parts = [p for p in conjuncts(mask) if not all(map(_is_steady, (p, p), (query, key), blocks))]
    pairs = [p for p in parts if {query, key} <= p.axes]
    if len(pairs) != len(parts):
        return bool(pairs)
    for part in pairs:
        if not (isinstance(part, Call) and part.op == "le" and all(a.is_int for a in part.args)):
            return True
        form = poly_sub(to_poly(part.args[1]), to_poly(part.args[0]))
        moving = {m for m in form if any({query, key} & atom.axes for atom in m)}
        if moving != {(query,), (key,)} or form[query,] * form[key,] != -1:
            return True
    return False


def _is_steady(expr: Expr, axis: Axis, block: int) -> bool:
    """Whether a value is the same for all positions of a tile of so many."""
    if isinstance(expr, Call) and expr.op == "floordiv" and expr.args[0] == axis and isinstance(expr.args[1], Const):
        return block > 0 and expr.args[1].value % block == 0
    return expr != axis and all(_is_steady(child, axis, block) for child in expr.children)


def refine(state: Tensor, mask: Expr, tiling: Tiling, budget: int) -> Tensor:
    """`state` (int8 [*batch, query tiles, key tiles]: 0 empty, 1 partial or open, 2 full) with open tiles decided.

    `budget`: how many pairs may be looked at, all in all.
    """
    blocks = tiling.blocks
    pairs = _Pairs(mask, tiling)
    open_ = (state == 1).nonzero()
    generator = torch.Generator().manual_seed(0)
    for count in _SAMPLES:
        open_ = open_[: budget // count]
        if not len(open_):
            return state
        rows, columns = (torch.randint(b, (count,), generator=generator) for b in blocks)
        ends = torch.tensor([0, 0, -1, -1]), torch.tensor([0, -1, 0, -1])  # monotone parts show at the corners
        rows[:4], columns[:4] = ends[0] % blocks[0], ends[1] % blocks[1]
        some, every = pairs.look(open_, rows.to(state.device), columns.to(state.device))
        open_ = open_[some == every]
    area = blocks[0] * blocks[1]
    open_ = open_[: budget // area]
    if not len(open_):
        return state
    rows, columns = torch.meshgrid(*(torch.arange(b, device=state.device) for b in blocks), indexing="ij")
    state = state.clone()
    step = max(1, _CHUNK // area)
    for part in open_.split(step):
        some, every = pairs.look(part, rows.flatten(), columns.flatten())
        state[part.unbind(1)] = some.to(torch.int8) + every.to(torch.int8)
    return state


class _Pairs:
    """A predicate at chosen pairs of chosen tiles."""

    def __init__(self, mask: Expr, tiling: Tiling) -> None:
        self.mask, self.tiling = mask, tiling
        self.axes = (*tiling.batch, tiling.query, tiling.key)
        self.blocks, self.starts = tiling.blocks, (tiling.first, 0)
        self.lengths = (tiling.queries, tiling.keys)

    def look(self, tiles: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(whether any, whether all) of the pairs at (rows, columns) of each tile are kept. `tiles` holds the position
        on each axis, then tile numbers; pairs past the end are replaced by the last one in range."""
        position = list(tiles.unsqueeze(-1).unbind(1))
        for k, inside in ((-2, rows), (-1, columns)):
            position[k] = (position[k] * self.blocks[k] + inside).clamp(max=self.lengths[k] - 1) + self.starts[k]
        kept = evaluate(self.mask, dict(zip(self.axes, position)), self.tiling.tensors, self.tiling.sizes)
        kept = kept.expand(len(tiles), len(rows))
        return kept.any(-1), kept.all(-1)
