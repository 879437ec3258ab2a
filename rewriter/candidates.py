"""Where attention may be: normalisers that read scores, and the products that they flow into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from refocus.blank import sources_of
from refocus.facts import (
    ATTENTION_OPS,
    NORMALISERS,
    SEVERAL,
    Facts,
    contraction_operands,
    is_kept,
    is_product_sum,
    taint_of,
)
from refocus.ir import Const
from refocus.lift import arguments, is_tensor, op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_tables import MOVES, OPERATIONS
from refocus.pair_sums import is_pair_sum
from refocus.sizes import hint, shape_of


@dataclass(frozen=True)
class Candidate:
    """A place where attention may be: the contraction with values, which operand is the weights, the normaliser. Of
    weights that are not `normalised`, it is they themselves."""

    root: fx.Node
    weights: int
    normaliser: fx.Node
    mixes: int = 0  # contractions between the normaliser and the root (talking heads)
    normalised: bool = True


def candidates(facts: Facts) -> list[list[Candidate]]:
    """For every normaliser that reads a score product, or other scores of pairs: the contractions it may flow into,
    nearest first."""
    groups: list[list[Candidate]] = []
    for node in facts.order:
        if node.op != "call_function" or not is_tensor(node) or node in facts.pure:
            continue
        name = op_name(node)
        if name in ATTENTION_OPS:
            groups.append([Candidate(node, -1, node)])
        elif name in NORMALISERS and not is_of_one(node) and (taint_of(node, facts) or of_pair_sums(node, facts)):
            group = list(reached(node, facts))
            if group:
                groups.append(group)
    return groups


def of_pair_sums(node: fx.Node, facts: Facts) -> bool:
    """Whether a softmax is of scores that are sums of what is made of a query and a key each."""
    return "softmax" in op_name(node) and any(map(is_pair_sum, _led_from(node, facts)))


def given_scores(facts: Facts, operands: Iterable[fx.Node]) -> list[fx.Node]:
    """Softmaxes over scores that come into the graph ready-made: as large as one of its inputs, which pointwise
    operations and views alone lead to. Not those that lead to `operands` of attention: they are of features."""
    found = []
    features = set().union(*(_led_from(node, facts) for node in operands))
    for node in facts.order:
        if node.op != "call_function" or not is_tensor(node) or "softmax" not in op_name(node) or node in facts.pure:
            continue
        if node in features or node.meta["val"].dim() < 3 or is_of_one(node):
            continue
        if taint_of(node, facts) or of_pair_sums(node, facts):
            continue
        for source in _led_from(node, facts):
            if source.op != "placeholder" or not is_tensor(source) or is_kept(source):
                continue
            if source.meta["val"].is_floating_point() and 0.5 < _elements(source) / max(1, _elements(node)) < 1.5:
                found.append(node)
                break
    return found


def _led_from(node: fx.Node, facts: Facts) -> set[fx.Node]:
    """What a value is made of by operations of each element."""
    found, stack = {node}, [node]
    while stack:
        n = stack.pop()
        if n.op == "call_function" and (op_name(n) in MOVES or op_name(n) in OPERATIONS or op_name(n) in SEVERAL):
            sources = [a for a in sources_of(n) if a not in found]
            found.update(sources)
            stack.extend(sources)
    return found


def _elements(node: fx.Node) -> int:
    return math.prod(hint(size) for size in node.meta["val"].shape)


def is_of_one(node: fx.Node) -> bool:
    """Whether a softmax runs over a single element: it is one, and nobody attends to anything."""
    source = arguments(node)[0]
    dim = arguments(node)[1] if len(arguments(node)) > 1 else node.kwargs.get("dim")
    if "softmax" not in op_name(node) or not isinstance(dim, int) or not is_tensor(source):
        return False
    shape = source.meta["val"].shape
    return bool(shape) and shape_of(source)[dim] == Const(1)


def reached(normaliser: fx.Node, facts: Facts) -> Iterator[Candidate]:
    """The contractions that what a node computes may flow into, nearest first."""
    queue: list[tuple[fx.Node, int]] = [(normaliser, 0)]
    seen = {normaliser}
    while queue:
        node, mixes = queue.pop(0)
        for user in sorted(node.users, key=facts.order.__getitem__):
            if user in seen or user.op != "call_function":
                continue
            name = op_name(user)
            if name in CONTRACTIONS or (name == "sum" and is_product_sum(user, facts)):
                if any(_is_nothing(n, facts) for n in contraction_operands(user)):
                    continue
                for k, operand in enumerate(contraction_operands(user)):
                    if operand is node or (name == "sum" and operand in seen):
                        yield Candidate(user, k, normaliser, mixes)
                if mixes < 1 and name != "sum":
                    seen.add(user)
                    queue.append((user, mixes + 1))
                if name != "sum":
                    continue
            # Past another contraction, an exponential is one of other scores.
            if name in NORMALISERS and (mixes or name not in ("exp", "exp2")):
                continue
            if name in MOVES or name in OPERATIONS or name in SEVERAL:
                seen.add(user)
                queue.append((user, mixes))


def _is_nothing(node: fx.Node, facts: Facts) -> bool:
    """Whether a value is zero everywhere, like the state before the first chunk."""
    form = facts.closed_form(node) if node in facts.closed else None
    return isinstance(form, Const) and form.value == 0
