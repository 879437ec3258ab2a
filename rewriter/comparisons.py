"""What several integer comparisons say together, inside one `and` or one `or`."""

from __future__ import annotations

from collections.abc import Callable

from refocus.ir import Call, Expr
from refocus.polynomial import from_poly, poly_add, poly_sub, to_poly


def decided(op: str, parts: list[Expr]) -> bool:
    """Whether two comparisons exclude each other (and), or leave nothing out (or): a - b >= 3 and b - a >= 0."""
    ahead = [poly_sub(to_poly(p.children[1]), to_poly(p.children[0])) for p in parts if _is_int_le(p)]
    for k, left in enumerate(ahead):
        for right in ahead[:k]:
            total = poly_add(left, right)
            if set(total) <= {()} and total.get((), 0) * (1 if op == "and" else -1) < (0 if op == "and" else 2):
                return True
    return False


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
