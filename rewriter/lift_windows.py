"""Windows that overlap: one element is read at several positions, none is computed.

x.unfold(1, 7, 1)[b, n, w]                     ->  x[b, n + w]
im2col(x, [3, 3])[b, 9*c + 3*u + v, 6*y + z]   ->  x[b, c, y + u, z + v]
x.as_strided([5, 8], [4, 1])[g, w]             ->  x[4*g + w]
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from refocus import simplify as s
from refocus.ir import TRUE, Const, Expr
from refocus.lift import Handler, Index, Lifter, dtype_of, kind_of
from refocus.lift_joins import clamped
from refocus.lift_views import arguments_of, dimension, reindex
from refocus.sizes import shape_of, size_expr


def _unfold(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    source, dim, _, step = arguments_of(node, "self", "dimension", "size", "step")
    dim = dimension(dim, len(index) - 1)
    at = s.add(s.mul(index[dim], size_expr(step)), index[-1])
    return lift.at(source, (*index[:dim], at, *index[dim + 1 : -1]))


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[-1])


def _im2col(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """Zeros past the border, where there is padding."""
    source, *options = arguments_of(node, "self", "kernel_size", "dilation", "padding", "stride")
    kernel, dilation, padding, stride = (_pair(o) for o in options)
    height, width = shape_of(source)[-2:]
    if not (isinstance(height, Const) and isinstance(width, Const)):
        return None
    columns = (int(width.value) + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    *batch, row, place = index
    offsets = s.mod(s.floordiv(row, kernel[1]), kernel[0]), s.mod(row, kernel[1])
    starts = s.floordiv(place, columns), s.mod(place, columns)
    inside: Expr = TRUE
    at = []
    for start, offset, size, step, gap, pad in zip(starts, offsets, (height, width), stride, dilation, padding):
        position = s.sub(s.add(s.mul(start, step), s.mul(offset, gap)), pad)
        inside = s.and_(inside, s.ge(position, 0), s.lt(position, size))
        at.append(position)
    channel = s.floordiv(row, kernel[0] * kernel[1])
    facts = s.assume(inside)
    at = [clamped(s.under(p, facts), size) for p, size in zip(at, (height, width))]
    # Read far, rows and columns are kept apart: a place is then its query's own and an offset in each of them.
    value = lift.leaf(source, (*batch, channel, *at)) if lift.far else lift.at(source, (*batch, channel, *at))
    return s.where(inside, value, s.cast(Const(0), kind_of(dtype_of(node))))


def _as_strided(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """Over a tensor that lies in memory row by row, from its start; what lies in no tensor of the graph is not read."""
    source, size, strides, offset = arguments_of(node, "self", "size", "stride", "storage_offset")
    value = source.meta["val"]
    numbers = [*size, *strides, offset or 0, *value.shape]
    if not all(type(n) is int for n in numbers) or not value.is_contiguous() or value.storage_offset() != 0:
        return None
    last = (offset or 0) + sum((n - 1) * stride for n, stride in zip(size, strides))
    if last >= value.numel() or any(n == 0 for n in size):
        return None
    flat = s.add(offset or 0, *(s.mul(x, stride) for x, stride in zip(index, strides)))
    return lift.at(source, reindex((flat,), (Const(value.numel()),), shape_of(source)))


WINDOWS: dict[str, Handler] = {"unfold": _unfold, "im2col": _im2col, "as_strided": _as_strided}
