"""A loop over chunks of positions, read as one linear attention over all of them.

    out[c, i] = sum over d of q[c, i] a(i) S[c]  +  sum over j <= i of (q[c, i] . k[c, j]) w(i - j) v[c, j]
    S[c + 1]  = keep * S[c]  +  sum over j of k[c, j] b(j) v[c, j]^T

With w(n) = exp(n * slope), both parts weight a pair alike, whatever their chunks, if a(i) = exp((i + 1) * slope),
b(j) = exp((C - 1 - j) * slope) and keep = exp(C * slope): what lies between the ends of the chunks adds up to the
distance. That is what is compared here; queries, keys and values must be the same in both parts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

from refocus import simplify as s
from refocus.ir import Axis, Call, Const, Expr, Load
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Pair, Product, Weight, logarithm, product_of, settled, sort, terms_of, weight_of
from refocus.patterns.recurrence import Update, summands
from refocus.polynomial import to_poly

# What is multiplied with a number of positions -> that number: the coefficient of each product of axes in it.
Positions = dict[tuple[Expr, ...], float]
Slopes = dict[tuple[Expr, ...], Positions]


@dataclass(frozen=True)
class Chunks:
    """The axes of a loop over chunks: its `step`, the `row` within a chunk, and `query` and `key` over all positions.
    `state` is the name that the state before a step is loaded under, `own` are its axes."""

    step: Axis
    row: Axis
    query: Axis
    key: Axis
    state: str
    own: tuple[Expr, ...]

    @property
    def size(self) -> int:
        assert isinstance(self.row.size, Const)
        return int(self.row.size.value)


def over_all(out: Expr, update: Update, free: tuple[Axis, ...], at: Chunks) -> tuple[Product, Weight]:
    """The product over all positions, and its weight. `free`: the axes of a chunk's results. Raises Stop."""
    found = [product_of(x) for x in summands(out, at.state)]
    reads = [x for x in found if any(_is_state(f, at) for f in x.factors)]
    if len(found) != 2 or len(reads) != 1 or update.erase is not None or update.gates:
        raise Stop(Declined("a loop over chunks does not add what is in a chunk to what is before it"))
    (between,) = reads
    inside = next(x for x in found if x is not between)
    if any(x.divisors for x in found) or between.conditions or between.exponents:
        raise Stop(Declined("a loop over chunks has a normaliser, or another mask between chunks"))
    for column in inside.summed:
        pair = (at.row, column)
        if column.size == at.row.size and sort(inside, free, *pair) is not None:
            break
    else:
        raise Stop(Declined("what a loop over chunks does inside of a chunk is no attention"))
    # Exponentials come apart once the pair is known.
    product = Product(inside.summed)
    for factor in inside.factors:
        product = product.times(product_of(factor, pair) if set(pair) <= factor.axes else Product(factors=(factor,)))
    product = settled(product.times(Product(conditions=inside.conditions)), pair)
    roles = sort(product, free, *pair)
    if roles is None:
        raise Stop(Declined("what a loop over chunks does inside of a chunk is no attention"))
    weight = weight_of(product, pair, _no_data)
    if not weight.causal or weight.strict:
        raise Stop(Declined("inside of a chunk, the mask is not causal"))
    queries, keys = (*roles.queries, *roles.rows), (*roles.keys, *roles.values)
    reader, writer = _alongside(between, update, roles.dot, queries, column, keys, at)
    slopes = _added(_slopes(e, sign, pair) for sign, e in product.exponents)
    row: Positions = {(at.row,): 1.0, (): 1.0}
    last: Positions = {(column,): -1.0, (): at.size - 1.0}
    _agree(_decay(reader, pair), slopes, pair, row)
    _agree(_decay(writer, pair), slopes, pair, last)
    here = _at_state(between, at)
    _agree(_decay([s.substitute(x, here) for x in update.bases], pair), slopes, pair, {(): float(at.size)})
    return _everywhere(product, queries, keys, pair, at), weight


def _is_state(e: Expr, at: Chunks) -> bool:
    return isinstance(e, Load) and e.tensor == at.state


def _no_data(value: Expr, axis: Axis) -> Expr:
    raise Stop(Declined("the decays of a loop over chunks depend on the data"))


def _at_state(between: Product, at: Chunks) -> dict[Expr, Expr]:
    (load,) = [f for f in between.factors if isinstance(f, Load) and f.tensor == at.state]
    return {a: x for a, x in zip(at.own, load.index) if isinstance(a, Axis)}


