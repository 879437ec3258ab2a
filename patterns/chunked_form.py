"""An attention that is computed in chunks of positions, read as one linear attention over all of them.

    out[c, i] = sum over j <= i of      q[c, i] . k[c, j]  w(c, i; c, j)  v[c, j]          inside of a chunk
              + sum over z < c, all j   q[c, i] . k[z, j]  w(c, i; z, j)  v[z, j]          between chunks

It is one attention iff queries, keys and values are the same in both parts and w is the exponential of the gates
between the two positions, wherever these are (`refocus.patterns.gate_sums`). However the second part was put together,
by a loop with a state or by products of states and decays, its factors are those of whole sums by then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, permutations

from refocus import simplify as s
from refocus.ir import ONE, TRUE, Axis, Call, Const, Expr, Load, Reduce, rewrite
from refocus.patterns.declined import Declined, Near, Stop
from refocus.patterns.gate_sums import CHUNK, ROW, Gate, Places, Sums, between, sums_of
from refocus.patterns.held_decays import Held, Values, no_values
from refocus.patterns.linear import (
    Product,
    Signed,
    Weight,
    always,
    as_number,
    exponent_of,
    holds_sum,
    logarithm,
    product_of,
    terms_of,
)
from refocus.patterns.summands import terms_that, times
from refocus.polynomial import order_key


@dataclass(frozen=True)
class Cut:
    """Where a position is in a result: in which `chunk`, and in which `row` of it; `query` and `key` run over all
    positions."""

    chunk: Axis
    row: Axis
    query: Axis
    key: Axis

    @property
    def size(self) -> Expr:
        return self.row.size

    def split(self, whole: Expr) -> tuple[Expr, Expr]:
        return s.floordiv(whole, self.size), s.mod(whole, self.size)


@dataclass(frozen=True)
class Part:
    """sum over `summed` of number * atoms * exps * exp(exponents), where all `conditions` hold. `exps`: exponentials
    that may be decays, or may be what a value is made of."""

    summed: tuple[Axis, ...]
    atoms: tuple[Expr, ...]
    exponents: tuple[Signed, ...]
    conditions: tuple[Expr, ...]
    number: float
    exps: tuple[Expr, ...] = ()

    @property
    def decays(self) -> tuple[Signed, ...]:
        """All that is under an exponential."""
        return (*self.exponents, *(x for f in self.exps for x in _exponents(f)[0]))

    def renamed(self, names: dict[Expr, Expr]) -> Part:
        return Part(
            tuple(a for a in (names.get(a, a) for a in self.summed) if isinstance(a, Axis)),
            tuple(s.substitute(x, names) for x in self.atoms),
            tuple((sign, s.substitute(x, names)) for sign, x in self.exponents),
            tuple(c for x in self.conditions for c in s.conjuncts(s.substitute(x, names)) if c != TRUE),
            self.number,
            tuple(s.substitute(x, names) for x in self.exps),
        )


OTHERS = "what is computed in chunks has other queries, keys or values between chunks than inside of them"


@dataclass(frozen=True)
class Joined:
    """The attention over all positions. `counts`: how often each gate counts; `number`: a factor of the product;
    `names`: what axes between chunks are called inside of them."""

    product: Product
    weight: Weight
    counts: tuple[tuple[Gate, float], ...]
    number: float
    names: dict[Expr, Expr]

    def reads(self, term: Expr, at: Cut, values: Values) -> bool:
        """Whether a term reads the state before a chunk with the decay from there, no more and no less."""
        part = part_of(term).renamed(self.names)
        places = Places(frozenset((at.chunk,)), frozenset((at.row,)), at.size, {})
        start = s.mul(at.chunk, at.size)
        rest = between(self.counts, s.add(start, at.row), s.sub(start, 1)).less(sums_of(part.decays, places))
        held = tuple(
            x for x in part.atoms if at.row in x.axes and x.loads and values(x, sorted(x.axes, key=order_key))
        )  # fmt: skip
        if part.number not in (1.0, self.number) or part.conditions:
            return False
        return Held(held, at.row, Axis("alone", ONE), values).are(rest, TRUE) if held else not rest.counts

    def written(self, term: Expr, at: Cut) -> tuple[Expr, ...] | None:
        """The factors that the state holds, where a term reads it: those of the product but for the term's own, which
        are all of the query's; None where some of these are not the term's."""
        part = part_of(term).renamed(self.names)
        of_query: dict[Expr, Expr] = dict(zip((at.chunk, at.row), at.split(at.query)))
        read = Counter(s.substitute(x, of_query) for x in (*part.atoms, *part.exps))
        read.update([Const(part.number, "float32")])
        held = tuple((Counter(self.product.factors) - read).elements())
        return None if any(at.query in x.axes for x in held) else held


def over_all(value: Expr, at: Cut, values: Values = no_values) -> Joined:
    """What both parts are together. `values`: what is known of constants. Raises `Stop`."""
    terms = _terms(_as_exponentials(value, values), at)
    parts = _two_parts(s.call("add", *terms, dtype=value.dtype) if len(terms) > 1 else terms[0])
    for inside, outer in (parts, parts[::-1]):
        for z, apart in _earlier(outer, at):
            return _Parts(inside, apart, z, at, values).joined()
    raise Stop(Declined("there is no state of the chunks before"))


def normalised(value: Expr, at: Cut, values: Values = no_values) -> Joined:
    """The same for a quotient of such sums: what is divided by is written as a function of sums over all positions."""
    parts = product_of(value)
    inner = any(d.axes & {*parts.summed} for d in parts.divisors)
    if not parts.divisors or inner or parts.exponents or parts.conditions:
        return over_all(value, at, values)
    over = times(sorted(parts.factors, key=holds_sum), value.dtype)
    for axis in reversed(parts.summed):
        over = Reduce("sum", axis, over, value.dtype)
    joined = over_all(over, at, values)
    of_query: dict[Expr, Expr] = dict(zip((at.chunk, at.row), at.split(at.query)))
    divisors = tuple(s.substitute(_with_sums(d, at, values, joined), of_query) for d in parts.divisors)
    exponents = () if joined.weight.gate is None else ((1, _decay(joined, at)),)
    return replace(joined, product=replace(joined.product, divisors=divisors, exponents=exponents))


def _decay(joined: Joined, at: Cut) -> Expr:
    """What stands for the sum of the gates between two positions, in weights and their sums."""
    gate = joined.weight.gate
    own = [a for a in joined.product.summed if gate is not None and a in gate.axes and a != at.key]
    return Load("gates between", (at.query, at.key, *own), "float32")


def _with_sums(divisor: Expr, at: Cut, values: Values, weights: Joined) -> Expr:
    """A divisor with the sums of its two parts written as one sum over all positions each."""

    def visit(node: Expr) -> Expr | None:
        terms = _terms(node, at)
        for pair in combinations(terms, 2):
            try:
                found = over_all(s.call("add", *pair, dtype=node.dtype), at, values)
            except Stop:
                continue
            whole = _as_sum(found, _same_gate(found, weights, at), node.dtype, _decay(weights, at))
            others = [x for x in terms if x not in pair]
            return s.call("add", whole, *others, dtype=node.dtype) if others else whole
        return None

    found = rewrite(divisor, visit, s.rebuild)
    if any(isinstance(n, Reduce) and _over_earlier(n, at) for n in found.walk()):
        raise Stop(Declined("the normaliser is no sum of the weights over the keys"))
    return found


def _as_sum(found: Joined, names: dict[Expr, Expr], dtype: str, decay: Expr) -> Expr:
    """An attention to numbers as a sum; what its axes are called in the weights is in `names`."""
    total: Expr = times([s.substitute(factor, names) for factor in found.product.factors], dtype)
    if found.weight.gate is not None:
        total = s.call("mul", total, s.call("exp", decay, dtype=dtype), dtype=dtype)
    total = s.where(s.and_(*found.product.conditions), total, Const(0.0, dtype))
    for axis in found.product.summed:
        total = Reduce("sum", names.get(axis, axis), total, dtype)  # type: ignore[arg-type]
    return total


def _terms(e: Expr, at: Cut) -> list[Expr]:
    """The terms of a value, multiplied out where one of them is a sum over earlier chunks (the state of a running sum
    that goes on inside of a chunk is read once for both)."""

    def holds(x: Expr) -> bool:
        return any(isinstance(n, Reduce) and _over_earlier(n, at) for n in x.walk())

    return terms_that(holds, e)


def _over_earlier(total: Reduce, at: Cut) -> bool:
    """Whether a sum runs over the chunks before one."""
    before = (s.lt(total.axis, at.chunk), s.le(total.axis, at.chunk))
    return any(
        isinstance(n, Call) and n.op == "where" and any(c in before for c in s.conjuncts(n.args[0]))
        for n in total.body.walk()
    )


def _same_gate(found: Joined, weights: Joined, at: Cut) -> dict[Expr, Expr]:
    """What the axes of a sum are called in the weights that decay as it does. Raises `Stop` for any other decay."""
    mine, theirs = ([a for a in x.product.summed if a != at.key] for x in (found, weights))
    for own in permutations(theirs):
        if [a.size for a in own] == [a.size for a in mine]:
            names: dict[Expr, Expr] = dict(zip(mine, own))
            gate = found.weight.gate
            if (None if gate is None else s.substitute(gate, names)) == weights.weight.gate:
                return names
    raise Stop(Declined("the normaliser is a sum of other weights"))


def _as_exponentials(value: Expr, values: Values) -> Expr:
    """A value, powers of positive constants (decays that a model keeps, one for each head) as exponentials."""

    def visit(node: Expr) -> Expr | None:
        if not (isinstance(node, Call) and node.op == "pow" and node.args[1].is_int):
            return None
        base, power = rewrite(node.args[0], visit, s.rebuild), node.args[1]
        if isinstance(base, Call) and base.op == "exp":
            log = base.args[0]
        else:
            found = values(base, sorted(base.axes, key=order_key)) if base.loads else None
            if found is None or not bool((found[0] > 0).all()):
                return None
            log = s.call("log", base, dtype=base.dtype)
        return s.call("exp", s.call("mul", log, power, dtype=node.dtype), dtype=node.dtype)

    return rewrite(value, visit, s.rebuild)


@lru_cache(maxsize=16)  # every pair of axes may be chunks and rows of one value
def _two_parts(value: Expr) -> tuple[Part, Part]:
    found = list(terms_of(value, 1))
    if len(found) != 2 or any(conditions for _, _, conditions in found):
        raise Stop(Declined("what is in a chunk is not added to what is before it"))
    one, other = (part_of(x if sign > 0 else s.call("neg", x, dtype=x.dtype)) for sign, x, _ in found)
    return one, other


def part_of(e: Expr) -> Part:
    """A product as a `Part`."""
    product = product_of(e)
    if product.divisors:
        raise Stop(Declined("what is computed in chunks has a normaliser"))
    atoms: list[Expr] = []
    exponents: list[Signed] = []
    conditions = list(product.conditions)
    number = 1.0
    exps: list[Expr] = []
    stack = list(product.factors)
    while stack:
        f = stack.pop()
        if isinstance(f, Const):
            number *= float(f.value)
        elif isinstance(f, Call) and f.op in ("exp", "exp2"):
            found, more = _exponents(f)
            if more:
                exponents.extend(found)
                conditions.extend(more)
            else:
                exps.append(f)
        elif isinstance(f, Call) and f.op == "pow" and f.args[1].is_int and (base := logarithm(f.args[0])) is not None:
            exponents.append((1, s.call("mul", base, f.args[1], dtype=f.dtype)))
        elif (base_log := logarithm(f)) is not None and isinstance(f, Call) and f.op == "pow":
            exponents.append((1, base_log))
        else:
            atoms.append(f)
    known = s.assume(s.and_(*conditions))
    flat = tuple(c for c in s.conjuncts(s.and_(*conditions)) if c != TRUE and not always(c, known))
    # With j <= i known, max(i - j, 0) is i - j.
    simple = tuple((sign, s.under(x, known)) for sign, x in exponents)
    return Part(product.summed, tuple(atoms), simple, flat, number, tuple(s.under(x, known) for x in exps))


def _exponents(f: Expr) -> tuple[list[Signed], list[Expr]]:
    """What is under an exponential, and the conditions outside of which it is zero."""
    assert isinstance(f, Call)
    terms = list(terms_of(exponent_of(f), 1))
    return [(sign, term) for sign, term, _ in terms], [c for _, _, more in terms for c in more]


def _earlier(part: Part, at: Cut) -> Iterator[tuple[Axis, Part]]:
    """The axis of earlier chunks, numbered as the queries' chunks are (zeros may have been put before them)."""
    for axis in part.summed:
        low = 1 if s.le(Const(1), axis) in part.conditions else 0
        z = Axis("earlier chunk", s.sub(axis.size, low))
        moved = part.renamed({axis: s.add(z, low)})
        moved = replace(moved, summed=tuple(z if a == axis else a for a in part.summed))
        if [c for c in moved.conditions if {z, at.chunk} <= c.axes] == [s.lt(z, at.chunk)]:
            if z.size == at.chunk.size:
                yield z, moved


