"""Decays that a model keeps for every pair of positions: read back as what they are.

    D[h,i,j]  ->  where(j <= i, D[h,i,i] * exp(slope[h] * (i - j)), 0)

Every element is compared with that, up to the rounding of the dtype that it is kept in. If the tensor is written to
later, the graph is compiled again (`refocus.held_values`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from refocus import simplify as s
from refocus.held_values import HeldValues
from refocus.ir import Axis, Const, Expr, Load, rewrite

_MOST_HEADS = 64
_MOST_PAIRS = 1 << 24
_FAR = {torch.float32: 1e-30, torch.float64: 1e-200}  # a decay that is still kept with all its digits
_ROWS = 512  # that are compared at once


@dataclass(frozen=True)
class _Decay:
    """Of each head the logarithm of its decay; `scaled`: the elements on the diagonal are other numbers than 1."""

    slopes: tuple[float, ...]
    scaled: bool


def written_out(value: Expr, values: HeldValues) -> Expr:
    """`value` with formulas for the decays that are kept."""
    known: dict[Load, Expr | None] = {}

    def visit(node: Expr) -> Expr | None:
        if not isinstance(node, Load) or not node.is_float:
            return None
        if node not in known:
            known[node] = _formula(node, values)
        return known[node]

    return rewrite(value, visit, s.rebuild)


def _formula(load: Load, values: HeldValues) -> Expr | None:
    """The formula of a load at a query, a key, and heads before these; None where it has none."""
    places = [k for k, x in enumerate(load.index) if isinstance(x, Axis)]
    if not 2 <= len(places) <= 3 or any(not isinstance(x, Axis | Const) for x in load.index):
        return None
    axes = [x for x in load.index if isinstance(x, Axis)]
    sizes = [a.size.value for a in axes if isinstance(a.size, Const)]
    if len({*axes}) < len(axes) or len(sizes) < len(axes) or sizes[-1] != sizes[-2] or sizes[-1] < 2:
        return None
    if sizes[-1] ** 2 > _MOST_PAIRS or (len(axes) == 3 and sizes[0] > _MOST_HEADS):
        return None
    table = values.kept(load)
    if table is None or table.dtype not in _FAR:
        return None
    lengths = iter(sizes)
    at = tuple(int(x.value) if isinstance(x, Const) else slice(next(lengths)) for x in load.index)
    heads = table.detach().cpu()[at]
    heads = heads if heads.dim() == 3 else heads[None]
    for row, column, turned in ((axes[-2], axes[-1], False), (axes[-1], axes[-2], True)):
        found = _decay_of(heads.mT if turned else heads)
        if found is not None:
            values.take(load)
            diagonal = tuple(row if x == column else x for x in load.index)
            return _written(found, Load(load.tensor, diagonal, load.dtype), row, column, axes[:-2])
    return None


def _written(found: _Decay, diagonal: Load, row: Axis, column: Axis, heads: list[Axis]) -> Expr:
    dtype = diagonal.dtype
    slope: Expr = Const(found.slopes[-1], dtype)
    for k in reversed(range(len(found.slopes) - 1)):
        slope = s.where(s.eq(heads[0], Const(k)), Const(found.slopes[k], dtype), slope)
    exponent = s.call("mul", slope, s.cast(s.sub(row, column), dtype), dtype=dtype)
    value = s.call("exp", exponent, dtype=dtype)
    if found.scaled:
        value = s.call("mul", diagonal, value, dtype=dtype)
    return s.where(s.le(column, row), value, Const(0.0, dtype))


def _decay_of(heads: Tensor) -> _Decay | None:
    """What a table (heads, positions, positions) holds, if every element is a power of a decay below the diagonal, or
    on it, and zero above."""
    slopes = []
    scaled = bool((heads.diagonal(0, -2, -1) != 1).any())
    for table in heads:
        slope = _slope(table)
        if slope is None or not _holds(table, slope):
            return None
        slopes.append(slope)
    return _Decay(tuple(slopes), scaled)


def _slope(table: Tensor) -> float | None:
    """The logarithm of the decay for a step: told from the farthest pair that has not lost digits."""
    diagonal = table.diagonal().double()
    first = table[:, 0].double()
    if not bool((diagonal > 0).all()) or not bool(diagonal.isfinite().all()):
        return None
    far = (first / diagonal >= _FAR[table.dtype]) & (first >= _FAR[table.dtype])
    last = int(far.nonzero().max()) if bool(far.any()) else 0
    return math.log(float(first[last] / diagonal[last])) / last if last else None


def _holds(table: Tensor, slope: float) -> bool:
    limits, positions = torch.finfo(table.dtype), torch.arange(table.shape[0], dtype=torch.float64)
    for start in range(0, table.shape[0], _ROWS):
        rows = table[start : start + _ROWS].double()
        diagonal = table.diagonal()[start : start + _ROWS, None].double()
        distance = positions[start : start + _ROWS, None] - positions
        exponent = slope * distance.clamp(min=0)
        wanted = torch.where(distance >= 0, diagonal * exponent.exp(), 0.0)
        # An exponent was itself computed in this dtype, and so was the decay of a step.
        room = limits.eps * (4 + 2 * exponent.abs()) * wanted + limits.tiny * (distance > 0)
        if not bool(((rows - wanted).abs() <= room).all()):
            return False
    return True
