"""Smart constructors: every expression is built here, and comes out canonical.

Integers are kept as polynomials (`refocus.polynomial`), so equal index arithmetic is equal structure. Division and
remainder by known sizes are where views disappear. For 0 <= r < c:

    (c*a + r) // (c*b)  ->  a // b            (c*a + r) % (c*b)  ->  c*(a % b) + r
    (x // a) // b       ->  x // (a*b)        (x % (a*b)) // b   ->  (x // b) % a
    b*(x // b) + x % b  ->  x

Comparisons of integers become `le` / `eq` of the two signs of their difference; `lt` never remains. `where` whose
condition is decided by ranges disappears, and so does one whose branches agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from math import gcd

from refocus.ir import BOOL, FALSE, INT, TRUE, Axis, Call, Const, Dot, Expr, Load, Reduce, rewrite
from refocus.polynomial import (
    NO_FACTS,
    Facts,
    Poly,
    divide_term,
    extreme,
    from_poly,
    order_key,
    poly_add,
    poly_mul,
    poly_nonneg,
    poly_scale,
    to_poly,
)

IntLike = Expr | int


def expr(value: IntLike) -> Expr:
    return Const(value) if isinstance(value, int) else value


def is_nonneg(value: IntLike, facts: Facts = NO_FACTS) -> bool:
    """Prove value >= 0 for every position and size."""
    return poly_nonneg(to_poly(expr(value)), facts)


def bounds(value: Expr, facts: Facts = NO_FACTS) -> tuple[int | None, int | None]:
    """Numeric range (None: unknown or unbounded). Sizes count as at least their lower bound, without upper one."""

    def end(upper: bool) -> int | None:
        poly = extreme(to_poly(value), upper, facts)
        if poly is None:
            return None
        if set(poly) <= {()}:
            return poly.get((), 0)
        total = poly.get((), 0)
        for mono, coef in poly.items():
            if mono:
                if (coef > 0) == upper:
                    return None
                total += coef * math.prod(a.low for a in mono)  # type: ignore[attr-defined]
        return total

    return end(False), end(True)


# ------------------------------------------------------------------------------------------------ integer arithmetic


def add(*values: IntLike) -> Expr:
    return from_poly(poly_add(*(to_poly(expr(v)) for v in values)))


def mul(*values: IntLike) -> Expr:
    out: Poly = {(): 1}
    for value in values:
        out = poly_mul(out, to_poly(expr(value)))
    return from_poly(out)


def neg(value: IntLike) -> Expr:
    return from_poly(poly_scale(to_poly(expr(value)), -1))


def sub(a: IntLike, b: IntLike) -> Expr:
    return add(a, neg(b))


def floordiv(a: IntLike, b: IntLike, facts: Facts = NO_FACTS) -> Expr:
    """a // b, rounding down; b > 0 (another b is kept as written)."""
    return _divide(expr(a), expr(b), facts)[0]


def mod(a: IntLike, b: IntLike, facts: Facts = NO_FACTS) -> Expr:
    """a % b in [0, b); b > 0 (another b is kept as written)."""
    return _divide(expr(a), expr(b), facts)[1]


