"""Loops that change their state several times in a step: as many steps of a loop that changes it once.

    for t in range(steps):                                       DeltaProduct: a product of reflections for each token
        for n in range(2):
            state = state + outer(k[t, n], b[t, n] * (v[t, n] - k[t, n] @ state))
        rows.append(q[t] @ state)

Between two changes there is one value that all of the state goes through: a dominator. Each change is read by itself,
and position t * 2 + n has what number n of step t has. Results are those at the last position of each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.decays import log_of
from refocus.facts import Facts
from refocus.ir import Axis, Const, Expr, Load, Reduce, rewrite
from refocus.lift import Index, is_tensor
from refocus.loop_steps import AFTER, BEFORE, Rolled, Step, as_one, ends_of, lifted, own_axes
from refocus.loops import Loop
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Product, Weight, product_of
from refocus.patterns.recurrence import Lookup, Update, read_update
from refocus.sizes import same_shape, shape_of

_MOST = 8  # changes in a step


def in_substeps(loop: Loop, facts: Facts, data: Set[fx.Node]) -> Rolled:
    """Raises Stop with the reason where a loop is none of these."""
    if len(loop.states) > 1 or loop.tail is not None or loop.from_nothing:
        raise Stop(Declined("a loop with several changes of its state in a step has several states"))
    step, own = Axis("step", Const(loop.steps)), own_axes(loop)[0]
    changes = _Changes(loop, facts, data, step, own).all()
    dims = tuple(None if d == Const(1) else Axis(f"o{k}", d) for k, d in enumerate(shape_of(loop.gather)))
    index = tuple(Const(0) if a is None else a for a in dims)
    part = (*index[: loop.dim], *(() if loop.stacked else (Const(0),)), *index[loop.dim + 1 :])
    steps = lifted(loop, facts, data, part, step, Step)
    fine = Axis("position", Const(loop.steps * len(changes)))
    key = Axis(f"{loop.gather.name}.key", fine.size)
    whole = _Joined(tuple(changes), step, key).update()
    reads = [x for x in steps.out.loads if x.tensor in (AFTER.format(0), BEFORE.format(0))]
    if len({*reads}) != 1 or reads[0].tensor != AFTER.format(0):
        raise Stop(Declined("a loop with the delta rule reads its state more than once"))
    here: dict[Expr, Expr] = {a: x for a, x in zip(own, reads[0].index) if isinstance(a, Axis)}
    there = _moved(whole, here)

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Load) and node.tensor == AFTER.format(0):
            kept = s.where(s.le(key, fine), there.write, Const(0.0, there.write.dtype))
            return Reduce("sum", key, kept, there.write.dtype)
        return None

    out = s.substitute(rewrite(steps.out, visit, s.rebuild), {step: s.floordiv(fine, len(changes))})
    ends = ends_of(loop, facts, steps.out, None)
    if ends is not None:
        ends = replace(ends, written=product_of(there.write).factors)
    query = s.sub(loop.steps - 1, index[loop.dim]) if loop.backwards else index[loop.dim]
    place = s.add(s.mul(query, len(changes)), len(changes) - 1)
    weight = Weight(True, False, there.gates[0] if there.gates else None)
    return Rolled(
        product_of(out), weight, dims, fine, key, place, steps.visited, there.erase, there.keys, there.lookup, ends=ends
    )


def _moved(update: Update, here: dict[Expr, Expr]) -> Update:
    assert update.erase is not None
    return replace(
        update,
        gates=tuple(s.substitute(x, here) for x in update.gates),
        write=s.substitute(update.write, here),
        erase=s.substitute(update.erase, here),
        keys=tuple(s.substitute(x, here) for x in update.keys),
        lookup=None if update.lookup is None else update.lookup.at(here),
    )


@dataclass(frozen=True)
class _Changes:
    """The changes of a step, told apart by what the whole state goes through."""

    loop: Loop
    facts: Facts
    data: Set[fx.Node]
    step: Axis
    own: Index

    def all(self) -> list[Update]:
        between = self._between()
        found: list[Update] = []
        at = 0
        while at < len(between) - 1:
            if len(found) == _MOST:
                raise _other()
            # The most that is one change: a decay comes before what is written, in the same.
            for to in range(len(between) - 1, at, -1):
                update = self._read(between[at], between[to])
                if update is not None:
                    found.append(update)
                    at = to
                    break
            else:
                raise _other()
        if len(found) < 2:
            raise _other()
        return found

    def _between(self) -> list[tuple[fx.Node, ...]]:
        """Values that a state goes through from one step to the next, itself and the next included, each by step."""
        states = self.loop.states[0]
        if len(states) <= self.loop.steps:
            raise _other()
        start, end = states[self.loop.steps - 1], states[self.loop.steps]
        way = nx.descendants(self.facts.flow, start) & (nx.ancestors(self.facts.flow, end) | {end}) | {start}
        above = nx.immediate_dominators(self.facts.flow.subgraph(way), start)
        chain = [end]
        while chain[-1] is not start:
            chain.append(above[chain[-1]])
        found = [tuple(states[: self.loop.steps])]
        for node in reversed(chain[1:-1]):
            first = self.loop.firsts.get(node)
            each = [n for n in self.loop.body if self.loop.firsts.get(n) is first]
            each.sort(key=self.facts.order.__getitem__)
            alike = is_tensor(node) and same_shape(node.meta["val"], end.meta["val"])
            if alike and len(each) == self.loop.steps:
                found.append(tuple(each))
        return [*found, tuple(states[1 : self.loop.steps + 1])]

    def _read(self, before: Sequence[fx.Node], after: Sequence[fx.Node]) -> Update | None:
        values = []
        for start, end in zip(before, after):
            held: dict[fx.Node, tuple[str, Index]] = {start: (BEFORE.format(0), ())}
            lifter = Step(
                self.facts, interior=self.loop.body, held=held, firsts=self.loop.firsts, data=self.data
            )  # fmt: skip
            values.append(lifter.at(end, self.own))
        try:
            value = as_one(values, self.step)
            update = read_update(value, BEFORE.format(0), self.own, self.step, lambda x: log_of(x, self.facts))
        except Stop:
            return None
        # A decay that is the same in all steps is none in the other changes of a step: it is a gate of its position.
        logs = [log_of(base, self.facts) for base in update.bases]
        known = tuple(x for x in logs if x is not None)
        return replace(update, gates=(*update.gates, *known), bases=()) if len(known) == len(logs) else update


@dataclass(frozen=True)
class _Joined:
    """Changes as one, of which there are several in each step: what number n of step t has, at key t * n + n."""

    changes: tuple[Update, ...]
    step: Axis
    key: Axis

    def update(self) -> Update:
        kinds = {(u.erase is not None, u.lookup is None or u.lookup.over) for u in self.changes}
        if len(kinds) > 1 or any(u.bases or u.erase is None for u in self.changes):
            raise Stop(Declined("the changes of a step are not all of one kind"))
        first = self.changes[0]
        gates = () if not any(u.gates for u in self.changes) else (self._chosen(_total),)
        erase = self._chosen(lambda u: u.erase)
        if first.lookup is None:
            keys = self._chosen(lambda u: _times(u.keys))
            write = s.call("mul", keys, self._chosen(lambda u: _times(_without(u, u.keys))), dtype=keys.dtype)
            return Update(gates, (), write, erase, (keys,))
        over = first.lookup.over
        written = [_sides(u, over) for u in self.changes]
        keys, values = (self._picked([_times(x[side]) for x in written]) for side in (0, 1))
        write = s.call("mul", keys, values, dtype=keys.dtype)
        looked_up = self._picked([u.lookup.key for u in self.changes if u.lookup is not None])
        return Update(gates, (), write, erase, (), Lookup(looked_up, over))

    def _chosen(self, part: Callable[[Update], Expr | None]) -> Expr:
        found = [part(u) for u in self.changes]
        known = [x for x in found if x is not None]
        assert len(known) == len(found)
        return self._picked(known)

    def _picked(self, values: Sequence[Expr]) -> Expr:
        """One of the values at each key, of the step that it belongs to."""
        count = len(values)
        at: dict[Expr, Expr] = {self.step: s.floordiv(self.key, count)}
        here = [s.substitute(x, at) for x in values]
        value = here[-1]
        for n in reversed(range(count - 1)):
            value = s.where(s.eq(s.mod(self.key, count), n), here[n], value)
        return value


def _total(update: Update) -> Expr:
    value: Expr = Const(0.0, update.write.dtype)
    for gate in update.gates:
        value = s.call("add", value, gate, dtype=gate.dtype)
    return value


def _without(update: Update, keys: Sequence[Expr]) -> list[Expr]:
    """The factors of what is written besides the keys'."""
    factors = list(_plain(product_of(update.write)).factors)
    for key in keys:
        factors.remove(key)
    return factors


def _sides(update: Update, over: tuple[Expr, ...]) -> tuple[list[Expr], list[Expr]]:
    """The factors of what is written that belong to keys, and to values."""
    factors = _plain(product_of(update.write)).factors
    keys = [f for f in factors if f.axes & {*over}]
    return keys, [f for f in factors if f not in keys]


def _plain(product: Product) -> Product:
    if product.summed or product.divisors or product.exponents or product.conditions:
        raise _other()
    return product


def _times(factors: Sequence[Expr]) -> Expr:
    value: Expr = Const(1.0, "float32")
    for factor in factors:
        value = s.call("mul", value, factor, dtype=factor.dtype if factor.is_float else "float32")
    return value


def _other() -> Stop:
    return Stop(Declined("a step of a loop changes its state by more than a decay and one key that is looked up"))
