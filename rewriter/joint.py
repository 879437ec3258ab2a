"""Several products with parts of one softmax, added up: one attention, whose values come from several tensors.

    p = softmax(cat(s, t)); p[.., :n] @ v + p[.., n:] @ w      ->      softmax(cat(s, t)) @ cat(v, w)

Which part of the weights a product takes is read off the views between the two; the values are a conditional load, each
part times the number that its product is scaled by, and zero for keys that no product takes. The weights of one key may
be multiplied with its value without a sum: p[.., -1:] * w. What is added to the weights after the softmax (a learned
weight of each offset) makes a product of its own, kept outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.candidates import Candidate
from refocus.facts import Facts
from refocus.ir import Axis, Const, Dot, Expr
from refocus.lift import Index, Lifter, is_tensor, op_name
from refocus.lift_joins import clamped
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_tables import MOVES, OPERATIONS
from refocus.lift_views import SPLITS, VIEWS
from refocus.patterns.declined import Declined, Stop
from refocus.products import reads_of
from refocus.sizes import shape_of

NOTHING: Expr = Const(0.0, "float32")


@dataclass(frozen=True)
class Joint:
    """A sum whose addends are products with parts of one normaliser's result."""

    root: fx.Node
    products: tuple[Candidate, ...]


@dataclass(frozen=True)
class Joined:
    """A joint in index notation: `weights` at `index`, over `key`, times `values`; `rest` is added."""

    key: Axis
    weights: fx.Node
    index: Index
    values: Expr
    rest: Expr


def joints(group: list[Candidate], facts: Facts) -> Iterator[Joint]:
    """Sums that several products of one normaliser flow into: those of most products first, then in graph order."""
    products = [c for c in group if c.mixes == 0 and op_name(c.root) in (*CONTRACTIONS, "sum")]
    products += of_one_key(group, facts)
    reached: dict[fx.Node, list[Candidate]] = {}
    for product in products:
        steps = _sums_and_views(product.root, facts)
        for node in (n for n in nx.descendants(steps, product.root) if len(_multiples(n) or ()) > 1):
            reached.setdefault(node, []).append(product)
    found = [(node, parts) for node, parts in reached.items() if len(parts) > 1]
    for node, parts in sorted(found, key=lambda x: (-len(x[1]), facts.order[x[0]]))[:_TRIED]:
        yield Joint(node, tuple(parts))


_TRIED = 4


def of_one_key(group: list[Candidate], facts: Facts) -> Iterator[Candidate]:
    """Beside products that sum over keys, weights of single keys times their values, which have an axis that the
    weights do not have: products that sum over an axis of size one."""
    normaliser = group[0].normaliser
    if not any(c.mixes == 0 and c.weights >= 0 for c in group):
        return
    weights, seen, stack = nx.descendants(facts.flow, normaliser), {normaliser}, [normaliser]
    while stack:
        node = stack.pop()
        for user in (u for u in node.users if u not in seen):
            operands = user.args[:2]
            product = op_name(user) in ("mul", "multiply") and all(map(is_tensor, operands)) and not user.kwargs
            wider = product and s.mul(*shape_of(user)) != s.mul(*shape_of(node))
            if wider and not weights.issuperset(operands):
                yield Candidate(user, operands.index(node), normaliser)
            elif op_name(user) in MOVES or op_name(user) in OPERATIONS or op_name(user) in (*SPLITS, "unbind"):
                seen.add(user)
                stack.append(user)


