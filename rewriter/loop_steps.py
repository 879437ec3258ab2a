"""The steps of an unrolled loop in index notation, and as one function of the step.

Each step is lifted by itself, and all of them must be one function of their number (`refocus.progressions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from torch import fx

from refocus import simplify as s
from refocus.expand import Expander
from refocus.factored import Factored
from refocus.facts import Facts
from refocus.ir import BOOL, ONE, ZERO, Axis, Call, Const, Expr, Load, Reduce, rewrite
from refocus.lift import Index, Lifter, dtype_of
from refocus.loops import Loop, Row
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Product, Weight
from refocus.patterns.recurrence import Lookup, Named
from refocus.progressions import named_alike, one_function
from refocus.sizes import shape_of

STATE = "state "
BEFORE, AFTER = STATE + "{} before", STATE + "{} after"


class OtherStart(Stop):
    """A loop does not begin with nothing."""


@dataclass
class _OfStep(Expander):
    """Lifts one step of a loop. `held`: what is loaded under a name, at the given first indices (a state; what a step
    solved for). Sums are named after the first step's nodes, so that equal steps are equal expressions."""

    held: dict[fx.Node, tuple[str, Index]] = field(default_factory=dict)
    firsts: dict[fx.Node, fx.Node] = field(default_factory=dict)
    data: Set[fx.Node] = frozenset()

    def at(self, node: fx.Node, index: Sequence[Expr]) -> Expr:  # type: ignore[override]
        if node in self.held:
            name, first = self.held[node]
            return Load(name, (*first, *index), dtype_of(node))
        return super().at(node, index)

    def bound(self, node: fx.Node, which: int, size: object) -> Axis:
        return super().bound(self.firsts.get(node, node), which, size)

    def sums_keys(self, node: fx.Node) -> bool:
        return False

    def constant(self, node: fx.Node, index: Index) -> Expr | None:
        """Of a body, only what the first step makes of a constant start is a constant; other steps are not like it."""
        return None if node in self.interior else super().constant(node, index)


@dataclass
class Step(_OfStep):
    """What does not depend on `data` is followed to its source: decays are, which are often made before the loop."""

    def within(self, node: fx.Node, index: Index) -> bool:
        return node in self.interior or node not in self.data

    def _choose(self, node: fx.Node, index: Index, below: Expr) -> Expr:
        return below if node not in self.data else super()._choose(node, index, below)


@dataclass
class ApartStep(_OfStep, Factored):
    """Products that were made before the loop are taken apart, too."""

    alike: bool = True


@dataclass(frozen=True)
class Ends:
    """The states before the first step and after the last: of what the loop starts with, None for zero, and the node
    that it ends with, where that is read. `index`: a state's dimensions, as axes of the result and of the sums.
    `written`: the factors of what is written to the state, or None where they are known to be the keys' and values'.
    `last`: where the keys are those of the steps before, what is kept and what is added in the last step."""

    initial: Expr | None
    final: fx.Node | None
    index: Index
    written: tuple[Expr, ...] | None
    last: tuple[Expr, Expr] | None = None

    @property
    def dims(self) -> tuple[Axis | None, ...]:
        """The axes of a state's dimensions, of which one may be several (batch and heads)."""
        return tuple(a for x in self.index for a in _digits(x) or (None,))


def _digits(place: Expr) -> tuple[Axis, ...]:
    """The axes that a place counts by, the slowest first."""
    nothing: dict[Expr, Expr] = dict.fromkeys(place.axes, ZERO)
    strides = {a: s.substitute(place, {**nothing, a: ONE}) for a in place.axes}
    return tuple(sorted(place.axes, key=lambda a: -int(x.value) if isinstance(x := strides[a], Const) else 0))


def _counts(place: Expr, size: Expr) -> bool:
    """Whether a place goes over a whole dimension, each of its axes over digits of their own."""
    total: Expr = ZERO
    stride: Expr = ONE
    for axis in reversed(_digits(place)):
        total, stride = s.add(s.mul(axis, stride), total), s.mul(stride, axis.size)
    return place == total and stride == size


