"""What a site encloses, and whether what it reads is still there when the site reads it."""

from __future__ import annotations

import networkx as nx
from torch import fx

from refocus.attention import Part
from refocus.blank import is_put_alike
from refocus.candidates import Candidate
from refocus.facts import Facts, contraction_operands
from refocus.hoist import Hoisted
from refocus.ir import Call, Region
from refocus.lift import is_tensor, op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_tables import MOVES, OPERATIONS
from refocus.lift_views import SPLITS
from refocus.normal_form import Binding
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.factors import holds_scores


def interior_of(candidate: Candidate, facts: Facts, visited: set[fx.Node]) -> set[fx.Node]:
    """Nodes whose value holds scores: from the score products forward to the root."""
    if candidate.weights < 0:
        return set()
    scores = {n for n in visited if is_product(n)}
    read = facts.flow.subgraph({*visited, candidate.root})
    below = nx.ancestors(read, candidate.root)
    starts = scores & below
    forward = starts.union(*(nx.descendants(read, start) & below for start in starts))
    return {n for n in forward if is_tensor(n) or op_name(n) in (*SPLITS, "unbind", "max")}


def reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether a reader has no use for a node's values: it asks for a size, or fills all that it is given."""
    if op_name(user) in _OF_SHAPE:
        return node not in user.args[1:]
    if is_put_alike(user):
        return node is not user.args[0]
    moves = op_name(user) in ("select", "slice", "narrow", "unsqueeze", "squeeze", "diagonal")
    return moves and bool(user.users) and all(reads_shape(reader, user) for reader in user.users)


_OF_SHAPE = frozenset(
    ("sym_size", "sym_numel", "sym_stride", "fill", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like",
     "randn_like", "new_empty", "new_zeros", "new_ones", "new_full")
)  # fmt: skip


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


def only_roots_after(node: fx.Node, facts: Facts) -> frozenset[fx.Node]:
    """The results that may be an attention's and that a reader of weights leads to (other values are multiplied with
    them in another shape or order); none, if it leads anywhere else, too."""
    roots: set[fx.Node] = set()
    seen, stack = {node}, [node]
    while stack:
        reader = stack.pop()
        if op_name(reader) not in _FOLLOWED or not reader.users:
            return frozenset()
        roots |= facts.roots & reader.users.keys()
        following = reader.users.keys() - facts.roots - seen
        seen |= following
        stack.extend(following)
    return frozenset(roots)


_FOLLOWED = frozenset((*MOVES, *OPERATIONS, *SPLITS, "unbind"))


def check_reads(facts: Facts, interior: set[fx.Node], part: Part) -> None:
    """A region reads nothing that is made of its own scores: they would be stored for that, and computed once more in
    the region, in another order of summation. Where the two are compared (scores with the tenth greatest of them), the
    last bit decides, so that nothing may be made of products of the same tensors elsewhere, either."""
    compared = _compared(part.region)
    twins = _twins(facts, interior) if compared else set()
    for operand, binding in zip(part.region.operands, part.bindings):
        for node in nodes_of(binding, facts):
            made_of = _made_of(node, facts)
            own = made_of & interior
            if own:
                readers = (n for n in made_of - interior if not own.isdisjoint(n.all_input_nodes))
                reader = min(readers, key=facts.order.__getitem__, default=node)
                raise Stop(Declined(f"a score is read elsewhere (by `{op_name(reader)}`)", reader.name))
            if operand.name in compared and not made_of.isdisjoint(twins):
                reason = "scores are compared with what is made of a second product of the same queries and keys"
                raise Stop(Declined(reason, node.name))


def _made_of(node: fx.Node, facts: Facts) -> set[fx.Node]:
    """A value and what it is computed from. What comes through a result that may be an attention's is its own to read:
    whether scores that two attentions share are stored is decided for both together."""
    found, stack = {node}, [node]
    while stack:
        n = stack.pop()
        if n in facts.roots:
            continue
        stack.extend(p for p in facts.flow.predecessors(n) if p not in found)
        found.update(facts.flow.predecessors(n))
    return found


def nodes_of(binding: Binding, facts: Facts) -> list[fx.Node]:
    """The nodes that an operand is made of."""
    if isinstance(binding, Hoisted):
        return [facts.nodes[x.tensor] for x in binding.value.loads if x.tensor in facts.nodes]
    return [binding] if isinstance(binding, fx.Node) else []


def _compared(region: Region) -> set[str]:
    """Operands of floats that decide, together with scores, where a condition holds."""
    return {
        load.tensor
        for e in (region.logits, region.mask, region.gate)
        for n in e.walk()
        if isinstance(n, Call) and n.op in ("lt", "le", "eq", "ne") and any(holds_scores(a) for a in n.args)
        for load in n.loads
        if load.is_float
    }


def _twins(facts: Facts, interior: set[fx.Node]) -> set[fx.Node]:
    """Products of what the scores are products of, that stand elsewhere."""
    products = {n: frozenset(_source(a) for a in contraction_operands(n)) for n in facts.order if is_product(n)}
    own = {factors for n, factors in products.items() if n in interior}
    return {n for n, factors in products.items() if n not in interior and factors in own}


def is_product(node: fx.Node) -> bool:
    """Whether a value is a product of queries and keys, in whatever way it is written."""
    return op_name(node) in CONTRACTIONS or _sums_product(node)


def _source(node: fx.Node) -> fx.Node:
    """The tensor that was moved and scaled to make a factor."""
    while op_name(node) in MOVES or op_name(node) in ("mul", "div"):
        tensors = [a for a in node.all_input_nodes if is_tensor(a)]
        if len(tensors) != 1:
            break
        node = tensors[0]
    return node


def _sums_product(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return op_name(node) == "sum" and isinstance(source, fx.Node) and op_name(source) == "mul"


def check_no_writes(facts: Facts, readers: set[fx.Node], root: fx.Node) -> None:
    """The region reads everything at the root: nothing may have been written since the eager code read it."""
    if overwritten(facts, readers, root):
        raise Stop(OVERWRITTEN)


def overwritten(facts: Facts, readers: set[fx.Node], root: fx.Node) -> frozenset[fx.Node]:
    """Those of the readers of what is written before the root, and after they have read it."""
    found = set()
    for reader in readers:
        for source in reader.all_input_nodes:
            storage = facts.storage.get(source, -1)
            if facts.storage[reader] == storage and reader is not root:
                continue  # a view reads nothing yet
            if any(facts.order[reader] < at < facts.order[root] for at, written in facts.writes if written == storage):
                found.add(reader)
    return frozenset(found)


OVERWRITTEN = Declined("a tensor it reads is written in place before it is used")
