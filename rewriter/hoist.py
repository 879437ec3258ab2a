"""Move out of the region what is a function of the distance i - j, and sums without scores.

    before   + table[bucket(i - j), h]            bucket(r) = cast(log(r / 8) / log(16) * 8) ... for every pair
    after    + t0[h, i - j + Nk - 1]              t0[h, t] = table[bucket(t - Nk + 1), h], computed once outside

    before   + sum_g w[h, g] * bias[g, i, j]      a bias whose heads are mixed with those of the scores
    after    + t0[h, i, j]

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
    """An operand that is computed outside the region: `value` over `axes` (its dimensions), from loads of nodes.
    `integers`: the dtype that positions and counts are put in, which a product with floats needs. `wide`: the one that
    a sum has, which may be wider than that of what is summed."""

    value: Expr
    axes: tuple[Axis, ...]
    integers: str | None = None
    wide: str | None = None

    @property
    def dtype(self) -> str:
        """That of the first tensor of floats among what it is made of, or its own."""
        own = self.integers if self.integers and self.value.is_int else self.value.dtype
        return self.wide or next((x.dtype for x in self.value.loads if x.is_float), own)


def hoist_distances(value: Expr, query: Axis, key: Axis, found: dict[str, Hoisted]) -> Expr:
    """Replace rounding functions of the distance by loads; `found` receives the new operands by the name that the loads
    use."""
    span = s.sub(s.add(query.size, key.size), 1)
    distance = Axis(DISTANCE, span)
    shift = s.sub(key.size, 1)
    as_distance: dict[Expr, Expr] = {query: s.add(key, distance, s.neg(shift))}

    def visit(node: Expr) -> Expr | None:
        if not node.is_float or isinstance(node, Dot | Reduce) or not {query, key} <= node.axes or not _rounds(node):
            return None
        if any(isinstance(n, Dot | Reduce) for n in node.walk()):
            return None
        outside = s.substitute(node, as_distance)
        if key in outside.axes or query in outside.axes:
            return None
        rest = sorted(outside.axes - {distance}, key=lambda a: a.name)
        name = f"hoisted {len(found)}"
        found[name] = Hoisted(outside, (*rest, distance))
        return Load(name, (*rest, s.add(query, s.neg(key), shift)), node.dtype)

    return rewrite(value, visit, s.rebuild)


def hoist_sums(value: Expr, query: Axis, key: Axis, found: dict[str, Hoisted]) -> Expr:
    """Replace sums of what is loaded by loads; `found` as above. What is summed for pairs is so of a tensor of pairs:
    none is made where there was none."""

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Dot):
            return node
        if (
            not isinstance(node, Reduce)
            or node.op not in ("sum", "max")
            or any(isinstance(n, Dot) for n in node.walk())
        ):
            return None
        if not any(node.axes & {query, key} <= load.axes for load in node.loads):
            return None
        body, axes = node.body, tuple(sorted(node.axes, key=lambda a: (a == key, a == query, a.name)))
        total: Expr = node
        if node.op == "sum" and isinstance(body, Call) and body.op == "mul" and len(body.args) == 2:
            left, right = body.args
            total = Dot((node.axis,), left, right, node.dtype)
        name = f"summed {len(found)}"
        found[name] = Hoisted(total, axes, wide=node.dtype)
        return Load(name, axes, node.dtype)

    return rewrite(value, visit, s.rebuild)


def _rounds(value: Expr) -> bool:
    return any(isinstance(n, Call) and n.op == "cast" for n in value.walk())