@dataclass(frozen=True)
class Rolled:
    """A loop as one function: what it gives out at `query`, as a sum over `key`; the weight of a pair, where it is read
    already. `dims` are those of what it gives out, at the position `place`, over the axes `free` and the query.
    `erase`: what the delta rule takes away at each key, of which `keys` are the factors of what is looked up; or what
    is taken away for what another key, `lookup`, finds. `rows`: how many positions are in a chunk; 1 where there are
    none. `local` is added to the sum over the keys before it is divided. `late`: the keys are those of the steps
    before. `named`: the gates that stand in the product by name. `apart`: rows that are read by themselves, too."""

    product: Product
    weight: Weight | None
    dims: tuple[Axis | None, ...]
    query: Axis
    key: Axis
    place: Expr
    visited: frozenset[fx.Node]
    erase: Expr | None = None
    keys: tuple[Expr, ...] = ()
    lookup: Lookup | None = None
    rows: Expr = ONE
    ends: Ends | None = None
    local: tuple[Expr, ...] = ()
    late: bool = False
    named: Named | None = None
    apart: tuple[Row, ...] = ()

    @property
    def free(self) -> tuple[Axis, ...]:
        """The axes of the result, its positions numbered by `query`."""
        return (self.query, *(a for a in self.dims if a is not None and a not in self.place.axes | {self.query}))


@dataclass(frozen=True)
class Steps:
    """What all steps do: the updates of the states, over `own` axes, and what they give out, as functions of `step`."""

    out: Expr
    updates: tuple[Expr, ...]
    visited: frozenset[fx.Node]
    shortened: frozenset[str] = frozenset()  # the names of axes over which the last step sums up less


def step_axis(loop: Loop) -> Axis:
    """The axis of the steps; where results are stacked, it is one of theirs."""
    return Axis(f"o{loop.dim}" if loop.stacked else "step", Const(loop.steps + (loop.tail is not None)))


def own_axes(loop: Loop) -> list[Index]:
    """Axes for the dimensions of each state."""
    return [
        tuple(Const(0) if d == Const(1) else Axis(f"s{n}.{k}", d) for k, d in enumerate(shape_of(states[0])))
        for n, states in enumerate(loop.states)
    ]


def lifted(
    loop: Loop, facts: Facts, data: Set[fx.Node], part: Index, step: Axis, kind: type[_OfStep],
    held: Sequence[Mapping[fx.Node, tuple[str, Index]]] = (),
) -> Steps:  # fmt: skip
    """The steps as one. `part`: where what they give out is read; `held`: what each step loads besides its states."""
    outs: list[Expr] = []
    updates: list[list[Expr]] = [[] for _ in loop.states]
    visited: set[fx.Node] = set()
    own = own_axes(loop)
    late = int(loop.from_nothing)
    put_together = loop.stacks()
    held = [{**given, **(held[t] if held else {})} for t, given in enumerate(put_together)]
    for t in range(loop.steps):
        mine = held[t]
        before = {states[t - late]: (BEFORE.format(n), ()) for n, states in enumerate(loop.states) if t >= late}
        after = {
            states[t + 1 - late]: (AFTER.format(n), ())
            for n, states in enumerate(loop.states)
            if t + 1 - late < len(states)
        }
        both = kind(facts, interior=loop.body, held={**mine, **before, **after}, firsts=loop.firsts, data=data)
        outs.append(both.at(loop.parts[t], part))
        earlier = kind(facts, interior=loop.body, held={**mine, **before}, firsts=loop.firsts, data=data)
        for n, states in enumerate(loop.states):
            if t + 1 - late < len(states):
                updates[n].append(earlier.at(states[t + 1 - late], own[n]))
        visited |= both.visited | earlier.visited
    out = _with_first(outs, step) if loop.headed else as_one(outs, step)
    if loop.from_nothing:
        whole = tuple(_after_nothing(x, step) for x in updates)
    else:
        numbered = {name: len(first) for name, first in held[0].values()}
        whole = tuple(as_one(x, step) if len(x) > 1 else _counted_on(x[0], out, step, facts, numbered) for x in updates)
    shortened: set[str] = set()
    if loop.tail is not None:
        if any(len(states) <= loop.steps - late for states in loop.states):
            raise Stop(Declined("the last step of a loop is not the same function of what it reads"))
        ready: dict[fx.Node, tuple[str, Index]] = {
            x[loop.steps - late]: (BEFORE.format(n), ()) for n, x in enumerate(loop.states)
        }
        last = kind(facts, interior=loop.body, held=ready, firsts=loop.firsts, data=data)
        size = shape_of(loop.tail)[loop.dim]
        index = tuple(Axis(a.name, size) if k == loop.dim and isinstance(a, Axis) else a for k, a in enumerate(part))
        # Where the mask is causal, a shorter chunk is one whose last rows are not asked for.
        out = from_before(out, whole, own)
        found = s.substitute(out, {step: Const(loop.steps)}), last.at(loop.tail, index)
        wide = shape_of(loop.parts[0])[loop.dim]
        rows = (wide, size) if _no_longer(loop) else (wide, wide)
        if not _shortened(*found, shortened, rows):
            raise Stop(Declined("the last step of a loop is not the same function of what it reads"))
        visited |= last.visited
    return Steps(out, whole, frozenset(visited), frozenset(shortened))


