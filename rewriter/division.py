"""Quotient and remainder of integer polynomials: where views disappear. For 0 <= r < c and b, c > 0:

    (c*a + r) // (c*b)  ->  a // b            (c*a + r) % (c*b)   ->  c*(a % b) + r
    (w + x // a) // b   ->  (a*w + x) // (a*b)
    (x % (a*b)) // b    ->  (x // b) % a      (y + x % (a*b)) % b ->  (y + x) % b
    b*(x // b) + x % b  ->  x                 a*((w + x // a) % b) + x % a  ->  (a*w + x) % (a*b)

`c` may be any divisor of the size: a number, a product of sizes, or a sum of them such as L + 1.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

from refocus.ir import INT, Call, Const, Expr
from refocus.polynomial import (
    Mono,
    Poly,
    divide_mono,
    from_poly,
    order_key,
    poly_add,
    poly_mul,
    poly_scale,
    poly_shift,
    poly_sub,
    to_poly,
)
from refocus.proofs import NO_FACTS, Facts, is_divisor, limit, poly_nonneg

_ONE: Poly = {(): 1}


@lru_cache(maxsize=1 << 16)
def floordiv(a: Expr, b: Expr, facts: Facts = NO_FACTS) -> Expr:
    """a // b, rounding down. A divisor not known to be positive is kept as written."""
    return canonical(_divide(a, b, facts)[0])


@lru_cache(maxsize=1 << 16)
def mod(a: Expr, b: Expr, facts: Facts = NO_FACTS) -> Expr:
    """a % b in [0, b). A divisor not known to be positive is kept as written."""
    return canonical(_divide(a, b, facts)[1])


