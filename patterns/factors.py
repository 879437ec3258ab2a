"""Products taken apart: exponents, factors, divisors, and the conditions outside of which they are zero.

    where(p, exp(x - m) * g, 0) / z         exponents x, -m;  factors g;  divisors z;  conditions p
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from refocus import simplify as s
from refocus.ir import Call, Const, Dot, Expr, Load, Reduce

Signed = tuple[int, Expr]


@dataclass
class Factored:
    """A product taken apart: exp(sum of exponents) * factors / divisors where all conditions hold, else 0.

    Those of the conditions that are `selected` choose between what is divided by scores and 0; the others multiply.
    `logged`: something was divided by in an exponent, as its logarithm."""

    exponents: list[tuple[int, Expr]]
    factors: list[Expr]
    divisors: list[Expr]
    conditions: list[Expr]
    cleaned: bool = False
    selected: tuple[Expr, ...] = ()
    logged: bool = False

    def invert(self) -> Factored:
        return replace(
            self,
            exponents=[(-sign, e) for sign, e in self.exponents],
            factors=self.divisors,
            divisors=self.factors,
        )

    def times(self, other: Factored) -> Factored:
        return Factored(
            self.exponents + other.exponents,
            self.factors + other.factors,
            self.divisors + other.divisors,
            self.conditions + other.conditions,
            self.cleaned or other.cleaned,
            self.selected + other.selected,
            self.logged or other.logged,
        )


def holds_scores(value: Expr) -> bool:
    return any(isinstance(n, Dot) for n in value.walk())


def factored(e: Expr) -> Factored:
    if isinstance(e, Const) and e.value == 1.0:
        return Factored([], [], [], [])
    if isinstance(e, Call):
        if e.op == "mul":
            out = factored(e.args[0])
            for a in e.args[1:]:
                out = out.times(factored(a))
            return out
        if e.op == "div":
            above = factored(e.args[0])
            if holds_scores(e.args[1]):  # a row of zeros is divided by its sum
                above = replace(above, selected=())
            return above.times(_inverse(e.args[1]))
        if e.op == "reciprocal":
            return _inverse(e.args[0])
        if e.op in ("exp", "exp2"):
            scale = (
                e.args[0] if e.op == "exp" else s.call("mul", e.args[0], Const(math.log(2.0), e.dtype), dtype=e.dtype)
            )
            out = Factored([], [], [], [])
            for sign, term in additive(scale, 1):
                term = but_for_base(term)
                if isinstance(term, Call) and term.op == "log" and not _is_read(term.args[0]):
                    part = factored(term.args[0])
                    out = out.times(part if sign > 0 else replace(_inverse(term.args[0]), logged=True))
                else:
                    out.exponents.append((sign, term))
            return out
        if e.op == "where":
            cond, a, b = e.args
            number = _but_for_nan(e)
            if number is not None:
                out = factored(number)
                return replace(out, cleaned=True)
            for condition, kept, other in ((cond, a, b), (s.not_(cond), b, a)):
                if isinstance(other, Const) and other.value == 0:
                    out = factored(kept)
                    selects = Factored([], [], [], [condition], selected=(condition,) if out.divisors else ())
                    return selects.times(out)
            if holds_scores(a) and holds_scores(b):
                return _of_both(cond, factored(a), factored(b), e)
        if e.op == "add" and all((isinstance(a, Const) and a.value == 0) or a is e.args[0] for a in e.args):
            return factored(e.args[0])
    return Factored([], [e], [], [])


def _is_read(weight: Expr) -> bool:
    """Whether a value is made of tensors, and of no sum: its logarithm is a term of the scores like any other, of
    which nothing cancels."""
    if any(isinstance(n, Reduce) for n in weight.walk()):
        return False
    return any(isinstance(n, Load) and n.is_float for n in weight.walk())


def but_for_base(e: Expr) -> Expr:
    """x out of x * log2(e) * log(2)."""
    inner, factor = e, 1.0
    while isinstance(inner, Call) and inner.op == "mul" and any(isinstance(a, Const) for a in inner.args):
        at = next(k for k, a in enumerate(inner.args) if isinstance(a, Const))
        inner, factor = inner.args[1 - at], factor * float(inner.args[at].value)  # type: ignore[attr-defined]
    return inner if inner is not e and math.isclose(factor, 1.0, rel_tol=1e-12) else e


def _inverse(divisor: Expr) -> Factored:
    """1 / divisor. What is zero where a condition fails is not taken apart: its inverse is infinite there."""
    parts = factored(divisor)
    return Factored([], [], [divisor], []) if parts.conditions else parts.invert()


def _of_both(condition: Expr, a: Factored, b: Factored, whole: Expr) -> Factored:
    """What both sides of a choice are products with: p[j] * 2 where j == 0, else p[j], is p[j] * (2 where j == 0)."""
    alike = (a.conditions, a.selected, a.logged) == (b.conditions, b.selected, b.logged)
    if a.cleaned or b.cleaned or not alike or Counter(a.exponents) != Counter(b.exponents):
        return Factored([], [whole], [], [])
    factors, divisors = (Counter(x) & Counter(y) for x, y in ((a.factors, b.factors), (a.divisors, b.divisors)))
    rest: list[Expr] = []
    for x in (a, b):
        above, below = Counter(x.factors) - factors, Counter(x.divisors) - divisors
        rest.append(multiplied(Factored([], [*above.elements()], [*below.elements()], []), whole.dtype))
    if any(holds_scores(r) for r in rest):
        return Factored([], [whole], [], [])
    common = replace(a, factors=[*factors.elements()], divisors=[*divisors.elements()])
    return common.times(Factored([], [s.where(condition, *rest)], [], []))


def _but_for_nan(e: Call) -> Expr | None:
    """x out of where(isnan(x), 0, x), which may also replace what is infinite: probabilities never are."""
    cond, fill, rest = e.args
    if isinstance(cond, Call) and cond.op == "not":
        cond, fill, rest = cond.args[0], rest, fill
    if not (isinstance(cond, Call) and cond.op == "isnan" and isinstance(fill, Const) and fill.value == 0):
        return None
    number = cond.args[0]
    while isinstance(rest, Call) and rest.op == "where" and rest != number:
        test = rest.args[0]
        if not (isinstance(test, Call) and test.op == "eq" and number in test.args):
            return None
        if not any(isinstance(a, Const) and a.is_float and math.isinf(a.value) for a in test.args):
            return None
        rest = rest.args[2]
    return number if rest == number else None


def additive(e: Expr, sign: int) -> list[tuple[int, Expr]]:
    if isinstance(e, Call) and e.is_float:
        if e.op == "add":
            return [t for a in e.args for t in additive(a, sign)]
        if e.op == "sub":
            return additive(e.args[0], sign) + additive(e.args[1], -sign)
        if e.op == "neg":
            return additive(e.args[0], -sign)
        if e.op == "mul" and any(isinstance(n, Reduce) for n in e.walk()):
            # c * (x - max x): the row's maximum is a term of its own
            for inner, factor in ((e.args[0], e.args[1]), (e.args[1], e.args[0])):
                if isinstance(factor, Const):
                    parts = additive(inner, sign)
                    return [(way, s.call("mul", part, factor, dtype=e.dtype)) for way, part in parts]
    return [(sign, e)]


def summed(terms: list[tuple[int, Expr]], dtype: str) -> Expr:
    out: Expr | None = None
    for sign, e in terms:
        if out is None:
            out = e if sign > 0 else s.call("neg", e, dtype=dtype)
        else:
            out = s.call("add" if sign > 0 else "sub", out, e, dtype=dtype)
    return Const(0.0, dtype) if out is None else out


def multiplied(parts: Factored, dtype: str) -> Expr:
    """A product that was taken apart, put together again."""
    value = s.call("exp", summed(parts.exponents, dtype), dtype=dtype)
    for factor in parts.factors:
        value = s.call("mul", value, factor, dtype=dtype)
    for divisor in parts.divisors:
        value = s.call("div", value, divisor, dtype=dtype)
    return s.where(s.and_(*parts.conditions), value, Const(0.0, dtype)) if parts.conditions else value
