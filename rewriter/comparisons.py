"""What several integer comparisons say together, inside one `and` or one `or`."""

from __future__ import annotations

from collections.abc import Callable

from refocus.division import nearest
from refocus.ir import Call, Const, Expr
from refocus.polynomial import Poly, from_poly, poly_add, poly_scale, poly_shift, poly_sub, to_poly
from refocus.proofs import Facts, limit


def decided(op: str, parts: list[Expr]) -> bool:
    """Whether two comparisons exclude each other (and), or leave nothing out (or): a - b >= 3 and b - a >= 0."""
    ahead = [poly_sub(to_poly(p.children[1]), to_poly(p.children[0])) for p in parts if _is_int_le(p)]
    for k, left in enumerate(ahead):
        for right in ahead[:k]:
            total = poly_add(left, right)
            if set(total) <= {()} and total.get((), 0) * (1 if op == "and" else -1) < (0 if op == "and" else 2):
                return True
    return False


# A remainder is followed through this many rounds.
_ROUNDS = 4


def remainder_between(diff: Poly, facts: Facts) -> list[Poly] | None:
    """Polynomials that are not negative where `diff`, a multiple of a remainder and a number, is not: a remainder that
    is small or large in one round only. (y - i) % 14 <= 8 with -4 < y - i < 12 is 0 <= y - i <= 8."""
    varying = [m for m in diff if m]
    if len(varying) != 1 or len(varying[0]) != 1:
        return None
    (atom,) = varying[0]
    if not (isinstance(atom, Call) and atom.op == "mod" and isinstance(atom.args[1], Const)):
        return None
    size, slope, number = int(atom.args[1].value), diff[varying[0]], diff.get((), 0)
    low, high = (-(number // slope), size - 1) if slope > 0 else (0, number // -slope)
    x = nearest(to_poly(atom.args[0]), size)
    first, last = limit(x, False, facts), limit(x, True, facts)
    if first is None or last is None or last // size - first // size >= _ROUNDS:
        return None
    rounds = [k * size for k in range(first // size, last // size + 1)]
    reached = [start for start in rounds if start + low <= last and start + high >= first]
    if len(reached) != 1:
        return None
    return [poly_shift(x, -(reached[0] + low)), poly_shift(poly_scale(x, -1), reached[0] + high)]


def _is_int_le(a: Expr) -> bool:
    return isinstance(a, Call) and a.op == "le" and a.args[0].is_int and a.args[1].is_int


def tightest(op: str, parts: list[Expr]) -> list[Expr]:
    """Of several `lhs <= rhs + c` that differ in c only, one decides."""
    best: dict[tuple[Expr, Expr], tuple[int, Expr]] = {}
    out: list[Expr] = []
    for part in parts:
        if _is_int_le(part):
            right = to_poly(part.children[1])
            key = (part.children[0], from_poly({m: c for m, c in right.items() if m}))
            constant = right.get((), 0)
            held = best.get(key)
            if held is None:
                best[key] = (constant, part)
                out.append(part)
            elif (constant < held[0]) == (op == "and"):
                out[out.index(held[1])] = part
                best[key] = (constant, part)
        else:
            out.append(part)
    return out


# Resolution compares parts pairwise; masks of more parts are lists of cases that share no literals.
_RESOLVED = 12


def resolve(parts: list[frozenset[Expr]], negate: Callable[[Expr], Expr]) -> list[frozenset[Expr]]:
    """The parts of an `or`, each a set of literals that hold together, without literals that the other parts make
    superfluous: p or (not p and q) is p or q, and (p and q) or (not p and q) is q. The same for `and`, turned round.
    """
    if len(parts) > _RESOLVED:
        return parts
    parts = list(parts)
    changed = True
    while changed:
        changed = False
        for k, part in enumerate(parts):
            for literal in part:
                opposite, rest = negate(literal), part - {literal}
                if any(opposite in other and other - {opposite} <= rest for other in parts):
                    parts[k] = rest
                    changed = True
                    break
    return [p for k, p in enumerate(parts) if not any(q < p or (q == p and m < k) for m, q in enumerate(parts))]
