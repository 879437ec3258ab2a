"""Give a matched attention its final form: roles and names for the axes, canonical operands, mask apart from score.

Equal layers come out as equal regions, so that they share one kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import fx

from refocus import simplify as s
from refocus.dropout import dropping
from refocus.empty_rows import Rows
from refocus.facts import Facts
from refocus.hoist import Hoisted, hoist_distances, hoist_sums
from refocus.ir import Axis, Call, Const, Dot, Expr, Load, Operand, Reduce, Region, rewrite
from refocus.lift import dtype_of
from refocus.low_scores import LowScores
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.factors import holds_scores
from refocus.patterns.masking import known_inside, separate_mask
from refocus.patterns.softmax import Softmax
from refocus.sizes import shape_of


@dataclass(frozen=True)
class Seed:
    """An operand that is drawn outside the region: one int64 number, the same for all reads of one `site`."""

    site: str


Binding = fx.Node | Hoisted | Seed


@dataclass(frozen=True)
class Draft:
    """A softmax with the axes of its site: `free` are the result's axes, `mixed` those summed after the region.
    `in_place`: values that are read from several tensors stay so, where one copy of all would be larger than these.
    `one_query`: what the weights have and no value are heads; those that the keys have, too, are of the batch."""

    free: list[Axis]
    mixed: tuple[Axis, ...]
    key: Axis
    softmax: Softmax
    values: Expr
    in_place: bool = False
    one_query: bool = False


BATCH_NAMES = ("b", "h", "g", "r", "s", "t", "u", "w")


def finish(
    draft: Draft, facts: Facts, out_dtype: str, zero_rows: bool
) -> tuple[Region, tuple[Binding, ...], tuple[Axis, ...]]:
    """The region, what its operands are bound to, and the site's axes in the order of the region's result. It
    yields row sums if its weights are to be multiplied with what the rounding of these leaves."""
    soft, key = draft.softmax, draft.key
    mask = separate_mask(soft.logits)[1]
    weight_axes = frozenset().union(soft.logits.axes, soft.gate.axes, *(e.axes for e in soft.extra))
    all_axes = [*draft.free, *draft.mixed]
    value = [a for a in draft.free if a in draft.values.axes and a not in weight_axes]
    rest = [a for a in all_axes if a not in value]
    query_like = [a for a in rest if a in weight_axes and a not in draft.values.axes]
    # Heads that are mixed are in the scores and not in the values, too; but keys have them.
    keyed = frozenset().union(*(dot.key.axes for dot in soft.dots))
    unkeyed = [a for a in query_like if a not in keyed]
    query_like = unkeyed if unkeyed or draft.one_query else query_like
    query = _choose_query(query_like, mask, key)
    if query is None:
        query = Axis("one", Const(1))
        batch = rest
    else:
        batch = [a for a in rest if a is not query]
    if any(query in dot.key.axes for dot in soft.dots):
        raise Stop(Declined("a key depends on the query", None))
    sums: dict[str, Hoisted] = {}
    hoisted: dict[str, Hoisted] = {}
    soft = replace(soft, logits=hoist_sums(soft.logits, query, key, sums))
    if soft.unnormalised:
        gate = hoist_sums(soft.gate, query, key, sums)
        soft = replace(soft, gate=hoist_distances(gate, query, key, hoisted))
    if any(isinstance(n, Reduce) for e in (soft.logits, soft.gate, *soft.extra) for n in e.walk()):
        raise Stop(Declined("a sum that is not a product of queries and keys stands in the scores"))
    if query in draft.values.axes:
        raise Stop(Declined("the values depend on the query"))
    order = [*batch, *([query] if query.name != "one" else []), *value]
    names = _axis_names(batch, query, key, value, [soft.logits, soft.gate, *soft.extra, draft.values])
    logits = hoist_distances(soft.logits, query, key, hoisted)
    rows = Rows(facts, batch, query, key)
    logits = rows.settled(soft, logits)
    score, mask = LowScores(facts, {**sums, **hoisted}).separated(logits)
    rule = rows.rule(soft, logits, mask, zero_rows)
    gate = soft.gate if rule == "logits" else known_inside(soft.gate, mask)
    builder = _Operands(facts, names, {**sums, **hoisted}, out_dtype)
    logits_, values_ = builder.canonical(logits), builder.values(draft.values, draft.in_place)
    score_, mask_, gate_ = (builder.canonical(e) for e in (score, mask, gate))
    extra_ = tuple(builder.canonical(e) for e in soft.extra)
    region = Region(
        batch=tuple(names[a] for a in batch),
        query=names[query],
        key=names[key],
        value=tuple(names[a] for a in value),
        score=score_,
        mask=mask_,
        logits=logits_,
        values=values_,
        operands=tuple(builder.operands.values()),
        out_dtype=out_dtype,
        extra=extra_,
        gate=gate_,
        empty_row="zero" if zero_rows and rule == "logits" else rule,
        row_sums=rows.rounded(soft, logits) or (soft.unnormalised and not isinstance(logits, Const)),
    )
    if soft.strict and not has_number(soft.logits, rule == "never"):
        raise Stop(Declined("a row may have no keys: it is no number then, whatever its share"))
    return region, tuple(builder.bindings.values()), tuple(order)


def has_number(logits: Expr, never_empty: bool) -> bool:
    """Whether no row has logits of -inf only: as a tensor that is added may have, or, if rows may be empty, a fill."""
    stack = [logits]
    while stack:
        e = stack.pop()
        if isinstance(e, Load) or (isinstance(e, Const) and e.is_float and math.isinf(e.value) and not never_empty):
            return False
        if not isinstance(e, Dot):
            parts = [a for a in e.children if a.is_float]
            # What scores are multiplied with makes them infinite only by being so: then there is no number anyway.
            scaled = [a for a in parts if holds_scores(a)] if isinstance(e, Call) and e.op in ("mul", "div") else []
            stack.extend(scaled or parts)
    return True


def _choose_query(found: list[Axis], mask: Expr, key: Axis) -> Axis | None:
    """Of several axes that only the weights have (MQA: heads and positions), the one that meets the key in the mask,
    else the longest, else the last."""
    if not found:
        return None

    def rank(axis: Axis) -> tuple[bool, float, int]:
        meets = any(axis in part.axes and key in part.axes for part in s.conjuncts(mask))
        size = float(axis.size.value) if isinstance(axis.size, Const) else float("inf")
        return meets, size, found.index(axis)

    return max(found, key=rank)


def _axis_names(batch: list[Axis], query: Axis, key: Axis, value: list[Axis], exprs: list[Expr]) -> dict[Axis, Axis]:
    names: dict[Axis, Axis] = {}
    for k, axis in enumerate(batch):
        names[axis] = Axis(BATCH_NAMES[k] if k < len(BATCH_NAMES) else f"b{k}", axis.size)
    names[query] = Axis("i", query.size)
    names[key] = Axis("j", key.size)
    for k, axis in enumerate(value):
        names[axis] = Axis("e" if k == 0 else f"e{k}", axis.size)
    seen: dict[Axis, None] = {}
    for e in exprs:
        for node in e.walk():
            if isinstance(node, Dot):
                seen.update(dict.fromkeys(summed_first(node).over))
    for k, axis in enumerate(seen):
        names[axis] = Axis("d" if k == 0 else f"d{k}", axis.size)
    return names


def summed_first(dot: Dot) -> Dot:
    """A product of three matrices as one of two: what only one side has is summed there, outside of the region.

    sum_(c,d) x[i,c] * w[c,d] * x[j,d]  ->  sum_d (sum_c x[i,c] * w[c,d]) * x[j,d]
    """
    of_query = tuple(a for a in dot.over if a in dot.query.axes and a not in dot.key.axes)
    of_key = tuple(a for a in dot.over if a in dot.key.axes and a not in dot.query.axes)
    over = tuple(a for a in dot.over if a not in (*of_query, *of_key))
    if not over or any(a.size == Const(1) for a in (*of_query, *of_key)):
        return dot
    return Dot(over, _summed(dot.query, of_query), _summed(dot.key, of_key), dot.dtype)


def _summed(value: Expr, axes: tuple[Axis, ...]) -> Expr:
    if not axes:
        return value
    if isinstance(value, Call) and value.op == "mul" and len(value.args) == 2:
        return Dot(axes, *value.args, value.dtype)
    for axis in reversed(axes):
        value = Reduce("sum", axis, value, value.dtype)
    return value


def in_pieces(value: Expr) -> bool:
    """Whether a value is read from one tensor here, from another there, or is padding."""
    if not isinstance(value, Call) or value.op != "where" or any(x.is_float for x in value.args[0].loads):
        return False
    return all(isinstance(x, Load | Const) or in_pieces(x) for x in value.args[1:])


class _Operands:
    """Collects the tensors a region reads, renames them, and hoists products on one side of a dot. Sides that are made
    of integers (positions, of which the expected one is asked for) are given the dtype `wide`."""

    def __init__(self, facts: Facts, names: dict[Axis, Axis], hoisted: dict[str, Hoisted], wide: str) -> None:
        self.facts, self.names, self.hoisted, self.wide = facts, names, hoisted, wide
        self.operands: dict[object, Operand] = {}
        self.bindings: dict[object, Binding] = {}
        self.memo: dict[Expr, Expr] = {}

    def canonical(self, value: Expr) -> Expr:
        """Rename axes and operands of a site's expression."""
        if value not in self.memo:
            self.memo[value] = self._go(value)
        return self.memo[value]

    def _go(self, value: Expr) -> Expr:
        def visit(node: Expr) -> Expr | None:
            if isinstance(node, Axis):
                return self.names.get(node, node)
            if isinstance(node, Dot):
                node = summed_first(node)
                over = tuple(self.names[a] for a in node.over)
                # A product of a column and a row sums over one element, which a view may have dropped from both.
                dropped = tuple(a for a in node.over if a not in node.query.axes | node.key.axes)
                return Dot(over, self._side(node.query, "q", dropped), self._side(node.key, "k"), node.dtype)
            if isinstance(node, Load):
                return self._load(node, "t")
            return None

        return rewrite(value, visit, s.rebuild)

    def values(self, value: Expr, in_place: bool) -> Expr:
        if in_place and in_pieces(value) and self._spreads(value):
            return self._pieces(value)
        return self._side(value, "v")

    def _pieces(self, value: Expr) -> Expr:
        if not isinstance(value, Call):
            return value if isinstance(value, Const) else self._side(value, "v")
        condition, first, second = value.args
        return s.where(self.canonical(condition), self._pieces(first), self._pieces(second))

    def _spreads(self, value: Expr) -> bool:
        """Whether a value has more than twice the elements of the tensors that it reads (each query has values of its
        own among them). A copy that is only padded costs less than a condition on every read."""
        tensors = {x.tensor: shape_of(self.facts.nodes[x.tensor]) for x in value.loads if x.is_float}
        apart = s.add(*(s.mul(*shape) for shape in tensors.values()))
        return s.is_nonneg(s.sub(s.mul(*(a.size for a in value.axes)), s.mul(2, apart)))

    def _in_rows(self, load: Load) -> bool:
        """Whether an axis is taken apart into dimensions of a tensor that the load reads all of, each element once."""
        apart = {
            e.args[0]
            for e in load.index
            if isinstance(e, Call) and e.op in ("floordiv", "mod") and isinstance(e.args[0], Axis) and not e.loads
        }
        if not apart or load.tensor not in self.facts.nodes:
            return False
        shape = shape_of(self.facts.nodes[load.tensor])
        return s.mul(*(a.size for a in load.axes)) == s.mul(*(d for d, e in zip(shape, load.index) if e.axes))

    def _load(self, load: Load, role: str) -> Load:
        outside, site = self.hoisted.get(load.tensor), dropping(load.tensor)
        if site is not None:
            name = self._name(load.tensor, "seed", load.dtype, (), Seed(site))
        elif outside is not None:
            name = self._name(load.tensor, role, load.dtype, tuple(a.size for a in outside.axes), outside)
        else:
            node = self.facts.nodes[load.tensor]
            name = self._name(load.tensor, role, dtype_of(node), shape_of(node), node)
        return Load(name, tuple(self.canonical(x) for x in load.index), load.dtype)

    def _name(self, tag: object, role: str, dtype: str, shape: tuple[Expr, ...], binding: Binding) -> str:
        if tag not in self.operands:
            taken = sum(o.name.rstrip("0123456789") == role for o in self.operands.values())
            name = role if taken == 0 and role != "t" else f"{role}{taken}"
            self.operands[tag] = Operand(name, dtype, shape)
            self.bindings[tag] = binding
        return self.operands[tag].name

    def _side(self, value: Expr, role: str, more: tuple[Axis, ...] = ()) -> Expr:
        """One side of a dot product: a load stays one, anything else is computed outside and loaded. So is a tensor
        with tokens in rows and columns, of which a view has them in one dimension, and what is given `more` axes."""
        if isinstance(value, Load) and value.is_float and not more and not self._in_rows(value):
            return self._load(value, role)
        axes = tuple(sorted({*value.axes, *more}, key=lambda a: list(self.names).index(a)))
        outside = Hoisted(value, axes, self.wide if value.is_int else None)
        tag = ("hoisted", value, more)
        name = self._name(tag, role, outside.dtype, tuple(a.size for a in axes), outside)
        return Load(name, tuple(self.names[a] for a in axes), outside.dtype)
