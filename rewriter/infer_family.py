"""One form for many planes (heads, windows of an image): a predicate with other numbers each, or a choice of a few."""

from __future__ import annotations

import re
from collections.abc import Sequence

from refocus import simplify as s
from refocus.infer_sets import set_form
from refocus.ir import INT, Axis, Call, Const, Expr

_SHAPE = re.compile(r"Const\(value=-?\d+, dtype='int64'\)")
_MOST_FORMS, _MOST_NUMBERS = 6, 16


def family(forms: Sequence[Expr], place: Axis) -> Expr | None:
    """A predicate that is forms[k] at place == k."""
    kinds: dict[str, list[int]] = {}
    for k, form in enumerate(forms):
        kinds.setdefault(_SHAPE.sub("Const()", repr(form)), []).append(k)
    if len(kinds) > _MOST_FORMS:
        return None
    parts = []
    for where in kinds.values():
        bits = sum(1 << k for k in where)
        inside = set_form(bits, ((1 << len(forms)) - 1) & ~bits, place)
        one = _same_but_numbers([forms[k] for k in where], where, place)
        if inside is None or one is None:
            return _choice(forms, place)
        parts.append(s.and_(inside, one))
    return s.or_(*parts)


def _choice(forms: Sequence[Expr], place: Axis) -> Expr | None:
    """(place in this set and this form) or (place in that set and that form)"""
    distinct = list(dict.fromkeys(forms))
    if len(distinct) > _MOST_FORMS:
        return None
    parts = []
    whole = (1 << len(forms)) - 1
    for form in distinct:
        where = sum(1 << k for k, other in enumerate(forms) if other == form)
        inside = set_form(where, whole & ~where, place)
        if inside is None:
            return None
        parts.append(s.and_(inside, form))
    return s.or_(*parts)


def _same_but_numbers(forms: Sequence[Expr], where: Sequence[int], place: Axis) -> Expr | None:
    """Forms, of the planes `where`, that differ in integer constants alone: each is then a function of the plane."""
    first = forms[0]
    if all(f == first for f in forms):
        return first
    if isinstance(first, Const):
        numbers = [f.value for f in forms if isinstance(f, Const) and f.dtype == INT]
        return _number([int(v) for v in numbers], where, place) if len(numbers) == len(forms) else None
    if not isinstance(first, Call) or any(not isinstance(f, Call) or f.op != first.op for f in forms):
        return None
    columns = list(zip(*(f.children for f in forms)))
    parts = [_same_but_numbers(column, where, place) for column in columns]
    known = [p for p in parts if p is not None]
    return s.call(first.op, *known, dtype=first.dtype) if len(known) == len(parts) else None


def _number(values: Sequence[int], where: Sequence[int], place: Axis) -> Expr | None:
    step, rest = divmod(values[1] - values[0], where[1] - where[0])
    if not rest and all(v == values[0] + step * (k - where[0]) for k, v in zip(where, values)):
        return s.add(values[0] - step * where[0], s.mul(step, place))
    changes = [n for n in range(1, len(values)) if values[n] != values[n - 1]]
    if len(changes) > _MOST_NUMBERS:
        return None
    out: Expr = Const(values[-1])
    for n in reversed(changes):
        out = s.where(s.lt(place, where[n]), Const(values[n - 1]), out)
    return out
