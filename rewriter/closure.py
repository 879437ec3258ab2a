"""What a site encloses, and whether what it reads is still there when the site reads it."""

from __future__ import annotations

import networkx as nx
from torch import fx

from refocus.facts import Candidate, Facts
from refocus.lift import is_tensor, op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_tables import MOVES
from refocus.lift_views import SPLITS
from refocus.patterns.declined import Declined, Stop


def interior_of(candidate: Candidate, facts: Facts, visited: set[fx.Node]) -> set[fx.Node]:
    """Nodes whose value holds scores: from the score products forward to the root."""
    if candidate.weights < 0:
        return set()
    scores = {n for n in visited if op_name(n) in CONTRACTIONS or _sums_product(n)}
    read = facts.flow.subgraph({*visited, candidate.root})
    below = nx.ancestors(read, candidate.root)
    starts = scores & below
    forward = starts.union(*(nx.descendants(read, start) & below for start in starts))
    return {n for n in forward if is_tensor(n) or op_name(n) in (*SPLITS, "unbind", "max")}


def reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether a reader has no use for a node's values: it asks for a size, or fills all that it is given."""
    if op_name(user) in _OF_SHAPE:
        return node not in user.args[1:]
    moves = op_name(user) in ("select", "slice", "narrow", "unsqueeze", "squeeze")
    return moves and bool(user.users) and all(reads_shape(reader, user) for reader in user.users)


_OF_SHAPE = frozenset(
    ("sym_size", "sym_numel", "sym_stride", "fill", "zeros_like", "ones_like", "full_like", "empty_like")
)


def is_returned(node: fx.Node) -> bool:
    """Whether what reads a value moves it, and hands it to whoever runs the graph: a graph break is enough."""
    seen, stack = {node}, [node]
    while stack:
        reader = stack.pop()
        if reader.op == "output":
            return True
        if reader is node or op_name(reader) in MOVES or op_name(reader) in ("scatter", "scatter_"):
            stack.extend(user for user in reader.users if user not in seen)
            seen.update(reader.users)
    return False


def _sums_product(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return op_name(node) == "sum" and isinstance(source, fx.Node) and op_name(source) == "mul"


def check_no_writes(facts: Facts, readers: set[fx.Node], root: fx.Node) -> None:
    """The region reads everything at the root: nothing may have been written since the eager code read it."""
    first_read: dict[int, int] = {}
    for reader in readers:
        for source in reader.all_input_nodes:
            storage = facts.storage.get(source, -1)
            if facts.storage[reader] == storage and reader is not root:
                continue  # a view reads nothing yet
            first_read[storage] = min(first_read.get(storage, facts.order[reader]), facts.order[reader])
    for position, storage in facts.writes:
        if first_read.get(storage, facts.order[root]) < position < facts.order[root]:
            raise Stop(Declined("a tensor it reads is written in place before it is used"))
