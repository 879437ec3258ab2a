"""Rows that the mask empties: what the model makes of them, and what it puts in place of their weights.

A softmax over a row of -inf is no number. Where the model chooses zero in place of such weights afterwards,

    where(kept, softmax(where(mask, x, -inf)), 0)

the weights are zero, which a product of the softmax with [kept] would not be. So the condition has to tell all emptied
rows from the others, and then they are zero; where that is not proved, the site is left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from refocus import simplify as s
from refocus.ir import TRUE, Axis, Const, Dot, Expr, Load, rewrite
from refocus.masks import never_empty
from refocus.patterns.declined import Declined


@dataclass(frozen=True)
class Rows:
    """The rows of a softmax: its mask, its logits as the model wrote them, and the axes that it has."""

    mask: Expr
    logits: Expr
    batch: tuple[Axis, ...]
    query: Axis
    key: Axis

    def rule(self, kept: Expr) -> str | Declined:
        """`Region.empty_row`. `kept`: where it does not hold, the model has put zeros in place of weights."""
        rest = set(s.conjuncts(kept)) - {TRUE, *s.conjuncts(self.mask)}
        if rest and _may_empty_rows(self.logits, self.key):
            return _UNPLAIN
        if never_empty(self.mask, self.batch, self.query, self.key):
            return "never"
        if kept == TRUE:
            return "logits"
        if set(s.conjuncts(self.mask)) <= set(s.conjuncts(kept)):
            return "zero"
        rows = s.and_(*(c for c in s.conjuncts(kept) if self.key not in c.axes))
        if rows != TRUE and never_empty(s.or_(s.not_(rows), self.mask), self.batch, self.query, self.key):
            return "zero"
        return _UNPLAIN if any(_is_infinite(n) for n in self.logits.walk()) else "logits"


_UNPLAIN = Declined("probabilities that are no numbers are replaced, where it is not plain which these are")


def _may_empty_rows(logits: Expr, key: Axis) -> bool:
    """Whether what is added to the products of queries and keys is a tensor's, which may hold -inf for all keys."""
    stack = [logits]
    while stack:
        e = stack.pop()
        if isinstance(e, Load) and e.is_float and key in e.axes:
            return True
        if not isinstance(e, Dot | Load):
            stack.extend(e.children)
    return False


def _is_infinite(e: Expr) -> bool:
    return isinstance(e, Const) and e.is_float and math.isinf(e.value)


def known_inside(value: Expr, mask: Expr) -> Expr:
    """A value of the pairs that a mask keeps. What is loaded is loaded everywhere: its index stays as it is."""
    known = dict.fromkeys(s.conjuncts(mask), TRUE)
    return rewrite(value, lambda node: known.get(node, node if isinstance(node, Load) else None), s.rebuild)
