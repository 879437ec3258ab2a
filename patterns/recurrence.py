"""One step of a recurrence, read as an update that is linear in the state.

    S'[d, e] = keep * S[d, e]  +  write[d, e]                                         a sum that decays
             - keep * erase * k[d] * (sum over d' of k[d'] * S[d', e])                 and the delta rule,
             - erase[d] * (sum over d' of lookup[d'] * S[d', e])                       or any change of rank one

`keep` is a product of decays, with a logarithm for each, or a number that is the same at every step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product as combinations

from refocus import simplify as s
from refocus.ir import TRUE, Axis, Call, Const, Expr, Load, Reduce, rewrite
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Product, as_number, product_of
from refocus.patterns.summands import minus, multiplied_out, number_of_terms, summands, times


@dataclass(frozen=True)
class Lookup:
    """What is looked up in the state before a step: `key`, in sums `over` axes of the state."""

    key: Expr
    over: tuple[Expr, ...]

    def at(self, here: dict[Expr, Expr]) -> Lookup:
        return Lookup(s.substitute(self.key, here), tuple(s.substitute(x, here) for x in self.over))


@dataclass(frozen=True)
class Update:
    """What a step does to a state, over the state's own axes and the step. `gates` are logarithms of decays, `bases`
    decays that do not depend on the step, `write` what is added. With the delta rule, `erase` is what it takes away,
    `keys` are the factors of the keys that it looks up. With a `lookup`, `erase` is what is taken away for what that
    finds."""

    gates: tuple[Expr, ...]
    bases: tuple[Expr, ...]
    write: Expr
    erase: Expr | None = None
    keys: tuple[Expr, ...] = ()
    lookup: Lookup | None = None


def read_update(
    update: Expr, state: str, own: tuple[Expr, ...], step: Axis, log: Callable[[Expr], Expr | None]
) -> Update:
    """Read S' as a function of loads of `state`, over the axes `own`. Raises Stop."""
    holds = cache(lambda e: _holds(e, state))
    if number_of_terms(update, holds) > _MOST_TERMS:
        raise Stop(Declined("a loop's update has too many terms to be read"))
    keeps: list[Product] = []
    erases: list[tuple[Product, Load]] = []
    terms = summands(update, holds)
    writes = [term for term in terms if not _holds(term, state)]
    for found in _collected([_contracted(product_of(term)) for term in terms if _holds(term, state)], update.dtype):
        loads = [f for f in found.factors if isinstance(f, Load) and f.tensor == state]
        rest = [f for f in found.factors if f not in loads]
        if len(loads) != 1 or any(_holds(x, state) for x in (*rest, *found.divisors, *found.conditions)):
            raise Stop(Declined("a loop's update is not linear in its state"))
        if found.divisors or not all(step in c.axes for c in found.conditions):
            raise Stop(Declined("a loop's state is not multiplied with decays alone"))
        # A state that is set to zero decays by zero.
        plain = Product(summed=found.summed, factors=(*rest, *map(as_number, found.conditions)))
        if loads[0].index == own and not found.summed:
            keeps.append(plain)
        else:
            erases.append((plain, loads[0]))
    if not keeps or not writes:
        raise Stop(Declined("a loop's state is no running sum, with or without a decay"))
    # A blend: state + rate * (new - state) keeps 1 - rate of it.
    keep = keeps[0].factors if len(keeps) == 1 else _blended(keeps, update.dtype)
    gates, bases = [], []
    for factor in keep:
        if step not in factor.axes:
            bases.append(factor)
        elif (gate := log(factor)) is not None:
            gates.append(gate)
        else:
            raise Stop(Declined("a loop's state is multiplied with what is not known to be a positive decay"))
    write = _written(writes)
    if not erases:
        return Update(tuple(gates), tuple(bases), write)
    changes = [_change(found, load, own) for found, load in erases]
    delta = _erased(*changes[0], keep, write) if len(changes) == 1 else None
    if delta is not None:
        erase, keys, values = delta
        return Update(tuple(gates), tuple(bases), values, erase, keys)
    erase, lookup = _looked_up(changes, write.dtype)
    return Update(tuple(gates), tuple(bases), write, erase, (), lookup)


