"""Choices between scores of the same make, which are one score that reads other places.

    where(b < 2, f(x[min(b, 1)]), f(x[max(b - 2, 0) + 2]))    ->    f(x[b])
    where(h < 1, f(x[h], 0.3), f(x[h], 0.5))                  ->    f(x[h], where(h < 1, 0.3, 0.5))

So read weights whose first and second half are normalised apart, and put side by side or written back to where the
scores were.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from refocus import simplify as s
from refocus.ir import Axis, Call, Dot, Expr, Load, Reduce
from refocus.patterns.factors import holds_scores


def without_choice(value: Expr, key: Axis, queries: Set[Axis]) -> Expr:
    """The one function that a choice between weights is; the choice itself, where they are made in different ways."""
    if not is_choice(value, key):
        return value
    condition, a, b = value.children
    yes, no = (
        without_choice(s.under(side, s.assume(known)), key, queries)
        for side, known in ((a, condition), (b, s.not_(condition)))
    )
    merged = _Choice(condition, queries).between(yes, no)
    return value if merged is None else merged


def is_choice(value: Expr, key: Axis) -> bool:
    """Whether a value is one of two that hold scores, and the row decides which."""
    if not (isinstance(value, Call) and value.op == "where" and all(map(holds_scores, value.args[1:]))):
        return False
    return key not in value.args[0].axes


def _renamed(product: Dot, other: Dot) -> dict[Expr, Expr] | None:
    """The axes that a product sums over by the names of those of another: each product has axes of its own."""
    if product.over == other.over:
        return {}
    theirs = set(other.over)
    used = product.query.axes | product.key.axes
    inner = {x for side in (product.query, product.key) for n in side.walk() if isinstance(n, Dot) for x in n.over}
    if [x.size for x in product.over] != [x.size for x in other.over] or theirs & (used | inner):
        return None
    return dict(zip(product.over, other.over))


@dataclass(frozen=True)
class _Choice:
    """Two values, of which the first is taken where the condition holds."""

    condition: Expr
    queries: Set[Axis]

    def between(self, a: Expr, b: Expr) -> Expr | None:
        """One expression for both; None where they are made in different ways."""
        if a == b:
            return a
        if a.dtype != b.dtype:
            return None
        if a.is_int:
            return self._place(a, b)
        if isinstance(a, Reduce) and isinstance(b, Reduce):
            there = s.substitute(b.body, {b.axis: a.axis})
            same = a.op == b.op and a.axis.size == b.axis.size and (a.axis == b.axis or a.axis not in b.body.axes)
            body = self.between(a.body, there) if same else None
            return None if body is None else Reduce(a.op, a.axis, body, a.dtype)
        if isinstance(a, Dot) and isinstance(b, Dot):
            names = _renamed(b, a)
            if names is None:
                return None
            query, key = (self.between(x, s.substitute(y, names)) for x, y in ((a.query, b.query), (a.key, b.key)))
            if query is None or key is None or key.axes & self.queries:
                return None
            return Dot(a.over, query, key, a.dtype)
        if isinstance(a, Load) and isinstance(b, Load) and a.tensor == b.tensor:
            return Load(a.tensor, tuple(x if x == y else self._place(x, y) for x, y in zip(a.index, b.index)), a.dtype)
        if isinstance(a, Call) and isinstance(b, Call) and a.op == b.op and len(a.args) == len(b.args):
            args = [self.between(x, y) for x, y in zip(a.args, b.args)]
            if all(x is not None for x in args):
                return s.rebuild(a, tuple(args))  # type: ignore[arg-type]
        for mine, other, here in ((a, b, self.condition), (b, a, s.not_(self.condition))):
            found = self._masked(mine, other, here)
            if found is not None:
                return found
        if holds_scores(a) or holds_scores(b) or any(isinstance(n, Reduce) for e in (a, b) for n in e.walk()):
            return None
        return s.where(self.condition, a, b) if self._in_range(a, b) else None

    def _in_range(self, *values: Expr) -> bool:
        """Whether what is used on one side only may be loaded on the other, too: loads are carried out everywhere."""
        loads = (x for e in values for x in ((e,) if isinstance(e, Load) else e.loads))
        return not any(entry.axes & self.condition.axes for x in loads for entry in x.index)

    def _masked(self, a: Expr, b: Expr, here: Expr) -> Expr | None:
        """Where `a`, which is taken `here`, is `b` but for a mask."""
        if not (isinstance(a, Call) and a.op == "where" and a.is_float):
            return None
        for condition, fill, rest in (a.args, (s.not_(a.args[0]), a.args[2], a.args[1])):
            if not holds_scores(fill) and holds_scores(rest):
                merged = self.between(rest, b) if here == self.condition else self.between(b, rest)
                known = merged is not None and self._in_range(condition, fill)
                return s.where(s.and_(here, condition), fill, merged) if known else None  # type: ignore[arg-type]
        return None

    def _place(self, a: Expr, b: Expr) -> Expr:
        """A position: each is in range where it is taken. What the condition makes a number may be an axis."""
        for axis in sorted(self.condition.axes, key=repr):
            here, there = (s.under(axis, s.assume(c)) for c in (self.condition, s.not_(self.condition)))
            if s.sub(a, here) == s.sub(b, there):
                return s.add(axis, s.sub(a, here))
        return s.where(self.condition, a, b)
