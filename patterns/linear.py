"""Linear attention, however it is spelled: a sum of products whose factors come apart by the axes they hold.

    out[i,e] = sum over j, d of  q[i,d]  *  k[j,d]  *  v[j,e]  *  [j <= i]  *  exp(c[i] - c[j])
                                 query      key        value      mask         decay

A value is first taken apart into a `Product`: sums over axes, factors, divisors, exponents and the conditions outside
of which it is zero. `sort` then says what each factor is, given which axes are the query's and the key's. What holds
both of them must be a causal mask or a decay: the exponential of a multiple of i - j, or of a difference of gates
summed up to i and up to j. Anything else is a weight that does not come apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from refocus import simplify as s
from refocus.evaluate import arange_env, evaluate
from refocus.ir import BOOL, TRUE, Axis, Call, Const, Expr, Load, Reduce
from refocus.patterns.declined import Declined, Stop
from refocus.polynomial import to_poly

Pair = tuple[Axis, Axis]  # (query, key)
Signed = tuple[int, Expr]


@dataclass(frozen=True)
class Product:
    """sum over `summed` of factors / divisors * exp(exponents), where all `conditions` hold; zero elsewhere."""

    summed: tuple[Axis, ...] = ()
    factors: tuple[Expr, ...] = ()
    divisors: tuple[Expr, ...] = ()
    exponents: tuple[Signed, ...] = ()
    conditions: tuple[Expr, ...] = ()

    def times(self, other: Product) -> Product:
        return Product(
            self.summed + other.summed,
            self.factors + other.factors,
            self.divisors + other.divisors,
            self.exponents + other.exponents,
            self.conditions + other.conditions,
        )


def product_of(e: Expr, pair: Pair | None = None) -> Product:
    """`e` taken apart. Exponentials stay whole, but for those of a `pair` of positions."""
    if isinstance(e, Const) and e.value == 1.0:
        return Product()
    if isinstance(e, Reduce) and e.op == "sum":
        return Product(summed=(e.axis,)).times(product_of(e.body, pair))
    if isinstance(e, Call):
        args = e.args
        if e.op == "mul":
            out = product_of(args[0], pair)
            for a in args[1:]:
                out = _multiplied(out, product_of(a, pair))
            return out
        if e.op == "div" and isinstance(args[1], Call) and args[1].op == "exp":
            return product_of(args[0], pair).times(product_of(_inverse(args[1]), pair))
        if e.op == "div":
            if holds_sum(args[1]):
                return product_of(args[0], pair).times(Product(divisors=(args[1],)))
            by = s.cast(args[1], e.dtype)
            known = isinstance(by, Const) and by.value
            inverse = Const(1 / by.value, e.dtype) if known else s.call("reciprocal", by, dtype=e.dtype)  # type: ignore[attr-defined]
            return product_of(args[0], pair).times(Product(factors=(inverse,)))
        if e.op == "reciprocal" and isinstance(args[0], Call) and args[0].op == "exp":
            return product_of(_inverse(args[0]), pair)
        if e.op == "reciprocal" and holds_sum(args[0]):
            return Product(divisors=(args[0],))
        if e.op == "neg":
            return Product(factors=(Const(-1.0, e.dtype),)).times(product_of(args[0], pair))
        if e.op == "where":
            for condition, kept, other in ((args[0], args[1], args[2]), (s.not_(args[0]), args[2], args[1])):
                if isinstance(other, Const) and other.value == 0:
                    return Product(conditions=tuple(s.conjuncts(condition))).times(product_of(kept, pair))
        if pair is not None and e.axes.issuperset(pair):
            if e.op in ("exp", "exp2"):
                found = list(terms_of(exponent_of(e), 1))
                whole = [s.call("exp", x if sign > 0 else s.call("neg", x, dtype=e.dtype), dtype=e.dtype)
                         for sign, x, _ in found if not x.axes & set(pair)]  # fmt: skip
                return Product(
                    factors=tuple(x for x in whole if not (isinstance(x, Const) and x.value == 1.0)),
                    exponents=tuple((sign, x) for sign, x, _ in found if x.axes & set(pair)),
                    conditions=tuple(c for _, _, conditions in found for c in conditions),
                )
            if e.op == "pow" and args[1].is_int:
                return _power(args[0], args[1], pair)
    return Product(factors=(e,))


def value_of(product: Product, dtype: str) -> Expr:
    """A product of factors and sums alone as a value."""
    value: Expr = Const(1.0, dtype)
    for factor in product.factors:
        value = s.call("mul", value, factor, dtype=dtype)
    if product.conditions:
        value = s.where(s.and_(*product.conditions), value, Const(0.0, dtype))
    for axis in reversed(product.summed):
        value = Reduce("sum", axis, value, dtype)
    return value


def renamed(product: Product, here: dict[Axis, Expr]) -> Product:
    """A product with other positions in place of axes."""
    places: dict[Expr, Expr] = dict(here.items())
    return Product(
        tuple(a for a in (here.get(a, a) for a in product.summed) if isinstance(a, Axis)),
        tuple(s.substitute(x, places) for x in product.factors),
        tuple(s.substitute(x, places) for x in product.divisors),
        tuple((sign, s.substitute(x, places)) for sign, x in product.exponents),
        tuple(s.substitute(x, places) for x in product.conditions),
    )


def _inverse(e: Call) -> Expr:
    """One over an exponential."""
    return s.call("exp", s.call("neg", e.args[0], dtype=e.dtype), dtype=e.dtype)


def _multiplied(a: Product, b: Product) -> Product:
    """The product of two products: a sum times a sum is one sum only where neither holds the other's axis."""
    for one, other in ((a, b), (b, a)):
        parts = (*other.factors, *other.divisors, *other.conditions, *(e for _, e in other.exponents))
        if any(axis in other.summed or any(axis in x.axes for x in parts) for axis in one.summed):
            raise Stop(Declined("the weights are not linear in the scores, but products of several", pairwise=True))
    return a.times(b)


