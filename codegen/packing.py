"""Query heads that read the same keys, packed along the queries: a region with fewer batch positions and longer tiles.

    S[b,h,i,j] = q[b,h,i,:] . k[b,h//4,j,:]    ==>    S[b,h,row,j] = q[b, 4*h + row//n, row%n, :] . k[b,h,j,:]

A row is a query of one of the heads in a group. Whatever else depends on head or query (a slope, a mask by head, a
sink) depends on the row now, by the same expressions, so it is the same function; and the rows of a result lie in
memory as its heads and queries do. Keys and values are then read once for a group, not once for each of its heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from refocus.codegen.heads import unflatten
from refocus.ir import Axis, Call, Const, Expr, Region
from refocus.simplify import add, floordiv, mul, substitute


@lru_cache(maxsize=512)
def packed(region: Region) -> Region:
    """The region whose queries are those of all heads that share keys and values; itself where none do."""
    heads: list[Axis] = []
    for axis in reversed(region.batch):
        if any(axis in side.axes for side in _key_sides(region)):
            return _by_group(region, axis, heads) or _pack(region, heads) or region
        heads.insert(0, axis)
    return _pack(region, heads) or region


def _key_sides(region: Region) -> list[Expr]:
    return [region.values, *(dot.key for dot in region.dots)]


def _by_group(region: Region, axis: Axis, heads: list[Axis]) -> Region | None:
    """With `heads`, the largest group of neighbours along `axis` for which keys and values are the same."""
    if not isinstance(axis.size, Const):
        return None
    for size in _groups(region, axis):
        outer, inner = Axis(axis.name, floordiv(axis.size, size)), Axis(f"{axis.name}_in_group", Const(size))
        split: dict[Expr, Expr] = {axis: add(mul(outer, size), inner)}
        if all(inner not in substitute(side, split).axes for side in _key_sides(region)):
            batch = tuple(b for a in region.batch for b in ((outer, inner) if a == axis else (a,)))
            return _pack(_substituted(replace(region, batch=batch), split), [inner, *heads])
    return None


def _groups(region: Region, axis: Axis) -> Iterator[int]:
    """Sizes of groups that the keys' own divisions suggest, the largest first."""
    assert isinstance(axis.size, Const)
    nodes = [n for side in _key_sides(region) for n in side.walk() if isinstance(n, Call) and n.op == "floordiv"]
    found = {n.args[1].value for n in nodes if axis in n.args[0].axes and isinstance(n.args[1], Const)}
    for size in sorted((int(s) for s in found), reverse=True):
        if size > 1 and axis.size.value % size == 0:
            yield size


def _pack(region: Region, heads: list[Axis]) -> Region | None:
    """These axes, the last of the batch, and the queries become one axis of rows; None where that changes nothing, or
    is not seen to leave keys and values apart from the rows."""
    if all(a.size == Const(1) for a in heads):
        return None
    row, parts = unflatten(_unused("row", region), (*heads, region.query))
    batch = region.batch[: len(region.batch) - len(heads)]
    out = _substituted(replace(region, batch=batch, query=row), parts)
    apart = all(row not in side.axes for side in _key_sides(out))
    return out if apart and out.syms == region.syms else None


def _substituted(region: Region, parts: dict[Expr, Expr]) -> Region:
    to = region.output
    return replace(
        region,
        score=substitute(region.score, parts),
        mask=substitute(region.mask, parts),
        logits=substitute(region.logits, parts),
        values=substitute(region.values, parts),
        gate=substitute(region.gate, parts),
        extra=tuple(substitute(e, parts) for e in region.extra),
        output=None if to is None else replace(to, index=tuple(substitute(e, parts) for e in to.index)),
    )


def _unused(name: str, region: Region) -> str:
    taken = {n.name for e in region.expressions for n in e.walk() if isinstance(n, Axis)}
    taken |= {a.name for a in (*region.batch, region.query, region.key, *region.value)}
    while name in taken:
        name += "_"
    return name
