"""Integer polynomials over atoms.

An integer `Expr` is a polynomial whose atoms are axes, sizes, integer loads and opaque calls (floordiv, mod, min, max,
...). The canonical expression of a polynomial is Call("add", terms) of Call("mul", (Const, atoms...)), terms ordered by
`order_key`, the constant last. What can be proved about signs and ranges is in `refocus.proofs`, division in
`refocus.division`.
"""

from __future__ import annotations

from functools import lru_cache

from refocus.ir import INT, Axis, Call, Const, Dot, Expr, Load, Reduce, Sym

Mono = tuple[Expr, ...]  # sorted by `order_key`, with repetitions; () is the constant term
Poly = dict[Mono, int]  # no zero coefficients


@lru_cache(maxsize=1 << 16)
def order_key(expr: Expr) -> str:
    """A text, different for different expressions, that orders them the same way in every process (hashes do not)."""
    if isinstance(expr, Axis):
        return f"0{expr.name} {order_key(expr.size)}"
    if isinstance(expr, Sym):
        return f"1{expr.name} {expr.low}"
    if isinstance(expr, Const):
        return f"2{expr.value!r} {expr.dtype}"
    inner = ",".join(order_key(c) for c in expr.children)
    if isinstance(expr, Call):
        head = expr.op
    elif isinstance(expr, Load):
        head = expr.tensor
    elif isinstance(expr, Dot):
        head = f"dot {' '.join(order_key(a) for a in expr.over)}"
    else:
        assert isinstance(expr, Reduce)
        head = f"{expr.op} over {order_key(expr.axis)}"
    return f"3{head}({inner}){'' if expr.dtype == INT else expr.dtype}"


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


def from_poly(poly: Poly) -> Expr:
    """The expression of a polynomial, terms in order. (`refocus.division.canonical` also joins div and mod.)"""
    if len(poly) == 1:
        [(mono, coef)] = poly.items()
        return _term(mono, coef)
    if not poly:
        return Const(0)
    terms = sorted(poly.items(), key=lambda mc: (not mc[0], [order_key(a) for a in mc[0]]))
    return Call("add", tuple([_term(m, c) for m, c in terms]), INT)


def _term(mono: Mono, coef: int) -> Expr:
    if not mono:
        return Const(coef)
    if coef == 1:
        return mono[0] if len(mono) == 1 else Call("mul", mono, INT)
    return Call("mul", (Const(coef), *mono), INT)


def poly_add(*polys: Poly) -> Poly:
    out: Poly = {}
    for poly in polys:
        if not out:
            out = dict(poly)
            continue
        for mono, coef in poly.items():
            total = out.get(mono, 0) + coef
            if total:
                out[mono] = total
            else:
                del out[mono]
    return out


def poly_scale(poly: Poly, factor: int) -> Poly:
    return {m: c * factor for m, c in poly.items()} if factor else {}


def poly_sub(left: Poly, right: Poly) -> Poly:
    out = dict(left)
    for mono, coef in right.items():
        total = out.get(mono, 0) - coef
        if total:
            out[mono] = total
        else:
            del out[mono]
    return out


def poly_shift(poly: Poly, by: int) -> Poly:
    """poly + by."""
    return poly_add(poly, {(): by}) if by else poly


def poly_mul(left: Poly, right: Poly) -> Poly:
    if len(right) == 1 and () in right:
        return poly_scale(left, right[()])
    if len(left) == 1 and () in left:
        return poly_scale(right, left[()])
    out: Poly = {}
    for lm, lc in left.items():
        for rm, rc in right.items():
            mono = join_mono(lm, rm)
            out[mono] = out.get(mono, 0) + lc * rc
    return {m: c for m, c in out.items() if c}


def poly_replace(poly: Poly, atom: Expr, value: Poly) -> Poly:
    """poly with `value` in the place of an atom."""
    out: Poly = {}
    for mono, coef in poly.items():
        part: Poly = {tuple([a for a in mono if a != atom]): coef}
        for _ in range(mono.count(atom)):
            part = poly_mul(part, value)
        out = poly_add(out, part)
    return out


def join_mono(left: Mono, right: Mono) -> Mono:
    return tuple(sorted(left + right, key=order_key)) if left and right else left or right


def divide_mono(mono: Mono, by: Mono) -> Mono | None:
    """mono / by, or None when it does not divide."""
    if not by:
        return mono
    rest = list(mono)
    for atom in by:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def isolate(poly: Poly, atom: Expr) -> tuple[Poly, Poly]:
    """(slope, rest) with poly = slope * atom + rest, and `rest` free of the atom."""
    slope: Poly = {}
    rest: Poly = {}
    for mono, coef in poly.items():
        if atom in mono:
            left = list(mono)
            left.remove(atom)
            slope[tuple(left)] = coef
        else:
            rest[mono] = coef
    return slope, rest


def atoms_of(poly: Poly) -> set[Expr]:
    return {atom for mono in poly for atom in mono}


def squares(poly: Poly) -> tuple[list[tuple[int, Poly]], Poly]:
    """c*x*x + c*y*y - 2*c*x*y as c * (x - y) ** 2: (coefficient, what is squared) for each, and the rest."""
    found: list[tuple[int, Poly]] = []
    for atoms, coef in poly.items():
        if len(atoms) != 2 or atoms[0] == atoms[1] or coef % 2:
            continue
        (x, y), half = atoms, coef // 2
        ends = poly.get((x, x)), poly.get((y, y))
        if ends in ((half, half), (-half, -half)):
            square: Poly = {(x,): 1}
            square = poly_add(square, {(y,): 1 if ends[0] == half else -1})
            found.append((-half if ends[0] == -half else half, square))
            rest = poly_add(poly, {(x, x): -found[-1][0], (y, y): -found[-1][0], atoms: -coef})
            more, rest = squares(rest)
            return found + more, rest
    return found, poly