def settled(product: Product, pair: Pair) -> Product:
    """The product, its pairs simplified where the mask holds: with j <= i known, max(i - j, 0) is i - j. And the mask
    where positions are: with 1 <= i known, j <= max(i - 1, 0) is j < i, which implies it."""
    held = set(pair)
    alone = {c for c in product.conditions if c.axes & held and not held <= c.axes}
    if alone:
        at = s.assume(s.and_(*alone))
        product = replace(product, conditions=tuple(x for c in product.conditions for x in _at(c, at, held)))
    known = s.assume(s.and_(*(c for c in product.conditions if held <= c.axes)))
    implied = {c for c in alone if s.under(c, known) == TRUE}
    product = replace(product, conditions=tuple(c for c in product.conditions if c not in implied))
    out = Product(product.summed, (), product.divisors, product.exponents, ())
    for factor in product.factors:
        if held <= factor.axes:
            simple = s.under(factor, known)
            inner = product_of(simple, pair)
            out = out.times(Product(factors=(simple,)) if inner.summed else inner)
        else:
            out = out.times(Product(factors=(factor,)))
    conditions = tuple(c for c in product.conditions if not always(c, known))
    return out.times(Product(conditions=conditions))


def _at(condition: Expr, known: s.Knowledge, held: set[Axis]) -> list[Expr]:
    return list(s.conjuncts(s.under(condition, known))) if held <= condition.axes else [condition]


def always(condition: Expr, known: s.Knowledge) -> bool:
    """Whether a condition only asks if a number is one, and it is."""
    if isinstance(condition, Call) and condition.op == "not":
        inner = condition.args[0]
        return isinstance(inner, Call) and inner.op == "isnan" and _is_number(s.under(inner.args[0], known))
    return False