def _written(terms: Sequence[Expr]) -> Expr:
    """The sum of what is written, as a product where its terms share factors."""
    products = [product_of(x) for x in terms]
    if len(terms) == 1 or any(p.summed or any(_others(p)) for p in products):
        return _sum(terms)
    return times(_common([p.factors for p in products], terms[0].dtype), terms[0].dtype)


def _blended(keeps: Sequence[Product], dtype: str) -> tuple[Expr, ...]:
    """What is kept of a state in several terms, as one: 1 - (1 - decay) is the decay."""
    terms = [times(chosen, dtype) for x in keeps for chosen in combinations(*map(multiplied_out, x.factors))]
    products = [product_of(x) for x in terms]
    if any(p.summed or p.exponents or p.conditions for p in products):
        raise Stop(Declined("a loop's state is no running sum, with or without a decay"))
    return _common([(*p.factors, *(s.call("reciprocal", x, dtype=dtype) for x in p.divisors)) for p in products], dtype)


def _common(products: Sequence[Sequence[Expr]], dtype: str) -> tuple[Expr, ...]:
    """A sum of products as one: the factors that all of them share, and the sum of what else they have."""
    factors = [Counter(f for f in p if not isinstance(f, Const)) for p in products]
    shared = factors[0].copy()
    for other in factors[1:]:
        shared &= other
    found: dict[frozenset[tuple[Expr, int]], tuple[float, list[Expr]]] = {}
    for p, mine in zip(products, factors):
        number = math.prod(float(f.value) for f in p if isinstance(f, Const))
        own = mine - shared
        key = frozenset(own.items())
        found[key] = found.get(key, (0.0, []))[0] + number, [*own.elements()]
    terms = sorted((x for x in found.values() if x[0] != 0.0), key=lambda term: (term[0] < 0.0, len(term[1])))
    total: Expr = Const(0.0, dtype)
    for place, (number, rest) in enumerate(terms):
        size = [] if abs(number) == 1.0 else [Const(abs(number), dtype)]
        value = times([*size, *rest], dtype)
        if place == 0:
            total = value if number > 0.0 else minus(value)
        else:
            total = s.call("add" if number > 0.0 else "sub", total, value, dtype=dtype)
    return (*shared.elements(), *(() if total == Const(1.0, dtype) else (total,)))


Moved = list[tuple[Expr, Expr]]  # axes of the state, and over which it is summed instead


def _change(found: Product, load: Load, own: tuple[Expr, ...]) -> tuple[Product, Moved]:
    moved = [(a, x) for a, x in zip(own, load.index) if a != x]
    if not moved or len(moved) != len(found.summed) or {x for _, x in moved} != set(found.summed):
        raise Stop(Declined("what a loop takes from its state is not looked up there by a key"))
    return found, moved


def _looked_up(changes: Sequence[tuple[Product, Moved]], dtype: str) -> tuple[Expr, Lookup]:
    """What is taken away for what a key finds, and that key. Several changes are one if they share one of the two."""
    keys: list[list[Expr]] = []
    rests: list[list[Expr]] = []
    for found, moved in changes:
        mine, theirs = frozenset(a for a, _ in moved), set(found.summed)
        if any(f.axes & mine and f.axes & theirs for f in found.factors):
            raise Stop(Declined("what a loop takes from its state is not looked up there by a key"))
        here: dict[Expr, Expr] = {x: a for a, x in moved}
        keys.append([s.substitute(f, here) for f in found.factors if f.axes & theirs])
        rests.append([f for f in found.factors if not f.axes & theirs])
    overs = {frozenset(a for a, _ in moved) for _, moved in changes}
    one_key, one_rest = (all(Counter(x) == Counter(side[0]) for x in side) for side in (keys, rests))
    if len(overs) > 1 or not (one_key or one_rest):
        raise Stop(Declined("a step of a loop changes its state by more than a decay and one key that is looked up"))
    key = _sum([times(x, dtype) for x in (keys[:1] if one_key else keys)])
    erase = _sum([times(x, dtype) for x in (rests if one_key else rests[:1])])
    return minus(erase), Lookup(key, tuple(a for a, _ in changes[0][1]))


