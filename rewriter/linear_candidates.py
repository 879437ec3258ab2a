"""Where linear attention may be: a product of two contractions of data, with nothing that normalises over the keys.

A product of data is one whose operands all depend on what the model is given, not on its parameters alone: so neither
projections nor low-rank weights are taken for queries, keys and values. Of a matrix that is handed in as it is, and of
a parameter read at places that data decide (the weights of an expert), no more is known than of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Set
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from refocus.convolutions import CHANNEL_PRODUCT
from refocus.facts import Facts, contraction_operands, is_kept
from refocus.lift import arguments, is_tensor, op_name
from refocus.lift_pointwise import POINTWISE
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_tables import MOVES, OPERATIONS
from refocus.sizes import hint

# Their second operand is a weight, and their first a sum's start.
_PROJECTIONS = ("linear", "addmm", "baddbmm", CHANNEL_PRODUCT)
_SPLITS = ("split", "chunk", "unbind", "split_with_sizes")


@dataclass(frozen=True)
class LinearCandidate:
    """`root` contracts values with what `cores`, products of data, have become; `interior` is all between, cores and
    root included."""

    root: fx.Node
    cores: frozenset[fx.Node]
    interior: frozenset[fx.Node]


def linear_candidates(root: fx.Node, facts: Facts, data: set[fx.Node], closed: set[fx.Node]) -> list[LinearCandidate]:
    """What may be a linear attention that ends in `root`, to be tried in this order. `data`: the nodes that depend on
    the model's input; `closed`: contractions that are attention already, and are not looked into."""
    operands = product_operands(root, data)
    if operands is None:
        return []
    reached = [cores_of(node, data, closed) for node in operands]
    choices = []
    for k, cores in enumerate(reached):
        others = [n for m, n in enumerate(operands) if m != k and n in data]
        if cores and not any(_chained(n, cores, facts, data) for n in others):
            choices.append(cores)
    if len(choices) > 1:
        choices.append(frozenset().union(*choices))
    if sum(n in data for n in operands) > 2:  # all in one product
        choices.append(frozenset((root,)))
    return [LinearCandidate(root, cores, _between(root, cores, facts)) for cores in choices]


def _chained(other: fx.Node, cores: frozenset[fx.Node], facts: Facts, data: set[fx.Node]) -> bool:
    """Whether an operand is made of the products that it is multiplied with, or they of it by way of other products:
    links of a longer chain (an inverse by iteration), and no queries, keys and values."""
    while len(other.all_input_nodes) == 1 and op_name(other) in _ALONE and other not in cores:
        other = other.all_input_nodes[0]
    below = nx.descendants(facts.flow, other) | {other}
    if other in cores or any(nx.has_path(facts.flow, core, other) for core in cores):
        return True
    within = [core for core in cores if core in below]
    return any(
        n in below and product_operands(n, data) is not None for core in within for n in nx.ancestors(facts.flow, core)
    )


def data_of(facts: Facts) -> set[fx.Node]:
    """The nodes that depend on what the model is called with, but for what may be weights."""
    starts = [n for n in facts.order if n.op == "placeholder" and not is_kept(n)]
    return set(starts).union(*(nx.descendants(facts.flow, n) for n in starts)) - _weights(facts)


def _weights(facts: Facts) -> set[fx.Node]:
    """Parameters, matrices that are inputs of the graph (where it broke, weights come in like that), and parts of them:
    a table that tokens are looked up in is none."""
    found: set[fx.Node] = set()
    for node in facts.order:
        if node.op == "placeholder":
            matrix = _is_float(node) and (is_kept(node) or node.meta["val"].dim() <= 2)
            found.update((node,) if matrix else ())
        elif op_name(node) in _READS:
            sources = [n for n in node.all_input_nodes if _is_float(n)]
            found.update((node,) if sources and found.issuperset(sources) else ())
    return found