def _is_number(e: Expr) -> bool:
    """Whether an expression of positions and constants has a value everywhere."""
    if isinstance(e, Const):
        return math.isfinite(e.value)
    if e.loads or not isinstance(e, Call):
        return e.is_int and not e.loads
    if e.op == "pow":
        return _positive(e.args[0]) and all(map(_is_number, e.args))
    return e.is_int or (e.op in ("add", "sub", "mul", "neg", "exp", "exp2") and all(map(_is_number, e.args)))


def exponent_of(e: Call) -> Expr:
    """What is under an exponential, in base e. What it is filled with, if the exponential of that is zero, is -inf."""
    log = e.args[0] if e.op == "exp" else s.call("mul", e.args[0], Const(math.log(2.0), e.dtype), dtype=e.dtype)
    return _filled(log, torch.finfo(getattr(torch, e.dtype)).smallest_normal)


def _filled(log: Expr, smallest: float) -> Expr:
    if not (isinstance(log, Call) and log.op == "where"):
        return log
    ways = (_filled(x, smallest) for x in log.args[1:])
    gone = 2 * math.log(smallest)  # below what is rounded to a subnormal number, in all dtypes
    lost = [Const(-math.inf, x.dtype) if isinstance(x, Const) and x.value < gone else x for x in ways]
    return s.where(log.args[0], *lost)


Summand = tuple[int, Expr, tuple[Expr, ...]]  # sign, value, and the conditions outside of which it is -inf


def terms_of(e: Expr, sign: int) -> Iterator[Summand]:
    """The terms of a sum, products over sums multiplied out."""
    if isinstance(e, Call) and e.is_float:
        args = e.args
        if e.op in ("add", "sub"):
            yield from terms_of(args[0], sign)
            for a in args[1:]:
                yield from terms_of(a, sign if e.op == "add" else -sign)
            return
        if e.op == "neg":
            yield from terms_of(args[0], -sign)
            return
        if e.op == "where":
            for condition, kept, other in ((args[0], args[1], args[2]), (s.not_(args[0]), args[2], args[1])):
                if isinstance(other, Const) and other.value == -math.inf and sign > 0:
                    for way, term, more in terms_of(kept, sign):
                        yield way, term, (*s.conjuncts(condition), *more)
                    return
        if e.op in ("mul", "div") and len(args) == 2:
            for inner, factor in ((args[0], args[1]), *([(args[1], args[0])] if e.op == "mul" else [])):
                # Of -inf, a factor would have to be known to be positive.
                positive = isinstance(factor, Const) and factor.value > 0
                found = [*terms_of(inner, sign)]
                if len(found) > 1 or (found[0][1] is not inner and (positive or not found[0][2])):
                    if any(more for _, _, more in found) and not positive:
                        break
                    for way, term, more in found:
                        yield way, s.call(e.op, term, factor, dtype=e.dtype), more
                    return
    yield sign, e, ()


# Heads whose decays are looked at one by one.
_FEW = 1 << 10

# A decay of zero, as its logarithm: exp of it is 0 in every dtype, and it does not turn sums into NaN.
GONE = -1.0e4


def _power(base: Expr, exponent: Expr, pair: Pair) -> Product:
    """base^(i - j): the logarithm of |base| is a gate; the signs are those of base^i and base^j."""
    query, key = pair
    if exponent != s.sub(query, key) or base.axes & set(pair):
        return Product(factors=(Call("pow", (base, exponent), base.dtype),))
    dtype = base.dtype
    log = _log_size(base)
    gate = Product(exponents=((1, s.call("mul", log, exponent, dtype=dtype)),))
    if _positive(base):
        return gate
    minus = s.call("lt", base, Const(0.0, dtype), dtype=BOOL)
    signs = [s.where(s.and_(minus, s.eq(s.mod(axis, 2), 1)), Const(-1.0, dtype), Const(1.0, dtype)) for axis in pair]
    return gate.times(Product(factors=tuple(signs)))


