"""Move what is a function of the distance i - j out of the region.

    before   + table[bucket(i - j), h]            bucket(r) = cast(log(r / 8) / log(16) * 8) ... for every pair
    after    + t0[h, i - j + Nk - 1]              t0[h, t] = table[bucket(t - Nk + 1), h], computed once outside

The rule of the cut, applied to the iteration space after a change of variables: it is one axis, not two. It also
keeps bucket boundaries where the eager code has them, since the same operations compute them in the same dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from refocus import simplify as s
from refocus.ir import Axis, Call, Dot, Expr, Load, Reduce, rewrite

DISTANCE = "distance"


@dataclass(frozen=True)
class Hoisted:
    """An operand that is computed outside the region: `value` over `axes` (its dimensions), from loads of nodes."""

    value: Expr
    axes: tuple[Axis, ...]


def hoist_distances(logits: Expr, query: Axis, key: Axis) -> tuple[Expr, dict[str, Hoisted]]:
    """Replace rounding functions of the distance by loads; the new operands by the name that the loads use."""
    found: dict[str, Hoisted] = {}
    span = s.sub(s.add(query.size, key.size), 1)
    distance = Axis(DISTANCE, span)
    shift = s.sub(key.size, 1)
    as_distance: dict[Expr, Expr] = {query: s.add(key, distance, s.neg(shift))}

    def visit(node: Expr) -> Expr | None:
        if not node.is_float or isinstance(node, Dot | Reduce) or not {query, key} <= node.axes or not _rounds(node):
            return None
        if any(isinstance(n, Dot | Reduce) for n in node.walk()):
            return None
        value = s.substitute(node, as_distance)
        if key in value.axes or query in value.axes:
            return None
        rest = sorted(value.axes - {distance}, key=lambda a: a.name)
        name = f"hoisted {len(found)}"
        found[name] = Hoisted(value, (*rest, distance))
        return Load(name, (*rest, s.add(query, s.neg(key), shift)), node.dtype)

    return rewrite(logits, visit, s.rebuild), found


def _rounds(value: Expr) -> bool:
    return any(isinstance(n, Call) and n.op == "cast" for n in value.walk())
