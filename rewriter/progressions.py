"""Values that are one function of their number: parts of a stack, steps of a loop.

Each value is an expression. Where whole numbers grow evenly from one to the next, they are taken to be linear in the
number, and then every value is compared with what that says of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from refocus import simplify as s
from refocus.ir import Axis, Const, Expr, Reduce, rewrite


def one_function(values: Sequence[Expr], number: Axis) -> Expr | None:
    """The function of `number` that all values are; None where there is none. Equal sums have equal names."""
    if len(values) == 1:
        return values[0]
    # At both ends, a comparison with the number may be decided.
    for last in dict.fromkeys((len(values) - 1, len(values) // 2)):
        one = between(values[last - 1], values[last], last, number)
        if one is not None and all(s.substitute(one, {number: Const(t)}) == value for t, value in enumerate(values)):
            return one
    return None


def between(earlier: Expr, later: Expr, number: int, step: Axis) -> Expr | None:
    """What is `later` at step `number`, and `earlier` one step before, whole numbers taken to grow evenly."""
    if earlier == later:
        return earlier
    if earlier.is_int and later.is_int:
        by = s.sub(later, earlier)
        if isinstance(by, Const):
            return s.add(later, s.mul(by, s.sub(step, number)))
    old, new = earlier.children, later.children
    if type(earlier) is not type(later) or len(old) != len(new):
        return None
    found = [between(a, b, number, step) for a, b in zip(old, new)]
    if any(x is None for x in found):
        return None
    return s.rebuild(later, tuple(found)) if found else None  # type: ignore[arg-type]


def named_alike(values: Sequence[Expr]) -> list[Expr]:
    """The values, what they sum over named as in the first of them, one after the other."""
    names = _summed(values[0])
    return [values[0], *(_renamed(value, names) for value in values[1:])]


def _summed(value: Expr) -> list[Axis]:
    return list(dict.fromkeys(n.axis for n in value.walk() if isinstance(n, Reduce)))


def _renamed(value: Expr, names: Sequence[Axis]) -> Expr:
    mine = _summed(value)
    if [a.size for a in mine] != [a.size for a in names]:
        return value
    new = dict(zip(mine, names))

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Reduce) and node.axis in new:
            body = s.substitute(rewrite(node.body, visit, s.rebuild), {node.axis: new[node.axis]})
            return Reduce(node.op, new[node.axis], body, node.dtype)
        return None

    return rewrite(value, visit, s.rebuild)
