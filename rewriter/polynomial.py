"""Integer polynomials over atoms, and proofs about their sign.

An integer `Expr` is a polynomial whose atoms are axes, sizes, integer loads and opaque calls (floordiv, mod,
min, max, ...). The canonical expression of a polynomial is Call("add", terms) of Call("mul", (Const, atoms...)),
terms ordered by `order_key`. `is_nonneg` proves p >= 0 for all positions and all sizes by replacing each axis and
each bounded atom by the end of its range that makes p smallest; what is left holds sizes only, and is shown to
be a sum of non-negative terms after writing each size as its lower bound plus something.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from refocus.ir import INT, Axis, Call, Const, Expr, Load, Sym

Poly = dict[tuple[Expr, ...], int]
Facts = Mapping[Expr, tuple["int | None", "int | None"]]  # narrower ranges of atoms, from an enclosing condition
NO_FACTS: Facts = {}


@lru_cache(maxsize=1 << 16)
def order_key(expr: Expr) -> str:
    """A text that orders expressions the same way in every process (hashes do not)."""
    if isinstance(expr, Axis):
        return f"0{expr.name}"
    if isinstance(expr, Sym):
        return f"1{expr.name}"
    if isinstance(expr, Const):
        return f"2{expr.value}"
    inner = ",".join(order_key(c) for c in expr.children)
    head = expr.op if isinstance(expr, Call) else expr.tensor if isinstance(expr, Load) else type(expr).__name__
    return f"3{head}({inner})"


@lru_cache(maxsize=1 << 16)
def to_poly(expr: Expr) -> Poly:
    """The polynomial of an integer expression. Shared: do not change what it returns."""
    if isinstance(expr, Const):
        return {(): int(expr.value)} if expr.value else {}
    if isinstance(expr, Call) and expr.op == "add" and expr.dtype == INT:
        return poly_add(*(to_poly(a) for a in expr.args))
    if isinstance(expr, Call) and expr.op == "mul" and expr.dtype == INT:
        product: Poly = {(): 1}
        for arg in expr.args:
            product = poly_mul(product, to_poly(arg))
        return product
    return {(expr,): 1}


def poly_add(*polys: Poly) -> Poly:
    out: Poly = {}
    for poly in polys:
        for mono, coef in poly.items():
            total = out.get(mono, 0) + coef
            if total:
                out[mono] = total
            else:
                out.pop(mono, None)
    return out


def poly_scale(poly: Poly, factor: int) -> Poly:
    return {m: c * factor for m, c in poly.items()} if factor else {}


def poly_mul(left: Poly, right: Poly) -> Poly:
    out: Poly = {}
    for lm, lc in left.items():
        for rm, rc in right.items():
            mono = tuple(sorted(lm + rm, key=order_key)) if lm and rm else lm or rm
            out[mono] = out.get(mono, 0) + lc * rc
    return {m: c for m, c in out.items() if c}


def from_poly(poly: Poly) -> Expr:
    """The canonical expression; m*(x//m) + x%m is put together again to x."""
    poly = _rejoin(poly)
    terms = [_term(m, c) for m, c in sorted(poly.items(), key=lambda mc: (not mc[0], [order_key(a) for a in mc[0]]))]
    if not terms:
        return Const(0)
    return terms[0] if len(terms) == 1 else Call("add", tuple(terms), INT)


def _term(mono: tuple[Expr, ...], coef: int) -> Expr:
    if not mono:
        return Const(coef)
    if coef == 1 and len(mono) == 1:
        return mono[0]
    return Call("mul", mono if coef == 1 else (Const(coef), *mono), INT)


def _rejoin(poly: Poly) -> Poly:
    for mono, coef in poly.items():
        for atom in mono:
            if not (isinstance(atom, Call) and atom.op == "mod"):
                continue
            rest = list(mono)
            rest.remove(atom)
            inner, size = atom.args
            quotient = Call("floordiv", (inner, size), INT)
            want = poly_mul({(*rest, quotient): 1} if rest else {(quotient,): 1}, poly_scale(to_poly(size), coef))
            want = {tuple(sorted(m, key=order_key)): c for m, c in want.items()}
            if all(poly.get(m) == c for m, c in want.items()):
                smaller = poly_add(poly, poly_scale(want, -1), {mono: -coef})
                return _rejoin(poly_add(smaller, poly_mul({tuple(rest): coef}, to_poly(inner))))
    return poly


Term = tuple[tuple[Expr, ...], int]


def divide_term(mono: tuple[Expr, ...], coef: int, by: Term) -> Term | None:
    """coef*mono divided by a monomial, or None when it does not divide exactly."""
    by_mono, by_coef = by
    if coef % by_coef:
        return None
    rest = list(mono)
    for atom in by_mono:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest), coef // by_coef


# ---------------------------------------------------------------------------------------------- ranges and signs