def from_before(out: Expr, updates: Sequence[Expr], own: Sequence[Index]) -> Expr:
    """What a step gives out, as a function of the states before it alone."""
    after = {AFTER.format(n): n for n in range(len(updates))}

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Load) and node.tensor in after:
            n = after[node.tensor]
            return s.substitute(updates[n], {a: x for a, x in zip(own[n], node.index) if isinstance(a, Axis)})
        return None

    return rewrite(out, visit, s.rebuild)


def reaches_beyond(update: Expr, step: Axis, facts: Facts) -> bool:
    """Whether what no step asks for, the update of the last one, would read what is not there."""
    assert isinstance(step.size, Const)
    last: dict[Expr, Expr] = {step: Const(step.size.value - 1)}
    for load in (x for x in update.walk() if isinstance(x, Load) and x.tensor in facts.nodes):
        for place, size in zip(load.index, shape_of(facts.nodes[load.tensor])):
            end = s.substitute(place, last)
            if isinstance(end, Const) and isinstance(size, Const) and not 0 <= end.value < size.value:
                return True
    return False


def _after_nothing(values: list[Expr], step: Axis) -> Expr:
    """The values of all steps as one, of which the first adds to nothing. Raises Stop."""
    first, *others = values
    one = s.substitute(as_one(others, step), {step: s.sub(step, 1)})

    def nothing(node: Expr) -> Expr | None:
        state = isinstance(node, Load) and node.tensor.startswith(STATE) and node.tensor.endswith("before")
        return Const(0.0, node.dtype) if state or _is_decayed_nothing(node) else None

    # What only the first step is made of has no counterpart, and sums of its own; the number 0 may decay, too.
    begun = rewrite(s.substitute(one, {step: Const(0)}), nothing, _but_for_nothing)
    begun, same = named_alike([begun, rewrite(first, nothing, _but_for_nothing)])
    if len(others) < 2 or begun != same:
        raise OtherStart(Declined("a loop starts from a state that is not zero"))
    return one


def _with_first(outs: list[Expr], step: Axis) -> Expr:
    """What all steps give out as one, of which the first has no state to read. Raises Stop."""
    try:
        return _after_nothing(outs, step)
    except OtherStart:
        raise Stop(Declined("the first step of a loop is not the same function of what it reads")) from None


def _counted_on(update: Expr, out: Expr, step: Axis, facts: Facts, numbered: Mapping[str, int]) -> Expr:
    """The only update of a loop of two steps as a function of the step: it is right for the first one, and nobody asks
    for the second. It is taken to go through tensors as what steps give out does, or, where that does not read one, to
    read the first of two parts. `numbered`: what is held for each step, and how many indices say for which."""
    strides: dict[tuple[str, int], Expr] = {}
    for load in out.loads:
        for dim, entry in enumerate(load.index):
            stride = s.sub(s.substitute(entry, {step: Const(1)}), s.substitute(entry, {step: Const(0)}))
            if isinstance(stride, Const) and stride.value:
                strides[load.tensor, dim] = stride

    def visit(node: Expr) -> Expr | None:
        if not isinstance(node, Load):
            return None
        if node.tensor in numbered:
            mine = numbered[node.tensor]
            return Load(node.tensor, (*(step for _ in node.index[:mine]), *node.index[mine:]), node.dtype)
        if node.tensor not in facts.nodes:
            return None
        sizes = shape_of(facts.nodes[node.tensor])
        known = any(tensor == node.tensor for tensor, _ in strides)
        index = [
            s.add(entry, s.mul(step, strides.get((node.tensor, dim), 0) if known else _half(entry, size)))
            for dim, (entry, size) in enumerate(zip(node.index, sizes))
        ]
        return Load(node.tensor, tuple(index), node.dtype)

    return rewrite(update, visit, s.rebuild)


def _half(entry: Expr, size: Expr) -> int:
    """How much of a dimension is read from its beginning, where that is half of it or more, but not all; else 0."""
    low, high = s.bounds(entry)
    if low != 0 or high is None or not isinstance(size, Const):
        return 0
    part = int(high) + 1
    return part if part < int(size.value) <= 2 * part else 0