def _log_size(base: Expr) -> Expr:
    dtype = base.dtype
    size = s.call("abs", base, dtype=dtype)
    return s.call("max", s.call("log", size, dtype=dtype), Const(GONE, dtype), dtype=dtype)


def logarithm(decay: Expr) -> Expr | None:
    """The logarithm of a factor that is a decay: an exponential, a power with a whole number, a positive number."""
    if isinstance(decay, Const) and decay.value > 0:
        return Const(math.log(decay.value), decay.dtype)
    if isinstance(decay, Call) and decay.op == "exp":
        return decay.args[0]
    if isinstance(decay, Call) and decay.op == "pow" and decay.args[1].is_int and _positive(decay.args[0]):
        return s.call("mul", _log_size(decay.args[0]), decay.args[1], dtype=decay.dtype)
    return None


def _positive(e: Expr) -> bool:
    if isinstance(e, Const):
        return e.value > 0
    if isinstance(e, Call):
        if e.op in ("exp", "exp2", "sigmoid"):
            return True
        if e.op in ("mul", "div", "add") and all(_positive(a) for a in e.args):
            return True
    sizes = [a.size for a in e.axes]
    if e.loads or not all(isinstance(n, Const) and n.value <= _FEW for n in sizes) or len(sizes) > 1:
        return False
    return bool((evaluate(e, arange_env(tuple(e.axes), {}), {}, {}, torch.float64) > 0).all())


# ---------------------------------------------------------------------------------------------------- sorting


@dataclass(frozen=True)
class Roles:
    """What each factor of a product is. `rows` are those of no key and no dot axis, `pairs` those of query and key."""

    query: Axis
    key: Axis
    dot: tuple[Axis, ...]
    value: tuple[Axis, ...]
    queries: tuple[Expr, ...]
    keys: tuple[Expr, ...]
    values: tuple[Expr, ...]
    rows: tuple[Expr, ...]
    pairs: tuple[Expr, ...]


def sort(product: Product, free: tuple[Axis, ...], query: Axis, key: Axis, of_numbers: bool = False) -> Roles | None:
    """The roles of a product's parts, or None where these are no query and key axes of it. `of_numbers`: the values may
    be single numbers, without an axis of their own, where queries or decays have all that is left. (Where each channel
    of the values decays by itself, it is a head of its own, that shares queries and keys with others.)"""
    dot = tuple(a for a in product.summed if a != key)
    items = [*product.factors, *(as_number(c) for c in product.conditions)]
    pairs = tuple(x for x in items if {query, key} <= x.axes)
    keyed = [x for x in items if key in x.axes and query not in x.axes]
    others = [x for x in items if key not in x.axes]
    exponents = [e for _, e in product.exponents]
    outside = frozenset().union(*(x.axes for x in (*others, *pairs, *product.divisors, *exponents)))
    value = tuple(a for a in free if a != query and a not in outside and any(a in x.axes for x in keyed))
    values = tuple(x for x in keyed if x.axes & set(value))
    keys = tuple(x for x in keyed if not x.axes & set(value))
    queries = tuple(x for x in others if x.axes & set(dot))
    rows = tuple(x for x in others if not x.axes & set(dot))
    heads = {query}.union(*(x.axes for x in queries))
    of_heads = of_numbers and {*free} <= heads.union(*(x.axes for x in exponents))
    if not dot or not (value or of_heads) or any(x.axes & set(dot) for x in values):
        return None
    if of_heads and not {*free} <= heads:
        values = tuple(x for x in keyed if not x.axes & set(dot))
        keys = tuple(x for x in keyed if x.axes & set(dot))
    if any(not any(a in x.axes for x in queries) or not any(a in x.axes for x in keys) for a in dot):
        return None
    if not any(query in x.axes for x in queries) or any(a in d.axes for d in product.divisors for a in (*dot, key)):
        return None
    return Roles(query, key, dot, value, queries, keys, values, rows, pairs)