def extreme(poly: Poly, upper: bool, facts: Facts = NO_FACTS, fuel: int = 24) -> Poly | None:
    """A polynomial in sizes only that bounds `poly` from above (or below) over all positions, or None."""
    while True:
        atom = _next_bounded(poly)
        if atom is None:
            return poly
        fuel -= 1
        if fuel < 0 or any(m.count(atom) > 1 for m in poly):
            return None
        slope: Poly = {}
        rest: Poly = {}
        for mono, coef in poly.items():
            if atom in mono:
                left = list(mono)
                left.remove(atom)
                slope[tuple(left)] = slope.get(tuple(left), 0) + coef
            else:
                rest[mono] = coef
        if _sign_known(slope, facts, fuel, 1):
            end = atom_bound(atom, upper, facts, fuel)
        elif _sign_known(slope, facts, fuel, -1):
            end = atom_bound(atom, not upper, facts, fuel)
        else:
            return None
        if end is None:
            return None
        poly = poly_add(rest, poly_mul(slope, end))


def _next_bounded(poly: Poly) -> Expr | None:
    # Calls first: their ranges may mention axes that are then eliminated in turn.
    found: Expr | None = None
    for mono in poly:
        for atom in mono:
            if isinstance(atom, Sym):
                continue
            if not isinstance(atom, Axis):
                return atom
            found = atom
    return found


def _sign_known(poly: Poly, facts: Facts, fuel: int, sign: int) -> bool:
    if len(poly) == 1 and () in poly:
        return poly[()] * sign >= 0
    return poly_nonneg(poly_scale(poly, sign), facts, fuel)


def atom_bound(atom: Expr, upper: bool, facts: Facts, fuel: int) -> Poly | None:
    """An end of the range of one atom as a polynomial (which may still hold axes), or None when unbounded."""
    known = facts.get(atom)
    if known is not None and known[upper] is not None:
        value = known[upper]
        assert value is not None
        return {(): value} if value else {}
    if isinstance(atom, Axis):
        return poly_add(to_poly(atom.size), {(): -1}) if upper else {}
    if not isinstance(atom, Call):
        return None
    args = atom.args
    if atom.op == "mod":
        return poly_add(to_poly(args[1]), {(): -1}) if upper else {}
    if atom.op == "floordiv":
        end = extreme(to_poly(args[0]), upper, facts, fuel)
        if end is None:
            return None
        size = to_poly(args[1])
        if set(size) <= {()} and set(end) <= {()}:
            value = end.get((), 0) // size[()]
            return {(): value} if value else {}
        from refocus.simplify import floordiv  # the quotient of two sizes may well simplify

        folded = to_poly(floordiv(from_poly(end), args[1]))
        if all(isinstance(a, Sym) for m in folded for a in m):
            return folded
        return {} if not upper and poly_nonneg(end, facts, fuel) else None
    if atom.op in ("min", "max"):
        ends = [extreme(to_poly(a), upper, facts, fuel) for a in args]
        if (atom.op == "min") == upper:  # either end will do
            known_ends = [e for e in ends if e is not None]
            return next((e for e in known_ends if set(e) <= {()}), known_ends[0] if known_ends else None)
        return _wider(ends[0], ends[1], upper, facts, fuel)
    if atom.op == "where":
        ends = [extreme(to_poly(a), upper, facts, fuel) for a in args[1:]]
        return _wider(ends[0], ends[1], upper, facts, fuel)
    if atom.op == "abs":
        if not upper:
            return {}
        high, low = extreme(to_poly(args[0]), True, facts, fuel), extreme(to_poly(args[0]), False, facts, fuel)
        return _wider(high, None if low is None else poly_scale(low, -1), True, facts, fuel)
    return None


def _wider(a: Poly | None, b: Poly | None, upper: bool, facts: Facts, fuel: int) -> Poly | None:
    if a is None or b is None:
        return None
    sign = 1 if upper else -1
    if poly_nonneg(poly_scale(poly_add(a, poly_scale(b, -1)), sign), facts, fuel):
        return a
    return b if poly_nonneg(poly_scale(poly_add(b, poly_scale(a, -1)), sign), facts, fuel) else None


def poly_nonneg(poly: Poly, facts: Facts = NO_FACTS, fuel: int = 24) -> bool:
    """Prove poly >= 0 for every position and every size."""
    low = extreme(poly, False, facts, fuel)
    if low is None:
        return False
    for sym in {a for m in low for a in m if isinstance(a, Sym)}:
        shifted: Poly = {}
        for mono, coef in low.items():
            power = mono.count(sym)
            rest = tuple(a for a in mono if a is not sym and a != sym)
            grown: Poly = {rest: coef}
            for _ in range(power):
                grown = poly_mul(grown, {(sym,): 1, (): sym.low})
            shifted = poly_add(shifted, grown)
        low = shifted
    return all(c >= 0 for c in low.values())
