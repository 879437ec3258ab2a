"""Loops over chunks of positions: pairs inside of a chunk, a state between chunks.

The state before a chunk is a sum over all chunks before it, as of any recurrence; with that, what a step gives out is
an attention in two parts (`refocus.patterns.chunked_form`). For the delta rule, see `refocus.chunk_solutions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from torch import fx

from refocus import simplify as s
from refocus.chunk_solutions import SOLUTION, Delta, Solved, solved_by
from refocus.facts import Facts
from refocus.held_values import HeldValues
from refocus.ir import Axis, Call, Const, Expr, Load, Reduce, rewrite
from refocus.lift import Index
from refocus.loop_steps import (
    BEFORE,
    STATE,
    ApartStep,
    Ends,
    Rolled,
    Steps,
    ends_of,
    from_before,
    lifted,
    own_axes,
    step_axis,
)
from refocus.loops import Loop
from refocus.patterns.chunked_form import Cut, Joined, normalised
from refocus.patterns.declined import Declined, Near, Stop
from refocus.patterns.linear import terms_of
from refocus.patterns.recurrence import Update, closed_form, read_update
from refocus.patterns.summands import cut_apart
from refocus.sizes import shape_of


def in_chunks(loop: Loop, facts: Facts, data: Set[fx.Node]) -> Rolled:
    """Raises Stop with the reason where a loop is none over chunks."""
    if loop.backwards:
        raise Stop(Declined("a loop over chunks runs from the last to the first"))
    solved = solved_by(loop, facts, data) if len(loop.states) == 1 and not loop.from_nothing else None
    form = _Form(loop, facts, data, solved)
    steps = form.steps()
    places = _places(steps, own_axes(loop))
    updates = [
        read_update(_at(update, own, place), BEFORE.format(n), place, form.step, _log)
        for n, (update, own, place) in enumerate(zip(steps.updates, own_axes(loop), places))
    ]
    if any(update.erase is not None for update in updates):
        raise Stop(Declined("what a loop takes from its state is not what the delta rule does"))
    first: Stop | None = None
    for row in form.rows():
        try:
            return form.whole(steps, updates, places, row)
        except Stop as stop:
            first = stop if first is None or (isinstance(stop, Near) and not isinstance(first, Near)) else first
    raise first or Stop(Declined("a loop's results are no products of queries with its state"))


def _holds_state(e: Expr) -> bool:
    return any(isinstance(n, Load) and n.tensor.startswith(STATE) for n in e.walk())


def _places(steps: Steps, own: Sequence[Index]) -> list[Index]:
    """Where each state is read by the next step: all over its own axes, or at one place of some of them. A running sum
    that a chunk ends with is read at its last row alone."""
    found = []
    for n, axes in enumerate(own):
        reads = [x.index for e in (steps.out, *steps.updates) for x in e.loads if x.tensor == BEFORE.format(n)]
        at = [{index[k] for index in reads} for k in range(len(axes))]
        found.append(tuple(next(iter(x)) if _one_place(x) else a for a, x in zip(axes, at)))
    return found


def _one_place(entries: Set[Expr]) -> bool:
    return len(entries) == 1 and not any(x.axes for x in entries)


def _at(value: Expr, own: Index, place: Index) -> Expr:
    return s.substitute(value, {a: x for a, x in zip(own, place) if isinstance(a, Axis)})


def _log(decay: Expr) -> Expr | None:
    return decay.args[0] if isinstance(decay, Call) and decay.op == "exp" else None


@dataclass(frozen=True)
class _Form:
    loop: Loop
    facts: Facts
    data: Set[fx.Node]
    solved: Solved | None

    @property
    def dims(self) -> tuple[Axis | None, ...]:
        return tuple(
            None if d == Const(1) else Axis(f"o{k}", d) for k, d in enumerate(shape_of(self.loop.gather))
        )  # fmt: skip

    @property
    def step(self) -> Axis:
        return step_axis(self.loop)

    @property
    def part(self) -> tuple[Axis | None, ...]:
        """The axes of what a step gives out."""
        if self.loop.stacked:
            return (*self.dims[: self.loop.dim], *self.dims[self.loop.dim + 1 :])
        rows = Axis("row", shape_of(self.loop.parts[0])[self.loop.dim])
        return tuple(rows if k == self.loop.dim else a for k, a in enumerate(self.dims))

    def steps(self) -> Steps:
        held: list[Mapping[fx.Node, tuple[str, Index]]] = []
        if self.solved is not None:
            held = [{node: (SOLUTION, (Const(t),))} for t, node in enumerate(self.solved.nodes)]
        index = tuple(Const(0) if a is None else a for a in self.part)
        steps = lifted(self.loop, self.facts, self.data, index, self.step, ApartStep, held)
        updates = tuple(cut_apart(x, _holds_state) for x in steps.updates)
        out = from_before(cut_apart(steps.out, _holds_state), updates, own_axes(self.loop))
        return replace(steps, out=out, updates=updates)

    def rows(self) -> Iterator[Axis]:
        """What may be the positions inside of a chunk."""
        if not self.loop.stacked:
            row = self.part[self.loop.dim]
            yield from () if row is None else (row,)
            return
        yield from (a for a in self.part if a is not None)

    def whole(self, steps: Steps, updates: Sequence[Update], places: Sequence[Index], row: Axis) -> Rolled:
        """The loop as one function, if `row` are the positions inside of a chunk."""
        stacked = self.loop.stacked
        length = s.mul(self.step.size, row.size) if stacked else shape_of(self.loop.gather)[self.loop.dim]
        query = Axis("position" if stacked else f"o{self.loop.dim}", length)
        at = Cut(self.step, row, query, Axis(f"{self.loop.gather.name}.key", length))
        earlier = Axis("earlier", self.step.size)

        def state(node: Expr) -> Expr | None:
            if isinstance(node, Load) and node.tensor in before:
                n = before[node.tensor]
                return closed_form(updates[n], places[n], node.index, self.step, earlier, s.lt)
            return None

        before = {BEFORE.format(n): n for n in range(len(updates))}
        value = rewrite(steps.out, state, s.rebuild)
        values = HeldValues(self.facts)
        joined = normalised(value, at, values)
        product = joined.product
        ends = self._ends(steps, joined, at, values)
        values.assume()
        # A shorter chunk may sum up fewer keys, whose weights are zero in a whole one; anything else is another sum.
        left = [*product.summed, *(n.axis for f in product.factors for n in f.walk() if isinstance(n, Reduce))]
        if any(a.name in steps.shortened for a in left):
            raise Stop(Declined("the last step of a loop is not the same function of what it reads"))
        place = s.add(s.mul(self.step, row.size), row) if stacked else query
        found = Rolled(product, joined.weight, self.dims, query, at.key, place, steps.visited, rows=row.size, ends=ends)
        if self.solved is None:
            return found
        lifter = ApartStep(
            self.facts, interior=self.loop.body | {self.solved.system.matrix}, firsts=self.loop.firsts, data=self.data
        )
        return Delta(self.solved, lifter, lambda e: rewrite(e, state, s.rebuild), at).of(found, steps.out)

    def _ends(self, steps: Steps, joined: Joined, at: Cut, values: HeldValues) -> Ends | None:
        """What the loop starts from and ends with: states at the ends of chunks, which must be read as such."""
        ends = ends_of(self.loop, self.facts, steps.out, None)
        if ends is None:
            return None
        terms = [term for _, term, _ in terms_of(steps.out, 1) if any(x.tensor == BEFORE.format(0) for x in term.loads)]
        written = joined.written(terms[0], at) if len(terms) == 1 and joined.reads(terms[0], at, values) else None
        if written is None:
            raise Stop(Declined("a loop over chunks does not read its state as it is at the end of a chunk"))
        names = joined.names
        initial = None if ends.initial is None else s.substitute(ends.initial, names)
        index = tuple(s.substitute(x, names) for x in ends.index)
        return replace(ends, initial=initial, index=index, written=written)
