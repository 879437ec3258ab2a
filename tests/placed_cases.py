"""Where a result is put: outputs for any region of tests.region_cases, and for windows of pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from refocus import simplify as s
from refocus.ir import Axis, Const, Expr, Output, Region


def merged(region: Region) -> Region:
    """(*batch but the last, query, last batch axis and values in one): heads merged."""
    heads = region.batch[-1:]
    return _put(region, *((a,) for a in region.batch[:-1]), (region.query,), (*heads, *region.value))


def queries_first(region: Region) -> Region:
    return _put(region, (region.query,), *((a,) for a in region.batch), *((a,) for a in region.value))


def flat(region: Region) -> Region:
    """All in one dimension, heads before the batch."""
    return _put(region, (*region.batch[::-1], region.query, *region.value))


def rolled(region: Region) -> Region:
    """Heads merged, and queries moved on by seven, those at the end to the front."""
    moved = s.mod(s.add(region.query, 7), region.query.size)
    return _instead(merged(region), region.query, moved)


def turned_round(region: Region) -> Region:
    """The last query first."""
    return _instead(queries_first(region), region.query, s.sub(s.sub(region.query.size, 1), region.query))


def windows_reversed(region: Region, columns: int, side: int, shift: int) -> Region:
    """Windows of `side` x `side` tokens, `columns` of them in a row, put together and rolled back: batch axes are
    picture, window and head."""
    picture, window, head = region.batch
    across = columns * side
    down = s.mul(s.floordiv(window.size, columns), side)
    row = s.add(s.mul(s.floordiv(window, columns), side), s.floordiv(region.query, side), shift)
    column = s.add(s.mul(s.mod(window, columns), side), s.mod(region.query, side), shift)
    inner, channels = _merged((head, *region.value))
    index = (picture, s.mod(row, down), s.mod(column, across), inner)
    return replace(region, output=Output((picture.size, down, Const(across), channels), index))


def values_apart(region: Region) -> Region:
    """Queries innermost."""
    return _put(region, *((a,) for a in region.batch), *((a,) for a in region.value), (region.query,))


PLACED: dict[str, Callable[[Region], Region]] = {
    f.__name__: f for f in (merged, queries_first, flat, rolled, turned_round)
}


def _put(region: Region, *dims: tuple[Axis, ...]) -> Region:
    index, shape = zip(*(_merged(axes) for axes in dims))
    return replace(region, output=Output(shape, index))


def _merged(axes: tuple[Axis, ...]) -> tuple[Expr, Expr]:
    """One position of several, the last fastest, and how many there are."""
    at: Expr = Const(0)
    for axis in axes:
        at = s.add(s.mul(at, axis.size), axis)
    return at, s.mul(1, *(a.size for a in axes))


def _instead(region: Region, axis: Axis, position: Expr) -> Region:
    assert region.output is not None
    index = tuple(s.substitute(e, {axis: position}) for e in region.output.index)
    return replace(region, output=replace(region.output, index=index))