def _alongside(
    between: Product, update: Update, dot: tuple[Axis, ...], queries: tuple[Expr, ...], column: Axis,
    keys: tuple[Expr, ...], at: Chunks,
) -> tuple[list[Expr], list[Expr]]:  # fmt: skip
    """What queries are multiplied with that read the state, and keys and values that are written to it, besides what
    they are inside of a chunk. Raises Stop where they are not the same."""
    readers = [f for f in between.factors if not _is_state(f, at)]
    write = product_of(update.write)
    if len(between.factors) != len(readers) + 1 or write.divisors or write.conditions or len(write.summed) != 1:
        raise Stop(Declined("a loop over chunks does not write the products of keys and values to its state"))
    for own in permutations(between.summed, len(dot)):
        if len(own) != len(between.summed):
            break
        named: dict[Expr, Expr] = dict(zip(own, dot))
        here = {a: s.substitute(x, named) for a, x in _at_state(between, at).items()} | {write.summed[0]: column}
        reading = Counter(s.substitute(f, named) for f in readers)
        writing = Counter(s.substitute(f, here) for f in write.factors)
        reading.subtract(Counter(queries))
        writing.subtract(Counter(keys))
        if min((*reading.values(), *writing.values()), default=0) >= 0 and write.summed[0].size == column.size:
            return list(reading.elements()), list(writing.elements())
    raise Stop(Declined("a loop over chunks has other queries, keys or values between chunks than inside of them"))


def _decay(factors: Iterable[Expr], pair: Pair) -> Slopes:
    """The logarithm of a product of decays. Raises Stop."""
    found = []
    for factor in factors:
        log = logarithm(factor)
        if log is None:
            raise Stop(Declined("what passes between chunks is multiplied with what is no decay"))
        found.append(_slopes(log, 1, pair))
    return _added(found)


def _slopes(e: Expr, sign: int, pair: Pair) -> Slopes:
    """An exponent as multiples of numbers of positions."""
    found: Slopes = {}
    for way, term, conditions in terms_of(e, sign):
        if conditions:
            raise Stop(Declined("a decay holds for some positions only"))
        count: Positions = {(): float(way)}
        rest: list[Expr] = []
        stack = [term]
        while stack:
            f = stack.pop()
            if isinstance(f, Call) and f.is_float and f.op == "mul":
                stack.extend(f.args)
            elif isinstance(f, Call) and f.is_float and f.op == "neg":
                count = {mono: -c for mono, c in count.items()}
                stack.append(f.args[0])
            elif isinstance(f, Const) or f.is_int:
                poly = {(): float(f.value)} if isinstance(f, Const) else {m: float(c) for m, c in to_poly(f).items()}
                if len(count) > 1 and len(poly) > 1:
                    raise Stop(Declined("a decay is not linear in the distance of query and key"))
                count = {(*m, *n): c * d for m, c in count.items() for n, d in poly.items()}
            else:
                rest.append(f)
        if any(f.axes & set(pair) for f in rest):
            raise Stop(Declined("the decays of a loop over chunks depend on the data"))
        found = _added([found, {tuple(sorted(rest, key=repr)): count}])
    return found


def _added(parts: Iterable[Slopes]) -> Slopes:
    total: Slopes = {}
    for part in parts:
        for tag, counts in part.items():
            mine = total.setdefault(tag, {})
            for mono, c in counts.items():
                mine[mono] = mine.get(mono, 0.0) + c
    return total


def _agree(found: Slopes, slopes: Slopes, pair: Pair, positions: Positions) -> None:
    """Whether a decay is the one inside of chunks, over so many `positions`."""
    for tag in found.keys() | slopes.keys():
        slope = slopes.get(tag, {}).get((pair[0],), 0.0)
        wanted = {mono: slope * c for mono, c in positions.items()}
        have = found.get(tag, {})
        for mono in wanted.keys() | have.keys():
            if not math.isclose(wanted.get(mono, 0.0), have.get(mono, 0.0), rel_tol=1e-12, abs_tol=1e-12):
                raise Stop(Declined("a loop over chunks decays otherwise between chunks than inside of them"))


def _everywhere(
    product: Product, queries: tuple[Expr, ...], keys: tuple[Expr, ...], pair: Pair, at: Chunks
) -> Product:
    """The product inside of a chunk, as that over all positions."""
    axes = {"query": (at.query, at.row), "key": (at.key, pair[1])}
    of: dict[str, dict[Expr, Expr]] = {
        name: {at.step: s.floordiv(whole, at.size), part: s.mod(whole, at.size)} for name, (whole, part) in axes.items()
    }
    factors = [s.substitute(f, of["query"]) for f in queries] + [s.substitute(f, of["key"]) for f in keys]
    if any(at.step in f.axes and at.row not in f.axes for f in queries):
        raise Stop(Declined("a factor of a loop over chunks depends on the chunk alone"))
    if any(at.step in f.axes and pair[1] not in f.axes for f in keys):
        raise Stop(Declined("a factor of a loop over chunks depends on the chunk alone"))
    summed = tuple(at.key if a == pair[1] else a for a in product.summed)
    return Product(summed, tuple(factors), (), (), (s.le(at.key, at.query),))


