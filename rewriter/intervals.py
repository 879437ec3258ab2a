"""Intervals whose ends are tensors: one interval for each tile of a grid, all computed at once.

An end is a tensor over the grid (with dimensions of size one where it does not vary), a number (possibly a traced
size), or None where there is no end. A predicate is an interval over False < True: `lo` means true everywhere, `hi`
true somewhere as far as can be told. The functions take independent arguments: `plus` of x and -x is not zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

End = Any  # Tensor | int | float | bool | SymInt | None


@dataclass(frozen=True)
class Interval:
    lo: End
    hi: End


UNKNOWN, MAYBE = Interval(None, None), Interval(False, True)


def as_tensor(value: End) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.int64)  # type: ignore[call-overload]


def _comparable(value: End) -> End:
    """A traced size must not be compared as a number: that would fix it."""
    return as_tensor(value) if isinstance(value, torch.SymInt) else value


def _bound(pick: Any, clamp: str, a: End, b: End) -> End:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return pick(a, b)
    if isinstance(a, Tensor):
        return torch.clamp(a, **{clamp: b})
    if isinstance(b, Tensor):
        return torch.clamp(b, **{clamp: a})
    if isinstance(a, float) or isinstance(b, float):
        return min(a, b) if clamp == "max" else max(a, b)
    return torch.sym_min(a, b) if clamp == "max" else torch.sym_max(a, b)


def least(a: End, b: End, either: bool = False) -> End:
    """The smaller end; `either`: one of them alone is a valid end too."""
    if a is None or b is None:
        return (b if a is None else a) if either else None
    return _bound(torch.minimum, "max", a, b)


def most(a: End, b: End, either: bool = False) -> End:
    if a is None or b is None:
        return (b if a is None else a) if either else None
    return _bound(torch.maximum, "min", a, b)


def plus(a: Interval, b: Interval) -> Interval:
    def end(x: End, y: End) -> End:
        return None if x is None or y is None else x + y

    return Interval(end(a.lo, b.lo), end(a.hi, b.hi))


def times(a: Interval, b: Interval) -> Interval:
    for one, other in ((a, b), (b, a)):
        if type(one.lo) is int and one.lo is one.hi:  # a known factor: its sign decides which end is which
            factor = one.lo
            if factor == 1:
                return other
            ends = [None if e is None else e * factor for e in (other.lo, other.hi)]
            return Interval(*(ends if factor >= 0 else reversed(ends)))
    if a.lo is None or a.hi is None or b.lo is None or b.hi is None:
        return UNKNOWN
    products = [x * y for x in ((a.lo,) if a.lo is a.hi else (a.lo, a.hi)) for y in (b.lo, b.hi)]
    lo = hi = products[0]
    for product in products[1:]:
        lo, hi = least(lo, product), most(hi, product)
    return Interval(lo, hi)


def square(a: Interval) -> Interval:
    if a.lo is None or a.hi is None:
        return Interval(0, None)
    nearest = most(most(a.lo, -a.hi), 0)
    farthest = most(a.hi, -a.lo)
    return Interval(nearest * nearest, farthest * farthest)


def not_(a: End) -> End:
    return ~a if isinstance(a, Tensor) else not a


def and_(a: End, b: End) -> End:
    for one, other in ((a, b), (b, a)):
        if not isinstance(one, Tensor):
            return other if one else False
    return a & b


def or_(a: End, b: End) -> End:
    for one, other in ((a, b), (b, a)):
        if not isinstance(one, Tensor):
            return True if one else other
    return a | b


def choose(cond: Interval, yes: Interval, no: Interval) -> Interval:
    """yes where the condition holds all over a tile, no where it fails all over, else either."""

    def end(pick: Any, a: End, b: End) -> End:
        if a is None or b is None:
            return None
        out = pick(a, b)
        for sure, value in ((cond.lo, a), (not_(cond.hi), b)):
            if isinstance(sure, Tensor):
                out = torch.where(sure, value, out)
            elif sure:
                out = value
        return out

    return Interval(end(least, yes.lo, no.lo), end(most, yes.hi, no.hi))


def compare(op: str, a: Interval, b: Interval, floats: bool = False) -> Interval:
    """le, lt, eq or ne (as eq) of two independent intervals. A NaN end compares false with anything, hence the
    negations: then nothing is proved."""
    if op in ("eq", "ne"):
        below, above = compare("le", a, b, floats), compare("le", b, a, floats)
        return Interval(and_(below.lo, above.lo), and_(below.hi, above.hi))

    def holds(x: End, y: End, strict: bool) -> End:
        x, y = _comparable(x), _comparable(y)
        return x < y if strict else x <= y

    strict = op == "lt"
    lo = False if a.hi is None or b.lo is None else holds(a.hi, b.lo, strict)
    if a.lo is None or b.hi is None:
        hi: End = True
    else:
        hi = not_(holds(b.hi, a.lo, not strict)) if floats else holds(a.lo, b.hi, strict)
    return Interval(lo, hi)