@dataclass(frozen=True)
class _Parts:
    """`inside` of a chunk, and between a chunk and those before it, whose number is `earlier`."""

    inside: Part
    apart: Part
    earlier: Axis
    at: Cut
    values: Values

    def joined(self) -> Joined:
        for column in self.inside.summed:
            if column.size == self.at.size and (found := self._by(column)) is not None:
                return found
        raise Stop(Declined("inside of a chunk, the mask is not causal"))

    def _by(self, column: Axis) -> Joined | None:
        """The whole, if `column` are the keys of a chunk; None where they cannot be."""
        row = self.at.row
        masks = s.le(column, row), s.lt(column, row)
        pair = s.and_(*(c for c in self.inside.conditions if {row, column} <= c.axes))
        if pair in masks:
            for names in self._names(column):
                apart = self.apart.renamed(names)
                if self._same(self.inside, apart, column):
                    with suppress(Stop):
                        return _Whole(self, self.inside, apart, column, names, pair, (), ()).read()
                    # Exponentials that both parts have may be values, and no decays.
                    inside, apart = self._valued(self.inside, apart, column)
                    return _Whole(self, inside, apart, column, names, pair, (), ()).read()
        inside, held = self._told(self.inside, column)
        if not held or not (pair == TRUE or pair in masks):
            if pair in masks:
                raise Near(Declined(OTHERS))
            return None
        seen = Held(held, row, column, self.values).sees() if pair == TRUE else pair
        if seen is None:
            raise Stop(Declined("inside of a chunk, the mask is not causal"))
        for names in self._names(column):
            rest, passing = self._told(self.apart.renamed(names), column)
            if self._same(inside, rest, column):
                return _Whole(self, inside, rest, column, names, seen, held, passing).read()
        raise Near(Declined(OTHERS))

    def _told(self, part: Part, column: Axis) -> tuple[Part, tuple[Expr, ...]]:
        """A part without the factors of rows and columns whose values are known, and these."""
        rows = {self.at.row, column}
        held = [
            x for x in part.atoms if x.axes & rows and x.loads and self.values(x, sorted(x.axes, key=order_key))
        ]  # fmt: skip
        return replace(part, atoms=tuple(x for x in part.atoms if x not in held)), tuple(held)

    def _names(self, column: Axis) -> Iterator[dict[Expr, Expr]]:
        """What the axes between chunks may be inside of them."""
        dots = [a for a in self.inside.summed if a != column]
        for own in permutations([a for a in self.apart.summed if a != self.earlier]):
            if [a.size for a in own] == [column.size, *(a.size for a in dots)]:
                yield dict(zip(own, (column, *dots)))

    def _same(self, inside: Part, apart: Part, column: Axis) -> bool:
        """Whether queries, keys and values are those inside of a chunk."""
        chunk, row = self.at.chunk, self.at.row
        mine, theirs = (Counter(_factors(x, self.masks(column))) for x in (inside, apart))
        if any({row, column} <= x.axes for x in mine) or any({chunk, self.earlier} <= x.axes for x in theirs):
            return False
        of_keys = Counter(x for x in theirs.elements() if x.axes & {self.earlier, column})
        of_queries = theirs - of_keys
        here = Counter(s.substitute(x, {self.earlier: chunk}) for x in of_keys.elements())
        return here == Counter(x for x in mine.elements() if column in x.axes) and of_queries == mine - here

    def _valued(self, inside: Part, apart: Part, column: Axis) -> tuple[Part, Part]:
        """Both parts, the exponentials that they have in common among the atoms."""
        here: dict[Expr, Expr] = {self.earlier: self.at.chunk}
        left = Counter(inside.exps)
        common: list[Expr] = []
        for x in apart.exps:
            mine = s.substitute(x, here)
            if left[mine] and not {self.at.chunk, self.earlier} <= x.axes and not {self.at.row, column} <= x.axes:
                left[mine] -= 1
                common.append(x)
        rest = Counter(apart.exps) - Counter(common)
        own = (s.substitute(x, here) for x in common)
        return (
            replace(inside, atoms=(*inside.atoms, *own), exps=tuple(left.elements())),
            replace(apart, atoms=(*apart.atoms, *common), exps=tuple(rest.elements())),
        )

    def masks(self, column: Axis) -> tuple[frozenset[Axis], ...]:
        return frozenset((self.at.row, column)), frozenset((self.at.chunk, self.earlier))


