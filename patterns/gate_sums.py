"""Decays of a sequence that is cut into chunks: exponents as sums of gates over its positions.

With G(p) the sum of a gate over all positions up to and with p = chunk * size + row,

    the gates of chunk c from row a to row b          G(c*size + b) - G(c*size + a - 1)
    the gates of the whole chunks from a to b         G(b*size + size - 1) - G(a*size - 1)
    the gate of one position                          G(p) - G(p - 1)

so that two spellings of a decay are one iff they are the same sum of Gs. A gate that is the same everywhere has
G(p) = gate * (p + 1), and is kept as a multiple of positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from refocus import simplify as s
from refocus.ir import Axis, Call, Const, Expr, Reduce
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Signed, product_of, terms_of
from refocus.polynomial import order_key, to_poly

# Where a gate is read: its chunk and its row.
CHUNK, ROW = "gate's chunk", "gate's row"


@dataclass(frozen=True)
class Places:
    """The axes that positions are made of, and the `size` of a chunk. `known`: what holds of them."""

    chunks: frozenset[Axis]
    rows: frozenset[Axis]
    size: Expr
    known: s.Knowledge

    @property
    def axes(self) -> frozenset[Axis]:
        return self.chunks | self.rows

    def position(self, chunk: Expr, row: Expr) -> Expr:
        return s.add(s.mul(chunk, self.size), row)


@dataclass(frozen=True)
class Gate:
    """A gate: `core`, over the axes `CHUNK` and `ROW`, times `rest`. One without a core is the same everywhere."""

    core: Expr | None
    rest: tuple[Expr, ...]


@dataclass
class Sums:
    """A sum of Gs: how often each stands for each position; of a gate without core, the polynomial of positions."""

    counts: dict[tuple[Gate, Expr], float] = field(default_factory=dict)

    def add(self, gate: Gate, position: Expr, count: float) -> None:
        self.counts[gate, position] = self.counts.get((gate, position), 0.0) + count

    def less(self, other: Sums) -> Sums:
        """What is left without `other`; nothing where they agree."""
        counts = {key: (self.counts.get(key, 0.0), other.counts.get(key, 0.0)) for key in (self.counts | other.counts)}
        return Sums(
            {key: a - b for key, (a, b) in counts.items() if not math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)}
        )

    def gates(self) -> list[Gate]:
        return list(dict.fromkeys(gate for (gate, _), count in self.counts.items() if count))


def between(gates: Iterable[tuple[Gate, float]], query: Expr, key: Expr) -> Sums:
    """The sum of gates, each so many times, over all positions after `key`, up to and with `query`."""
    found = Sums()
    for gate, count in gates:
        if gate.core is not None:
            found.add(gate, query, count)
            found.add(gate, key, -count)
        else:
            for mono, coefficient in to_poly(s.sub(query, key)).items():
                found.add(gate, _product(mono), count * coefficient)
    return found


def _product(mono: tuple[Expr, ...]) -> Expr:
    return s.mul(*mono) if mono else Const(1)


def sums_of(exponents: Iterable[Signed], at: Places) -> Sums:
    """Exponents as sums of Gs. Raises `Stop` where they are none."""
    found = Sums()
    for sign, exponent in exponents:
        for way, term, conditions in terms_of(exponent, sign):
            if conditions:
                raise Stop(Declined("a decay holds for some positions only"))
            _add(found, way, term, at)
    return found


def _add(found: Sums, sign: int, term: Expr, at: Places) -> None:
    count = float(sign)
    positions: Expr = Const(1)
    cores: list[Expr] = []
    rest: list[Expr] = []
    stack = [term]
    while stack:
        f = stack.pop()
        if isinstance(f, Const):
            count *= float(f.value)
        elif isinstance(f, Call) and f.is_float and f.op == "mul":
            stack.extend(f.args)
        elif isinstance(f, Call) and f.is_float and f.op == "neg":
            count = -count
            stack.append(f.args[0])
        elif isinstance(f, Call) and f.is_float and f.op == "div" and not f.args[1].axes & at.axes:
            stack.extend((f.args[0], s.call("reciprocal", s.cast(f.args[1], f.dtype), dtype=f.dtype)))
        elif f.is_int:
            positions = s.mul(positions, f)
        elif isinstance(f, Reduce) and (same := _same_each_time(f, at)) is not None:
            positions = s.mul(positions, same[0])
            stack.extend(same[1])
        elif f.axes & at.axes:
            cores.append(f)
        else:
            rest.append(f)
    if not cores:
        gate = Gate(None, tuple(sorted(rest, key=order_key)))
        for mono, coefficient in to_poly(positions).items():
            found.add(gate, _product(mono), count * coefficient)
        return
    if len(cores) > 1 or positions != Const(1):
        raise Stop(Declined("a decay is no multiple of a distance and no difference of summed gates"))
    for way, core, inner, position in _Core(cores[0], at).sums():
        found.add(Gate(core, tuple(sorted((*rest, *inner), key=order_key))), position, count * way)


def _same_each_time(total: Reduce, at: Places) -> tuple[Expr, tuple[Expr, ...]] | None:
    """How many terms a sum has, and their factors, where all terms are equal: the sum of a gate that is the same
    everywhere."""
    product = product_of(total)
    plain = not product.divisors and not product.exponents and total.op == "sum"
    if not plain or any(a in f.axes for f in product.factors for a in product.summed):
        return None
    times: Expr = Const(1)
    conditions = list(product.conditions)
    for step in product.summed:
        mine = [c for c in conditions if step in c.axes]
        conditions = [c for c in conditions if c not in mine]
        low, high = _Core(total, at).bounds(step, mine)
        times = s.mul(times, s.add(s.sub(high, low), 1))
    return None if conditions or times.axes & set(product.summed) else (times, product.factors)


@dataclass(frozen=True)
class _Core:
    """What a decay is made of: a sum of gates, or one gate."""

    value: Expr
    at: Places

    def sums(self) -> Iterator[tuple[float, Expr, tuple[Expr, ...], Expr]]:
        """(count, gate's core, further factors of the gate, position), one for each G."""
        at = self.at
        if not isinstance(self.value, Reduce):
            chunks, rows = self.value.axes & at.chunks, self.value.axes & at.rows
            if len(chunks) != 1 or len(rows) != 1:
                raise self._stop()
            (chunk,), (row,) = chunks, rows
            core = self._core([self.value], chunk, row)[0]
            position = at.position(chunk, row)
            yield 1.0, core, (), position
            yield -1.0, core, (), s.sub(position, 1)
            return
        product = product_of(self.value)
        if product.divisors or product.exponents or self.value.op != "sum":
            raise self._stop()
        mine = at.axes | set(product.summed)
        scale = 1.0
        factors: list[Expr] = []
        rest: list[Expr] = []
        for f in product.factors:
            if isinstance(f, Const):
                scale *= float(f.value)
            else:
                (factors if f.axes & mine else rest).append(f)
        if len(product.summed) == 1:
            (step,) = product.summed
            chunks = frozenset().union(*(f.axes for f in factors)) & at.chunks
            low, high = self.bounds(step, product.conditions)
            if len(chunks) > 1 or step.size != at.size:
                raise self._stop()
            if chunks:
                (chunk,) = chunks
                core, _ = self._core(factors, chunk, step)
                yield scale, core, tuple(rest), at.position(chunk, high)
                yield -scale, core, tuple(rest), at.position(chunk, s.sub(low, 1))
                return
            raise self._stop()
        for chunk, row in (product.summed, product.summed[::-1]) if len(product.summed) == 2 else ():
            if row.size != at.size:
                continue
            of_rows = [c for c in product.conditions if row in c.axes]
            if any(chunk in c.axes for c in of_rows) or self.bounds(row, of_rows) != (Const(0), s.sub(at.size, 1)):
                continue
            low, high = self.bounds(chunk, [c for c in product.conditions if c not in of_rows])
            core, shift = self._core(factors, chunk, row)
            last = s.add(s.sub(high, shift), 1)
            yield scale, core, tuple(rest), s.sub(s.mul(last, at.size), 1)
            yield -scale, core, tuple(rest), s.sub(s.mul(s.sub(low, shift), at.size), 1)
            return
        raise self._stop()

    def _core(self, factors: list[Expr], chunk: Axis, row: Axis) -> tuple[Expr, int]:
        """The product of `factors` at the gate's own chunk and row, and by how much its chunk is counted otherwise
        (where chunks were joined to something before them)."""
        value: Expr = Const(1.0, self.value.dtype)
        for f in sorted(factors, key=order_key):
            value = s.call("mul", value, f, dtype=self.value.dtype)
        mine, line = Axis(CHUNK, chunk.size), Axis(ROW, row.size)
        found = []
        for shift in (0, 1) if chunk not in self.at.chunks else (0,):
            here = s.substitute(value, {chunk: s.add(mine, shift), row: line})
            found.append((sum(1 for _ in here.walk()), shift, here))
        _, shift, core = min(found, key=lambda x: x[:2])
        if shift:
            core = s.substitute(core, {mine: Axis(CHUNK, s.sub(chunk.size, shift))})
        if core.axes & self.at.axes:
            raise self._stop()
        return core, shift

    def bounds(self, step: Axis, conditions: Iterable[Expr]) -> tuple[Expr, Expr]:
        """The first and the last of the steps for which all `conditions` hold, both there wherever it matters."""
        lows: list[Expr] = [Const(0)]
        highs: list[Expr] = [s.sub(step.size, 1)]
        for condition in conditions:
            if not (isinstance(condition, Call) and condition.op == "le" and all(a.is_int for a in condition.args)):
                raise self._stop()
            form = s.sub(condition.args[1], condition.args[0])
            if form == s.add(s.sub(form, step), step) and step not in s.sub(form, step).axes:
                lows.append(s.neg(s.sub(form, step)))
            elif step not in s.add(form, step).axes:
                highs.append(s.add(form, step))
            else:
                raise self._stop()
        known = self.at.known
        low = next((x for x in lows if all(s.is_nonneg(s.sub(x, y), known) for y in lows)), None)
        high = next((x for x in highs if all(s.is_nonneg(s.sub(y, x), known) for y in highs)), None)
        if low is None or high is None or not s.is_nonneg(s.add(s.sub(high, low), 1), known):
            raise self._stop()
        return low, high

    def _stop(self) -> Stop:
        return Stop(Declined("a decay is no sum of the gates between key and query"))
