"""Rows that keep one range of columns each: low(i) <= j < high(i), with both ends found as arithmetic of i."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refocus import simplify as s
from refocus.bits import Rows, full
from refocus.ir import FALSE, TRUE, Expr


@dataclass(frozen=True)
class _Bound:
    """The end of a row's range is `known`, or anything on to `limit` (None: as far as one likes that way)."""

    row: int
    known: int
    limit: int | None
    is_low: bool

    def allows(self, value: int) -> bool:
        if self.is_low:
            return value <= self.known and (self.limit is None or value >= self.limit)
        return value >= self.known and (self.limit is None or value <= self.limit)


@dataclass(frozen=True)
class _Line:
    """step * ((i + shift) // per) + offset, clamped to `low` from below and `high` from above where these are given."""

    step: int
    per: int
    shift: int
    offset: int
    low: int | None = None
    high: int | None = None

    def at(self, row: int) -> int:
        value = self.step * ((row + self.shift) // self.per) + self.offset
        if self.low is not None:
            value = max(value, self.low)
        return value if self.high is None else min(value, self.high)

    def text(self, i: Expr) -> Expr:
        value = s.add(s.mul(self.step, s.floordiv(s.add(i, self.shift), self.per)), self.offset)
        if self.low is not None:
            value = s.maximum(value, self.low)
        return value if self.high is None else s.minimum(value, self.high)


def ranges_form(on: Rows, off: Rows, i: Expr, j: Expr) -> Expr | None:
    """None where a row has two ranges or none at all, or the ends follow no rule."""
    lows: list[_Bound] = []
    highs: list[_Bound] = []
    for k, (yes, no) in enumerate(zip(on, off)):
        if not yes:
            if no:
                return None
            continue
        first, stop = (yes & -yes).bit_length() - 1, yes.bit_length()
        if no & (full(stop) ^ full(first)):
            return None
        below, above = no & full(first), no >> stop
        lows.append(_Bound(k, first, below.bit_length() if below else None, True))
        highs.append(_Bound(k, stop, stop + (above & -above).bit_length() - 1 if above else None, False))
    parts: list[Expr] = [TRUE]
    for bounds, is_low in ((lows, True), (highs, False)):
        held = [b for b in bounds if b.limit is not None]
        if not held:
            continue
        line = next((c for c in _candidates(held) if all(b.allows(c.at(b.row)) for b in bounds)), None)
        if line is None:
            return None
        parts.append(s.le(line.text(i), j) if is_low else s.lt(j, line.text(i)))
    found = s.and_(*parts)
    return None if found == FALSE else found


def _candidates(held: Sequence[_Bound]) -> Iterator[_Line]:
    first, last = held[0], held[-1]
    yield _Line(0, 1, 0, first.known)
    yield _Line(1, 1, 0, first.known - first.row)
    yield _Line(1, 1, 0, last.known - last.row)
    lines = list(dict.fromkeys((*_stairs(held), *_stairs(held[::-1]))))
    yield from lines
    for line in (_Line(1, 1, 0, first.known - first.row), _Line(1, 1, 0, last.known - last.row), *lines):
        for low in (None, first.known, last.known):
            for high in (None, first.known, last.known):
                if low is not None or high is not None:
                    yield _Line(line.step, line.per, line.shift, line.offset, low, high)


def _stairs(held: Sequence[_Bound]) -> Iterator[_Line]:
    """Steps of the same height and width, as the known ends have them: from the first two that are seen."""
    changes = [(b, b.known - a.known) for a, b in itertools.pairwise(held) if b.known != a.known]
    if held[0].row > held[-1].row:
        changes = [(a, a.known - b.known) for a, b in itertools.pairwise(held) if b.known != a.known]
    if not changes:
        return
    rows = [b.row for b, _ in changes]
    per = abs(rows[1] - rows[0]) if len(rows) > 1 else 0
    per = math.gcd(*(abs(r - rows[0]) for r in rows)) if len(rows) > 2 else per
    for step in dict.fromkeys(d for _, d in changes[:2]):
        for width in dict.fromkeys((per, abs(rows[1] - rows[0]) if len(rows) > 1 else 0)):
            if width < 1:
                continue
            shift = -rows[0] % width
            known = next(b.known for b, _ in changes if b.row == rows[0])
            yield _Line(step, width, shift, known - step * ((rows[0] + shift) // width))
