"""The delta rule in chunks: what a chunk writes is the solution of a triangular system, with the state before the chunk
on its right side,

    (1 + L) u = x - y S        u[i] = x[i] - y[i] S - sum over j < i of L[i,j] u[j]

solved for x and for y once, and put together as u = own - seen S in each step. Then x - u is an attention in two parts
with u as values (`refocus.patterns.chunked_form`), like the results; it is the delta rule where its queries are the
keys, times what is erased, and x are values times the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from itertools import permutations

from torch import fx

from refocus import simplify as s
from refocus.facts import Facts
from refocus.inverses import System, Systems, inverted_system, solved_system
from refocus.ir import Axis, Const, Expr, Load, Reduce
from refocus.lift import Index, is_tensor, op_name
from refocus.loop_steps import BEFORE, ApartStep, Rolled, as_one, step_axis
from refocus.loops import Loop, depends
from refocus.patterns.chunked_form import Cut, over_all
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Product, as_number, product_of, terms_of
from refocus.progressions import one_function
from refocus.sizes import shape_of

SOLUTION = "solution of a step"
_INSIDE = "{} of a step"


@dataclass(frozen=True)
class Solution:
    """(1 + L)^-1 times a right side: `index` are the batch of the `system` and the row; `right` is the right side at
    this row."""

    system: System | Systems
    index: Index
    right: Expr


@dataclass(frozen=True)
class Solved:
    """What each step solved for: `nodes` are u, one a step, over `axes`, of which the one numbered `row` are the rows
    of the system. `own` and `seen` are the solutions that u is put together from, `state` what is read of the state,
    all as functions of these axes and the step; `width` is summed over."""

    nodes: tuple[fx.Node, ...]
    axes: Index
    row: int
    own: Solution
    seen: Solution
    state: Load
    width: Axis

    @property
    def system(self) -> System | Systems:
        return self.own.system


def solved_by(loop: Loop, facts: Facts, data: Set[fx.Node]) -> Solved | None:
    """The first value of each step that is a solution like this; None where there is none."""
    last = loop.states[0][loop.steps - 1]
    for node in sorted(loop.body, key=facts.order.__getitem__):
        if not is_tensor(node) or (last not in node.all_input_nodes and op_name(node) not in ("sub", "add")):
            continue
        first = loop.firsts.get(node)
        nodes = [n for n in loop.body if loop.firsts.get(n) is first]
        nodes.sort(key=facts.order.__getitem__)
        if node is not nodes[-1] or len(nodes) != loop.steps:
            continue
        found = _as_solution(tuple(nodes), loop, facts, data)
        if found is not None:
            return found
    return None


def _as_solution(nodes: tuple[fx.Node, ...], loop: Loop, facts: Facts, data: Set[fx.Node]) -> Solved | None:
    axes = tuple(Const(0) if d == Const(1) else Axis(f"u{k}", d) for k, d in enumerate(shape_of(nodes[0])))

    def lifter(**held: tuple[str, Index]) -> ApartStep:
        given = {facts.nodes[name]: x for name, x in held.items()}
        return ApartStep(facts, interior=loop.body, held=given, firsts=loop.firsts, data=data)

    inside = _solved_inside(loop, facts)

    def value(t: int) -> Expr:
        held: dict[str, tuple[str, Index]] = {of_step[t].name: (name, (Const(t),)) for name, of_step in inside.items()}
        return lifter(**held, **{loop.states[0][t].name: (BEFORE.format(0), ())}).at(nodes[t], axes)

    reader = _Reader(lifter(), facts, inside, step_axis(loop))
    if reader.taken_apart(value(loop.steps - 1)) is None:
        return None
    found = reader.taken_apart(as_one([value(t) for t in range(loop.steps)], step_axis(loop)))
    if found is None:
        return None
    own, seen, state, width = found
    row = next((k for k, a in enumerate(axes) if a == own.index[-1]), None)
    same = own.system.among(facts) == seen.system.among(facts) and own.index == seen.index
    if row is None or not same or axes[row] in state.axes:
        return None
    return Solved(nodes, axes, row, own, seen, state, width)


def _solved_inside(loop: Loop, facts: Facts) -> dict[str, tuple[fx.Node, ...]]:
    """Solutions and inverses that each step computes for itself, without its state: by step, under a name for all."""
    found: dict[str, tuple[fx.Node, ...]] = {}
    of_state = depends(loop, facts)
    for node in loop.body - of_state:
        first = loop.firsts.get(node)
        if first is None or _INSIDE.format(first.name) in found:
            continue
        if solved_system(node) is not None or inverted_system(node, facts) is not None:
            each = sorted((n for n in loop.body if loop.firsts.get(n) is first), key=facts.order.__getitem__)
            if len(each) == loop.steps:
                found[_INSIDE.format(first.name)] = tuple(each)
    return found


@dataclass(frozen=True)
class _Reader:
    """Reads values as sums of solutions. `inside`: those that are computed in each step, one node for each."""

    lifter: ApartStep
    facts: Facts
    inside: dict[str, tuple[fx.Node, ...]]
    step: Axis

    def taken_apart(self, value: Expr) -> tuple[Solution, Solution, Load, Axis] | None:
        """own, seen, state and the summed axis of own - sum of seen * state."""
        terms = list(terms_of(value, 1))
        if len(terms) != 2 or any(conditions for _, _, conditions in terms):
            return None
        found: dict[bool, tuple[Solution, list[Load], tuple[Axis, ...]]] = {}
        for sign, term, _ in terms:
            product = product_of(term)
            states = [f for f in product.factors if isinstance(f, Load) and f.tensor == BEFORE.format(0)]
            rest = replace(product, factors=tuple(f for f in product.factors if f not in states))
            read = self._solution(rest)
            if read is None or read[0] != (-sign if states else sign):
                return None
            found[bool(states)] = read[1], states, read[2]
        if len(found) < 2:
            return None
        (own, _, over), (seen, states, width) = found[False], found[True]
        if over or len(width) != 1 or len(states) != 1 or width[0] not in states[0].axes:
            return None
        return own, seen, states[0], width[0]

    def _solution(self, product: Product) -> tuple[int, Solution, tuple[Axis, ...]] | None:
        """A product as sign, solution, and what is summed over besides the columns of an inverse."""
        if product.divisors or product.exponents or product.conditions:
            return None
        sign, factors = 1, list[Expr]()
        for f in product.factors:
            if isinstance(f, Const) and abs(f.value) == 1:
                sign *= int(f.value)
            else:
                factors.append(f)
        for load in factors:
            if not isinstance(load, Load):
                continue
            index = load.index[1:] if load.tensor in self.inside else load.index
            solved = self._solved(load.tensor, index) if len(factors) == 1 else None
            if solved is not None:
                return sign, Solution(solved[0], index[:-1], solved[1]), product.summed
            column = index[-1] if index else None
            if column not in product.summed or any(column in x.axes for x in index[:-1]):
                continue
            system = self._inverted(load.tensor)
            row = index[-2]
            rest = [f for f in factors if f is not load]
            if system is None or not isinstance(row, Axis) or any(row in f.axes for f in rest) or not rest:
                continue
            value = rest[0]
            for f in rest[1:]:
                value = s.call("mul", value, f, dtype=value.dtype)
            assert isinstance(column, Axis)
            right = s.substitute(value, {column: row})
            return sign, Solution(system, index[:-1], right), tuple(a for a in product.summed if a != column)
        return None

    def _solved(self, name: str, index: Index) -> tuple[System | Systems, Expr] | None:
        """The system of a solution, and its right side."""
        if name not in self.inside:
            found = solved_system(self.facts.nodes[name]) if name in self.facts.nodes else None
            return None if found is None else (found[0], self.lifter.at(found[1], index))
        each = [solved_system(n) for n in self.inside[name]]
        known = [x for x in each if x is not None]
        if len(known) < len(each):
            return None
        right = one_function([self.lifter.at(x[1], index) for x in known], self.step)
        return None if right is None else (Systems(tuple(x[0] for x in known), self.step), right)

    def _inverted(self, name: str) -> System | Systems | None:
        """The system that a tensor is the inverse of."""
        if name not in self.inside:
            return inverted_system(self.facts.nodes[name], self.facts) if name in self.facts.nodes else None
        each = [inverted_system(n, self.facts) for n in self.inside[name]]
        known = tuple(x for x in each if x is not None)
        return Systems(known, self.step) if len(known) == len(each) else None


@dataclass(frozen=True)
class Delta:
    """What a loop with the delta rule looks up and writes. `unrolled`: an expression, its states written as sums."""

    solved: Solved
    lifter: ApartStep
    unrolled: Callable[[Expr], Expr]
    at: Cut

    def of(self, found: Rolled, out: Expr) -> Rolled:
        """`found`, which is the attention to what the steps solved for, with values and what is erased instead. `out`:
        what a step gives out. Raises `Stop`."""
        at, mine = self.at, _Sides.of(found.product, self.at)
        reads = {x.index[1:] for x in out.loads if x.tensor == SOLUTION}
        if len(reads) != 1 or found.weight is None or found.weight.strict:
            raise _other_rule()
        axes = tuple(at.row if k == self.solved.row else x for k, x in enumerate(next(iter(reads))))
        here: dict[Expr, Expr] = {a: x for a, x in zip(self.solved.axes, axes) if isinstance(a, Axis)}
        looked_up_all = over_all(self.unrolled(self._lookup(here, axes)), at)
        product, weight = looked_up_all.product, looked_up_all.weight
        numbers = [f.value for f in product.factors if isinstance(f, Const)]  # keys that are scaled, say
        number = math.prod(float(x) for x in numbers)
        product = replace(product, factors=tuple(f for f in product.factors if not isinstance(f, Const)))
        theirs = _Sides.of(product, at)
        if not weight.strict or number == 0:
            raise _other_rule()
        for own in permutations(theirs.dots):
            if [a.size for a in own] != [a.size for a in mine.dots]:
                continue
            names: dict[Expr, Expr] = dict(zip(own, mine.dots))
            keys, looked_up = (
                Counter(s.substitute(x, {**names, at.query: at.key}) for x in side)
                for side in (theirs.keys, theirs.queries)
            )
            gate = None if weight.gate is None else s.substitute(weight.gate, names)
            erase = looked_up - keys
            if keys != Counter(mine.keys) or gate != found.weight.gate or keys - looked_up:
                continue
            if not any(x.axes & set(mine.dots) for x in erase):
                return self._written(found, mine, erase, number, here)
        raise _other_rule()

    def _lookup(self, here: dict[Expr, Expr], axes: Index) -> Expr:
        """x - u at a row: y S + L u."""
        solved, row = self.solved, self.at.row
        column = Axis("column", row.size)
        index = tuple(s.substitute(x, here) for x in solved.own.index[:-1])
        seen = s.substitute(solved.seen.right, here)
        state = s.substitute(solved.state, here)
        dtype = state.dtype
        before = Reduce("sum", solved.width, s.call("mul", seen, state, dtype=dtype), dtype)
        earlier = tuple(column if k == solved.row else x for k, x in enumerate(axes))
        u = Load(SOLUTION, (self.at.chunk, *earlier), dtype)
        system = solved.system.below(self.lifter, (*index, row, column))
        if system is None:
            raise Stop(Declined("what a chunk solves is no triangular system with ones on its diagonal"))
        inside = s.where(s.lt(column, row), s.call("mul", system, u, dtype=dtype), Const(0.0, dtype))
        return s.call("add", before, Reduce("sum", column, inside, dtype), dtype=dtype)

    def _written(
        self, found: Rolled, mine: _Sides, erase: Counter[Expr], number: float, here: dict[Expr, Expr]
    ) -> Rolled:
        """The values are what x has besides what is erased, `erase` times a `number`."""
        at, solved = self.at, self.solved
        right = product_of(s.substitute(solved.own.right, here))
        of_key: dict[Expr, Expr] = dict(zip((at.chunk, at.row), at.split(at.key)))
        factors = [s.substitute(x, of_key) for x in (*right.factors, *map(as_number, right.conditions))]
        values = Counter(factors)
        if right.summed or right.divisors or right.exponents or erase - values:
            raise _other_rule()
        values -= erase
        rate: Expr = Const(number, solved.own.right.dtype)
        if number != 1:
            values[Const(1 / number, rate.dtype)] += 1
        for x in erase.elements():
            rate = s.call("mul", rate, x, dtype=rate.dtype)
        product = replace(
            found.product,
            factors=(*(f for f in found.product.factors if f not in mine.solutions), *values.elements()),
            exponents=(*found.product.exponents, (1, rate)),
        )
        ends = found.ends
        if ends is not None and ends.written is not None:
            written = (*(f for f in ends.written if f not in mine.solutions), *values.elements())
            ends = replace(ends, written=written)
        return replace(found, product=product, erase=rate, keys=mine.keys, ends=ends)


@dataclass(frozen=True)
class _Sides:
    """The factors of an attention to solutions, by the position that they belong to."""

    dots: tuple[Axis, ...]
    queries: tuple[Expr, ...]
    keys: tuple[Expr, ...]
    solutions: tuple[Expr, ...]

    @staticmethod
    def of(product: Product, at: Cut) -> _Sides:
        solutions = tuple(f for f in product.factors if isinstance(f, Load) and f.tensor == SOLUTION)
        keys = tuple(f for f in product.factors if at.key in f.axes and f not in solutions)
        queries = tuple(f for f in product.factors if at.key not in f.axes)
        if len(solutions) != 1 or any(x.tensor == SOLUTION for f in (*keys, *queries) for x in f.loads):
            raise _other_rule()
        return _Sides(tuple(a for a in product.summed if a != at.key), queries, keys, solutions)


def _other_rule() -> Stop:
    return Stop(Declined("what a loop takes from its state is not what the delta rule does"))
