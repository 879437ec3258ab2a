"""Proofs that what a row is shifted or divided by is a number, whatever the scores are.

Softmax in chunks of keys is no number where all keys up to a chunk are filled with -inf: exp(-inf - -inf). The same
softmax over all keys at once is one, if a later chunk keeps a key. The two are equal where every maximum that weights
are shifted by, and every sum that they are divided by on the way, is known to have met a key.

    max(-inf, max_r x[i, r])                                        a number, if x is
    max(-inf, max_r where(r <= i, x[i, r], -inf))                   a number: key 0 is always kept
    max(-inf, max_r where(0 <= i - r < 8, x[i, r], -inf))           none in rows from 8 + size(r)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from refocus import simplify as s
from refocus.facts import NORMALISERS
from refocus.ir import TRUE, Axis, Call, Const, Dot, Expr, Load, Reduce
from refocus.lift import Index, Lifter, op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.masks import never_empty
from refocus.patterns.factors import factored, summed
from refocus.patterns.guards import unguarded
from refocus.patterns.masking import separate_mask
from refocus.row_sums import Row


class Open(Lifter):
    """Reads rows down to the scores that they are made of, which no region does."""

    def within(self, node: fx.Node, index: Index) -> bool:
        return True

    def inside(self, index: Index) -> bool:
        return True


class Above(Open):
    """Reads weights down to what normalises them, and no further."""

    def within(self, node: fx.Node, index: Index) -> bool:
        return op_name(node) not in CONTRACTIONS and op_name(node) not in NORMALISERS


Weights = tuple[Axis, tuple[fx.Node, Index]]  # the key axis, and where they are read


def shifted_by_numbers(lifter: Open, weights: Iterable[Weights], rows: Iterable[Row], proofs: Proofs) -> bool:
    """Whether weights, and the rows that their sums are multiplied with or divided by, are numbers in every row."""
    for key, at in weights:
        parts = factored(lifter.at(*at))
        if not all(proofs.is_number(x) for _, x in parts.exponents if key not in x.axes):
            return False
        if not all(proofs.is_positive(x) for x in parts.divisors if key not in x.axes):
            return False  # a softmax of no keys
    for row in rows:
        parts = factored(row.at(lifter))
        # exp(-inf) is 0, and may be multiplied with.
        if not all(proofs.is_number(x) for sign, x in parts.exponents if sign * row.sign < 0):
            return False
        if not all(map(proofs.is_positive, parts.divisors if row.sign > 0 else parts.factors)):
            return False
    return True


# Operations that make numbers of numbers.
_CLOSED = frozenset(
    ("add", "sub", "mul", "neg", "min", "max", "abs", "tanh", "sigmoid", "relu", "sin", "cos", "detach")
)


@dataclass
class Proofs:
    """What holds for every position of `query` and of the other axes.

    Values that are loaded from `products` are scores, and numbers; those from `scores` may be anything. With `rows`,
    others without a key are taken for numbers: all chunks of keys read them, so that where they are none, the row is
    none, however it is summed.
    """

    query: Axis
    products: frozenset[str]
    scores: frozenset[str]
    rows: bool
    _known: dict[tuple[str, Expr, Axis | None], bool] = field(default_factory=dict)

    def is_number(self, e: Expr) -> bool:
        """Whether a row is above -inf. (Not whether it is below inf: no softmax is a number there.)"""
        return self._once("number", e)

    def is_positive(self, e: Expr) -> bool:
        """Whether a sum of exponentials has met a key in every row."""
        return self._once("positive", e)

    def is_finite(self, e: Expr, key: Axis | None = None) -> bool:
        """Whether no fill, and nothing that is loaded for each key, makes a value infinite."""
        return self._once("finite", e, key)

    def keeps_a_key(self, logits: Expr, condition: Expr, key: Axis) -> bool:
        """Whether every row has a logit above -inf where the condition holds."""
        score, mask = (logits, TRUE) if self.is_finite(logits, key) else separate_mask(logits)
        mask = s.and_(mask, condition)
        return self.is_finite(score, key) and never_empty(mask, mask.axes - {self.query, key}, self.query, key)

    def _once(self, what: str, e: Expr, key: Axis | None = None) -> bool:
        if (what, e, key) not in self._known:
            proved = {"number": self._number, "positive": self._positive}.get(what)
            self._known[what, e, key] = proved(e) if proved else self._finite(e, key)
        return self._known[what, e, key]

    def _number(self, e: Expr) -> bool:
        if isinstance(e, Reduce):
            if e.op == "max" and self.is_finite(e.body, e.axis):
                return True  # of no keys at all there is no maximum: eager code raises an error
            return e.op == "max" and self.keeps_a_key(e.body, TRUE, e.axis)
        if not isinstance(e, Call):
            return self.is_finite(e)
        if e.op in ("max", "mul"):
            return (any if e.op == "max" else all)(self.is_number(a) for a in e.args)
        if e.op == "log":
            return self.is_positive(e.args[0])
        if e.op == "where":
            return unguarded(e) is not None or all(self.is_number(a) for a in e.args[1:])
        return e.op in _CLOSED and all(self.is_number(a) for a in e.args)

    def _positive(self, e: Expr) -> bool:
        if isinstance(e, Reduce) and e.op == "sum":
            parts = factored(e.body)
            keyed = [(sign, x) for sign, x in parts.exponents if e.axis in x.axes]
            rest = [x for _, x in parts.exponents if e.axis not in x.axes]
            if parts.factors or parts.divisors or not parts.exponents:
                return False
            logits = summed(keyed, e.dtype)
            return all(map(self.is_number, rest)) and self.keeps_a_key(logits, s.and_(*parts.conditions), e.axis)
        if not isinstance(e, Call):
            return isinstance(e, Const) and 0 < e.value < math.inf
        if e.op == "add":
            return any(map(self.is_positive, e.args)) and all(map(_no_less_than_zero, e.args))
        if e.op in ("exp", "exp2"):
            return self.is_number(e.args[0])
        return e.op in ("mul", "div", "detach") and all(map(self.is_positive, e.args))

    def _finite(self, e: Expr, key: Axis | None) -> bool:
        if not e.is_float or isinstance(e, Dot):
            return True
        if isinstance(e, Const):
            return math.isfinite(e.value)
        if isinstance(e, Load):
            return e.tensor in self.products or (self.rows and e.tensor not in self.scores and key not in e.axes)
        if key is not None and key not in e.axes:
            return self.is_number(e)
        if not isinstance(e, Call):
            return False
        if e.op == "div":
            above, below = e.args
            divides = below.value != 0 if isinstance(below, Const) else key is not None and key not in below.axes
            return divides and self.is_finite(above, key) and self.is_finite(below, key)
        return (e.op in _CLOSED or e.op == "where") and all(self.is_finite(a, key) for a in e.args)


def _no_less_than_zero(e: Expr) -> bool:
    """Whether a value is a sum of products of exponentials."""
    if isinstance(e, Const):
        return e.value >= 0
    if isinstance(e, Reduce):
        return e.op == "sum" and not factored(e.body).factors
    if isinstance(e, Call) and e.op in ("add", "mul", "div"):
        return all(_no_less_than_zero(a) for a in e.args)
    return isinstance(e, Call) and e.op in ("exp", "exp2")