def as_number(condition: Expr) -> Expr:
    """A condition as a factor."""
    return s.where(condition, Const(1.0, "float32"), Const(0.0, "float32"))


def obstacle(product: Product, free: tuple[Axis, ...]) -> Declined | None:
    """Why a product without roles is none, where it looks like an attention: a function of scores, summed over a key
    axis together with values."""
    for factor in product.factors:
        for key in product.summed:
            if holds_sum(factor) and key in factor.axes:
                mine = factor.axes & set(free)
                theirs = [f.axes & set(free) for f in product.factors if key in f.axes and f is not factor]
                if any(mine - other and other - mine for other in theirs):
                    return Declined(_why_not(factor), blamed(factor), pairwise=True)
    plain = replace(product, divisors=())
    for key in product.summed:
        keyed = any(holds_sum(d) and key in d.axes for d in product.divisors)
        if keyed and any(sort(plain, free, query, key) is not None for query in free):
            return Declined("the normaliser depends on the key")
    return None


def holds_sum(e: Expr) -> bool:
    """Whether scores stand in an expression: a sum that was written out."""
    return any(isinstance(n, Reduce) for n in e.walk())


# ---------------------------------------------------------------------------------------------------- the pairs


@dataclass(frozen=True)
class Weight:
    """What a pair of positions is weighted with besides q . k: a causal mask, and decays as gates over the key axis."""

    causal: bool
    strict: bool
    gate: Expr | None


def weight_of(product: Product, pair: Pair, step_of: Callable[[Expr, Axis], Expr]) -> Weight:
    """Read the conditions and exponents of a pair. `step_of(c, t)`: the difference c[t] - c[t-1] of a value that holds
    t. Raises `Stop` with the reason where they are no causal mask and no decay."""
    query, key = pair
    for factor in product.factors:
        if {query, key} <= factor.axes:
            raise Stop(Declined(_why_not(factor), blamed(factor), pairwise=True))
    mask = s.and_(*(c for c in product.conditions if {query, key} <= c.axes))
    causal, strict = mask == s.le(key, query), mask == s.lt(key, query)
    if not (causal or strict or mask == TRUE):
        from refocus.notation import notation

        reason = f"a linear form needs a causal mask or none, and this one is {notation(mask)}"
        raise Stop(Declined(reason, pairwise=True))
    known = s.assume(s.le(key, query))
    exponents = [x for sign, e in product.exponents for x in _under(e, sign, known)]
    gate = _gate(exponents, pair, step_of)
    if gate is not None and not (causal or strict):
        raise Stop(Declined("weights that decay without a causal mask have no linear form here"))
    return Weight(causal or strict, strict, gate)


def _under(e: Expr, sign: int, known: s.Knowledge) -> list[Signed]:
    """An exponent with the mask known: a choice that it decides is gone, and what is left may be a sum."""
    simple = s.under(e, known)
    terms = list(terms_of(simple, sign))
    return [(sign, simple)] if any(none for _, _, none in terms) else [(way, x) for way, x, _ in terms]


def _why_not(factor: Expr) -> str:
    name = blamed(factor)
    if holds_sum(factor):
        return f"the weights are not linear in the scores (`{name}` of them)"
    return f"the weights do not come apart into a query's and a key's share (`{name}`)"


def blamed(e: Expr) -> str | None:
    return e.op if isinstance(e, Call) else e.tensor if isinstance(e, Load) else None


