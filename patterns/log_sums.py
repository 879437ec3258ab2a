"""Values that a softmax's log-sum-exp alone decides, however they are spelled.

    log sum_r exp(x[i,r])                            L[i]
    m[i] + log sum_r exp(x[i,r] - m[i])              L[i], by any shift m
    log2 sum_r exp2(x[i,r] * log2 e)                 L[i] * log2 e

The sum is put in as exp(L - m); then logarithms of exponentials are these, and what is added and taken away is gone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from refocus import simplify as s
from refocus.ir import TRUE, Axis, Call, Const, Dot, Expr, Load, Reduce, rewrite
from refocus.patterns.declined import Declined
from refocus.patterns.factors import Signed, additive, but_for_base, factored, holds_scores, summed
from refocus.patterns.fills import UNCLEAR
from refocus.patterns.guards import unguarded
from refocus.patterns.softmax import Softmax, by_key, match

LOG_SUM = Load("log-sum-exp", (), "float32")


@dataclass(frozen=True)
class LogSum:
    """A value as a function of `LOG_SUM`. `fills`: what its exponentials make of a row of nothing but finite fills, as
    in `Softmax`. `guarded`: if they are shifted, then by numbers where all logits are -inf, too."""

    value: Expr
    fills: str
    guarded: bool


@dataclass(frozen=True)
class _Sum:
    """The sum of a softmax: what its exponents have more than the logits, and what becomes of fills."""

    shifts: tuple[Signed, ...]
    fills: str


def of_log_sum(value: Expr, soft: Softmax, key: Axis) -> LogSum | None:
    """Read a value of a row as a function of the log-sum-exp of `soft` over `key`; None where it is none."""
    sums: list[_Sum] = []

    def visit(node: Expr) -> Expr | None:
        found = _sum_of(node, soft, key)
        if found is None:
            return None
        sums.append(found)
        return s.call("exp", summed([(1, LOG_SUM), *found.shifts], node.dtype), dtype=node.dtype)

    left = alone(rewrite(value, visit, s.rebuild))
    fills = {x.fills for x in sums}
    if left is None or len(fills) != 1 or UNCLEAR in fills:
        return None
    return LogSum(left, fills.pop(), all(unguarded(e) is not None for x in sums for _, e in x.shifts))


def alone(value: Expr) -> Expr | None:
    """A value that holds exp(LOG_SUM + shift), where the shifts are gone and no other tensor is left; or None."""
    left = _collected(value)
    more = any(isinstance(n, Dot | Reduce) or (isinstance(n, Load) and n != LOG_SUM) for n in left.walk())
    return None if more else left


def _sum_of(total: Expr, soft: Softmax, key: Axis) -> _Sum | None:
    """The sum of a softmax; None where it is another one."""
    parts = total.args if isinstance(total, Call) and total.op == "add" else (total,)
    sums = [p for p in parts if isinstance(p, Reduce) and p.op == "sum" and holds_scores(p)]
    if len(sums) != 1:
        return None
    surplus = s.sub(sums[0].axis.size, key.size)
    for offset in dict.fromkeys((Const(0), surplus)):
        body = s.substitute(sums[0].body, {sums[0].axis: s.add(key, offset)})
        read = match(s.call("div", body, total, dtype=total.dtype), key, by_hand=True)
        if isinstance(read, Declined) or (read.logits, read.extra) != (soft.logits, soft.extra):
            continue
        terms = factored(body)
        if terms.factors or terms.divisors:
            continue  # of weights that are normalised already, or scaled: their quotient is a softmax, too
        if read.gate == Const(1.0, read.gate.dtype) and read.selected == TRUE and not read.cleaned:
            return _Sum(tuple(by_key(terms.exponents, key)[1]), read.fills)
    return None


def _collected(e: Expr) -> Expr:
    """Logarithms of exponentials taken for what these are of, and sums without what they add and take away."""
    children = tuple(_collected(c) for c in e.children)
    e = e if children == e.children else s.rebuild(e, children)
    if not (isinstance(e, Call) and e.is_float):
        return e
    if e.op in ("log", "log2"):
        parts = factored(e.args[0])
        if not parts.exponents or parts.conditions or parts.cleaned:
            return e
        natural = [*parts.exponents, *((1, _log(f)) for f in parts.factors), *((-1, _log(d)) for d in parts.divisors)]
        found = summed(_without_opposites(natural), e.dtype)
        return found if e.op == "log" else _times(found, 1 / math.log(2.0))
    if e.op in ("add", "sub", "neg"):
        return summed(_without_opposites(additive(e, 1)), e.dtype)
    numbers = [a for a in e.args if isinstance(a, Const)] if e.op == "mul" else []
    return _times(next(a for a in e.args if a is not numbers[0]), numbers[0].value) if numbers else e


def _times(e: Expr, number: float) -> Expr:
    """c * (x - m), of which each is a term of its own."""
    terms = [(sign, s.call("mul", x, Const(number, x.dtype), dtype=x.dtype)) for sign, x in additive(e, 1)]
    return summed(_without_opposites(terms), e.dtype)


def _log(e: Expr) -> Expr:
    return s.call("log", e, dtype=e.dtype)


def _without_opposites(terms: list[Signed]) -> list[Signed]:
    """Terms without pairs of one and its opposite. A maximum is what it is under a guard, too: where it is -inf, so is
    the log-sum-exp that it is added to. One that takes no gradient is not one that does."""
    rest: list[Signed] = []
    for sign, e in ((sign, but_for_base(e)) for sign, e in terms):
        opposite = next((k for k, (way, other) in enumerate(rest) if way == -sign and _bare(other) == _bare(e)), None)
        if opposite is None:
            rest.append((sign, e))
        else:
            del rest[opposite]
    return rest


def _bare(e: Expr) -> Expr:
    """A maximum without what guards it, whether gradients are stopped before that or after."""
    e = unguarded(e) or e
    if not (isinstance(e, Call) and e.op == "detach"):
        return e
    inner = _bare(e.args[0])
    return inner if isinstance(inner, Call) and inner.op == "detach" else s.call("detach", inner, dtype=e.dtype)
