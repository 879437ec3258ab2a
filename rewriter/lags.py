"""Parts of a form that depend on the difference of two positions alone: evaluated once for each difference.

`(i - j) % 4 == 0` on 4096 x 4096 positions has 8191 values; the matrix of them is a view of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from refocus.evaluate import evaluate
from refocus.ir import INT, Axis, Call, Const, Expr, Load, rewrite
from refocus.polynomial import Poly, poly_sub, to_poly


@dataclass(frozen=True)
class Lags:
    """`form` reads what depends on row - column at (`local`, column), where `local` is a row's place in its block."""

    form: Expr
    local: Axis
    size: tuple[int, int]
    values: Mapping[str, Tensor]  # by row - column, the last row's first column first

    def block(self, first: int, rows: int) -> dict[str, Tensor]:
        """What the form reads for so many rows."""
        shape, start = (rows, self.size[1]), self.size[0] - first - rows
        return {name: t.as_strided(shape, (1, 1), start).contiguous().flip(0) for name, t in self.values.items()}


def lags(form: Expr, row: Axis, column: Axis) -> Lags | None:
    """None where no part of the form is of this kind."""
    if not (isinstance(row.size, Const) and isinstance(column.size, Const)):
        return None
    local = Axis("@local", row.size)
    found: dict[Expr, Load] = {}

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Call) and not node.is_float and {row, column} <= node.axes and _is_lag(node, row, column):
            return found.setdefault(node, Load(f"@lag{len(found)}", (local, column), node.dtype))
        return None

    changed = rewrite(form, visit, _again)
    if not found:
        return None
    height, width = int(row.size.value), int(column.size.value)
    ahead = torch.arange(1 - height, width)  # column - row
    at = {row: (-ahead).clamp(min=0), column: ahead.clamp(min=0)}
    values = {load.tensor: evaluate(part, at, {}, {}).expand(len(ahead)).contiguous() for part, load in found.items()}
    return Lags(changed, local, (height, width), values)


def _again(node: Expr, children: tuple[Expr, ...]) -> Expr:
    if isinstance(node, Load):
        return Load(node.tensor, children, node.dtype)
    assert isinstance(node, Call)
    return Call(node.op, children, node.dtype)


def _is_lag(node: Expr, row: Axis, column: Axis) -> bool:
    """Whether rows and columns occur in differences of each other only. Read off, not simplified: it is part of a
    proof."""
    if isinstance(node, Const):
        return True
    if not isinstance(node, Call):
        return False
    if node.op == "add" and node.dtype == INT and {row, column} <= node.axes:
        return _is_difference(to_poly(node), row, column)
    if node.op in ("le", "lt", "eq", "ne") and all(a.dtype == INT for a in node.args):
        if _is_difference(poly_sub(*map(to_poly, node.args)), row, column):
            return True
    return all(_is_lag(c, row, column) for c in node.children)


def _is_difference(poly: Poly, row: Axis, column: Axis) -> bool:
    return poly.get((row,), 0) == -poly.get((column,), 0) and set(poly) <= {(), (row,), (column,)}
