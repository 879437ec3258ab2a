"""The delta rule in chunks: what a chunk writes is the solution of a triangular system, with the state before the chunk
on its right side,

    (1 + L) u = x - y S        u[i] = x[i] - y[i] S - sum over j < i of L[i,j] u[j]

solved for x and for y once, and put together as u = own - seen S in each step. Then x - u is an attention in two parts
with u as values (`refocus.patterns.chunked_form`), like the results; it is the delta rule where its queries are the
keys, times what is erased, and x are values times the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from itertools import permutations

from torch import fx

from refocus import simplify as s
from refocus.facts import Facts
from refocus.ir import Axis, Const, Expr, Load, Reduce
from refocus.lift import Index, arguments, is_tensor, op_name
from refocus.loop_steps import BEFORE, ApartStep, Rolled, as_one, step_axis
from refocus.loops import Loop
from refocus.patterns.chunked_form import Cut, over_all
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Product, as_number, product_of, terms_of
from refocus.sizes import shape_of

SOLUTION = "solution of a step"


@dataclass(frozen=True)
class Solved:
    """What each step solved for: `nodes` are u, one a step, over `axes`, of which the one numbered `row` are the rows
    of the system. `own` and `seen` are the solutions that u is put together from, `state` what is read of the state,
    all as functions of these axes and the step; `width` is summed over."""

    nodes: tuple[fx.Node, ...]
    axes: Index
    row: int
    own: Load
    seen: Load
    state: Load
    width: Axis
    system: fx.Node
    rights: tuple[fx.Node, fx.Node]  # x and y


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

    def value(t: int) -> Expr:
        held: dict[fx.Node, tuple[str, Index]] = {loop.states[0][t]: (BEFORE.format(0), ())}
        return ApartStep(facts, interior=loop.body, held=held, firsts=loop.firsts, data=data).at(nodes[t], axes)

    if _taken_apart(value(loop.steps - 1)) is None:
        return None
    found = _taken_apart(as_one([value(t) for t in range(loop.steps)], step_axis(loop)))
    if found is None:
        return None
    own, seen, state, width = found
    row = next((k for k, a in enumerate(axes) if a == own.index[-2]), None)
    solves = facts.nodes[own.tensor], facts.nodes[seen.tensor]
    systems = {_system(node) for node in solves}
    system = next(iter(systems))
    if row is None or system is None or len(systems) > 1:
        return None
    if own.index[:-1] != seen.index[:-1] or seen.index[-1] != width or axes[row] in state.axes:
        return None
    rights = arguments(solves[0])[1], arguments(solves[1])[1]
    return Solved(nodes, axes, row, own, seen, state, width, system, rights)


def _taken_apart(value: Expr) -> tuple[Load, Load, Load, Axis] | None:
    """own, seen, state and the summed axis of own - sum of seen * state."""
    terms = list(terms_of(value, 1))
    if len(terms) != 2 or any(conditions for _, _, conditions in terms):
        return None
    plain = [(sign, product_of(term)) for sign, term, _ in terms]
    plain.sort(key=lambda x: len(x[1].summed))
    (one, own), (other, read) = plain
    loads = [f for f in read.factors if isinstance(f, Load)]
    sign = other
    for f in read.factors:
        if isinstance(f, Const) and abs(f.value) == 1:
            sign *= int(f.value)
        elif f not in loads:
            return None
    if own.summed or len(own.factors) != 1 or not isinstance(own.factors[0], Load) or (one, sign) != (1, -1):
        return None
    states = [x for x in loads if x.tensor == BEFORE.format(0)]
    if len(read.summed) != 1 or len(loads) != 2 or len(states) != 1:
        return None
    if any(p.divisors or p.exponents or p.conditions for p in (own, read)):
        return None
    (seen,) = (x for x in loads if x not in states)
    return own.factors[0], seen, states[0], read.summed[0]


def _system(node: fx.Node) -> fx.Node | None:
    """The matrix of a lower triangular system with ones on its diagonal that a node solves."""
    if op_name(node) != "linalg_solve_triangular" or dict(node.kwargs) != {"upper": False, "unitriangular": True}:
        return None
    system, right = arguments(node)[:2]
    same = shape_of(system)[:-2] == shape_of(right)[:-2] == shape_of(node)[:-2]
    return system if same and len(arguments(node)) == 2 else None


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
        theirs = _Sides.of(product, at)
        if not weight.strict:
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
                return self._written(found, mine, erase, here)
        raise _other_rule()

    def _lookup(self, here: dict[Expr, Expr], axes: Index) -> Expr:
        """x - u at a row: y S + L u."""
        solved, row = self.solved, self.at.row
        column = Axis("column", row.size)
        index = tuple(s.substitute(x, here) for x in solved.own.index[:-2])
        seen = self.lifter.at(solved.rights[1], (*index, row, solved.width))
        state = s.substitute(solved.state, here)
        dtype = state.dtype
        before = Reduce("sum", solved.width, s.call("mul", seen, state, dtype=dtype), dtype)
        earlier = tuple(column if k == solved.row else x for k, x in enumerate(axes))
        u = Load(SOLUTION, (self.at.chunk, *earlier), dtype)
        system = self.lifter.at(solved.system, (*index, row, column))
        inside = s.where(s.lt(column, row), s.call("mul", system, u, dtype=dtype), Const(0.0, dtype))
        return s.call("add", before, Reduce("sum", column, inside, dtype), dtype=dtype)

    def _written(self, found: Rolled, mine: _Sides, erase: Counter[Expr], here: dict[Expr, Expr]) -> Rolled:
        """The values are what x has besides what is erased."""
        at, solved = self.at, self.solved
        right = product_of(self.lifter.at(solved.rights[0], tuple(s.substitute(x, here) for x in solved.own.index)))
        of_key: dict[Expr, Expr] = dict(zip((at.chunk, at.row), at.split(at.key)))
        factors = [s.substitute(x, of_key) for x in (*right.factors, *map(as_number, right.conditions))]
        values = Counter(factors)
        if right.summed or right.divisors or right.exponents or erase - values:
            raise _other_rule()
        values -= erase
        rate: Expr = Const(1.0, solved.own.dtype)
        for x in erase.elements():
            rate = s.call("mul", rate, x, dtype=solved.own.dtype)
        product = replace(
            found.product,
            factors=(*(f for f in found.product.factors if f not in mine.solutions), *values.elements()),
            exponents=(*found.product.exponents, (1, rate)),
        )
        return replace(found, product=product, erase=rate, keys=mine.keys)


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
