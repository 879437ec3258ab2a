"""Lifting with contractions written out: for forms whose sums are to be taken apart and put together anew.

What lies between a product of queries and keys and its use is expanded, whatever its axes; so is what holds both a
query and a key axis, once these are known. Everything else is loaded, as the rule of the cut has it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from refocus import simplify as s
from refocus.facts import Facts
from refocus.ir import Axis, Const, Expr, Load, rewrite
from refocus.lift import Index, Lifter, arguments, op_name
from refocus.lift_pointwise import POINTWISE
from refocus.sizes import shape_of


@dataclass
class Expander(Lifter):
    """`interior`: the nodes that are expanded wherever they are read. `root`: the contraction with values or states,
    which sums over its own axes."""

    interior: frozenset[fx.Node] = frozenset()
    root: fx.Node | None = None
    expands: bool = True

    def sums_keys(self, node: fx.Node) -> bool:
        return node is not self.root

    def within(self, node: fx.Node, index: Index) -> bool:
        return node in self.interior or self.inside(index)

    def _choose(self, node: fx.Node, index: Index, below: Expr) -> Expr:
        return below if node in self.interior else super()._choose(node, index, below)


@dataclass
class _Viewer(Lifter):
    """Looks through whatever only moves values, down to the node that computed them."""

    found: list[fx.Node] = field(default_factory=list)

    def _choose(self, node: fx.Node, index: Index, below: Expr) -> Expr:
        return below


def viewed(value: Expr, facts: Facts) -> Expr:
    """The value, every load through views replaced by one of what is viewed: then equal values are equal."""

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Load) and node.tensor in facts.nodes:
            below = _Viewer(facts).at(facts.nodes[node.tensor], node.index)
            return below if isinstance(below, Load) else node
        return None

    return rewrite(value, visit, s.rebuild)


@dataclass
class Follower(_Viewer):
    """Looks through pointwise operations, too."""

    def within(self, node: fx.Node, index: Index) -> bool:
        return op_name(node) in POINTWISE


def without(value: Expr, axes: Set[Axis], facts: Facts) -> Expr:
    """The value as a function of less: what is the same along some of the `axes` may have been spread over them before
    it was computed (a step size for each channel, out of one for the head). Loads that hold such an axis are followed
    to their sources where these hold fewer."""

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Load) and node.is_float and node.tensor in facts.nodes and node.axes & axes:
            below = Follower(facts).at(facts.nodes[node.tensor], node.index)
            return below if len(below.axes & axes) < len(node.axes & axes) else node
        return None

    return rewrite(value, visit, s.rebuild)


def in_range(value: Expr, facts: Facts) -> Expr:
    """The value, read at the edge of a tensor where it would be read beyond. There it counts for nothing, or the model
    would read it there: a condition that it stood under may have become a factor of zeros and ones (padding)."""

    def visit(node: Expr) -> Expr | None:
        if not isinstance(node, Load) or node.tensor not in facts.nodes:
            return None
        sizes = shape_of(facts.nodes[node.tensor])
        index = tuple(_clamped(x, size) for x, size in zip(node.index, sizes))
        return None if index == node.index else Load(node.tensor, index, node.dtype)

    return rewrite(value, visit, s.rebuild)


def _clamped(place: Expr, size: Expr) -> Expr:
    low, high = s.bounds(place)
    if low is not None and low < 0:
        place = s.maximum(place, Const(0))
    if high is not None and isinstance(size, Const) and high >= size.value:
        place = s.minimum(place, Const(int(size.value) - 1))
    return place


def step_of(value: Expr, axis: Axis, facts: Facts) -> Expr:
    """value[t] - value[t-1], where the value is a load at t = `axis`; of a running sum, what it adds at t: a difference
    of long sums would have lost what they have in common. At t = 0 it is anything."""
    if isinstance(value, Load) and value.tensor in facts.nodes:
        below = _Viewer(facts).at(facts.nodes[value.tensor], value.index)
        if isinstance(below, Load) and below.tensor in facts.nodes:
            node = facts.nodes[below.tensor]
            source: Any = arguments(node)[0] if node.args else None
            if op_name(node) == "cumsum" and not {node, source} & facts.opaque:
                given: Any = arguments(node)[1] if len(arguments(node)) > 1 else node.kwargs["dim"]
                dim = int(given) % len(below.index)
                others = [e for k, e in enumerate(below.index) if k != dim]
                place, alone = below.index[dim], not any(axis in e.axes for e in others)
                if place == axis and alone:
                    return Lifter(facts).at(source, below.index)
                if place == s.sub(s.sub(axis.size, 1), axis) and alone:  # counted from the end
                    after = s.minimum(s.add(place, 1), s.sub(axis.size, 1))
                    step = Lifter(facts).at(source, (*below.index[:dim], after, *below.index[dim + 1 :]))
                    return s.call("neg", step, dtype=step.dtype)
    before = s.substitute(value, {axis: s.maximum(s.sub(axis, 1), Const(0))})
    return s.call("sub", value, before, dtype=value.dtype)
