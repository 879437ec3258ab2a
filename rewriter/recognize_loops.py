"""Recurrences that a model spells as a loop: prove all steps one function of t, and write the state as a sum.

    every step     S[t+1] = decay(t) * S[t] + write(t),    out[t] = g(S[t+1], t)         lifted, and compared
    closed form    S[t+1] = sum over j <= t of decay(j+1) .. decay(t) * write(j)
    then           out[t] is a sum over pairs of steps, and read like any other         (refocus.recognize_linear)

With the delta rule, S[t+1] = decay(t) * (S[t] - erase(t) k(t) (k(t)^T S[t])) + erase(t) k(t) v(t)^T, there is no such
sum; what is erased is read apart, and goes with the form of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from torch import fx

from refocus import simplify as s
from refocus.expand import Expander
from refocus.facts import Facts
from refocus.ir import Axis, Call, Const, Expr, Load, rewrite
from refocus.lift import Index, Lifter, arguments, dtype_of, op_name
from refocus.loops import Loop
from refocus.patterns.chunk_loop import Chunks, over_all
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Product, Weight, product_of, settled
from refocus.patterns.recurrence import Update, closed_form, read_update
from refocus.sizes import shape_of

BEFORE, AFTER = "state {} before", "state {} after"


@dataclass
class _Step(Expander):
    """Lifts one step of a loop. `held`: states, which are loaded under these names. Sums are named after the first
    step's nodes, so that equal steps are equal expressions. What does not depend on `data` is followed to its source:
    decays are, which are often made before the loop."""

    held: dict[fx.Node, str] = field(default_factory=dict)
    firsts: dict[fx.Node, fx.Node] = field(default_factory=dict)
    data: Set[fx.Node] = frozenset()

    def within(self, node: fx.Node, index: Index) -> bool:
        return node in self.interior or node not in self.data

    def _choose(self, node: fx.Node, index: Index, below: Expr) -> Expr:
        return below if node not in self.data else super()._choose(node, index, below)

    def at(self, node: fx.Node, index: Sequence[Expr]) -> Expr:  # type: ignore[override]
        if node in self.held:
            return Load(self.held[node], tuple(index), dtype_of(node))
        return super().at(node, index)

    def bound(self, node: fx.Node, which: int, size: object) -> Axis:
        return super().bound(self.firsts.get(node, node), which, size)

    def sums_keys(self, node: fx.Node) -> bool:
        return False

    def constant(self, node: fx.Node, index: Index) -> Expr | None:
        """Of a body, only what the first step makes of a constant start is a constant; other steps are not like it."""
        return None if node in self.interior else super().constant(node, index)


@dataclass(frozen=True)
class Rolled:
    """A loop as one function: what it gives out at `query`, over the gather's `dims`, as a sum over `key`; the weight
    of a pair, where it is read already. `erase`: what the delta rule takes away at each key, of which `keys` are the
    factors of what is looked up."""

    product: Product
    weight: Weight | None
    dims: tuple[Axis | None, ...]
    query: Axis
    key: Axis
    erase: Expr | None
    keys: tuple[Expr, ...]
    visited: frozenset[fx.Node]


def rolled(loop: Loop, facts: Facts, data: Set[fx.Node]) -> Rolled:
    """Raises Stop with the reason where a loop is no recurrence of this kind."""
    gather = loop.gather
    shape = shape_of(gather)
    dims = tuple(None if d == Const(1) else Axis(f"o{k}", d) for k, d in enumerate(shape))
    query = Axis(f"o{loop.dim}", shape[loop.dim])
    rows = s.floordiv(shape[loop.dim], loop.steps)
    row = None if loop.stacked or rows == Const(1) else Axis("row", rows)
    index = [Const(0) if a is None else a for a in dims]
    mine = () if loop.stacked else (Const(0) if row is None else row,)
    part = (*index[: loop.dim], *mine, *index[loop.dim + 1 :])
    own = [
        tuple(Const(0) if d == Const(1) else Axis(f"s{n}.{k}", d) for k, d in enumerate(shape_of(states[0])))
        for n, states in enumerate(loop.states)
    ]
    visited: set[fx.Node] = set()
    outs: list[Expr] = []
    updates: list[list[Expr]] = [[] for _ in loop.states]
    for t in range(loop.steps):
        before = {states[t]: BEFORE.format(n) for n, states in enumerate(loop.states)}
        after = {states[t + 1]: AFTER.format(n) for n, states in enumerate(loop.states) if t + 1 < len(states)}
        both = _Step(facts, interior=loop.body, held={**before, **after}, firsts=loop.firsts, data=data)
        outs.append(both.at(loop.parts[t], part))
        visited |= both.visited
        earlier = _Step(facts, interior=loop.body, held=before, firsts=loop.firsts, data=data)
        for n, states in enumerate(loop.states):
            if t + 1 < len(states):
                updates[n].append(earlier.at(states[t + 1], own[n]))
        visited |= earlier.visited
    step = Axis("step", Const(loop.steps))
    out = _as_one(outs, step)
    key = Axis(f"{gather.name}.key", query.size)
    read: list[Update] = []
    for n, (values, axes) in enumerate(zip(updates, own)):
        update = _as_one(values, step)
        start = Lifter(facts).at(loop.states[n][0], axes)
        if not (isinstance(start, Const) and start.value == 0):
            raise Stop(Declined("a loop starts from a state that is not zero"))
        read.append(read_update(update, BEFORE.format(n), axes, step, lambda x: _log(x, facts)))
    if row is not None:
        if len(read) > 1:
            raise Stop(Declined("a loop over chunks has several states"))
        chunks = Chunks(step, row, query, key, BEFORE.format(0), own[0])
        free = tuple(row if a == query else a for a in dims if a is not None)
        product, weight = over_all(out, read[0], free, chunks)
        return Rolled(product, weight, dims, query, key, None, (), frozenset(visited))
    erasing = [u for u in read if u.erase is not None]
    if erasing and len(read) > 1:
        raise Stop(Declined("a loop has several states, and the delta rule"))

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Load):
            for n, update in enumerate(read):
                for name, last in ((BEFORE.format(n), s.lt), (AFTER.format(n), s.le)):
                    if node.tensor == name:
                        return closed_form(update, own[n], node.index, step, key, last)
        return None

    value = s.substitute(rewrite(out, visit, s.rebuild), {step: query})
    erase: Expr | None = None
    keys: tuple[Expr, ...] = ()
    if erasing:
        erase, keys = _at_root(erasing[0], own[0], out, step, key)
    product = settled(product_of(value, (query, key)), (query, key))
    return Rolled(product, None, dims, query, key, erase, keys, frozenset(visited))


def _at_root(update: Update, own: Index, out: Expr, step: Axis, key: Axis) -> tuple[Expr, tuple[Expr, ...]]:
    """What is erased, over the axes at which the result reads the state."""
    reads = [x for x in out.loads if x.tensor in (BEFORE.format(0), AFTER.format(0))]
    if len(reads) != 1 or update.erase is None:
        raise Stop(Declined("a loop with the delta rule reads its state more than once"))
    here: dict[Expr, Expr] = {a: x for a, x in zip(own, reads[0].index) if isinstance(a, Axis)}
    here[step] = key
    return s.substitute(update.erase, here), tuple(s.substitute(x, here) for x in update.keys)


# ---------------------------------------------------------------------------------------------------- all steps


def _as_one(values: list[Expr], step: Axis) -> Expr:
    """The values of all steps as one function of the step. Raises Stop where they are none."""
    one = _between(values[-2], values[-1], len(values) - 1, step) if len(values) > 1 else values[0]
    for t, value in enumerate(values):
        if one is None or s.substitute(one, {step: Const(t)}) != value:
            raise Stop(Declined("the steps of a loop are not the same function of what they read"))
    assert one is not None
    return one


def _between(earlier: Expr, later: Expr, number: int, step: Axis) -> Expr | None:
    """What is `later` at step `number`, and `earlier` one step before, whole numbers taken to grow evenly."""
    if earlier == later:
        return earlier
    if earlier.is_int and later.is_int:
        by = s.sub(later, earlier)
        if isinstance(by, Const):
            return s.add(later, s.mul(by, s.sub(step, number)))
    old, new = earlier.children, later.children
    if type(earlier) is not type(later) or len(old) != len(new):
        return None
    found = [_between(a, b, number, step) for a, b in zip(old, new)]
    if any(x is None for x in found):
        return None
    return s.rebuild(later, tuple(found)) if found else None  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- decays


def _log(decay: Expr, facts: Facts) -> Expr | None:
    """The logarithm of a decay, where it is known to be one: of an exponential or a sigmoid, here or where the value
    that is read was made."""
    if isinstance(decay, Call) and decay.op == "exp":
        return decay.args[0]
    if isinstance(decay, Load) and decay.tensor in facts.nodes:
        node, index = facts.nodes[decay.tensor], decay.index
        while node not in facts.opaque and op_name(node) in _VIEWS:
            below = _Seen(facts).at(node, index)
            if not isinstance(below, Load) or below.tensor not in facts.nodes or below.tensor == node.name:
                return None
            node, index = facts.nodes[below.tensor], below.index
        if node in facts.opaque or op_name(node) not in ("exp", "sigmoid"):
            return None
        inner = Lifter(facts).at(arguments(node)[0], index)
        if op_name(node) == "exp":
            return inner
        decay = s.call("sigmoid", inner, dtype=dtype_of(node))
    if isinstance(decay, Call) and decay.op == "sigmoid":
        # log(sigmoid(x)) = -log(1 + exp(-x)), which is finite wherever x is.
        x = s.call("neg", decay.args[0], dtype=decay.dtype)
        total = s.call("logaddexp", x, Const(0.0, decay.dtype), dtype=decay.dtype)
        return s.call("neg", total, dtype=decay.dtype)
    return None


@dataclass
class _Seen(Lifter):
    """Looks through whatever only moves values."""

    def _choose(self, node: fx.Node, index: Index, below: Expr) -> Expr:
        return below


_VIEWS = frozenset(
    ("view", "reshape", "permute", "transpose", "select", "slice", "unsqueeze", "squeeze", "expand", "getitem",
     "unbind", "split", "chunk", "to", "_to_copy", "contiguous", "clone", "flatten", "unflatten", "mT", "t")
)  # fmt: skip
