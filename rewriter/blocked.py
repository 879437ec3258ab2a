"""Attention that is seen, but not read: before the softmax or after it stands an operation that has no index notation,
such as a norm over the heads of the probabilities; or its scores come into the graph, and are mixed there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from refocus.attention import Left
from refocus.candidates import is_of_one, of_pair_sums
from refocus.facts import NORMALISERS, Facts, contraction_operands, is_kept, taint_of
from refocus.finite_rows import Open
from refocus.ir import Axis, Const, Load
from refocus.lift import arguments, is_tensor, op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_tables import MOVES, OPERATIONS
from refocus.patterns.declined import Declined
from refocus.sizes import shape_of


def blocked(facts: Facts) -> Iterator[tuple[fx.Node | None, Left]]:
    """The attentions that such an operation keeps from being read, each with the mixture of heads that comes before
    the operation, if there is one."""
    for node in facts.order:
        if node.op != "call_function" or not is_tensor(node) or node in facts.pure or is_of_one(node):
            continue
        if "softmax" not in op_name(node) or op_name(node) not in NORMALISERS:
            continue
        if any(map(_is_product, taint_of(node, facts))):
            yield from _past(node, None, facts)
        elif not taint_of(node, facts):
            before = _before(node, facts)
            if before is not None:
                yield from _past(node, before, facts)


def _before(normaliser: fx.Node, facts: Facts) -> fx.Node | None:
    """The unknown operation that stands between a softmax and a product of queries and keys."""
    stack, seen = [normaliser], {normaliser}
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            if source in seen or not is_tensor(source) or source.op != "call_function":
                continue
            seen.add(source)
            if op_name(source) in MOVES or op_name(source) in OPERATIONS:
                stack.append(source)
            elif any(_is_product(n) and _keeps_pairs(n, source) for x in _tensors(source) for n in taint_of(x, facts)):
                return source
    return None


def with_given_scores(left: Left, facts: Facts) -> Left:
    """The same, with the reason where its scores came into the graph: one of its inputs has a number for each pair of
    a query and a key, and heads at most are mixed before the softmax."""
    node = left.normaliser
    if "softmax" not in op_name(node) or any(map(_is_product, taint_of(node, facts))) or of_pair_sums(node, facts):
        return left
    source = arguments(node)[0]
    axes = [Axis(f"o{k}", size) for k, size in enumerate(shape_of(source))]
    dim = arguments(node)[1] if len(arguments(node)) > 1 else node.kwargs.get("dim")
    if not isinstance(dim, int):
        return left
    lifter = Open(facts, expands=True)
    value = lifter.at(source, axes)
    if any(map(_is_product, lifter.visited)):
        return left
    for load in (value,) if isinstance(value, Load) else value.loads:
        scores = facts.nodes.get(load.tensor)
        if scores is None or scores.op != "placeholder" or is_kept(scores) or not load.is_float:
            continue
        missing = [a for a in axes if a not in load.index and a.size != Const(1)]
        if axes[dim] in load.index and len(missing) <= 1 and len(axes) > 3:
            return replace(left, declined=Declined(GIVEN, scores.name))
    return left


GIVEN = "the scores came into the graph: a graph break stands between them and the product of queries and keys"


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def _past(normaliser: fx.Node, before: fx.Node | None, facts: Facts) -> Iterator[tuple[fx.Node | None, Left]]:
    """A walk from the softmax, past one mixture at most, to the first product that an unknown operation leads to."""
    queue: list[tuple[fx.Node, fx.Node | None, fx.Node | None]] = [(normaliser, None, before)]
    seen = {normaliser}
    while queue:
        node, mixture, unknown = queue.pop(0)
        for user in sorted(node.users, key=facts.order.__getitem__):
            if user in seen or user.op != "call_function" or op_name(user) in NORMALISERS:
                continue
            seen.add(user)
            name = op_name(user)
            if name in CONTRACTIONS:
                if unknown is not None and node in contraction_operands(user):
                    reason = f"`{op_name(unknown)}` is not understood"
                    yield mixture, Left(user, normaliser, Declined(reason, unknown.name))
                    return
                if mixture is None and unknown is None and any(map(_is_learned, contraction_operands(user))):
                    queue.append((user, user, None))
            elif name in MOVES or name in OPERATIONS or name == "getitem":
                queue.append((user, mixture, unknown))
            elif _keeps_pairs(node, user):
                queue.append((user, mixture, unknown or user))


def _is_product(node: fx.Node) -> bool:
    """Whether a contraction is one of two values that the graph computes, or is given."""
    return op_name(node) in CONTRACTIONS and not any(map(_is_learned, contraction_operands(node)))


def _is_learned(node: fx.Node) -> bool:
    """Whether a value is the model's own in some layout: with these heads are mixed, and values are none."""
    while node.op == "call_function" and op_name(node) in MOVES and is_tensor(arguments(node)[0]):
        node = arguments(node)[0]
    return node.op == "placeholder" and is_kept(node)


def _keeps_pairs(source: fx.Node, result: fx.Node) -> bool:
    """Whether an operation gives a value for each pair of query and key: all sizes but one, the heads, stay."""
    if not is_tensor(source) or not is_tensor(result):
        return False
    here, there = Counter(shape_of(source)), Counter(shape_of(result))
    return here.total() == there.total() and (here - there).total() <= 1
