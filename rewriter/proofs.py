"""Proofs about integer polynomials: their sign, their range, and what an enclosing condition adds.

`poly_nonneg` proves p >= 0 for all positions and all sizes. First by interval arithmetic: each axis and each bounded
atom is replaced by the end of its range that makes p smallest; what is left holds sizes only, and is shown to be a sum
of non-negative terms after writing each size as its lower bound plus something. Where that is too coarse, a search
with a small budget splits min, max, where and abs into cases, replaces quotients by what they round,

    c*(x // c) in [x - c + 1, x]

and subtracts multiples of known facts: p >= 0 follows from p - k*f >= 0 for a fact f >= 0. Everything here is sound
and incomplete: "not proved" says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from math import gcd, prod

from refocus.ir import BOOL, Axis, Call, Const, Expr, Sym
from refocus.polynomial import (
    Mono,
    Poly,
    atoms_of,
    divide_mono,
    from_poly,
    isolate,
    join_mono,
    order_key,
    poly_add,
    poly_mul,
    poly_replace,
    poly_scale,
    poly_shift,
    poly_sub,
    to_poly,
)

Range = tuple["int | None", "int | None"]


class Facts(Mapping[Expr, Range]):
    """What holds in some context: ranges of integer expressions (ends included, None: open), and predicates that are
    known to be true, as (1, 1), or false, as (0, 0). Immutable and hashable. Keys carry no constant term: i <= j + 3
    is kept as i - j in (None, 3)."""

    def __init__(self, ranges: Mapping[Expr, Range] | None = None, subtract: bool = True) -> None:
        items = sorted((ranges or {}).items(), key=lambda kv: order_key(kv[0]))
        self._ranges = dict(items)
        self._subtract = subtract
        self._hash = hash((subtract, *items))
        self.axes: frozenset[Axis] = frozenset(a for key in self._ranges for a in key.axes)
        self.about_sizes = any(not key.axes for key in self._ranges)
        self.atoms: dict[Expr, Range] = {}  # ranges that replace those of single atoms
        self.polys: tuple[Poly, ...] = ()  # polynomials that are not negative
        for key, (low, high) in items:
            if key.dtype == BOOL:
                continue
            poly = to_poly(key)
            if (key,) in poly:
                self.atoms[key] = (low, high)
                if isinstance(key, Axis) and isinstance(key.size, Const):
                    continue  # one range says it all
            if not subtract:
                continue
            if low is not None:
                self.polys += (poly_shift(poly, -low),)
            if high is not None:
                self.polys += (poly_shift(poly_scale(poly, -1), high),)

    @staticmethod
    def of(ranges: Mapping[Expr, Range]) -> Facts:
        return ranges if isinstance(ranges, Facts) else Facts(ranges) if ranges else NO_FACTS

    def __getitem__(self, key: Expr) -> Range:
        return self._ranges[key]

    def __iter__(self) -> Iterator[Expr]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Facts) and self._subtract == other._subtract and self._ranges == other._ranges

    def __repr__(self) -> str:
        return f"Facts({self._ranges!r})"

    @cached_property
    def plain(self) -> Facts:
        """The same ranges, none to be subtracted: what proofs inside a proof may use once a fact was subtracted, so
        that they only ever get smaller."""
        return Facts(self._ranges, subtract=False) if self._subtract else self

    def only(self, atom: Expr) -> int | None:
        """The one value that an atom can have."""
        if atom not in self.atoms:
            return None
        low, high = (limit({(atom,): 1}, upper, self) for upper in (False, True))
        return low if low == high else None

    def concern(self, target: Expr) -> bool:
        """Whether anything here may bear on an expression."""
        return self.about_sizes or not self.axes.isdisjoint(target.axes)

    def without(self, axes: tuple[Axis, ...]) -> Facts:
        """What holds whatever the value of some axes (for the body that binds them)."""
        if self.axes.isdisjoint(axes):
            return self
        return Facts({k: r for k, r in self._ranges.items() if k.axes.isdisjoint(axes)})

    def and_nonneg(self, *polys: Poly) -> Facts:
        """These facts, and that some polynomials are not negative."""
        ranges = dict(self._ranges)
        for poly in polys:
            varying = {m: c for m, c in poly.items() if m}
            if not varying:
                continue
            step = gcd(*varying.values())
            if varying[min(varying, key=lambda m: [order_key(a) for a in m])] < 0:
                step = -step
            key = from_poly({m: c // step for m, c in varying.items()})
            low, high = ranges.get(key, (None, None))
            if step > 0:
                end = -(poly.get((), 0) // step)
                low = end if low is None else max(low, end)
            else:
                end = poly.get((), 0) // -step
                high = end if high is None else min(high, end)
            ranges[key] = (low, high)
        return Facts(ranges)

    def and_truth(self, predicate: Expr, value: bool) -> Facts:
        return Facts({**self._ranges, predicate: (int(value), int(value))})


NO_FACTS = Facts()


def conjuncts(a: Expr, op: str = "and") -> list[Expr]:
    """The parts of a flattened and (or or) chain."""
    if isinstance(a, Call) and a.op == op:
        return [part for x in a.args for part in conjuncts(x, op)]
    return [a]


@lru_cache(maxsize=1 << 14)
def assume(cond: Expr, facts: Facts = NO_FACTS, holds: bool = True) -> Facts:
    """What is known where `cond` holds (or does not), besides `facts`."""
    for part in conjuncts(cond, "and" if holds else "or"):
        if isinstance(part, Const) or part.dtype != BOOL:
            continue
        value, atom = holds, part
        if isinstance(part, Call) and part.op == "not":
            value, atom = not holds, part.args[0]
        facts = facts.and_truth(atom, value)
        if not (isinstance(atom, Call) and atom.op in ("le", "eq") and all(a.is_int for a in atom.args)):
            continue
        ahead = poly_sub(to_poly(atom.args[1]), to_poly(atom.args[0]))
        behind = poly_scale(ahead, -1)
        if atom.op == "le":
            facts = facts.and_nonneg(ahead if value else poly_shift(behind, -1))
        elif value:
            facts = facts.and_nonneg(ahead, behind)
        else:
            for side in ahead, behind:  # not equal, and on one side only
                if limit(side, False, facts) == 0:
                    facts = facts.and_nonneg(poly_shift(side, -1))
    return facts


# ------------------------------------------------------------------------------------------------------- intervals


def extreme(poly: Poly, upper: bool, facts: Facts = NO_FACTS) -> Poly | None:
    """A polynomial in sizes only that bounds `poly` from above (or below) over all positions, or None."""
    low = _lowest(poly_scale(poly, -1) if upper else poly, facts, _varies)
    return poly_scale(low, -1) if upper and low is not None else low


def limit(poly: Poly, upper: bool, facts: Facts = NO_FACTS) -> int | None:
    """A number that bounds `poly` from above (or below) over all positions and sizes, or None."""
    low = _lowest(poly_scale(poly, -1) if upper else poly, facts, _varies)
    number = None if low is None else _least(low, facts)
    return -number if upper and number is not None else number


def _varies(atom: Expr) -> bool:
    return bool(atom.axes or atom.loads)


def _is_computed(atom: Expr) -> bool:
    return not isinstance(atom, Sym)


def _lowest(poly: Poly, facts: Facts, eliminate: Callable[[Expr], bool]) -> Poly | None:
    """A lower bound of poly without the atoms for which `eliminate` holds."""
    for _ in range(24):
        atom = _outermost(a for m in poly for a in m if eliminate(a))
        if atom is None:
            return poly
        slope, rest = isolate(poly, atom)
        sign = _sign(slope, facts)
        end = _end(atom, sign < 0, facts) if sign else None
        if end is None:
            return None
        poly = poly_add(rest, poly_mul(slope, end))
    return None


def _outermost(atoms: Iterable[Expr]) -> Expr | None:
    # Calls first, the longest first: an atom is shorter than what contains it, and axes may appear in its bounds.
    best: Expr | None = None
    rank: tuple[bool, int, str] | None = None
    for atom in atoms:
        if atom is not best:
            key = order_key(atom)
            mine = (not isinstance(atom, Axis), len(key), key)
            if rank is None or mine > rank:
                best, rank = atom, mine
    return best


def _sign(poly: Poly, facts: Facts) -> int:
    """1 or -1 where poly is proved to be >= 0 or <= 0, else 0."""
    if len(poly) == 1 and () in poly:
        return 1 if poly[()] > 0 else -1
    return 1 if poly_nonneg(poly, facts) else -1 if poly_nonneg(poly_scale(poly, -1), facts) else 0


def _end(atom: Expr, upper: bool, facts: Facts) -> Poly | None:
    """An end of the range of one atom as a polynomial (which may still hold axes), or None when unbounded."""
    known = facts.atoms.get(atom)
    value = None if known is None else known[upper]
    if value is not None:
        return {(): value} if value else {}
    if isinstance(atom, Axis):
        return poly_shift(to_poly(atom.size), -1) if upper else {}
    if not isinstance(atom, Call):
        return None
    args = atom.args
    if atom.op == "mod" and is_divisor(args[1], facts):
        return poly_shift(to_poly(args[1]), -1) if upper else {}
    if atom.op == "floordiv" and is_divisor(args[1], facts):
        return _quotient_end(args[0], args[1], upper, facts)
    if atom.op in ("min", "max"):
        ends = [extreme(to_poly(a), upper, facts) for a in args]
        if (atom.op == "min") != upper:
            return _wider(ends, upper, facts)
        found = [e for e in ends if e is not None]  # either will do
        return min(found, key=lambda e: not (set(e) <= {()})) if found else None
    if atom.op == "where":
        return _wider([extreme(to_poly(a), upper, facts) for a in args[1:]], upper, facts)
    if atom.op == "abs":
        if not upper:
            return {}
        low = extreme(to_poly(args[0]), False, facts)
        high = extreme(to_poly(args[0]), True, facts)
        return _wider([high, None if low is None else poly_scale(low, -1)], True, facts)
    return None


def _quotient_end(x: Expr, size: Expr, upper: bool, facts: Facts) -> Poly | None:
    end = extreme(to_poly(x), upper, facts)
    if end is None:
        return None
    by = to_poly(size)
    if len(by) == 1:
        [(mono, coef)] = by.items()
        whole: Poly = {}
        for m, c in end.items():
            left = divide_mono(m, mono)
            if left is None or (c % coef and left):
                break
            whole[left] = c // coef
        else:
            return {m: c for m, c in whole.items() if c}
        if not mono:
            number = None if upper else _least(end, facts)
            if number is not None:
                return {(): number // coef} if number // coef else {}
            if all(isinstance(a, Sym) and a.low >= 0 for m in end for a in m):
                # each coefficient rounded outwards, for what it multiplies is not negative
                rounded = {m: -(-c // coef) if upper and m else c // coef for m, c in end.items()}
                return {m: c for m, c in rounded.items() if c}
    return {} if not upper and poly_nonneg(end, facts) else None


def _wider(ends: list[Poly | None], upper: bool, facts: Facts) -> Poly | None:
    a, b = ends
    if a is None or b is None:
        return None
    above = poly_sub(a, b) if upper else poly_sub(b, a)
    return a if poly_nonneg(above, facts) else b if poly_nonneg(poly_scale(above, -1), facts) else None


@lru_cache(maxsize=1 << 12)
def is_divisor(size: Expr, facts: Facts = NO_FACTS) -> bool:
    """Whether the rules of division hold for a divisor: it is proved to be positive. A size that can be zero counts:
    where it is, there is no position to divide."""
    if isinstance(size, Const):
        return size.value > 0
    poly = to_poly(size)
    return poly_nonneg(poly if not (size.axes or size.loads) else poly_shift(poly, -1), facts)


def _least(poly: Poly, facts: Facts) -> int | None:
    """A number below a polynomial in sizes, or None."""
    number = _least_of_sizes(poly, facts)
    if number is None and any(isinstance(a, Call) for m in poly for a in m):
        simpler = _lowest(poly, facts, _is_computed)
        number = None if simpler is None else _least_of_sizes(simpler, facts)
    return number


def _least_of_sizes(poly: Poly, facts: Facts) -> int | None:
    lows: dict[Expr, int] = {}
    for atom in atoms_of(poly):
        low = _size_low(atom, facts)
        if low is None:
            return None
        lows[atom] = low
    if all(c >= 0 for m, c in poly.items() if m) and all(low >= 0 for low in lows.values()):
        return sum(c * prod(lows[a] for a in m) for m, c in poly.items())
    for atom, low in lows.items():  # atom = low + something that is not negative
        poly = poly_replace(poly, atom, {(atom,): 1, (): low} if low else {(atom,): 1})
    return None if any(c < 0 for m, c in poly.items() if m) else poly.get((), 0)


def _size_low(atom: Expr, facts: Facts) -> int | None:
    if isinstance(atom, Sym):
        known = facts.atoms.get(atom, (None, None))[0]
        return atom.low if known is None else max(known, atom.low)
    low = _lowest({(atom,): 1}, facts, _is_computed)
    return None if low is None else _least_of_sizes(low, facts)


# ----------------------------------------------------------------------------------------------------------- signs


def poly_nonneg(poly: Poly, facts: Facts = NO_FACTS) -> bool:
    """Prove poly >= 0 for every position and every size."""
    if not facts:
        total = 0
        for mono, coef in poly.items():
            if not mono:
                total += coef
                continue
            atom = mono[0]
            if len(mono) > 1:
                break
            if isinstance(atom, Axis) and isinstance(atom.size, Const):
                if coef < 0:
                    total += coef * (int(atom.size.value) - 1)
            elif coef < 0 or not isinstance(atom, Sym):
                break
            else:
                total += coef * atom.low
        else:
            return total >= 0
    key = (frozenset(poly.items()), facts)
    proved = _PROVED.get(key)
    if proved is None:
        if len(_PROVED) > 1 << 16:
            _PROVED.clear()
        relevant = facts and any(a in facts.atoms or facts.concern(a) for a in atoms_of(poly))
        proved = poly_nonneg(poly) if facts else False
        if not proved and (relevant or not facts):
            proved = _search(poly, facts, facts.polys, [40], 4)
        _PROVED[key] = proved
    return proved


_PROVED: dict[tuple[frozenset[tuple[Mono, int]], Facts], bool] = {}


Case = tuple[Poly, Facts, tuple[Poly, ...]]  # what to prove, what is known, and which facts may still be subtracted


def _search(poly: Poly, facts: Facts, polys: tuple[Poly, ...], budget: list[int], depth: int) -> bool:
    low = _lowest(poly, facts, _varies)
    if low is not None:
        number = _least(low, facts)
        if number is not None and number >= 0:
            return True
    if depth:
        for cases in _alternatives(poly, facts, polys):
            budget[0] -= len(cases)
            if budget[0] < 0:
                return False
            if all(_search(*case, budget, depth - 1) for case in cases):
                return True
    return False


def _alternatives(poly: Poly, facts: Facts, polys: tuple[Poly, ...]) -> Iterator[list[Case]]:
    """Lists of cases; poly >= 0 follows when every case of one list is proved."""
    calls = [a for a in atoms_of(poly) if isinstance(a, Call) and a.op in _SPLIT]
    for atom in sorted(calls, key=lambda a: (-len(order_key(a)), order_key(a))):
        yield from _split(poly, atom, facts, polys)
    for k, fact in enumerate(polys):
        for multiple in _cancelling(poly, fact):
            yield [(multiple, facts.plain, polys[:k] + polys[k + 1 :])]


_SPLIT = ("where", "min", "max", "abs", "floordiv", "mod")


def _split(poly: Poly, atom: Call, facts: Facts, polys: tuple[Poly, ...]) -> Iterator[list[Case]]:
    args = atom.args
    if atom.op == "where":
        cond, a, b = args
        outer = NO_FACTS if facts is facts.plain else facts
        cases: list[Case] = []
        for end, holds in (a, True), (b, False):
            known = assume(cond, outer, holds)
            new = tuple(p for p in known.polys if p not in facts.polys)
            cases.append((poly_replace(poly, atom, to_poly(end)), known, polys + new))
        yield cases
        return
    slope, rest = isolate(poly, atom)
    sign = _sign(slope, facts) if not any(atom in m for m in slope) else 0
    if atom.op in ("min", "max", "abs"):
        ends = [to_poly(a) for a in args]
        if atom.op == "abs":
            ends.append(poly_scale(ends[0], -1))
        cases = [(poly_replace(poly, atom, end), facts, polys) for end in ends]
        if sign == (-1 if atom.op == "min" else 1):  # any of them is on the safe side
            yield from ([case] for case in cases)
        else:
            yield cases
        return
    x, size = to_poly(args[0]), to_poly(args[1])
    if not sign or not is_divisor(args[1], facts):
        return
    if atom.op == "mod":
        if sign < 0 and poly_nonneg(x, facts):
            yield [(poly_add(rest, poly_mul(slope, x)), facts, polys)]
        return
    if facts and sign > 0 and poly_nonneg(x, facts):
        yield [(rest, facts, polys)]
    if not args[1].axes and not args[1].loads and poly_nonneg(poly_shift(size, -1), facts):
        # p >= 0 iff size*p + size - 1 >= 0, for p is an integer
        rounded = x if sign < 0 else poly_shift(poly_sub(x, size), 1)
        scaled = poly_add(poly_mul(rest, size), poly_mul(slope, rounded))
        yield [(poly_shift(poly_add(scaled, size), -1), facts, polys)]


def _cancelling(poly: Poly, fact: Poly) -> Iterator[Poly]:
    """s*poly - k*fact, with s, k > 0, for each k that makes a term of poly disappear."""
    seen: set[tuple[int, int, Mono]] = set()
    for mono in sorted((m for m in fact if m), key=lambda m: [order_key(a) for a in m]):
        for other, coef in poly.items():
            factor = divide_mono(other, mono)
            if factor is None or (coef < 0) != (fact[mono] < 0) or not all(isinstance(a, Sym) for a in factor):
                continue
            if any(a.low < 0 for a in factor):  # type: ignore[attr-defined]
                continue
            common = gcd(coef, fact[mono])
            scale, times = abs(fact[mono]) // common, abs(coef) // common
            if (scale, times, factor) not in seen:
                seen.add((scale, times, factor))
                lifted = {join_mono(m, factor): c * times for m, c in fact.items()}
                yield poly_sub(poly_scale(poly, scale), lifted)
