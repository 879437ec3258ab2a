"""Masks kept as numbers: what an expression of finitely many values, or a line with a steep slope, says as a predicate.

where(p, 1.0, 0.0) + where(q, 1.0, 0.0) > 0.0            p or q
(1.0 - where(p, 1.0, 0.0)) * -3.4e38                     0.0 where p, -3.4e38 elsewhere
(1.0 - padding[b, j]) * -3.4e38 <= -1e4                  padding[b, j] <= 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from refocus import simplify as s
from refocus.constants import fold
from refocus.ir import BOOL, FALSE, TRUE, Call, Const, Expr, Load

# More distinct values, or more combinations of arguments, than masks are made of.
_VALUES, _COMBINATIONS = 6, 24

Number = int | float
Cases = dict[Number, Expr]


@lru_cache(maxsize=1 << 12)
def cases(e: Expr) -> Cases | None:
    """Value -> where the expression has it: a partition. None where there are too many, or where one is a NaN."""
    if isinstance(e, Const):
        return None if e.value != e.value else {e.value: TRUE}
    if not isinstance(e, Call):
        return {1: e, 0: s.not_(e)} if e.dtype == BOOL else None
    if e.dtype == BOOL:
        return {1: e, 0: s.not_(e)}
    if e.op == "where":
        yes, no = cases(e.args[1]), cases(e.args[2])
        if yes is None or no is None:
            return None
        inside = [(value, s.and_(e.args[0], p)) for value, p in yes.items()]
        return _joined([*inside, *((value, s.and_(s.not_(e.args[0]), p)) for value, p in no.items())])
    parts = [cases(a) for a in e.args]
    known = [p for p in parts if p is not None]
    if len(known) < len(parts) or math.prod(len(p) for p in known) > _COMBINATIONS:
        return None
    found: list[tuple[Number, Expr]] = []
    for choice in product(*(p.items() for p in known)):
        dtypes = [a.dtype if a.dtype != BOOL else "int64" for a in e.args]
        value = fold(e.op, [Const(v, t) for (v, _), t in zip(choice, dtypes)], e.dtype)
        where = s.and_(*(p for _, p in choice))
        if where == FALSE:
            continue
        if value is None or value.value != value.value:
            return None
        found.append((value.value, where))
    return _joined(found)


def _joined(found: list[tuple[Number, Expr]]) -> Cases | None:
    out: Cases = {}
    for value, where in found:
        out[value] = s.or_(out.get(value, FALSE), where)
    out = {value: where for value, where in out.items() if where != FALSE}
    return out if 0 < len(out) <= _VALUES else None


def from_cases(values: Cases, dtype: str) -> Expr:
    """The expression again, as a choice between constants."""
    items = list(values.items())
    out: Expr = Const(items[-1][0], dtype)
    for value, where in reversed(items[:-1]):
        out = s.where(where, Const(value, dtype), out)
    return out


def compare(op: str, a: Expr, b: Expr) -> Expr | None:
    """A comparison of two expressions of few values as a predicate; None where there are many, or where rounding
    could decide."""
    left, right = cases(a), cases(b)
    if left is None or right is None:
        return None
    out: Expr = FALSE
    for (x, p), (y, q) in product(left.items(), right.items()):
        if not _apart(x, y):
            return None
        if {"le": x <= y, "lt": x < y, "eq": x == y}[op]:
            out = s.or_(out, s.and_(p, q))
    return out


def _apart(x: Number, y: Number) -> bool:
    """Whether every float dtype agrees on how two numbers compare: small whole numbers are exact in all of them."""
    small = all(math.isinf(v) or (v == int(v) and abs(v) <= 256) for v in (x, y))
    return small or abs(x - y) > 0.05 * max(abs(x), abs(y))


@dataclass(frozen=True)
class Line:
    """slope * (value - root): a mask of numbers times a huge one, for any tensor of numbers."""

    slope: float
    value: Expr
    root: float

    def below(self, limit: float) -> Expr | None:
        """Where it is surely at most `limit` (< 0), by half a step of the value and more; None for a flat line.

        Half way between two whole numbers no rounding decides, whatever the dtype.
        """
        if abs(self.slope) / 2 < -limit or not math.isfinite(self.root):
            return None
        half = 0.5 if self.slope < 0 else -0.5
        edge = Const(self.root + half, self.value.dtype if self.value.is_float else "float32")
        return s.le(edge, self.value) if self.slope < 0 else s.le(self.value, edge)


@lru_cache(maxsize=1 << 12)
def line(e: Expr) -> Line | None:
    """An expression as a line in one loaded or whole number, if additions come before multiplications and add small
    whole numbers: those are exact."""
    if isinstance(e, Load) or (e.is_int and e.loads and not isinstance(e, Const)):
        return Line(1.0, e, 0.0)
    if not (isinstance(e, Call) and e.is_float):
        return None
    if e.op == "neg":
        below = line(e.args[0])
        return None if below is None else Line(-below.slope, below.value, below.root)
    if len(e.args) != 2:
        return None
    for k, (inner, number) in enumerate(((e.args[0], e.args[1]), (e.args[1], e.args[0]))):
        if not isinstance(number, Const) or not math.isfinite(number.value):
            continue
        below = line(inner)
        if below is None:
            return None
        c = number.value
        if e.op == "mul" and c:
            return Line(below.slope * c, below.value, below.root)
        if e.op == "div" and k == 0 and c:
            return Line(below.slope / c, below.value, below.root)
        if e.op in ("add", "sub") and abs(below.slope) == 1 and c == int(c) and abs(c) <= 256:
            sign = -1.0 if e.op == "sub" and k == 1 else 1.0
            shift = -c if e.op == "sub" and k == 0 else c
            slope = sign * below.slope  # sign * slope * (x - root) + shift
            return Line(slope, below.value, below.root - shift / slope)
        return None
    return None


def _solved(op: str, e: Expr, c: Number) -> Expr | None:
    """`e op c` solved for the whole number in it: 1.0 - x == 0.0 is x == 1."""
    found = line(e)
    if found is None or not found.value.is_int or abs(found.slope) != 1 or abs(c) > 256 or found.value is e:
        return None
    at = c / found.slope + found.root
    if op == "eq":
        return s.eq(found.value, int(at)) if at == int(at) else FALSE
    edge = Const(float(at), "float32")
    return s.call(op, found.value, edge, dtype=BOOL) if found.slope > 0 else s.call(op, edge, found.value, dtype=BOOL)


_WHOLE = frozenset(("add", "sub", "mul", "neg", "min", "max", "abs"))


@lru_cache(maxsize=1 << 12)
def whole_number(e: Expr) -> Expr | None:
    """A float expression as the integer that it is: region numbers painted into a tensor of zeros, floored quotients.

    None where it may not be whole, or not exact in its dtype.
    """
    found = _whole(e)
    if found is None or found is e:
        return found
    low, high = s.bounds(found)
    limit = {"float16": 1 << 11, "bfloat16": 1 << 8}.get(e.dtype, 1 << 24)
    return found if low is not None and high is not None and max(-low, high) <= limit else None


def _whole(e: Expr) -> Expr | None:
    if e.is_int:
        return e
    if isinstance(e, Const):
        return Const(int(e.value)) if math.isfinite(e.value) and e.value == int(e.value) else None
    if not (isinstance(e, Call) and e.is_float):
        return None
    if e.op == "where":
        yes, no = _whole(e.args[1]), _whole(e.args[2])
        return None if yes is None or no is None else s.where(e.args[0], yes, no)
    if e.op == "floor" and isinstance(e.args[0], Call) and e.args[0].op == "div":
        top, by = (_whole(a) for a in e.args[0].args)
        # By a power of two, division is exact. By anything else, how it rounds is the device's business.
        if top is None or not isinstance(by, Const) or by.value <= 0 or int(by.value).bit_count() != 1:
            return None
        return s.floordiv(top, by)
    if e.op not in _WHOLE:
        return None
    parts = [_whole(a) for a in e.args]
    known = [p for p in parts if p is not None]
    return s.call(e.op, *known, dtype="int64") if len(known) == len(parts) else None


def compare_floats(op: str, a: Expr, b: Expr) -> Expr:
    """A comparison ("le", "lt" or "eq") of which one side at least is a float."""
    if isinstance(a, Const) and isinstance(b, Const):
        return Const({"le": a.value <= b.value, "lt": a.value < b.value, "eq": a.value == b.value}[op], BOOL)
    if a.is_int != b.is_int:
        whole = _compare_with_number(op, a, b)
        if whole is not None:
            return whole
    decided_by_cases = compare(op, a, b)
    if decided_by_cases is not None:
        return decided_by_cases
    for choice, other, turned in ((a, b, False), (b, a, True)):
        told_apart = branches(choice) if isinstance(other, Const) else None
        if told_apart is not None:
            cond, *ends = told_apart
            told = [s.call(op, *((other, x) if turned else (x, other)), dtype=BOOL) for x in ends]
            return s.or_(s.and_(cond, told[0]), s.and_(s.not_(cond), told[1]))
    left, right = whole_number(a), whole_number(b)
    if left is not None and right is not None:
        return s.call(op, left, right, dtype=BOOL)
    for number, other in ((a, b), (b, a)):
        if isinstance(number, Const) and math.isfinite(number.value) and (op == "eq" or number is b):
            solved = _solved(op, other, number.value)
            if solved is not None:
                return solved
        elif isinstance(number, Const) and math.isfinite(number.value):
            flipped = _solved({"le": "lt", "lt": "le"}[op], other, number.value)  # c <= x is not x < c
            if flipped is not None:
                return s.not_(flipped)
    return Call(op, (a, b), BOOL)


def branches(e: Expr) -> tuple[Expr, Expr, Expr] | None:
    """A choice of which one branch at least is a number, or a multiple of a choice between 1 and 0: masks stacked on
    one another, and multiplied."""
    if not (isinstance(e, Call) and e.is_float):
        return None
    if e.op == "where" and any(isinstance(x, Const) for x in e.args[1:]):
        return e.args[0], e.args[1], e.args[2]
    if e.op == "mul" and len(e.args) == 2:
        zero = Const(0.0, e.dtype)
        for bit, rest in (e.args, e.args[::-1]):
            if not (isinstance(bit, Call) and bit.op == "where"):
                continue
            cond, yes, no = bit.args
            if isinstance(yes, Const) and isinstance(no, Const):
                if (yes.value, no.value) == (1.0, 0.0):
                    return cond, rest, zero
                if (yes.value, no.value) == (0.0, 1.0):
                    return cond, zero, rest
    return None


def _compare_with_number(op: str, a: Expr, b: Expr) -> Expr | None:
    """A position, which the model may have kept in floats, against a number."""
    number = b if a.is_int else a
    if not (isinstance(number, Const) and abs(number.value) < 2**53):  # not infinite, not NaN, and exact in floats
        return None
    value = number.value
    if op == "eq":
        return s.eq(b if number is a else a, int(value)) if value == int(value) else FALSE
    if number is a:
        return s.le(math.ceil(value) if op == "le" else math.floor(value) + 1, b)
    return s.le(a, math.floor(value) if op == "le" else math.ceil(value) - 1)