def _is_decayed_nothing(node: Expr) -> bool:
    """Whether a value is a state that is the number 0, decayed."""
    zeros = (isinstance(x, Const) and x.value == 0 for x in node.children)
    return isinstance(node, Call) and node.op == "mul" and node.is_float and any(zeros)


def _but_for_nothing(node: Expr, children: tuple[Expr, ...]) -> Expr:
    """A value made of others, some of which are nothing: what decays of that is nothing, whatever the decay."""
    empty = [isinstance(x, Const) and x.is_float and x.value == 0 for x in children]
    if any(empty) and isinstance(node, Call) and node.op == "mul":
        return Const(0.0, node.dtype)
    if any(empty) and isinstance(node, Call) and node.op == "add" and len(children) == 2:
        return children[1] if empty[0] else children[0]
    if isinstance(node, Reduce) and node.op == "sum" and empty[-1]:
        return Const(0.0, node.dtype)
    return s.rebuild(node, children)


def _no_longer(loop: Loop) -> bool:
    """Whether the last part has no more rows than the others: if the tracer knows of its size that it is a chunk's, as
    far as it goes, or else sees it in this call, and from then on holds the graph to that."""
    assert loop.tail is not None
    return bool(loop.tail.meta["val"].shape[loop.dim] <= loop.parts[0].meta["val"].shape[loop.dim])


def _shortened(whole: Expr, part: Expr, names: set[str], rows: tuple[Expr, Expr]) -> bool:
    """Whether two values are the same, but for what is summed over being shorter in `part`, and for its names. The
    `names` of such axes are collected. `rows`: a length, and one that is known to be no larger."""
    if isinstance(whole, Reduce) and isinstance(part, Reduce):
        axis = whole.axis
        here = s.substitute(part.body, {part.axis: Axis(axis.name, part.axis.size)})
        if axis.size != part.axis.size:
            names.add(axis.name)
            if (axis.size, part.axis.size) != rows and not s.is_nonneg(s.sub(axis.size, part.axis.size)):
                return False
        return whole.op == part.op and whole.dtype == part.dtype and _shortened(whole.body, here, names, rows)
    sizes: dict[str, Axis] = {a.name: a for a in part.axes}
    if isinstance(whole, Call | Load) and type(whole) is type(part) and not whole.is_int and whole.dtype != BOOL:
        same = [getattr(x, "op", None) or getattr(x, "tensor", None) for x in (whole, part)]
        pairs = list(zip(whole.children, part.children))
        return (
            same[0] == same[1]
            and len(whole.children) == len(part.children)
            and all(_shortened(*x, names, rows) for x in pairs)
        )
    return s.substitute(whole, {a: sizes.get(a.name, a) for a in whole.axes}) == part


def starts_at_zero(loop: Loop, facts: Facts) -> bool:
    if loop.from_nothing:
        return True
    starts = (Lifter(facts).at(states[0], axes) for states, axes in zip(loop.states, own_axes(loop)))
    return all(isinstance(x, Const) and x.value == 0 for x in starts)


def ends_of(loop: Loop, facts: Facts, out: Expr, written: tuple[Expr, ...] | None) -> Ends | None:
    """What a loop starts from and ends with; None where it starts from zero, and nobody asks. Raises `Stop` where
    there are more states than one, or more places where they are read."""
    zero = starts_at_zero(loop, facts)
    if zero and loop.final is None:
        return None
    if len(loop.states) > 1:
        raise Stop(Declined("a loop starts from a state that is not zero"))
    reads = {x.index for x in out.loads if x.tensor in (BEFORE.format(0), AFTER.format(0))}
    sizes = shape_of(loop.states[0][0])
    plain = [i for i in reads if all(_counts(x, size) for x, size in zip(i, sizes))]
    if len(reads) != 1 or not plain or sum(len(x.axes) for x in plain[0]) != len({a for x in plain[0] for a in x.axes}):
        raise Stop(Declined("a loop reads its state at more than one place"))
    initial = None if zero else Lifter(facts).at(loop.states[0][0], plain[0])
    return Ends(initial, loop.final, plain[0], written)


# ---------------------------------------------------------------------------------------------------- all steps


def as_one(values: list[Expr], step: Axis) -> Expr:
    """The values of all steps as one function of the step. Raises Stop where they are none."""
    one = one_function(values, step)
    if one is None:
        raise Stop(Declined("the steps of a loop are not the same function of what they read"))
    return one