@lru_cache(maxsize=1 << 16)
def _divide(a: Expr, b: Expr, facts: Facts) -> tuple[Poly, Poly]:
    if isinstance(b, Const):
        if b.value == 1:
            return to_poly(a), {}
        if isinstance(a, Const) and b.value:
            return to_poly(Const(a.value // b.value)), to_poly(Const(a.value % b.value))
    if not is_divisor(b, facts):
        return {(Call("floordiv", (a, b), INT),): 1}, {(Call("mod", (a, b), INT),): 1}
    size = to_poly(b)
    whole, rest = _reduce(to_poly(a), size)
    quotient, remainder = _divide_rest(rest, size, b, facts)
    return poly_add(whole, quotient), remainder


def _reduce(poly: Poly, size: Poly, nearest: bool = False) -> tuple[Poly, Poly]:
    """poly = q * size + r, where no term of r holds the leading term of size (with `nearest`, more than half of it)."""
    lead = min(size, key=lambda m: (-len(m), [order_key(a) for a in m]))
    whole: Poly = {}
    rest = poly
    for _ in range(16):
        step: Poly = {}
        for mono, coef in rest.items():
            left = divide_mono(mono, lead)
            if left is not None:
                times = _times(coef, size[lead], nearest, round_down=not left)
                if times:
                    step[left] = times
        if not step:
            break
        whole = poly_add(whole, step)
        rest = poly_sub(rest, poly_mul(step, size))
        if len(size) == 1:
            break
    return whole, rest


def nearest(poly: Poly, size: int) -> Poly:
    """poly less a multiple of a number, so that its coefficients are small: the same remainder."""
    return _reduce(poly, {(): size}, nearest=True)[1]


def _times(coef: int, size: int, nearest: bool, round_down: bool) -> int:
    if round_down:
        return coef // size
    times = abs(coef) // size
    if nearest and 2 * (abs(coef) - times * size) > size:
        times += 1
    return times if coef > 0 else -times


def _divide_rest(rest: Poly, size: Poly, b: Expr, facts: Facts) -> tuple[Poly, Poly]:
    """Quotient and remainder of what no term-wise division reaches."""
    if not rest:
        return {}, {}
    done = _resolve(rest, size, facts)
    if done is not None:
        return done
    for unit in _units(rest, size):
        high, low = _reduce(rest, unit)
        fixed = _resolve(low, unit, facts) if high else None
        times = _exact(size, unit) if fixed else None
        if fixed is not None and times is not None:
            q, r = _divide(canonical(poly_add(high, fixed[0])), from_poly(times), facts)
            return q, poly_add(poly_mul(r, unit), fixed[1])
    value = canonical(rest)
    if to_poly(value) != rest:
        return _divide(value, b, facts)
    return to_poly(_opaque_quotient(rest, value, b, facts)), to_poly(_opaque_remainder(rest, value, size, b, facts))


def _resolve(rest: Poly, size: Poly, facts: Facts) -> tuple[Poly, Poly] | None:
    """Quotient and remainder, if the remainder is proved to lie in [0, size), perhaps moved by a few sizes."""
    near_whole, near = _reduce(rest, size, nearest=True)
    for whole, part in ({}, rest), (near_whole, near):
        if whole or part is rest:
            for times in _moves(part, size, facts):
                moved = poly_sub(part, poly_scale(size, times))
                if poly_nonneg(moved, facts) and poly_nonneg(poly_shift(poly_sub(size, moved), -1), facts):
                    return poly_shift(whole, times), moved
    return None


def _moves(part: Poly, size: Poly, facts: Facts) -> list[int]:
    moves = [0]
    if () in size and len(size) == 1:
        low = limit(part, False, facts)
        if low is not None and low // size[()]:
            moves.append(low // size[()])
        if not facts:
            return moves
        # What is known of a sum bounds it better than what is known of its terms.
        for fact in facts.polys:
            low = limit(poly_sub(part, fact), False, facts)
            if low is not None and low // size[()] not in moves:
                moves.append(low // size[()])
    return moves + [k for k in (-1, 1) if k not in moves]


def _units(rest: Poly, size: Poly) -> list[Poly]:
    """Proper divisors of the size that may divide some terms of `rest`, largest first."""
    common = gcd(*size.values())
    shared = _shared(list(size))
    core = {_without(m, shared): c // common for m, c in size.items()}  # 1 when the size is a single term
    found: dict[tuple[Mono, int], None] = {(shared, common): None, ((), 1): None}
    for mono, coef in rest.items():
        part = _shared([mono, shared])
        step = gcd(coef, common)
        found.update(dict.fromkeys([(part, step), (part, 1), ((), step)]))
    units: list[Poly] = []
    for part, step in sorted(found, key=lambda f: (-len(f[0]), -f[1], [order_key(a) for a in f[0]])):
        single: Poly = {part: step}
        for unit in [single] if core == _ONE else [poly_mul(core, single), single]:
            if unit != size and unit != _ONE and unit not in units:
                units.append(unit)
    return units


def _shared(monos: list[Mono]) -> Mono:
    out = list(monos[0])
    for mono in monos[1:]:
        left = list(mono)
        for atom in list(out):
            if atom in left:
                left.remove(atom)
            else:
                out.remove(atom)
    return tuple(out)


def _without(mono: Mono, part: Mono) -> Mono:
    left = divide_mono(mono, part)
    assert left is not None
    return left


def _exact(poly: Poly, by: Poly) -> Poly | None:
    """poly / by when nothing remains."""
    whole, rest = _reduce(poly, by)
    return None if rest else whole


def _opaque_quotient(rest: Poly, value: Expr, b: Expr, facts: Facts) -> Expr:
    inner = [m[0] for m, c in rest.items() if c == 1 and len(m) == 1 and isinstance(m[0], Call)]
    quotients = [a for a in inner if isinstance(a, Call) and a.op == "floordiv" and is_divisor(a.args[1])]
    if len(quotients) == 1:
        [atom] = quotients
        x, by = to_poly(atom.args[0]), to_poly(atom.args[1])
        others = {m: c for m, c in rest.items() if m != (atom,)}
        return floordiv(canonical(poly_add(x, poly_mul(others, by))), from_poly(poly_mul(by, to_poly(b))), facts)
    if len(rest) == 1 and inner:
        [remainder] = inner
        if isinstance(remainder, Call) and remainder.op == "mod":
            times = _exact(to_poly(remainder.args[1]), to_poly(b))
            if times is not None:
                return mod(floordiv(remainder.args[0], b, facts), from_poly(times), facts)
    return Call("floordiv", (value, b), INT)


def _opaque_remainder(rest: Poly, value: Expr, size: Poly, b: Expr, facts: Facts) -> Expr:
    stripped: Poly = {}
    for mono, coef in rest.items():
        for atom in mono:
            if isinstance(atom, Call) and atom.op == "mod":
                others: Poly = {_without(mono, (atom,)): coef}
                if _exact(poly_mul(others, to_poly(atom.args[1])), size) is not None:
                    stripped = poly_add(stripped, poly_mul(others, to_poly(atom.args[0])))
                    break
        else:
            stripped = poly_add(stripped, {mono: coef})
    return mod(canonical(stripped), b, facts) if stripped != rest else Call("mod", (value, b), INT)


# ------------------------------------------------------------------------------------------- putting together again


def canonical(poly: Poly) -> Expr:
    """The canonical expression of a polynomial: what div and mod took apart is joined."""
    if any(isinstance(a, Call) and a.op == "mod" for m in poly for a in m):
        poly = _rejoin(poly)
    return from_poly(poly)


def _rejoin(poly: Poly) -> Poly:
    for mono in sorted(poly, key=lambda m: [order_key(a) for a in m]):
        for atom in mono:
            if isinstance(atom, Call) and atom.op == "mod" and is_divisor(atom.args[1]):
                term: Poly = {_without(mono, (atom,)): poly[mono]}
                joined = _join_quotient(poly, mono, term, atom) or _join_remainder(poly, mono, term, atom)
                if joined is not None:
                    return _rejoin(joined)
    return poly


def _holds(poly: Poly, part: Poly) -> bool:
    return all(poly.get(m) == c for m, c in part.items())


def _join_quotient(poly: Poly, mono: Mono, term: Poly, atom: Call) -> Poly | None:
    """term*size*(x // size) + term*(x % size)  ->  term*x."""
    x, size = atom.args
    quotient = to_poly(floordiv(x, size))
    whole = poly_mul(poly_mul(term, to_poly(size)), quotient)
    if not _holds(poly, whole):
        return None
    return poly_add(poly_sub(poly, poly_add(whole, {mono: poly[mono]})), poly_mul(term, to_poly(x)))


def _join_remainder(poly: Poly, mono: Mono, term: Poly, atom: Call) -> Poly | None:
    """term*a*((w + x // a) % b) + term*(x % a)  ->  term*((a*w + x) % (a*b))."""
    x, size = atom.args
    by = to_poly(size)
    for other in sorted({a for m in poly for a in m if isinstance(a, Call) and a.op == "mod"}, key=order_key):
        assert isinstance(other, Call)
        whole = poly_mul(poly_mul(term, by), {(other,): 1})
        if other == atom or not _holds(poly, whole) or not is_divisor(other.args[1]):
            continue
        quotient, inside = to_poly(floordiv(x, size)), to_poly(other.args[0])
        if _holds(inside, quotient):
            w = poly_sub(inside, quotient)
            both = from_poly(poly_mul(by, to_poly(other.args[1])))
            merged = mod(canonical(poly_add(to_poly(x), poly_mul(w, by))), both)
            return poly_add(poly_sub(poly, poly_add(whole, {mono: poly[mono]})), poly_mul(term, to_poly(merged)))
    return None