def _sum(values: Sequence[Expr]) -> Expr:
    out = values[0]
    for value in values[1:]:
        out = s.call("add", out, value, dtype=out.dtype)
    return out


def _erased(
    found: Product, moved: Moved, keep: tuple[Expr, ...], write: Expr
) -> tuple[Expr, tuple[Expr, ...], Expr] | None:
    """What the delta rule takes away, the keys' factors, and what is written without what is taken away. None where it
    is another rule."""
    here: dict[Expr, Expr] = {x: a for a, x in moved}
    mine = {a for a, _ in moved}
    # What is looked up has decayed already, each channel of it in its own way.
    left = Counter(f for f in found.factors if not isinstance(f, Const))
    left.subtract(Counter(s.substitute(f, dict(moved)) for f in keep if not isinstance(f, Const)))
    if any(count < 0 for count in left.values()):
        return None
    factors = list(left.elements())
    looked_up = [s.substitute(f, here) for f in factors if f.axes & set(found.summed)]
    keys = [f for f in factors if f.axes & mine]
    if Counter(looked_up) != Counter(keys) or any(f.axes & mine and f.axes & set(found.summed) for f in factors):
        return None
    decay = _number(keep)
    sign = _number(found.factors) / decay if decay else 0.0
    scalars = [f for f in factors if not f.axes & (mine | set(found.summed))]
    if sign >= 0.0:
        return None
    written = product_of(write)
    number = _number(written.factors) / -sign
    rest = Counter(f for f in written.factors if not isinstance(f, Const))
    rest.subtract(Counter([*keys, *scalars]))
    if written.summed or written.divisors or written.conditions or any(count < 0 for count in rest.values()):
        return None
    values = list(rest.elements())
    if any(f.axes & mine for f in values):
        return None
    values += [Const(number, write.dtype)] if number != 1.0 else []
    scalars += [Const(-sign, write.dtype)] if sign != -1.0 else []
    return times(scalars, write.dtype), tuple(keys), times([*keys, *values], write.dtype)


def _contracted(product: Product) -> Product:
    """A product without the sums of which a condition leaves one term: those with an identity matrix."""
    for condition in product.conditions:
        for axis in product.summed:
            place = _solved_for(axis, condition)
            if place is None:
                continue
            here: dict[Expr, Expr] = {axis: place}
            others = [s.substitute(c, here) for c in product.conditions if c is not condition]
            rest = Product(
                summed=tuple(a for a in product.summed if a != axis),
                factors=tuple(s.substitute(x, here) for x in product.factors),
                divisors=tuple(s.substitute(x, here) for x in product.divisors),
                exponents=tuple((sign, s.substitute(x, here)) for sign, x in product.exponents),
                conditions=tuple(c for c in others if c != TRUE),
            )
            return _contracted(rest)
    return product


def _solved_for(axis: Axis, condition: Expr) -> Axis | None:
    """The other axis, of the same size, that a condition says an axis to be at."""
    if isinstance(condition, Call) and condition.op == "eq":
        for one, other in (condition.args, condition.args[::-1]):
            if one == axis and isinstance(other, Axis) and other.size == axis.size:
                return other
    return None


def _collected(products: Sequence[Product], dtype: str) -> list[Product]:
    """Products that are the same but for a number as one, and none where the numbers cancel."""
    found: dict[object, tuple[float, Product]] = {}
    for product in products:
        number = _number(product.factors)
        rest = replace(product, factors=tuple(f for f in product.factors if not isinstance(f, Const)))
        key = (frozenset(Counter(rest.factors).items()), frozenset(rest.summed), *map(tuple, _others(rest)))
        found[key] = (found[key][0] if key in found else 0.0) + number, rest
    return [
        rest if number == 1.0 else replace(rest, factors=(Const(number, dtype), *rest.factors))
        for number, rest in found.values()
        if number != 0.0
    ]


