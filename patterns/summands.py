"""Products multiplied out over the sums that matter: those of which a term reads a state, say.

    sum over d of q[d] * (S[d, e] + x[d, e])   =   (sum over d of q[d] * S[d, e]) + (sum over d of q[d] * x[d, e])

Whatever else is added up inside of a factor stays one value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product as combinations

from refocus import simplify as s
from refocus.ir import ONE, ZERO, Axis, Call, Const, Expr, Reduce, rewrite
from refocus.patterns.linear import terms_of


def summands(e: Expr, holds: Callable[[Expr], bool], looked_up: bool = False, apart: bool = True) -> list[Expr]:
    """The terms of a sum, products over those that hold the state multiplied out. What is `looked_up` in a state, by
    sums over it, may be blended with other values, or be looked up by a matrix that is a sum: then all is, unless these
    are not to be taken `apart`. `holds`: whether the state stands in an expression."""
    if not holds(e):
        return [e]
    if isinstance(e, Call) and e.is_float:
        args = e.args
        if e.op in ("add", "sub"):
            found = summands(args[0], holds, looked_up, apart)
            for a in args[1:]:
                found += [x if e.op == "add" else minus(x) for x in summands(a, holds, looked_up, apart)]
            return found
        if e.op == "neg":
            return [minus(x) for x in summands(args[0], holds, looked_up, apart)]
        if e.op == "mul":
            sums = apart and (looked_up or any(isinstance(n, Reduce) and holds(n) for n in e.walk()))
            parts = [
                multiplied_out(a) if sums and not holds(a) else summands(a, holds, looked_up, apart) for a in args
            ]
            return [times(chosen, e.dtype) for chosen in combinations(*parts)]
        if e.op == "div":
            return [s.call("div", x, args[1], dtype=e.dtype) for x in summands(args[0], holds, looked_up, apart)]
    if isinstance(e, Reduce) and e.op == "sum":
        return [Reduce("sum", e.axis, x, e.dtype) for x in summands(e.body, holds, True, apart)]
    return [e]


_MOST_TERMS = 64


def terms_that(holds: Callable[[Expr], bool], e: Expr) -> list[Expr]:
    """The terms of a value, multiplied out where one of them holds what is asked for and nowhere else; the value itself
    where there would be very many."""
    known: dict[Expr, bool] = {}

    def held(x: Expr) -> bool:
        if x not in known:
            known[x] = holds(x)
        return known[x]

    return [e] if number_of_terms(e, held) > _MOST_TERMS else summands(e, held, apart=False)


def number_of_terms(e: Expr, holds: Callable[[Expr], bool]) -> int:
    """How many `summands` there are, at least: products of sums of products have exponentially many."""
    known: dict[Expr, int] = {}

    def count(x: Expr) -> int:
        if x not in known:
            inner = x.children if isinstance(x, Call | Reduce) and x.is_float and holds(x) else ()
            counts = [count(child) for child in inner if child.is_float]
            is_sum = isinstance(x, Call) and x.op in ("add", "sub")
            known[x] = (sum if is_sum else math.prod)(counts) if counts else 1
        return known[x]

    return count(e)


def cut_apart(e: Expr, holds: Callable[[Expr], bool]) -> Expr:
    """A value, its sums over what was put together of two parts as two sums, where one of the parts `holds` the state:
    sum over j of (S if j < 1 else x[j - 1]) is S + (sum over j of x[j])."""

    def visit(node: Expr) -> Expr | None:
        if not (isinstance(node, Reduce) and node.op == "sum" and holds(node)):
            return None
        found = next((m for n in node.body.walk() if (m := _joint(n, node.axis, holds)) is not None), None)
        if found is None:
            return None
        name, size = node.axis.name, node.axis.size
        first, later = Axis(f"{name}.first", found), Axis(f"{name}.later", s.sub(size, found))
        here: list[Expr] = []
        for axis, start in ((first, ZERO), (later, found)):
            one = axis.size == ONE
            body = s.substitute(node.body, {node.axis: s.add(ZERO if one else axis, start)})
            here.append(rewrite(body if one else Reduce("sum", axis, body, node.dtype), visit, s.rebuild))
        return s.call("add", *here, dtype=node.dtype)

    return rewrite(e, visit, s.rebuild)


def _joint(e: Expr, axis: Axis, holds: Callable[[Expr], bool]) -> Expr | None:
    """Where on an axis a choice has its second part begin."""
    if not (isinstance(e, Call) and e.op == "where" and any(holds(x) for x in e.args[1:])):
        return None
    condition = e.args[0]
    if isinstance(condition, Call) and condition.op == "le" and axis in condition.args:
        low, high = condition.args
        place = s.add(high, 1) if low == axis else low
        return None if place.axes else place
    return None


def multiplied_out(e: Expr) -> list[Expr]:
    """The terms of a factor, where they are finite."""
    terms = list(terms_of(e, 1))
    if any(conditions for _, _, conditions in terms):
        return [e]
    return [x if sign > 0 else minus(x) for sign, x, _ in terms]


def minus(e: Expr) -> Expr:
    return s.call("mul", Const(-1.0, e.dtype), e, dtype=e.dtype)


def times(factors: Sequence[Expr], dtype: str) -> Expr:
    out: Expr = Const(1.0, dtype)
    for factor in factors:
        out = s.call("mul", out, factor, dtype=dtype)
    return out
