"""Smart constructors: every expression is built here, and comes out canonical.

Integers are kept as polynomials (`refocus.polynomial`), so equal index arithmetic is equal structure; views disappear
in `refocus.division`. Comparisons of integers become `le` / `eq` of the two signs of their difference; `lt` never
remains. `where` whose condition is decided by ranges disappears, and so does one whose branches agree. `under`
simplifies again with what an enclosing condition says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import gcd

from refocus import division
from refocus.comparisons import decided, remainder_between, resolve, tightest
from refocus.constants import fold, held, identities, overflows
from refocus.division import canonical
from refocus.ir import BOOL, FALSE, INT, TRUE, Call, Const, Dot, Expr, Load, Reduce, rewrite
from refocus.polynomial import (
    Poly,
    order_key,
    poly_add,
    poly_mul,
    poly_replace,
    poly_scale,
    poly_shift,
    poly_sub,
    to_poly,
)
from refocus.proofs import NO_FACTS, Facts, Range, assume, conjuncts, limit, poly_nonneg

__all__ = [
    "add", "and_", "as_bool", "assume", "bounds", "call", "cast", "conjuncts", "eq", "expr", "floordiv", "ge", "gt",
    "is_nonneg", "le", "lt", "maximum", "minimum", "mod", "mul", "ne", "neg", "not_", "or_", "rebuild", "sub",
    "substitute", "under", "where", "xor",
]  # fmt: skip

IntLike = Expr | int
Knowledge = Mapping[Expr, Range]  # what `assume` returns, or ranges written by hand


def expr(value: IntLike) -> Expr:
    return _number(value) if isinstance(value, int) else value


@lru_cache(maxsize=1 << 12)
def _number(value: int) -> Const:
    return Const(int(value))  # True is 1


def is_nonneg(value: IntLike, facts: Knowledge = NO_FACTS) -> bool:
    """Prove value >= 0 for every position and size."""
    return poly_nonneg(to_poly(expr(value)), Facts.of(facts))


def bounds(value: Expr, facts: Knowledge = NO_FACTS) -> Range:
    """Numeric range (None: unknown or unbounded). Sizes count as at least their lower bound, without upper one."""
    poly, known = to_poly(value), Facts.of(facts)
    return limit(poly, False, known), limit(poly, True, known)


# ------------------------------------------------------------------------------------------------ integer arithmetic


def add(*values: IntLike) -> Expr:
    return _sum(tuple([expr(v) for v in values]))


def mul(*values: IntLike) -> Expr:
    return _product(tuple([expr(v) for v in values]))


def neg(value: IntLike) -> Expr:
    return _product((Const(-1), expr(value)))


def sub(a: IntLike, b: IntLike) -> Expr:
    return _difference(expr(a), expr(b))


@lru_cache(maxsize=1 << 16)
def _sum(values: tuple[Expr, ...]) -> Expr:
    return canonical(poly_add(*(to_poly(v) for v in values)))


@lru_cache(maxsize=1 << 16)
def _difference(a: Expr, b: Expr) -> Expr:
    return canonical(poly_sub(to_poly(a), to_poly(b)))


@lru_cache(maxsize=1 << 16)
def _product(values: tuple[Expr, ...]) -> Expr:
    out: Poly = {(): 1}
    for value in values:
        out = poly_mul(out, to_poly(value))
    return canonical(out)


def floordiv(a: IntLike, b: IntLike, facts: Knowledge = NO_FACTS) -> Expr:
    """a // b, rounding down; b > 0 (another b is kept as written)."""
    return division.floordiv(expr(a), expr(b), Facts.of(facts))


def mod(a: IntLike, b: IntLike, facts: Knowledge = NO_FACTS) -> Expr:
    """a % b in [0, b); b > 0 (another b is kept as written)."""
    return division.mod(expr(a), expr(b), Facts.of(facts))


def minimum(a: IntLike, b: IntLike, facts: Knowledge = NO_FACTS) -> Expr:
    return _pick("min", expr(a), expr(b), Facts.of(facts))


