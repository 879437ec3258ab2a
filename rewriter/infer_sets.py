"""A closed form of a set of positions: ranges, progressions, and ranges with a progression inside or beside them.

A set is given by two integers: the bits of `on` are in it, those of `off` are not, all others may be either.
"""

from __future__ import annotations

from refocus import simplify as s
from refocus.bits import full
from refocus.ir import FALSE, TRUE, Expr

# Few ranges are a form; more are tried as progressions first, and many are no form at all.
_FEW, _MANY = 3, 12


def set_form(on: int, off: int, x: Expr, origin: int = 0) -> Expr | None:
    """The predicate of the integer `x` that holds for x + origin in `on` and for none in `off`; None: not found."""
    if not on:
        return FALSE
    if not off:
        return TRUE
    ranges, gaps = _ranges(on, off, _MANY), _ranges(off, on, _FEW)
    if ranges is not None and len(ranges) <= _FEW:
        return _within(ranges, on, off, x, origin)
    if gaps is not None:
        return s.not_(_within(gaps, off, on, x, origin))
    found = _periodic(on, off, x, origin) or _inside(on, off, x, origin) or _beside(on, off, x, origin)
    if found is None and ranges is not None:
        return _within(ranges, on, off, x, origin)
    return found


def _ranges(on: int, off: int, most: int) -> list[tuple[int, int]] | None:
    """The fewest ranges that hold all of `on` and nothing of `off`; None where they are more than `most`."""
    out: list[tuple[int, int]] = []
    at = 0
    while on >> at:
        if len(out) == most:
            return None
        start = at + _lowest(on >> at)
        beyond = off >> start
        stop = start + _lowest(beyond) if beyond else on.bit_length()
        out.append((start, stop))
        at = stop
    return out


def _within(ranges: list[tuple[int, int]], on: int, off: int, x: Expr, origin: int) -> Expr:
    found: list[Expr] = []
    for start, stop in ranges:
        if stop - start == 1 and off & full(start) and off >> stop:
            found.append(s.eq(x, start - origin))
            continue
        below = s.le(start - origin, x) if off & full(start) else TRUE
        above = s.lt(x, stop - origin) if off >> stop else TRUE
        found.append(s.and_(below, above))
    return s.or_(*found)


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _periodic(on: int, off: int, x: Expr, origin: int) -> Expr | None:
    """(x + origin) % period in one or two ranges, seen over two periods at least."""
    length = (on | off).bit_length() - _lowest(on | off)
    for period in range(2, length // 2 + 1):
        if (on >> period) & off or (off >> period) & on:
            continue
        yes, no = _folded(on, period), _folded(off, period)
        if yes & no:
            continue
        shift = _lowest(no) + 1  # just past one that is out, so that no range goes round
        yes, no = ((v >> shift) | (v << (period - shift)) & full(period) for v in (yes, no))
        ranges = _ranges(yes, no, 2)
        if ranges is None:
            continue
        parts = []
        for start, stop in ranges:
            at = s.mod(s.add(x, origin - shift - start), period)
            parts.append(s.eq(at, 0) if stop - start == 1 else s.lt(at, stop - start))
        return s.or_(*parts)
    return None


def _folded(bits: int, period: int) -> int:
    out = 0
    while bits:
        out |= bits & full(period)
        bits >>= period
    return out


def _inside(on: int, off: int, x: Expr, origin: int) -> Expr | None:
    """A range, and a progression inside it (a dilated window)."""
    hull = full(on.bit_length()) ^ full(_lowest(on))
    if not off & ~hull or not off & hull:
        return None
    inner = _periodic(on, off & hull, x, origin)
    # Residues may hold further out than the last one seen: the range ends where the set is known to have ended.
    return None if inner is None else s.and_(_within([(_lowest(on), on.bit_length())], on, off, x, origin), inner)


def _beside(on: int, off: int, x: Expr, origin: int) -> Expr | None:
    """A range, and a progression beside it (a window, and every so many)."""
    longest, at, rest = (0, 0), 0, on
    while rest:
        start = at + _lowest(rest)
        rest = on >> start
        stop = start + _lowest(~rest)
        if stop - start > longest[1] - longest[0]:
            longest = (start, stop)
        at, rest = stop, on >> stop
    start, stop = longest
    run = full(stop) ^ full(start)
    left = on & ~run
    if not left or stop - start < 2:
        return None
    other = _periodic(left, off, x, origin) or _inside(left, off, x, origin)
    return None if other is None else s.or_(_within([longest], run, off, x, origin), other)