def _is_float(node: fx.Node) -> bool:
    """Whether a node is a tensor of floats, or several."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, torch.Tensor) and first.is_floating_point()


# What a value is still that value after, or a multiple of it, where it is the only tensor.
_ALONE = frozenset((*MOVES, *POINTWISE))
_READS = frozenset((*MOVES, "to", "_to_copy")) - {"embedding"}


def product_operands(node: fx.Node, data: Set[fx.Node]) -> list[fx.Node] | None:
    """The operands of a product of data that is summed over something, or laid out as one (an outer product)."""
    name = op_name(node)
    if node.op != "call_function" or not is_tensor(node) or not node.meta["val"].is_floating_point():
        return None
    if name in CONTRACTIONS and name not in _PROJECTIONS:
        operands = contraction_operands(node)
    elif name == "sum" and isinstance(arguments(node)[0], fx.Node) and op_name(arguments(node)[0]) == "mul":
        operands = contraction_operands(node)
    else:
        return None
    factors = [n for n in operands if n in data]
    return operands if len(factors) > 1 else None


def cores_of(start: fx.Node, data: set[fx.Node], closed: set[fx.Node]) -> frozenset[fx.Node]:
    """The nearest products of data that an operand is made of; failing these, products under a running sum."""
    found: set[fx.Node] = set()
    running: set[fx.Node] = set()
    for node in upstream(start, data, closed):
        if node in closed:
            continue
        if op_name(node) in CONTRACTIONS:
            if product_operands(node, data) is not None:
                found.add(node)
        elif op_name(node) == "cumsum" and (outer := _outer(arguments(node)[0], data)) is not None:
            running.add(outer)
        else:
            found |= _summed_pairs(node, data)
    return frozenset(found or running)


def upstream(start: fx.Node, data: set[fx.Node], closed: Container[fx.Node] = ()) -> Iterator[fx.Node]:
    """What a node is made of, through operations that can be lifted, up to contractions."""
    seen: set[fx.Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node in seen or node not in data or node.op != "call_function":
            continue
        seen.add(node)
        yield node
        name = op_name(node)
        if name in CONTRACTIONS or node in closed or _summed_pairs(node, data):
            continue
        if name in MOVES or name in OPERATIONS or name in _SPLITS:
            stack.extend(node.all_input_nodes)


def _summed_pairs(node: fx.Node, data: set[fx.Node]) -> set[fx.Node]:
    """The multiplications under a sum, of tensors that were spread over one another's axes: a contraction written out.
    Empty where a node is none."""
    source = arguments(node)[0] if op_name(node) == "sum" and is_tensor(node) else None
    if not isinstance(source, fx.Node) or op_name(source) != "mul":
        return set()
    factors: list[fx.Node] = []
    products = {source}
    stack = [source]
    while stack:
        for a in arguments(stack.pop())[:2]:
            if isinstance(a, fx.Node) and is_tensor(a):
                if op_name(a) == "mul" and elements(a) == elements(source):
                    products.add(a)
                    stack.append(a)
                else:
                    factors.append(a)
    spread = sum(n in data and elements(n) < elements(source) for n in factors) > 1
    return products if spread else set()


def elements(node: fx.Node) -> int:
    """How many elements a tensor has, or about."""
    return math.prod(hint(size) for size in node.meta["val"].shape)


def _outer(node: fx.Node, data: set[fx.Node]) -> fx.Node | None:
    """The multiplication of two tensors of data that a running sum adds up."""
    while isinstance(node, fx.Node) and op_name(node) in MOVES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or op_name(node) != "mul":
        return None
    return node if sum(isinstance(a, fx.Node) and a in data and is_tensor(a) for a in arguments(node)) == 2 else None


def _between(root: fx.Node, cores: frozenset[fx.Node], facts: Facts) -> frozenset[fx.Node]:
    above = nx.ancestors(facts.flow, root) | {root}
    below = cores.union(*(nx.descendants(facts.flow, core) for core in cores))
    return frozenset(above & below)