def maximum(a: IntLike, b: IntLike, facts: Knowledge = NO_FACTS) -> Expr:
    return _pick("max", expr(a), expr(b), Facts.of(facts))


@lru_cache(maxsize=1 << 14)
def _pick(op: str, a: Expr, b: Expr, facts: Facts) -> Expr:
    ahead = poly_sub(to_poly(b), to_poly(a))
    if poly_nonneg(ahead, facts):
        return a if op == "min" else b
    if poly_nonneg(poly_scale(ahead, -1), facts):
        return b if op == "min" else a
    return Call(op, tuple(sorted((a, b), key=order_key)), INT)


# ---------------------------------------------------------------------------------------------------- predicates


def le(a: IntLike, b: IntLike, facts: Knowledge = NO_FACTS) -> Expr:
    a, b = _as_number(expr(a)), _as_number(expr(b))
    if a.is_float or b.is_float:
        return _float_compare("le", a, b)
    return _int_le(a, b, Facts.of(facts))


@lru_cache(maxsize=1 << 14)
def _int_le(a: Expr, b: Expr, facts: Facts) -> Expr:
    return _sign_of(poly_sub(to_poly(b), to_poly(a)), facts)


def _sign_of(diff: Poly, facts: Facts) -> Expr:
    """diff >= 0."""
    if poly_nonneg(diff, facts):
        return TRUE
    if poly_nonneg(poly_shift(poly_scale(diff, -1), -1), facts):
        return FALSE
    spread = _over_where(diff, lambda d: _sign_of(d, facts))
    if spread is not None:
        return spread
    ends = remainder_between(diff, facts)
    if ends is not None:
        return and_(*(_sign_of(end, facts) for end in ends))
    divisor = gcd(*(c for m, c in diff.items() if m))
    if divisor > 1:
        diff = {m: c // divisor for m, c in diff.items() if c // divisor}
    left = canonical({m: -c for m, c in diff.items() if c < 0 and m})
    right = canonical({m: c for m, c in diff.items() if c > 0 or not m})
    return Call("le", (left, right), BOOL)


def lt(a: IntLike, b: IntLike, facts: Knowledge = NO_FACTS) -> Expr:
    a, b = _as_number(expr(a)), _as_number(expr(b))
    if a.is_float or b.is_float:
        return _float_compare("lt", a, b)
    return le(add(a, 1), b, facts)


def ge(a: IntLike, b: IntLike, facts: Knowledge = NO_FACTS) -> Expr:
    return le(b, a, facts)


def gt(a: IntLike, b: IntLike, facts: Knowledge = NO_FACTS) -> Expr:
    return lt(b, a, facts)


def eq(a: IntLike, b: IntLike, facts: Knowledge = NO_FACTS) -> Expr:
    a, b = expr(a), expr(b)
    if a.dtype == BOOL and b.dtype == BOOL:
        return not_(xor(a, b))
    a, b = _as_number(a), _as_number(b)
    if a.is_float or b.is_float:
        return _float_compare("eq", a, b)
    return _int_eq(a, b, Facts.of(facts))


@lru_cache(maxsize=1 << 14)
def _int_eq(a: Expr, b: Expr, facts: Facts) -> Expr:
    return _zero(poly_sub(to_poly(b), to_poly(a)), facts)


def _zero(diff: Poly, facts: Facts) -> Expr:
    """diff == 0."""
    if not diff:
        return TRUE
    less, more = poly_shift(poly_scale(diff, -1), -1), poly_shift(diff, -1)
    if poly_nonneg(more, facts) or poly_nonneg(less, facts):
        return FALSE
    if facts and poly_nonneg(diff, facts) and poly_nonneg(poly_scale(diff, -1), facts):
        return TRUE
    spread = _over_where(diff, lambda d: _zero(d, facts))
    if spread is not None:
        return spread
    if len(diff) == 1 and len(next(iter(diff))) > 1:  # a product is zero where a factor is
        return or_(*(_zero({(atom,): 1}, facts) for atom in next(iter(diff))))
    divisor = gcd(*(c for m, c in diff.items() if m))
    if diff.get((), 0) % divisor:
        return FALSE
    first = min((m for m in diff if m), key=lambda m: [order_key(x) for x in m])
    if diff[first] < 0:
        divisor = -divisor
    diff = {m: c // divisor for m, c in diff.items()}
    left = canonical({m: c for m, c in diff.items() if c > 0 and m})
    right = canonical({m: -c for m, c in diff.items() if c < 0 or not m})
    return Call("eq", (left, right), BOOL)


def ne(a: IntLike, b: IntLike, facts: Knowledge = NO_FACTS) -> Expr:
    return not_(eq(a, b, facts))


def _over_where(diff: Poly, compare: Callable[[Poly], Expr]) -> Expr | None:
    """A comparison with a `where` of constants is a choice between two comparisons (masks kept as integers)."""
    # Sums and products against a constant: two choices compared with each other would be multiplied out.
    varying = [m for m in diff if m]
    signs = {diff[m] > 0 for m in varying}
    atoms = dict.fromkeys(a for m in varying for a in m)
    if len(signs) != 1 or len(atoms) > 4:
        return None
    if atoms and all(map(_is_choice, atoms)):
        atom = next(iter(atoms))
        assert isinstance(atom, Call)
        yes, no = (compare(poly_replace(diff, atom, to_poly(x))) for x in atom.args[1:])
        return where(atom.args[0], yes, no)
    return None


def _is_choice(a: Expr) -> bool:
    """A constant, or a choice between such."""
    return isinstance(a, Const) or (isinstance(a, Call) and a.op == "where" and all(map(_is_choice, a.args[1:])))


def _float_compare(op: str, a: Expr, b: Expr) -> Expr:
    from refocus import steps  # made of the constructors of this file

    return steps.compare_floats(op, a, b)


@lru_cache(maxsize=1 << 14)
def not_(a: Expr) -> Expr:
    if isinstance(a, Const):
        return FALSE if a.value else TRUE
    if isinstance(a, Call):
        if a.op == "not":
            return a.args[0]
        if a.op == "le" and a.args[0].is_int and a.args[1].is_int:
            return le(add(a.args[1], 1), a.args[0])
        if a.op == "and":
            return or_(*(not_(x) for x in a.args))
        if a.op == "or":
            return and_(*(not_(x) for x in a.args))
    return Call("not", (a,), BOOL)


def and_(*args: Expr) -> Expr:
    return _connect("and", args)


def or_(*args: Expr) -> Expr:
    return _connect("or", args)


def xor(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const):
        return not_(b) if a.value else b
    if isinstance(b, Const):
        return not_(a) if b.value else a
    if a == b or a == not_(b):
        return FALSE if a == b else TRUE
    return Call("xor", tuple(sorted((a, b), key=order_key)), BOOL)


@lru_cache(maxsize=1 << 14)
def _connect(op: str, args: tuple[Expr, ...]) -> Expr:
    absorbing, neutral = (FALSE, TRUE) if op == "and" else (TRUE, FALSE)
    parts: dict[Expr, None] = {}
    for arg in args:
        for part in conjuncts(as_bool(arg), op):
            if part == absorbing:
                return absorbing
            if part != neutral:
                parts[part] = None
    kept = tightest(op, list(parts))
    present = set(kept)
    single = [p for p in kept if not (isinstance(p, Call) and p.op in ("and", "or"))]
    if any(not_(p) in present for p in single) or decided(op, kept):
        return absorbing
    other = "or" if op == "and" else "and"  # absorption: a and (a or b) = a
    kept = [p for p in kept if not any(q in present for q in conjuncts(p, other) if q != p)]
    if len(kept) > 1 and len(single) < len(kept):
        known = dict.fromkeys(single, neutral) | {not_(p): absorbing for p in single}
        decided_parts = [p if p in known else _replace(p, known) for p in kept]
        if decided_parts != kept:
            return _connect(op, tuple(decided_parts))
        sets = [frozenset(conjuncts(p, other)) for p in kept]
        resolved = resolve(sets, not_)
        if resolved != sets:
            return _connect(op, tuple(_connect(other, tuple(sorted(p, key=order_key))) for p in resolved))
    kept.sort(key=order_key)
    if not kept:
        return neutral
    out = kept[0]
    for part in kept[1:]:
        out = Call(op, (out, part), BOOL)
    return out


def _replace(part: Expr, known: Mapping[Expr, Expr]) -> Expr:
    """A part with predicates replaced that its neighbours decide. What stands in a load guards it, and stays."""
    return rewrite(part, lambda node: known.get(node, None if isinstance(node, Call) else node), rebuild)


def as_bool(a: Expr) -> Expr:
    if a.dtype == BOOL:
        return a
    return ne(a, Const(0)) if a.is_int else not_(_float_compare("eq", a, Const(0.0, a.dtype)))


def _as_number(a: Expr) -> Expr:
    return where(a, Const(1), Const(0)) if a.dtype == BOOL else a


# ------------------------------------------------------------------------------------------------ pointwise, any dtype


def where(cond: Expr, a: Expr, b: Expr) -> Expr:
    cond = as_bool(cond)
    if isinstance(cond, Const):
        return a if cond.value else b
    if a == b:
        return a
    if isinstance(cond, Call) and cond.op == "not":
        return where(cond.args[0], b, a)
    if isinstance(a, Call) and a.op == "where" and a.args[0] == cond:
        a = a.args[1]
    if isinstance(b, Call) and b.op == "where" and b.args[0] == cond:
        b = b.args[2]
    if a.dtype == BOOL and b.dtype == BOOL:
        if isinstance(a, Const):
            return or_(cond, b) if a.value else and_(not_(cond), b)
        if isinstance(b, Const):
            return or_(not_(cond), a) if b.value else and_(cond, a)
        return or_(and_(cond, a), and_(not_(cond), b))
    a, b = _as_number(a), _as_number(b)
    dtype = a.dtype if a.is_float else b.dtype if b.is_float else INT
    return Call("where", (cond, a, b), dtype)


def cast(a: Expr, dtype: str) -> Expr:
    """Change of kind. Between floats the identity, but for literals that overflow; float to integer truncates."""
    if dtype == BOOL:
        return as_bool(a)
    to_float = dtype.startswith(("float", "bfloat"))
    if a.dtype == BOOL:
        return where(a, Const(1.0, dtype), Const(0.0, dtype)) if to_float else where(a, Const(1), Const(0))
    if isinstance(a, Call) and a.op == "where" and a.is_float and (not to_float or overflows(a, dtype)):
        return where(a.args[0], cast(a.args[1], dtype), cast(a.args[2], dtype))
    if to_float:
        return held(a, dtype) if isinstance(a, Const) else a
    if not a.is_float:
        return a
    if isinstance(a, Const) and math.isfinite(a.value):
        return Const(int(a.value))
    return Call("cast", (a,), INT)


_INT_OPS: dict[str, Callable[..., Expr]] = {
    "add": add, "mul": mul, "sub": sub, "neg": neg, "floordiv": floordiv, "mod": mod, "min": minimum, "max": maximum,
}  # fmt: skip
_LOGIC: dict[str, Callable[..., Expr]] = {
    "le": le, "lt": lt, "eq": eq, "ne": ne, "and": and_, "or": or_, "not": not_, "xor": xor, "where": where,
}  # fmt: skip


def call(op: str, *args: Expr, dtype: str) -> Expr:
    """Any operation of `refocus.ir.OPS`. An operation on integers stays an integer one whatever `dtype` says:
    positions that a model keeps in floats are still positions."""
    if op in _LOGIC:
        return _LOGIC[op](*args)
    if op == "cast":
        return cast(args[0], dtype)
    args = tuple(_as_number(a) for a in args)
    if all(a.is_int for a in args):
        if op in _INT_OPS:
            return _INT_OPS[op](*args)
        if op == "abs":
            return _int_abs(args[0])
        if op == "square":
            return mul(args[0], args[0])
        if op == "pow" and isinstance(args[1], Const) and args[1].value in (1, 2, 3):
            return mul(*(args[0],) * int(args[1].value))
        if op in ("floor", "ceil", "round", "trunc"):
            return args[0]
        if op == "relu":
            return maximum(args[0], 0)
    if op in ("isnan", "isinf"):
        dtype = BOOL
    if op == "detach" and (isinstance(args[0], Const) or not args[0].is_float):
        return args[0]
    numbers = [a for a in args if isinstance(a, Const)]
    folded = fold(op, numbers, dtype) if len(numbers) == len(args) else None
    if folded is not None:
        return folded
    spread = _spread_where(op, args, dtype)
    return spread if spread is not None else identities(op, args, dtype)


def _int_abs(a: Expr, facts: Knowledge = NO_FACTS) -> Expr:
    if is_nonneg(a, facts):
        return a
    return neg(a) if is_nonneg(neg(a), facts) else Call("abs", (a,), INT)


def _spread_where(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    """An operation on one `where` of constants and otherwise constants: (1 - m) * min becomes a choice."""
    picks = [k for k, a in enumerate(args) if not isinstance(a, Const)]
    if len(picks) != 1:
        return None
    chosen = args[picks[0]]
    if not (isinstance(chosen, Call) and chosen.op == "where"):
        return None
    cond, a, b = chosen.args
    if not (isinstance(a, Const) and isinstance(b, Const)):
        return None

    def put(value: Expr) -> Expr:
        return call(op, *(value if k == picks[0] else x for k, x in enumerate(args)), dtype=dtype)

    return where(cond, put(a), put(b))


# ------------------------------------------------------------------------------------------------ rebuilding


def rebuild(node: Expr, children: tuple[Expr, ...]) -> Expr:
    """Put a node together from new children through the smart constructors."""
    if isinstance(node, Call):
        return call(node.op, *children, dtype=node.dtype)
    if isinstance(node, Load):
        return Load(node.tensor, children, node.dtype)
    if isinstance(node, Dot):
        return Dot(node.over, children[0], children[1], node.dtype)
    if isinstance(node, Reduce):
        return Reduce(node.op, node.axis, children[0], node.dtype)
    return node


def substitute(target: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """Replace nodes (axes, sizes, anything) and simplify what changes."""
    return rewrite(target, mapping.get, rebuild) if mapping else target


def under(target: Expr, facts: Knowledge = NO_FACTS) -> Expr:
    """Simplify again, knowing `facts` (as from `assume`). A branch of a `where` knows its condition, too."""
    return _under(target, Facts.of(facts))


@lru_cache(maxsize=1 << 14)
def _under(target: Expr, facts: Facts) -> Expr:
    if facts and not facts.concern(target):
        facts = NO_FACTS
    if not target.children:
        known = facts.only(target)
        return target if known is None else Const(known)
    if target.dtype == BOOL:
        for predicate, value in (target, True), (not_(target), False):
            truth = facts.get(predicate, (None, None))[0]
            if truth is not None:
                return Const(bool(truth) == value, BOOL)
    if isinstance(target, Call) and target.op == "where":
        cond = _under(target.args[0], facts)
        if isinstance(cond, Const):
            return _under(target.args[1 if cond.value else 2], facts)
        yes, no = _under(target.args[1], assume(cond, facts)), _under(target.args[2], assume(cond, facts, False))
        unchanged = cond is target.args[0] and yes is target.args[1] and no is target.args[2]
        return target if unchanged else where(cond, yes, no)
    inner = facts.without(target.over) if isinstance(target, Dot) else facts
    inner = facts.without((target.axis,)) if isinstance(target, Reduce) else inner
    children = tuple([_under(c, inner) for c in target.children])
    if facts and isinstance(target, Call) and target.op in _WITH_FACTS and all(c.is_int for c in children):
        again = _WITH_FACTS[target.op](*children, facts)
        return target if again == target else again
    return target if all(a is b for a, b in zip(children, target.children)) else rebuild(target, children)


_WITH_FACTS: dict[str, Callable[..., Expr]] = {
    "floordiv": floordiv, "mod": mod, "min": minimum, "max": maximum, "le": le, "eq": eq, "abs": _int_abs,
}  # fmt: skip