def _gate(exponents: list[Signed], pair: Pair, step_of: Callable[[Expr, Axis], Expr]) -> Expr | None:
    query, key = pair
    slopes: dict[tuple[Expr, ...], Expr] = {}  # factors -> the sum of what they multiply, in positions
    open_: list[tuple[int, Counter[Expr], Expr]] = []  # sign, factors, a value of one position or summed between
    for sign, e in exponents:
        positions, cores, given = _sorted_factors(e, pair)
        if len(cores) > 1 or (cores and positions != Const(1)):
            raise Stop(Declined("a decay is no multiple of a distance and no difference of summed gates", blamed(e)))
        if cores:
            open_.append((sign, Counter(given), cores[0]))
        else:
            tag = tuple(sorted(given, key=repr))
            slopes[tag] = s.add(slopes.get(tag, Const(0)), s.mul(sign, positions))
    gates = [_scaled(tag, Const(float(_slope(p, pair)), "float32")) for tag, p in slopes.items() if p != Const(0)]
    while open_:
        sign, rest, core = open_.pop(0)
        if {query, key} <= core.axes:
            gates.append(_scaled((*rest.elements(), Const(float(sign), "float32")), _summed_between(core, pair)))
            continue
        mine, other = (query, key) if query in core.axes else (key, query)
        partner = (-sign, rest, s.substitute(core, {mine: other}))
        if partner not in open_:
            raise Stop(Declined("a decay is no difference of gates summed up to the query and up to the key"))
        open_.remove(partner)
        upward = sign if mine == query else -sign
        step = step_of(s.substitute(core, {mine: key}), key)
        gates.append(_scaled((*rest.elements(), Const(float(upward), "float32")), step))
    total: Expr | None = None
    for gate in gates:
        total = gate if total is None else s.call("add", total, gate, dtype=gate.dtype)
    return total


def _sorted_factors(e: Expr, pair: Pair) -> tuple[Expr, list[Expr], list[Expr]]:
    """A term as a whole number of positions, values that depend on a position, and factors that do not."""
    positions: Expr = Const(1)
    cores: list[Expr] = []
    rest: list[Expr] = []
    stack = [e]
    while stack:
        f = stack.pop()
        if isinstance(f, Call) and f.op == "mul" and f.is_float:
            stack.extend(f.args)
        elif isinstance(f, Call) and f.op == "neg" and f.is_float:
            stack.append(f.args[0])
            positions = s.neg(positions)
        elif isinstance(f, Call) and f.op == "div" and f.is_float and not f.args[1].axes & set(pair):
            stack.append(f.args[0])
            rest.append(s.call("reciprocal", s.cast(f.args[1], f.dtype), dtype=f.dtype))
        elif not f.axes & set(pair):
            rest.append(f)
        elif f.is_int:
            positions = s.mul(positions, f)
        else:
            cores.append(f)
    return positions, cores, rest


def _slope(positions: Expr, pair: Pair) -> int:
    """c where `positions` is c * (i - j) with a whole number c."""
    query, key = pair
    for mono, coefficient in to_poly(positions).items():
        if mono == (query,) and positions == s.mul(coefficient, s.sub(query, key)):
            return coefficient
    raise Stop(Declined("a decay is not linear in the distance of query and key"))


def _scaled(factors: tuple[Expr, ...], value: Expr) -> Expr:
    for factor in factors:
        value = s.call("mul", value, factor, dtype=factor.dtype if factor.is_float else "float32")
    return value


def _summed_between(core: Expr, pair: Pair) -> Expr:
    """g[t] out of sum over j < t <= i of g[t]."""
    query, key = pair
    product = product_of(core)
    if len(product.summed) == 1 and not product.divisors and isinstance(core, Reduce):
        step = product.summed[0]
        between = {s.le(step, query), s.lt(key, step)}
        if set(product.conditions) == between and not any(f.axes & set(pair) for f in product.factors):
            gate: Expr = Const(1.0, core.dtype)
            for factor in product.factors:
                gate = s.call("mul", gate, factor, dtype=core.dtype)
            return s.substitute(gate, {step: key})
        if set(product.conditions) == {s.lt(step, query), s.lt(key, step)}:
            raise Stop(Declined("a state is read before it decays: weights lack the gate of the query's own step"))
    raise Stop(Declined("a decay is no sum of the gates between key and query"))
