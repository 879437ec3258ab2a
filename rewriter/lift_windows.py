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
from refocus.lift_views import arguments_of, dimension
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
    """Over a tensor that holds each place in memory once; what lies in no tensor of the graph is not read."""
    source, size, strides, offset = arguments_of(node, "self", "size", "stride", "storage_offset")
    value = source.meta["val"]
    start = value.storage_offset()
    numbers = [*size, *strides, start, start if offset is None else offset, *value.shape, *value.stride()]
    if not all(type(n) is int for n in numbers) or any(n == 0 for n in (*size, *value.shape)):
        return None
    begin = 0 if offset is None else offset - start
    last = begin + sum((n - 1) * stride for n, stride in zip(size, strides))
    if begin < 0 or last > sum((n - 1) * stride for n, stride in zip(value.shape, value.stride())):
        return None
    place = s.add(begin, *(s.mul(x, stride) for x, stride in zip(index, strides)))
    at = _where_in_memory(place, value.shape, value.stride())
    return None if at is None else lift.at(source, at)


def _where_in_memory(place: Expr, shape: Sequence[int], strides: Sequence[int]) -> list[Expr] | None:
    """The index of the element that lies `place` elements after the first. None where that may be none of the tensor's,
    or several."""
    at: list[Expr] = [Const(0)] * len(shape)
    for dim in sorted((d for d, n in enumerate(shape) if n != 1), key=lambda d: -strides[d]):
        step, length = strides[dim], shape[dim]
        if step == 0:
            return None
        at[dim], place = s.floordiv(place, step), s.mod(place, step)
        if not s.is_nonneg(s.sub(length - 1, at[dim])):
            return None
    return at if place == Const(0) else None


WINDOWS: dict[str, Handler] = {"unfold": _unfold, "im2col": _im2col, "as_strided": _as_strided}
