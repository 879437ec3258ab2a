"""Decoding with a state: a single step of a recurrence, whose state comes from a cache and goes back to it.

    S'  = keep * S + k v^T          the new state, which is read again (returned, or copied to the cache)
    out = q S'

No loop tells which value is the state. It is the one tensor of the new state's own size of which that is a linear
function; with it, the step is read like one of a loop (`refocus.patterns.recurrence`), delta rule and all.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, replace

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.close_linear import LinearSite, Read, close
from refocus.decays import log_of
from refocus.expand import without
from refocus.facts import Facts
from refocus.ir import ONE, ZERO, Axis, Expr, Load
from refocus.lift import Index, Unliftable, is_tensor, op_name
from refocus.lift_pointwise import POINTWISE
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_tables import MOVES
from refocus.linear_candidates import LinearCandidate, elements, product_operands
from refocus.loop_steps import AFTER, Ends, Rolled, Step
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import Product, Weight, product_of
from refocus.patterns.recurrence import Update, read_update
from refocus.patterns.single_step import gate_of, roles_of_step
from refocus.recognize_chunked import inside_of
from refocus.roles import Axes
from refocus.sizes import shape_of

_LEAST_DIMS = 3  # a batch of states
_MOST_VIEWS = 4  # after the product with queries, until heads and batch are told apart


@dataclass(frozen=True)
class _NewState:
    """A new state over its `own` axes, as a function of the old one, read at `own` too."""

    node: fx.Node
    own: Index
    old: Load
    update: Update
    keep: tuple[Expr, ...]
    visited: frozenset[fx.Node]


def decoding_at(root: fx.Node, facts: Facts, data: set[fx.Node], closed: Container[fx.Node]) -> LinearSite | None:
    """The site of a single step whose result `root` is, or views of it; None where it is none. `closed`: what other
    sites make."""
    for node in product_operands(root, data) or ():
        new = _kept(node, root, facts)
        if new is None or new in closed:
            continue
        found: LinearSite | None = None
        for state in _new_states(new, facts, data, closed):
            site = _first_site(root, state, facts, data)
            if site is None and found is not None:
                break  # it is a sum of what several steps add
            found = site or found
        if found is not None:
            return found
    return None


def _first_site(root: fx.Node, state: _NewState, facts: Facts, data: Set[fx.Node]) -> LinearSite | None:
    """The site of the result or of what it looks like after views; None where it is none."""
    with suppress(Stop, Unliftable):
        for result in _viewed(root):
            site = _site(result, state, facts, data)
            if site is not None:
                return site
    return None


def _kept(node: fx.Node, root: fx.Node, facts: Facts) -> fx.Node | None:
    """The new state that an operand is, seen through views and casts: the sum itself, or what of it is kept."""
    seen = [node]
    while op_name(node) in MOVES and node.all_input_nodes and node not in facts.opaque:
        node = node.all_input_nodes[0]
        seen.append(node)
    summed = node.op == "call_function" and (op_name(node) in POINTWISE or op_name(node) in CONTRACTIONS)
    kept = (n for n in reversed(seen) if any(_goes_on(user, root, facts) for user in n.users))
    new = next(kept, None) if summed else None
    if new is None or not is_tensor(new) or new.meta["val"].dim() < _LEAST_DIMS:
        return None
    return new


def _goes_on(user: fx.Node, root: fx.Node, facts: Facts) -> bool:
    """Whether a reader of the new state keeps it for later: it is not on the way to the result."""
    return user is not root and not nx.has_path(facts.flow, user, root)


def _viewed(root: fx.Node) -> Iterator[fx.Node]:
    """The result, and what it looks like after views."""
    node = root
    for _ in range(_MOST_VIEWS):
        yield node
        users = list(node.users)
        if len(users) != 1 or op_name(users[0]) not in MOVES or len(users[0].all_input_nodes) != 1:
            return
        node = users[0]


def _new_states(
    node: fx.Node, facts: Facts, data: Set[fx.Node], closed: Container[fx.Node]
) -> Iterator[_NewState]:  # fmt: skip
    """A new state as a function of an old one: of what the way to it starts from, or a value on the way that another
    step ends with, or that is read for something else, too. The last of these first."""
    own = tuple(ZERO if d == ONE else Axis(f"s{k}", d) for k, d in enumerate(shape_of(node)))
    axes = {a for a in own if isinstance(a, Axis)}
    above, leaves = _above(node, facts)
    known = [n for n in above - {node} if n in closed or any(_goes_on(user, node, facts) for user in n.users)]
    for source in sorted((*known, *leaves), key=facts.order.__getitem__, reverse=True):
        below = nx.descendants(facts.flow, source)
        on_the_way = {n for n in nx.ancestors(facts.flow, node) & below if n not in closed} | {node}
        lifter = Step(facts, interior=frozenset(above | on_the_way) - {source}, data=data, expands=True)
        with suppress(Unliftable):
            value = lifter.at(node, own)
            olds = {x for x in value.loads if x.tensor == source.name and {*x.index} - {ZERO} == axes}
            for old in olds:
                with suppress(Stop):
                    step = Axis("step", ONE)
                    update = read_update(value, old.tensor, old.index, step, lambda _: None)
                    yield _NewState(node, own, old, update, update.bases, frozenset(lifter.visited))
        if source in closed:
            break  # another step ends with it


def _above(node: fx.Node, facts: Facts) -> tuple[set[fx.Node], list[fx.Node]]:
    """What a new state is made of that is as large, element by element, and the tensors that this starts from."""
    size, found, leaves = elements(node), set[fx.Node](), list[fx.Node]()
    stack = [node]
    while stack:
        this = stack.pop()
        if this in found or this in leaves:
            continue
        name = op_name(this)
        opened = this.op == "call_function" and (name in POINTWISE or name in MOVES or name in CONTRACTIONS)
        if not opened or this in facts.opaque:
            leaves.append(this)
            continue
        found.add(this)
        stack.extend(n for n in this.all_input_nodes if is_tensor(n) and elements(n) == size)
    return found, leaves


def _site(root: fx.Node, state: _NewState, facts: Facts, data: Set[fx.Node]) -> LinearSite | None:
    """The site, if the result is a product of queries with the new state. Raises Stop with what it lacks."""
    axes = Axes([[] if d == ONE else [Axis(f"o{k}", d)] for k, d in enumerate(shape_of(root))])
    below = nx.descendants(facts.flow, state.node)
    interior = frozenset(nx.ancestors(facts.flow, root) & below) | {root}
    lifter = Step(facts, interior=interior, held={state.node: (AFTER.format(0), ())}, data=data)
    product = product_of(lifter.at(root, axes.index()))
    reads = [f for f in product.factors if isinstance(f, Load) and f.tensor == AFTER.format(0)]
    places = [x for f in reads for x in f.index]
    if (split := axes.split(places, {*axes.flat()}, "floordiv")) is not None:  # heads that share a state
        axes, product = split, product_of(lifter.at(root, split.index()))
        reads = [f for f in product.factors if isinstance(f, Load) and f.tensor == AFTER.format(0)]
    dims = tuple(a for group in axes.dims for a in group or (None,))
    if len(reads) != 1 or product.divisors or product.conditions or product.exponents:
        return None
    index = reads[0].index
    own = frozenset(x for x in index if isinstance(x, Axis))
    if any(not isinstance(x, Axis) and x != ZERO for x in index) or len(own) != sum(x != ZERO for x in index):
        return None
    rest = [f for f in product.factors if f is not reads[0]]
    dot = tuple(a for a in product.summed if a in own)
    if set(product.summed) - own or any(x.tensor == AFTER.format(0) for f in rest for x in f.loads):
        return None
    at: dict[Expr, Expr] = {a: x for a, x in zip(state.own, index) if isinstance(a, Axis)}
    written = product_of(s.substitute(state.update.write, at))
    if written.summed or written.divisors or written.conditions:
        return None
    query, key = Axis("step", ONE), Axis(f"{root.name}.key", ONE)
    keep = [without(s.substitute(x, at), {*own}, facts) for x in state.keep]
    lookup = None if state.update.lookup is None else state.update.lookup.at(at)
    erase = None if state.update.erase is None else s.substitute(state.update.erase, at)
    if erase is not None:
        erase = without(erase, {*own} if lookup is None else own - {*dot}, facts)
    gate, initial = gate_of(keep, lambda x: log_of(x, facts)), s.substitute(state.old, at)
    by_head = (frozenset() if erase is None else erase.axes) | (frozenset() if lookup is None else lookup.key.axes)
    try:
        decays = frozenset() if gate is None else gate.axes - {*dot}
        roles = roles_of_step(query, key, dot, own, rest, written.factors, by_head | decays)
    except Stop:  # it decays otherwise for each value
        gate, roles = None, roles_of_step(query, key, dot, own, rest, written.factors, by_head)
    if gate is None and keep and lookup is not None:
        raise Stop(Declined("a loop's state is multiplied with what is not known to be a positive decay"))
    if gate is None or (erase is not None and lookup is None and gate.axes & {*dot}):
        for factor in keep:  # what is no decay of whole channels is multiplied with what the state starts from
            initial = s.call("mul", initial, factor, dtype="float64" if initial.dtype == "float64" else "float32")
        gate = None
    whole = Product((*dot, key), (*rest, *written.factors))
    visited = frozenset(lifter.visited) | state.visited
    free = (query, *(a for a in dims if a is not None))
    weight = Weight(True, False, gate)
    roll = Rolled(
        whole, weight, dims, query, key, ZERO, visited,
        erase, tuple(s.substitute(x, at) for x in state.update.keys), lookup,
        ends=Ends(initial, state.node, index, None),
    )  # fmt: skip
    inside = inside_of(root, visited, facts) | inside_of(state.node, visited, facts)
    candidate = LinearCandidate(root, frozenset(), inside - {state.node})
    site = close(candidate, facts, Read(free, dims, whole, visited), roles, weight, roll)
    return replace(site, spelled="step")
