"""Expressions of several key axes, one after the other, as one expression of one axis.

    x[j] for j < 16, x[16 + r] for r < 16      ->      x[key] for key < 32
    x[j] for j < 16, y[r] for r < 16           ->      where(key < 16, x[key], y[key - 16])
"""

from __future__ import annotations

from collections.abc import Sequence

from refocus import simplify as s
from refocus.ir import Axis, Const, Dot, Expr, Reduce, rewrite
from refocus.lift_joins import clamped

Piece = tuple[Axis, Expr]  # an axis of its own, and what stands along it


def along(key: Axis, pieces: Sequence[Piece]) -> Expr:
    """What the pieces are along `key`, whose size is the sum of theirs."""
    whole = seamless(key, pieces)
    if whole is not None:
        return whole
    out: Expr | None = None
    for (own, x), begin in zip(reversed(pieces), reversed(_begins(pieces))):
        end = s.lt(key, s.add(begin, own.size))
        local = clamped(s.under(s.sub(key, begin), s.assume(s.and_(s.ge(key, begin), end))), own.size)
        here = s.substitute(x, {own: local})
        out = here if out is None else s.where(end, here, out)
    assert out is not None
    return out


def seamless(key: Axis, pieces: Sequence[Piece]) -> Expr | None:
    """The one expression that all pieces are parts of, where they are."""
    moved = (s.substitute(x, {own: s.sub(key, begin)}) for (own, x), begin in zip(pieces, _begins(pieces)))
    first, *rest = (renamed(x) for x in moved)
    return first if all(x == first for x in rest) else None


def _begins(pieces: Sequence[Piece]) -> list[Expr]:
    begins: list[Expr] = [Const(0)]
    for own, _ in pieces[:-1]:
        begins.append(s.add(begins[-1], own.size))
    return begins


def renamed(value: Expr) -> Expr:
    """Bound axes by their order, so that equal sums compare equal whatever operation they come from."""
    count = iter(range(1 << 30))

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Dot):
            over = tuple(Axis(f"bound{next(count)}", a.size) for a in node.over)
            fresh = dict[Expr, Expr](zip(node.over, over))
            query, key = (rewrite(s.substitute(x, fresh), visit, s.rebuild) for x in (node.query, node.key))
            return Dot(over, query, key, node.dtype)
        if isinstance(node, Reduce):
            axis = Axis(f"bound{next(count)}", node.axis.size)
            body = s.substitute(node.body, {node.axis: axis})
            return Reduce(node.op, axis, rewrite(body, visit, s.rebuild), node.dtype)
        return None

    return rewrite(value, visit, s.rebuild)