def _opaque(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    return Call("floordiv", (a, b), INT), Call("mod", (a, b), INT)


def _divide(a: Expr, b: Expr, facts: Facts) -> tuple[Expr, Expr]:
    if isinstance(b, Const):
        if b.value == 1:
            return a, Const(0)
        if isinstance(a, Const) and b.value:
            return Const(a.value // b.value), Const(a.value % b.value)
        if b.value <= 0:
            return _opaque(a, b)
    size = to_poly(b)
    if len(size) != 1:
        if to_poly(a) == size:
            return Const(1), Const(0)
        remainder = to_poly(a)
        if poly_nonneg(remainder, facts) and poly_nonneg(poly_add(size, poly_scale(remainder, -1), {(): -1}), facts):
            return Const(0), a
        return _opaque(a, b)
    [(mono, coef)] = size.items()
    whole: Poly = {}
    rest: Poly = {}
    for m, c in to_poly(a).items():
        done = divide_term(m, c, (mono, coef))
        if done is not None:
            whole[done[0]] = whole.get(done[0], 0) + done[1]
        elif not m and not mono:  # a constant leaves its own remainder behind
            whole[()] = whole.get((), 0) + c // coef
            rest[()] = c % coef
        else:
            rest[m] = c
    quotient, remainder_ = _divide_rest(rest, mono, coef, b, facts)
    return from_poly(poly_add({m: c for m, c in whole.items() if c}, to_poly(quotient))), remainder_


def _divide_rest(rest: Poly, mono: tuple[Expr, ...], coef: int, b: Expr, facts: Facts) -> tuple[Expr, Expr]:
    """Quotient and remainder of what no term-wise division reaches."""
    rest = {m: c for m, c in rest.items() if c}
    if not rest:
        return Const(0), Const(0)
    size: Poly = {mono: coef}
    if _in_range(rest, size, facts):
        return Const(0), from_poly(rest)
    for factor_mono, factor in _common_factors(rest, mono, coef):
        high: Poly = {}
        low: Poly = {}
        for m, c in rest.items():
            done = divide_term(m, c, (factor_mono, factor))
            if done is None:
                low[m] = c
            else:
                high[done[0]] = high.get(done[0], 0) + done[1]
        unit: Poly = {factor_mono: factor}
        if high and _in_range(low, unit, facts):
            left = divide_term(mono, coef, (factor_mono, factor))
            assert left is not None
            q, r = _divide(from_poly(high), from_poly({left[0]: left[1]}), facts)
            return q, from_poly(poly_add(poly_mul(to_poly(r), unit), low))
    value = from_poly(_strip_mods(rest, mono, coef))
    if to_poly(value) != rest:
        _, inner_r = _divide(value, b, facts)
        # (x % (k*b)) keeps its remainder, but not its quotient
        return _quotient_of_rest(rest, b), inner_r
    return _quotient_of_rest(rest, b), Call("mod", (value, b), INT)


def _quotient_of_rest(rest: Poly, b: Expr) -> Expr:
    constant = rest.get((), 0)
    atoms = {m: c for m, c in rest.items() if m}
    if len(atoms) == 1:
        [(m, c)] = atoms.items()
        if len(m) == 1 and c == 1 and isinstance(m[0], Call):
            atom = m[0]
            if atom.op == "floordiv":
                return floordiv(add(atom.args[0], mul(constant, atom.args[1])), mul(atom.args[1], b))
            if atom.op == "mod" and not constant:
                times = _exact(atom.args[1], b)
                if times is not None:
                    return mod(floordiv(atom.args[0], b), times)
    return Call("floordiv", (from_poly(rest), b), INT)


def _exact(a: Expr, b: Expr) -> Expr | None:
    """a / b when that is exact for single terms."""
    pa, pb = to_poly(a), to_poly(b)
    if len(pa) != 1 or len(pb) != 1:
        return None
    [(ma, ca)], [(mb, cb)] = pa.items(), pb.items()
    done = divide_term(ma, ca, (mb, cb))
    return None if done is None else from_poly({done[0]: done[1]})


def _strip_mods(rest: Poly, mono: tuple[Expr, ...], coef: int) -> Poly:
    """Inside `% b`, a term `x % (k*b)` may be read as x."""
    out: Poly = {}
    for m, c in rest.items():
        [*others] = m
        if len(m) == 1 and isinstance(m[0], Call) and m[0].op == "mod":
            inner, size = m[0].args
            if _exact(size, from_poly({mono: coef})) is not None:
                out = poly_add(out, poly_scale(to_poly(inner), c))
                continue
        out = poly_add(out, {tuple(others): c})
    return out


def _in_range(poly: Poly, size: Poly, facts: Facts) -> bool:
    return poly_nonneg(poly, facts) and poly_nonneg(poly_add(size, poly_scale(poly, -1), {(): -1}), facts)


def _common_factors(rest: Poly, mono: tuple[Expr, ...], coef: int) -> list[tuple[tuple[Expr, ...], int]]:
    """Monomials that divide the divisor and at least one term, largest first."""
    found: dict[tuple[tuple[Expr, ...], int], None] = {}
    for m, c in rest.items():
        left = list(m)
        shared = []
        for atom in mono:
            if atom in left:
                left.remove(atom)
                shared.append(atom)
        for part in (tuple(shared), ()) if shared else ((),):
            common = gcd(c, coef)
            if part or common > 1:
                found[(part, common)] = None
                if part and common > 1:
                    found[(part, 1)] = None
    return sorted(found, key=lambda f: (-len(f[0]), -f[1]))


def minimum(a: IntLike, b: IntLike, facts: Facts = NO_FACTS) -> Expr:
    a, b = expr(a), expr(b)
    if is_nonneg(sub(b, a), facts):
        return a
    if is_nonneg(sub(a, b), facts):
        return b
    return Call("min", tuple(sorted((a, b), key=order_key)), INT)


def maximum(a: IntLike, b: IntLike, facts: Facts = NO_FACTS) -> Expr:
    a, b = expr(a), expr(b)
    if is_nonneg(sub(a, b), facts):
        return a
    if is_nonneg(sub(b, a), facts):
        return b
    return Call("max", tuple(sorted((a, b), key=order_key)), INT)


# ---------------------------------------------------------------------------------------------------- predicates


def le(a: IntLike, b: IntLike, facts: Facts = NO_FACTS) -> Expr:
    a, b = expr(a), expr(b)
    if a.is_float or b.is_float:
        return _float_compare("le", a, b)
    diff = poly_add(to_poly(b), poly_scale(to_poly(a), -1))
    if poly_nonneg(diff, facts):
        return TRUE
    if poly_nonneg(poly_add(poly_scale(diff, -1), {(): -1}), facts):
        return FALSE
    spread = _over_where(diff, lambda d: le(Const(0), d, facts))
    if spread is not None:
        return spread
    divisor = gcd(*(c for m, c in diff.items() if m))
    if divisor > 1:
        diff = {m: (c // divisor) for m, c in diff.items()}
        diff = {m: c for m, c in diff.items() if c}
    left = from_poly({m: -c for m, c in diff.items() if c < 0 and m})
    right = from_poly({m: c for m, c in diff.items() if c > 0 or not m})
    return Call("le", (left, right), BOOL)


def lt(a: IntLike, b: IntLike, facts: Facts = NO_FACTS) -> Expr:
    a, b = expr(a), expr(b)
    if a.is_float or b.is_float:
        return _float_compare("lt", a, b)
    return le(add(a, 1), b, facts)


def ge(a: IntLike, b: IntLike, facts: Facts = NO_FACTS) -> Expr:
    return le(b, a, facts)


def gt(a: IntLike, b: IntLike, facts: Facts = NO_FACTS) -> Expr:
    return lt(b, a, facts)


def eq(a: IntLike, b: IntLike, facts: Facts = NO_FACTS) -> Expr:
    a, b = expr(a), expr(b)
    if a.dtype == BOOL and b.dtype == BOOL:
        return not_(xor(a, b))
    a, b = _as_number(a), _as_number(b)
    if a.is_float or b.is_float:
        return _float_compare("eq", a, b)
    diff = poly_add(to_poly(b), poly_scale(to_poly(a), -1))
    if not diff:
        return TRUE
    minus_one: Poly = {(): -1}
    if poly_nonneg(poly_add(diff, minus_one), facts) or poly_nonneg(poly_add(poly_scale(diff, -1), minus_one), facts):
        return FALSE
    spread = _over_where(diff, lambda d: eq(d, Const(0), facts))
    if spread is not None:
        return spread
    divisor = gcd(*(c for m, c in diff.items() if m))
    if diff.get((), 0) % divisor:
        return FALSE
    diff = {m: c // divisor for m, c in diff.items()}
    first = min((m for m in diff if m), key=lambda m: [order_key(x) for x in m])
    if diff[first] < 0:
        diff = poly_scale(diff, -1)
    left = from_poly({m: c for m, c in diff.items() if c > 0 and m})
    right = from_poly({m: -c for m, c in diff.items() if c < 0 or not m})
    return Call("eq", (left, right), BOOL)


def ne(a: IntLike, b: IntLike, facts: Facts = NO_FACTS) -> Expr:
    return not_(eq(a, b, facts))


def _over_where(diff: Poly, compare: Callable[[Expr], Expr]) -> Expr | None:
    """A comparison with one `where` of constants in it is a choice of two comparisons (bool masks kept as ints)."""
    for mono in diff:
        if len(mono) == 1 and isinstance(mono[0], Call) and mono[0].op == "where":
            cond, a, b = mono[0].args
            rest = {m: c for m, c in diff.items() if m != mono}
            # Only against a constant: two choices compared with each other would be multiplied out.
            if isinstance(a, Const) and isinstance(b, Const) and set(rest) <= {()}:
                factor = diff[mono]
                return where(
                    cond,
                    compare(from_poly(poly_add(rest, poly_scale(to_poly(a), factor)))),
                    compare(from_poly(poly_add(rest, poly_scale(to_poly(b), factor)))),
                )
    return None


def _float_compare(op: str, a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const) and isinstance(b, Const):
        return Const({"le": a.value <= b.value, "lt": a.value < b.value, "eq": a.value == b.value}[op], BOOL)
    for left, right, flip in ((a, b, False), (b, a, True)):
        if isinstance(left, Call) and left.op == "where" and isinstance(right, Const):
            cond, x, y = left.args
            if isinstance(x, Const) and isinstance(y, Const):
                pick = (lambda v, r=right: (r, v)) if flip else (lambda v, r=right: (v, r))
                return where(cond, _float_compare(op, *pick(x)), _float_compare(op, *pick(y)))
    return Call(op, (a, b), BOOL)


def not_(a: Expr) -> Expr:
    if isinstance(a, Const):
        return FALSE if a.value else TRUE
    if isinstance(a, Call):
        if a.op == "not":
            return a.args[0]
        if a.op == "le" and not (a.args[0].is_float or a.args[1].is_float):
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
    return FALSE if a == b else Call("xor", (a, b), BOOL)


def conjuncts(a: Expr, op: str = "and") -> list[Expr]:
    """The parts of a flattened and (or or) chain."""
    if isinstance(a, Call) and a.op == op:
        return [part for x in a.args for part in conjuncts(x, op)]
    return [a]


def _connect(op: str, args: tuple[Expr, ...]) -> Expr:
    absorbing, neutral = (FALSE, TRUE) if op == "and" else (TRUE, FALSE)
    parts: dict[Expr, None] = {}
    for arg in args:
        for part in conjuncts(as_bool(arg), op):
            if part == absorbing:
                return absorbing
            if part != neutral:
                parts[part] = None
    kept = _tightest(op, list(parts))
    present = set(kept)
    if any(not_(p) in present for p in kept if not (isinstance(p, Call) and p.op in ("and", "or"))):
        return absorbing
    other = "or" if op == "and" else "and"  # absorption: a and (a or b) = a
    kept = [p for p in kept if not any(q in present for q in conjuncts(p, other) if q != p)]
    kept.sort(key=order_key)
    if not kept:
        return neutral
    out = kept[0]
    for part in kept[1:]:
        out = Call(op, (out, part), BOOL)
    return out


def _tightest(op: str, parts: list[Expr]) -> list[Expr]:
    """Of several `lhs <= rhs + c` that differ in c only, one decides."""
    best: dict[tuple[Expr, Expr], tuple[int, Expr]] = {}
    out: list[Expr] = []
    for part in parts:
        if isinstance(part, Call) and part.op == "le" and part.args[0].is_int and part.args[1].is_int:
            right = to_poly(part.args[1])
            key = (part.args[0], from_poly({m: c for m, c in right.items() if m}))
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
        return or_(and_(cond, a), and_(not_(cond), b))
    dtype = a.dtype if a.is_float else b.dtype if b.is_float else INT
    return Call("where", (cond, a, b), dtype)


def cast(a: Expr, dtype: str) -> Expr:
    """Change of kind. Between floats it is the identity over the reals; float to integer truncates."""
    if dtype == BOOL:
        return as_bool(a)
    to_float = dtype.startswith(("float", "bfloat"))
    if a.dtype == BOOL:
        return where(a, Const(1.0, dtype), Const(0.0, dtype)) if to_float else where(a, Const(1), Const(0))
    if to_float:
        return Const(float(a.value), dtype) if isinstance(a, Const) else a
    if not a.is_float:
        return a
    if isinstance(a, Const):
        return Const(int(a.value))
    if isinstance(a, Call) and a.op == "where":
        return where(a.args[0], cast(a.args[1], dtype), cast(a.args[2], dtype))
    return Call("cast", (a,), INT)


_FOLD: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "neg": lambda a: -a, "min": min, "max": max, "abs": abs, "exp": math.exp, "log": math.log, "sqrt": math.sqrt,
    "rsqrt": lambda a: 1 / math.sqrt(a), "pow": lambda a, b: a**b, "tanh": math.tanh, "floor": math.floor,
    "ceil": math.ceil, "trunc": math.trunc, "reciprocal": lambda a: 1 / a, "square": lambda a: a * a,
    "sin": math.sin, "cos": math.cos, "exp2": lambda a: 2.0**a, "log2": math.log2, "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b, "sigmoid": lambda a: 1 / (1 + math.exp(-a)), "relu": lambda a: max(a, 0.0),
    "isinf": math.isinf, "isnan": math.isnan,
}  # fmt: skip
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
    if all(isinstance(a, Const) for a in args) and op in _FOLD:
        try:
            value = _FOLD[op](*(a.value for a in args))  # type: ignore[attr-defined]
        except (OverflowError, ZeroDivisionError, ValueError):
            return Call(op, args, dtype)
        return Const(bool(value), BOOL) if dtype == BOOL else Const(float(value), dtype)
    spread = _spread_where(op, args, dtype)
    return spread if spread is not None else _identities(op, args, dtype)


def _int_abs(a: Expr) -> Expr:
    if is_nonneg(a):
        return a
    return neg(a) if is_nonneg(neg(a)) else Call("abs", (a,), INT)


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


def _identities(op: str, args: tuple[Expr, ...], dtype: str) -> Expr:
    def const(k: int, value: float) -> bool:
        a = args[k]
        return isinstance(a, Const) and a.value == value

    if op in ("add", "sub", "div", "mul", "pow") and len(args) == 2:
        unit = 0.0 if op in ("add", "sub") else 1.0
        if const(1, unit):
            return args[0]
        if op in ("add", "mul") and const(0, unit):
            return args[1]
    if op == "neg" and isinstance(args[0], Call) and args[0].op == "neg":
        return args[0].args[0]
    lowest = -3.0e38
    if op == "max" and any(isinstance(a, Const) and a.value <= lowest for a in args):  # a clamp at finfo.min
        return next((a for a in args if not (isinstance(a, Const) and a.value <= lowest)), args[0])
    if op == "add" and len(args) > 2:
        return _identities("add", (_identities("add", args[:-1], dtype), args[-1]), dtype)
    return Call(op, args, dtype)


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


def assume(cond: Expr) -> dict[Expr, tuple[int | None, int | None]]:
    """Facts that hold where `cond` does: ranges of single atoms (`d <= 7` gives d in (None, 7))."""
    facts: dict[Expr, tuple[int | None, int | None]] = {}
    for part in conjuncts(cond):
        if isinstance(part, Call) and part.op == "le" and part.args[0].is_int and part.args[1].is_int:
            diff = poly_add(to_poly(part.args[1]), poly_scale(to_poly(part.args[0]), -1))  # >= 0
            atoms = [m for m in diff if m]
            if len(atoms) == 1 and len(atoms[0]) == 1:
                atom, slope, constant = atoms[0][0], diff[atoms[0]], diff.get((), 0)
                low, high = facts.get(atom, (None, None))
                if slope > 0:
                    value = -(constant // slope)
                    facts[atom] = (value if low is None else max(low, value), high)
                else:
                    value = constant // -slope
                    facts[atom] = (low, value if high is None else min(high, value))
    return facts


_RANGED: dict[str, Callable[[Expr, Expr, Facts], Expr]] = {
    "floordiv": floordiv, "mod": mod, "min": minimum, "max": maximum, "le": le, "eq": eq,
}  # fmt: skip


def under(target: Expr, facts: Facts) -> Expr:
    """Simplify index arithmetic again, knowing `facts`."""
    if not facts or not any(a in facts for a in target.axes):
        return target

    def again(node: Expr, children: tuple[Expr, ...]) -> Expr:
        if isinstance(node, Call) and all(c.is_int for c in children):
            if node.op in _RANGED:
                return _RANGED[node.op](children[0], children[1], facts)
        return rebuild(node, children)

    memo: dict[Expr, Expr] = {}

    def go(node: Expr) -> Expr:
        if node not in memo:
            children = () if isinstance(node, Axis) else tuple(go(c) for c in node.children)
            memo[node] = again(node, children) if children else node
        return memo[node]

    return go(target)