def _number(factors: Sequence[Expr]) -> float:
    """What numbers among factors multiply to."""
    return math.prod(float(f.value) for f in factors if isinstance(f, Const))


def _others(product: Product) -> tuple[Sequence[object], ...]:
    return product.divisors, product.exponents, product.conditions


def _holds(e: Expr, state: str) -> bool:
    return any(isinstance(n, Load) and n.tensor == state for n in e.walk())


_MOST_TERMS = 256  # of several steps taken for one, there are exponentially many


@dataclass
class Named:
    """Gates under names: where a gate counts for a pair, its step is after a key's, and what it is made of would be
    simplified with that. For a state that a loop starts from, the gate of the first step counts, too."""

    gates: dict[Expr, tuple[str, tuple[Axis, ...]]] = field(default_factory=dict)

    def of(self, gate: Expr, step: Axis) -> Load:
        """A gate as a load at its step and its other axes; equal ones, but for what their axes are called, alike."""
        own = dict.fromkeys(x for x in gate.walk() if isinstance(x, Axis) and x in gate.axes and x != step)
        axes = (step, *own)
        places = tuple(Axis(f"gate's {n}", a.size) for n, a in enumerate(axes))
        plain = s.substitute(gate, dict(zip(axes, places)))
        name, _ = self.gates.setdefault(plain, (f"gate {len(self.gates)}", places))
        return Load(name, axes, gate.dtype)

    def put_back(self, value: Expr) -> Expr:
        """The value, its names replaced by what they stand for."""
        known = {name: (gate, places) for gate, (name, places) in self.gates.items()}

        def visit(node: Expr) -> Expr | None:
            if not isinstance(node, Load) or node.tensor not in known:
                return None
            gate, places = known[node.tensor]
            return s.substitute(gate, dict(zip(places, node.index)))

        return rewrite(value, visit, s.rebuild)


def closed_form(
    update: Update, own: tuple[Expr, ...], at: tuple[Expr, ...], step: Axis, key: Axis,
    seen: Callable[[Expr, Expr], Expr], late: bool = False, named: Named | None = None,
) -> Expr:  # fmt: skip
    """The state that is read at the position `at` in a step: a sum over the steps `key` that it has `seen`. A state
    that has decayed only up to the step before (`late`) is one of keys that are counted from one: what is written at a
    step is a key of the next. With `named`, gates stand in it by name."""
    here: dict[Expr, Expr] = {a: x for a, x in zip(own, at) if isinstance(a, Axis)}
    between = Axis("between", step.size)
    wrote = before(key) if late else key
    value = s.substitute(update.write, {**here, step: wrote})
    dtype = value.dtype
    last = step if late or seen is s.le else s.sub(step, 1)
    for base in update.bases:
        power = Call("pow", (s.substitute(base, here), s.sub(last, key)), dtype)
        value = s.call("mul", value, power, dtype=dtype)
    for gate in update.gates:
        held = s.and_(s.le(between, last), s.lt(key, between))
        there = s.substitute(gate, {**here, step: before(between) if late else between})
        there = there if named is None else named.of(there, between)
        inner = s.where(held, there, Const(0.0, gate.dtype))
        value = s.call("mul", value, s.call("exp", Reduce("sum", between, inner, gate.dtype), dtype=dtype), dtype=dtype)
    keeps = s.and_(s.le(Const(1), key), s.le(key, step)) if late else seen(key, step)
    return Reduce("sum", key, s.where(keeps, value, Const(0.0, dtype)), dtype)


def before(position: Expr) -> Expr:
    """The position before one; of the first, the first."""
    return s.maximum(s.sub(position, 1), Const(0))