def _sums_and_views(start: fx.Node, facts: Facts) -> nx.DiGraph:
    """What a value flows through on its way, as long as it is only added to, or seen in another shape."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_node(start)
    stack = [start]
    while stack:
        node = stack.pop()
        for user in facts.flow.successors(node):
            passes = _multiples(user) is not None or op_name(user) in VIEWS
            if user not in graph and passes and is_tensor(user):
                stack.append(user)
            if user in graph or user in stack:
                graph.add_edge(node, user)
    return graph


Multiple = tuple[fx.Node, float]  # a value, and the number that it counts times


def _multiples(node: fx.Node) -> tuple[Multiple, ...] | None:
    """The values that an operation adds up, each with a number; None where it does anything else."""
    name, args = op_name(node), node.args
    if name in ("add", "sub", "subtract", "rsub") and len(args) >= 2 and all(map(is_tensor, args[:2])):
        by = node.kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        if type(by) not in (int, float) or not by:
            return None
        one, other = args[:2] if name != "rsub" else args[1::-1]
        return (one, 1.0), (other, float(by) if name == "add" else -float(by))  # type: ignore[arg-type, return-value]
    if name in ("neg", "negative"):
        return ((args[0], -1.0),)  # type: ignore[return-value]
    if name not in ("mul", "multiply", "div", "divide") or len(args) != 2 or node.kwargs:
        return None
    source, number = args
    if "mul" in name and isinstance(source, int | float):
        source, number = number, source
    if not isinstance(source, fx.Node) or type(number) not in (int, float) or not number:
        return None
    if source.meta["val"].dtype != node.meta["val"].dtype:
        return None
    return ((source, float(number) if "mul" in name else 1 / float(number)),)  # type: ignore[arg-type]


@dataclass
class _Probe(Lifter):
    """Notes where an operation reads, instead of reading there."""

    reads: list[tuple[fx.Node, Index]] = field(default_factory=list)

    def at(self, node: fx.Node, index: object) -> Expr:
        self.reads.append((node, tuple(index)))  # type: ignore[arg-type]
        return Const(0.0, "float32")


def moved(lifter: Lifter, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """What an operation that only moves elements reads at a position; None for any other operation."""
    name = op_name(node)
    if name == "getitem" and op_name(node.args[0]) not in SPLITS:  # type: ignore[arg-type]
        return None
    if name not in VIEWS or node in lifter.known.opaque:
        return None
    probe = _Probe(lifter.known)
    if VIEWS[name](probe, node, index) is None or len(probe.reads) != 1:
        return None
    lifter.visited.update((node, *probe.visited))
    return probe.reads[0]


def _addends(
    lifter: Lifter, node: fx.Node, index: Index, stop: set[fx.Node], scale: float = 1.0
) -> Iterator[tuple[fx.Node, Index, float]]:
    """The summands of a value at a position, looked at through views, each with a number that it is multiplied with; a
    node of `stop` is not taken apart."""
    if node not in stop:
        multiples = _multiples(node)
        if multiples is not None:
            lifter.visited.add(node)
            probe = _Probe(lifter.known)
            for operand, _ in multiples:
                probe.broadcast(operand, index)
            for (source, at), (_, number) in zip(probe.reads, multiples):
                yield from _addends(lifter, source, at, stop, scale * number)
            return
        below = moved(lifter, node, index)
        if below is not None:
            yield from _addends(lifter, *below, stop, scale)
            return
    yield node, index, scale


@dataclass(frozen=True)
class _Taken:
    """What a product takes of weights, at `index` of them: those of all positions on `bound`, or of one key."""

    bound: Axis | None
    weights: fx.Node
    index: Index
    values: tuple[fx.Node, Index]
    scale: float


@dataclass(frozen=True)
class _Part:
    """One product: its weights are columns `start`, .. of `weights`; `bound` is the axis it sums over, if it does."""

    bound: Axis | None
    weights: fx.Node
    index: Index
    dim: int
    start: Expr
    values: tuple[fx.Node, Index]
    scale: float

    @property
    def end(self) -> Expr:
        return s.add(self.start, Const(1) if self.bound is None else self.bound.size)


def lift_joint(joint: Joint, lifter: Lifter, index: Index, after: frozenset[fx.Node]) -> Joined:
    """Read a sum of products. `after`: what comes after the normaliser. Raises Stop with the reason."""
    taken: list[_Taken] = []
    rest = NOTHING
    weighted = {c.root: c.weights for c in joint.products}
    for node, at, scale in _addends(lifter, joint.root, index, set(weighted)):
        if node not in weighted:
            rest = _plus(rest, _times(lifter.leaf(node, at), scale))
            continue
        lifter.visited.add(node)
        reads = reads_of(lifter, node, at, weighted[node])
        if reads is None or len(reads[1]) != 2 or len(reads[0]) > 1:
            raise Stop(Declined("the values are not summed over one key axis", op_name(node)))
        bound, operands = next(iter(reads[0]), None), reads[1]
        weights, values = operands[weighted[node]], operands[1 - weighted[node]]
        for source, position, share in _addends(lifter, *weights, set()):
            if source in after:
                taken.append(_Taken(bound, source, position, values, scale * share))
                continue
            more, weight = _times(lifter.at(*values), scale * share), lifter.leaf(source, position)
            apart = s.call("mul", weight, more, dtype="float32")
            rest = _plus(rest, apart if bound is None else Dot((bound,), weight, more, "float32"))
    if len(taken) < 2:
        raise Stop(Declined("the products take no part of the weights"))
    parts = _in_order(_parts(taken))
    first = parts[0]
    key = Axis(f"{joint.root.name}.keys", s.sub(parts[-1].end, first.start))
    position = tuple(s.add(key, first.start) if k == first.dim else e for k, e in enumerate(first.index))
    return Joined(key, first.weights, position, _values(lifter, parts, key), rest)


def _parts(taken: list[_Taken]) -> list[_Part]:
    """What products take of one tensor of weights, which they read alike but for the key."""
    bound = [k for one in taken for k, e in enumerate(one.index) if one.bound in e.axes]
    parts = []
    for one in taken:
        at = one.index[bound[0]] if bound else None
        start = at if at is None or one.bound not in at.axes else s.sub(at, one.bound)
        others = [e for k, e in enumerate(one.index) if k not in bound]
        same = one.weights is taken[0].weights and others == [e for k, e in enumerate(taken[0].index) if k not in bound]
        if start is None or start.axes or start.loads or len(set(bound)) > 1 or not same:
            raise Stop(Declined(_NOT_APART, one.weights.name))
        parts.append(_Part(one.bound, one.weights, one.index, bound[0], start, one.values, one.scale))
    return parts


_NOT_APART = "the products do not take the weights apart, key by key"


def _in_order(parts: list[_Part]) -> list[_Part]:
    """Parts that follow each other, the first one first: each starts where another ends, or later."""
    rest, ordered = list(parts), list[_Part]()
    while rest:
        first = [p for p in rest if all(s.is_nonneg(s.sub(other.start, p.end)) for other in rest if other is not p)]
        if len(first) != 1:
            raise Stop(Declined(_NOT_APART, parts[0].weights.name))
        rest.remove(first[0])
        ordered.append(first[0])
    return ordered


def _plus(rest: Expr, more: Expr) -> Expr:
    return more if rest == NOTHING else s.call("add", rest, more, dtype="float32")


def _times(value: Expr, scale: float) -> Expr:
    return value if scale == 1 else s.call("mul", value, Const(scale, value.dtype), dtype=value.dtype)


def _values(lifter: Lifter, parts: list[_Part], key: Axis) -> Expr:
    """The values as one conditional load along the joint key axis."""
    value: Expr | None = None
    following: Expr | None = None
    for part in reversed(parts):
        begin = s.sub(part.start, parts[0].start)
        end = s.sub(part.end, parts[0].start)
        node, index = part.values
        if part.bound is not None:
            facts = s.assume(s.and_(s.ge(key, begin), s.lt(key, end)))
            local = clamped(s.under(s.sub(key, begin), facts), part.bound.size)
            index = tuple(s.substitute(e, {part.bound: local}) for e in index)
        here = _times(lifter.at(node, index), part.scale)
        if value is not None and following is not None:
            if following != end:
                value = s.where(s.lt(key, following), Const(0.0, here.dtype), value)
            here = s.where(s.lt(key, end), here, value)
        value, following = here, begin
    assert value is not None
    return value
