"""Recurrences that a model spells as a loop: prove all steps one function of t, and write the state as a sum.

    every step     S[t+1] = decay(t) * S[t] + write(t),    out[t] = g(S[t+1], t)         lifted, and compared
    closed form    S[t+1] = sum over j <= t of decay(j+1) .. decay(t) * write(j)
    then           out[t] is a sum over pairs of steps, and read like any other         (refocus.recognize_linear)

With the delta rule, S[t+1] = decay(t) * (S[t] - erase(t) k(t) (k(t)^T S[t])) + erase(t) k(t) v(t)^T, there is no such
sum; what is erased is read apart, and goes with the form of the rest. So is what another key looks up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace

from torch import fx

from refocus import simplify as s
from refocus.decays import log_of
from refocus.facts import Facts
from refocus.ir import Axis, Const, Expr, Load, rewrite
from refocus.lift import Index
from refocus.loop_steps import (
    AFTER,
    BEFORE,
    STATE,
    Ends,
    Rolled,
    Step,
    Steps,
    ends_of,
    lifted,
    own_axes,
    reaches_beyond,
)
from refocus.loops import Loop
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import as_number, blamed, product_of, settled
from refocus.patterns.local_terms import with_local
from refocus.patterns.recurrence import Named, Update, before, closed_form, read_update
from refocus.patterns.summands import terms_that, times
from refocus.recognize_chunk_loops import in_chunks
from refocus.roles import Axes
from refocus.sizes import shape_of
from refocus.substeps import in_substeps

Reading = Callable[[Loop, Facts, Set[fx.Node]], Rolled]


def readings(loop: Loop) -> Iterator[Reading]:
    """What a loop may be, in the order of which is tried. Each raises Stop with the reason where it is none of that."""
    if not loop.stacked and shape_of(loop.parts[0])[loop.dim] != Const(1):
        yield in_chunks
        return
    yield step_by_step
    if loop.stacked:
        yield in_chunks
    if not loop.from_nothing:
        yield in_substeps


def step_by_step(loop: Loop, facts: Facts, data: Set[fx.Node]) -> Rolled:
    gather = loop.gather
    shape = shape_of(gather)
    axes = Axes([[] if d == Const(1) else [Axis(f"o{k}", d)] for k, d in enumerate(shape)])
    outer = Axis(f"o{loop.dim}", shape[loop.dim])
    query = Axis("position", outer.size) if loop.backwards else outer
    step, own = Axis("step", Const(loop.steps)), own_axes(loop)
    steps = _at(axes, loop, facts, data, step)
    while (split := axes.split([steps.out], {*axes.flat()} - {outer})) is not None:  # heads that each step merges
        axes, steps = split, _at(split, loop, facts, data, step)
    # Heads that share a state.
    while (split := axes.split(_state_places(steps.out), {*axes.flat()} - {outer}, "floordiv")) is not None:
        axes, steps = split, _at(split, loop, facts, data, step)
    dims = tuple(a for group in axes.dims for a in group or (None,))
    key, out = Axis(f"{gather.name}.key", query.size), steps.out
    if any(reaches_beyond(update, step, facts) for update in steps.updates):
        raise Stop(Declined("the first step of a loop is not the same function of what it reads"))
    _read_apart(out)
    for n, update in enumerate(steps.updates):
        if any(x.tensor.startswith(STATE) and x.tensor != BEFORE.format(n) for x in update.loads):
            raise Stop(Declined("a state of a loop is changed by another one, as with a momentum"))
    read = [
        read_update(update, BEFORE.format(n), own[n], step, lambda x: log_of(x, facts))
        for n, update in enumerate(steps.updates)
    ]
    erasing = [u for u in read if u.erase is not None]
    if erasing and len(read) > 1:
        raise Stop(Declined("a loop has several states, and the delta rule", several=True))

    late, named = _is_late(out, read), Named()

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Load):
            for n, update in enumerate(read):
                for name, last in ((BEFORE.format(n), s.lt), (AFTER.format(n), s.le)):
                    if node.tensor == name:
                        return closed_form(update, own[n], node.index, step, key, last, late, named)
        return None

    value = s.substitute(rewrite(out, visit, s.rebuild), {step: query})
    there = _at_root(erasing[0], own[0], out, step, key) if erasing else Update((), (), out)
    product, local = with_local(value, (query, key))
    place = s.sub(s.sub(outer.size, 1), outer) if loop.backwards else query
    ends = ends_of(loop, facts, out, None)
    if ends is not None:
        here: dict[Expr, Expr] = {a: x for a, x in zip(own[0], ends.index) if isinstance(a, Axis)}
        ends = _written(ends, read[0], here, step, key, late)
    return Rolled(
        settled(product, (query, key)), None, dims, query, key, place, steps.visited, there.erase, there.keys,
        there.lookup, ends=ends, local=local, late=late, named=named,
    )  # fmt: skip


def _state_places(out: Expr) -> list[Expr]:
    """Where states are read."""
    return [place for x in out.loads if x.tensor.startswith(STATE) for place in x.index]


def _is_late(out: Expr, read: Sequence[Update]) -> bool:
    """Whether states that decay are read as the step before left them, and not as the step makes them."""
    names = {x.tensor for x in out.loads if x.tensor.startswith(STATE)}
    decays = any((u.gates or u.bases) and u.erase is None for u in read)
    return decays and names <= {BEFORE.format(n) for n in range(len(read))}


def _written(ends: Ends, update: Update, here: dict[Expr, Expr], step: Axis, key: Axis, late: bool) -> Ends:
    """The ends of a loop, with what it writes to its state."""
    if not late:
        return replace(ends, written=product_of(s.substitute(update.write, {**here, step: key})).factors)
    first = as_number(s.le(Const(1), key))
    factors = product_of(s.substitute(update.write, {**here, step: before(key)})).factors
    end: dict[Expr, Expr] = {**here, step: s.sub(step.size, 1)}
    decays = [s.call("exp", gate, dtype=gate.dtype) for gate in update.gates]
    kept = times([s.substitute(x, end) for x in (*decays, *update.bases)], update.write.dtype)
    return replace(ends, written=(*factors, first), last=(kept, s.substitute(update.write, end)))


def _read_apart(out: Expr) -> None:
    """Raises Stop where what reads a state was itself read from one, and is no sum of that any more."""
    for term in terms_that(lambda e: any(x.tensor.startswith(STATE) for x in _loads(e)), out):
        product = product_of(term)
        for factor in product.factors:
            within = [x for x in factor.loads if x.tensor.startswith(STATE)]
            if within and not isinstance(factor, Load) and factor.axes & {*product.summed}:
                raise Stop(Declined("what reads a state of a loop is itself a function of a state", blamed(factor)))


def _loads(e: Expr) -> tuple[Load, ...]:
    return (e,) if isinstance(e, Load) and not e.loads else e.loads


def _at(axes: Axes, loop: Loop, facts: Facts, data: Set[fx.Node], step: Axis) -> Steps:
    index = axes.index()
    part = (*index[: loop.dim], *(() if loop.stacked else (Const(0),)), *index[loop.dim + 1 :])
    return lifted(loop, facts, data, part, step, Step)


def _at_root(update: Update, own: Index, out: Expr, step: Axis, key: Axis) -> Update:
    """What is erased and looked up, over the axes at which the result reads the state."""
    reads = [x for x in out.loads if x.tensor in (BEFORE.format(0), AFTER.format(0))]
    if len(reads) != 1 or update.erase is None:
        raise Stop(Declined("a loop with the delta rule reads its state more than once"))
    here: dict[Expr, Expr] = {a: x for a, x in zip(own, reads[0].index) if isinstance(a, Axis)}
    here[step] = key
    return replace(
        update,
        erase=s.substitute(update.erase, here),
        keys=tuple(s.substitute(x, here) for x in update.keys),
        lookup=None if update.lookup is None else update.lookup.at(here),
    )