@dataclass(frozen=True)
class _Whole:
    """Two parts with the same queries, keys and values; `mask` is that of a chunk. `held` and `passing`: decays inside
    of it and between chunks whose values are known."""

    parts: _Parts
    inside: Part
    apart: Part
    column: Axis
    names: dict[Expr, Expr]
    mask: Expr
    held: tuple[Expr, ...]
    passing: tuple[Expr, ...]

    def read(self) -> Joined:
        at, z, column = self.parts.at, self.parts.earlier, self.column
        if self.apart.number * self.inside.number <= 0:
            raise Near(Declined(OTHERS))
        scale = Const(math.log(self.apart.number / self.inside.number), "float64")
        rows = frozenset((at.row, column))
        here = Places(frozenset((at.chunk,)), rows, at.size, s.assume(self.mask))
        there = Places(frozenset((at.chunk, z)), rows, at.size, s.assume(s.lt(z, at.chunk)))
        query, key, before = (there.position(*x) for x in ((at.chunk, at.row), (at.chunk, column), (z, column)))
        law = sums_of(self.inside.decays, here)
        passed = sums_of((*self.apart.decays, (1, scale)), there)
        if self.held and not law.gates():
            # A gate that is the same everywhere counts as often as for the chunks that it passes, by their length.
            length = float(at.size.value) if isinstance(at.size, Const) else math.nan
            counts = [(gate, passed.counts.get((gate, at.chunk), 0.0) / length) for gate in passed.gates()]
        else:
            counts = [(gate, law.counts.get((gate, query if gate.core else at.row), 0.0)) for gate in law.gates()]
        if not self._are(self.held, between(counts, query, key).less(law), self.mask):
            raise Near(Declined("inside of a chunk, decays are no sums of the gates between query and key"))
        if not self._are(self.passing, between(counts, query, before).less(passed), TRUE):
            raise Near(Declined("what is computed in chunks decays otherwise between chunks than inside of them"))
        of_query: dict[Expr, Expr] = dict(zip((at.chunk, at.row), at.split(at.query)))
        of_key: dict[Expr, Expr] = dict(zip((z, column), at.split(at.key)))
        factors: list[Expr] = [Const(self.inside.number, "float32")] if self.inside.number != 1.0 else []
        for x in _factors(self.apart, self.parts.masks(column)):
            factors.append(s.substitute(x, of_key if x.axes & {z, column} else of_query))
        summed = (*(a for a in self.inside.summed if a != column), at.key)
        strict = self.mask == s.lt(column, at.row)
        mask = s.lt(at.key, at.query) if strict else s.le(at.key, at.query)
        gate = _gate(counts, at)
        exponents = () if gate is None else ((1, gate),)  # whose axes are no values'
        product = Product(summed, tuple(factors), (), exponents, (mask,))
        return Joined(product, Weight(True, strict, gate), tuple(counts), self.inside.number, self.names)

    def _are(self, held: tuple[Expr, ...], sums: Sums, mask: Expr) -> bool:
        """Whether factors that are kept are the exponentials of what is left of the decays."""
        if not held:
            return not sums.counts
        return Held(held, self.parts.at.row, self.column, self.parts.values).are(sums, mask)


def _factors(part: Part, masks: tuple[frozenset[Axis], ...]) -> list[Expr]:
    """The atoms, and what conditions there are besides the masks."""
    return [*part.atoms, *(as_number(c) for c in part.conditions if not any(m <= c.axes for m in masks))]


def _gate(counts: list[tuple[Gate, float]], at: Cut) -> Expr | None:
    """The gate of each key."""
    chunk, row = at.split(at.key)
    total: Expr | None = None
    for gate, count in counts:
        value: Expr = Const(count, "float32")
        for x in (*gate.rest, *(() if gate.core is None else (gate.core,))):
            here = {a: chunk if a.name == CHUNK else row for a in x.axes if a.name in (CHUNK, ROW)}
            value = s.call("mul", value, s.substitute(x, here), dtype=x.dtype if x.is_float else "float32")  # type: ignore[arg-type]
        total = value if total is None else s.call("add", total, value, dtype=value.dtype)
    return total
