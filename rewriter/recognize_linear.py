"""Find linear attention: expand a candidate, sort its factors by the axes they hold, name the axes, build the region.

candidate   a contraction that ends in two products of data                      (refocus.linear_candidates)
expand      root[free] = sum over d, j of factors, first without, then with the knowledge of what i and j are
sort        queries, keys, values, mask, decay                                    (refocus.patterns.linear)
close       normalisers, operands, outputs                                        (refocus.close_linear)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import replace

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.attention import Part
from refocus.close_linear import LinearSite, Read, close, sources_of
from refocus.decay_tables import written_out
from refocus.expand import Expander, step_of, viewed
from refocus.facts import Facts
from refocus.held_values import HeldValues
from refocus.ir import Axis, Call, Const, Dot, Expr, Reduce, rewrite
from refocus.lift import Unliftable
from refocus.linear_candidates import LinearCandidate, data_of, linear_candidates, upstream
from refocus.loop_steps import OtherStart, Rolled
from refocus.loops import Loop, beginning, depends, loop_at, of_channels
from refocus.patterns.declined import Declined, Near, Stop
from refocus.patterns.directions import looks_ahead, turned_around, upright
from refocus.patterns.linear import (
    Pair,
    Product,
    Weight,
    holds_sum,
    obstacle,
    product_of,
    renamed,
    settled,
    sort,
    value_of,
    weight_of,
)
from refocus.patterns.local_terms import of_position
from refocus.patterns.mask_sums import one_sum
from refocus.patterns.summands import terms_that
from refocus.recognize import Left, Site
from refocus.recognize_chunked import chunked_at, inside_of
from refocus.recognize_decoding import decoding_at
from refocus.recognize_loops import readings
from refocus.sizes import shape_of


def recognize_linear(facts: Facts, found: Sequence[Site | Left]) -> list[Site | Left | LinearSite]:
    """The sites of a graph with its linear attentions among them, in graph order."""
    sites = [x for x in found if isinstance(x, Site)]
    kept = {x.root: x for x in found if isinstance(x, Left)}
    data = data_of(facts)
    # A softmax over features that parameters name, or over positions for each of these, may be a feature map.
    closed = {n for site in sites if not _names_features(site, data) for n in (site.root, *site.interior)}
    linear: list[LinearSite] = []
    lefts: dict[fx.Node, Left] = {}
    gathered = dict(_loops(facts))
    given: set[fx.Node] = set()
    for gather, loop in gathered.items():
        if given.issuperset(loop.parts):
            continue
        try:
            site = _of_loop(loop, facts, data)
        except Stop as stop:
            lefts[gather] = Left(gather, gather, stop.declined)
            # Where states are read themselves, each step may be an attention.
            closed |= set() if stop.declined.apart or loop.gives_states else depends(loop, facts)
            continue
        linear.append(site)
        given.update(o.node for o in site.outputs)
        closed |= given | site.interior
    for root in facts.order:
        roll = chunked_at(root, facts, data, closed)
        if roll is not None:
            with suppress(Stop):
                site = _rolled_site(root, roll, inside_of(root, roll.visited, facts), facts)
                linear.append(site)
                closed.update((root, *site.interior))
    for root in facts.order:
        if root in closed:
            continue
        outcome = decoding_at(root, facts, data, closed) or _first(root, facts, data, closed)
        if isinstance(outcome, LinearSite):
            linear.append(outcome)
            closed.update((*(o.node for o in outcome.outputs), *outcome.interior))
        elif outcome is not None and root not in kept:
            lefts[root] = outcome
    inside = {n for site in linear for n in (site.root, *site.interior)}
    # A loop that was read in another way, step by step, is none that is left.
    given = inside.union(o.node for site in linear for o in site.outputs)
    lefts = {n: x for n, x in lefts.items() if n not in gathered or not gathered[n].carried_by(given)}
    sites = [x for x in sites if x.root not in inside]
    gone = inside.union(*((x.root, *x.interior) for x in sites))
    features = {n for site in linear for x in sources_of(site, facts) for n in upstream(x, data)}
    reported = [x for x in kept.values() if x.root not in gone and x.normaliser not in gone | features]
    new = [x for root, x in lefts.items() if root not in gone and not _told(x, reported, facts)]
    return sorted([*sites, *linear, *reported, *new], key=lambda x: facts.order[x.root])


def _told(left: Left, reported: list[Left], facts: Facts) -> bool:
    """Whether the same attention is among those reported: it ends here, or one of its normalisers is on the way from
    the scores (one of several products with parts of a softmax)."""
    if any(n in (left.root, *left.root.all_input_nodes) for x in reported for n in (x.root, x.normaliser)):
        return True
    above = nx.ancestors(facts.flow, left.root)
    return any(x.normaliser in above and nx.has_path(facts.flow, left.normaliser, x.normaliser) for x in reported)


def _loops(facts: Facts) -> list[tuple[fx.Node, Loop]]:
    """The unrolled loops that hand a matrix for each batch from step to step, or numbers of each channel of which one
    is divided by another; others are no attention. Two steps that start from data are any two values of which one is
    made of the other: f(x) beside f(-x). A gather that nobody reads is of steps known to be such."""
    found = [(node, loop) for node in facts.order if (loop := loop_at(node, facts)) is not None]
    return [
        (node, loop)
        for node, loop in found
        if (any(x[0].meta["val"].dim() > 2 for x in loop.states) or of_channels(loop, facts))
        and (loop.steps > 2 or not node.users or all(x[0] in facts.closed for x in loop.states))
    ]


def _names_features(site: Site, data: set[fx.Node]) -> bool:
    """Whether parameters stand for the keys or for the queries: its probabilities are features, of each position or
    over all of them."""
    return all(
        any(not _holds_data(part, side, data) for side in (lambda dot: dot.key, lambda dot: dot.query))
        for part in site.parts
    )


def _holds_data(part: Part, side: Callable[[Dot], Expr], data: set[fx.Node]) -> bool:
    bound = {o.name: b for o, b in zip(part.region.operands, part.bindings)}
    loads = [load.tensor for dot in part.region.dots for load in side(dot).loads]
    return any(not isinstance(n := bound[name], fx.Node) or n in data for name in loads if name in bound)


def _first(root: fx.Node, facts: Facts, data: set[fx.Node], closed: set[fx.Node]) -> LinearSite | Left | None:
    """The first candidate that is one, or why the first that looked like one is not."""
    declined: Left | None = None
    for candidate in linear_candidates(root, facts, data, closed):
        try:
            site = _attempt(candidate, facts)
        except Unliftable:
            continue
        except Stop as stop:
            core = min(candidate.cores, key=facts.order.__getitem__)
            declined = declined or Left(root, core, stop.declined)
            continue
        if site is not None:
            return site
    return declined


def _value(
    candidate: LinearCandidate, facts: Facts, node: fx.Node, queries: Set[Axis], keys: Set[Axis],
    values: HeldValues | None = None,
) -> tuple[tuple[Axis | None, ...], Expr, Set[fx.Node]]:  # fmt: skip
    """A node over axes of its dimensions, and what was looked at for it."""
    dims = tuple(None if d == Const(1) else Axis(f"o{k}", d) for k, d in enumerate(shape_of(node)))
    lifter = Expander(facts, interior=candidate.interior | {node}, root=node)
    lifter.query_axes |= queries
    lifter.key_axes |= keys
    value = lifter.at(node, [Const(0) if a is None else a for a in dims])
    value = rewrite(value if values is None else written_out(value, values), _detached, s.rebuild)
    return dims, value, lifter.visited


def _expand(candidate: LinearCandidate, facts: Facts, pair: Pair | None, values: HeldValues | None = None) -> Read:
    queries, keys = (set(), set()) if pair is None else ({pair[0]}, {pair[1]})
    dims, value, visited = _value(candidate, facts, candidate.root, queries, keys, values)
    product = product_of(value, pair)
    product = product if pair is None else settled(product, pair)
    return Read(tuple(a for a in dims if a is not None), dims, product, visited)


def _attempt(candidate: LinearCandidate, facts: Facts) -> LinearSite | None:
    """The site of a candidate; None where it has nothing of an attention. Raises Stop with what it lacks."""
    first = _expand(candidate, facts, None)
    pair = _pair_of(first)
    values = HeldValues(facts)
    if pair is not None:
        read = _expand(candidate, facts, pair, values)
    else:
        added = _added_up(candidate, facts, values)
        reason = obstacle(first.product, first.free)
        if added is None and reason is not None:
            raise Stop(reason)
        if added is None:
            return None
        read, pair = added
    read, pair = _facing_back(read, pair)
    roles = sort(read.product, read.free, *pair)
    if roles is None:
        return None
    weight = _weight(read.product, pair, facts)
    if weight.causal and roles.query.size != roles.key.size:
        sizes = (roles.query.size, roles.key.size)
        raise Stop(Declined("the mask is causal, and there are not as many keys as queries", equal=sizes))
    if any(holds_sum(side) for side in (*roles.queries, *roles.keys, *roles.values)):
        return None  # a chain of more than three products (an inverse by iteration): none of them is an attention
    site = close(candidate, facts, read, roles, weight, values=values)
    values.assume()
    return site


def _added_up(candidate: LinearCandidate, facts: Facts, values: HeldValues) -> tuple[Read, Pair] | None:
    """The one sum over keys that several are together, where they differ in their masks; None where there are not
    several. Raises Stop with what they lack."""
    dims, value, visited = _value(candidate, facts, candidate.root, set(), set())
    free = tuple(a for a in dims if a is not None)
    products = [product_of(x) for x in terms_that(holds_sum, value)]
    pairs = [pair for p in products for pair in _pairs_of(Read(free, dims, p, visited))]
    masked = [pair for pair in pairs if any({*pair} <= c.axes for p in products for c in p.conditions)]
    if len(products) < 2:
        return None
    for query, key in dict.fromkeys(masked[:1] or pairs):
        keys = {j for p in products for j in p.summed if j.size == key.size and sort(p, free, query, j) is not None}
        try:
            dims, value, visited = _value(candidate, facts, candidate.root, {query}, keys, values)
            terms = [_over(x, query, keys, key) for x in terms_that(holds_sum, value)]
            found, rest = one_sum(terms, (query, key))
            local = tuple(of_position(value_of(p, value.dtype), key) for p in rest)
        except Stop:
            if masked:
                raise
            continue  # products that are added up, like many others
        return Read(free, dims, settled(found, (query, key)), visited, local), (query, key)
    return None


def _over(term: Expr, query: Axis, keys: Set[Axis], key: Axis) -> Product:
    """A term taken apart, its keys counted by `key`."""
    own = next((a for a in product_of(term).summed if a in keys and a.size == key.size), None)
    if own is None:
        return product_of(term)
    product = settled(product_of(term, (query, own)), (query, own))
    return upright(renamed(product, {own: key}), (query, key))


def _facing_back(read: Read, pair: Pair) -> tuple[Read, Pair]:
    """A reading in which a query sees what is before it: where it saw what is after, with all counted from the end."""
    product = upright(read.product, pair)
    if not looks_ahead(product, pair):
        return replace(read, product=product), pair
    product, turned = turned_around(product, pair)
    free = tuple(turned.new if a == turned.old else a for a in read.free)
    return replace(read, free=free, product=product, turned=turned), (turned.new, pair[1])


def _detached(node: Expr) -> Expr | None:
    """A sum that nothing flows back through is that of its terms, cut off afterwards: normalisers often are."""
    if isinstance(node, Reduce) and isinstance(node.body, Call) and node.body.op == "detach":
        return s.call("detach", Reduce(node.op, node.axis, node.body.args[0], node.dtype), dtype=node.dtype)
    return None


def _weight(product: Product, pair: Pair, facts: Facts) -> Weight:
    exponents = tuple((sign, viewed(e, facts)) for sign, e in product.exponents)
    return weight_of(replace(product, exponents=exponents), pair, lambda value, axis: step_of(value, axis, facts))


def _of_loop(loop: Loop, facts: Facts, data: set[fx.Node]) -> LinearSite:
    """The site that a loop spells step by step. Raises Stop with what it lacks."""
    begun = beginning(loop, facts)
    if loop.headed:
        if begun is None:
            raise Stop(Declined("the first step of a loop is not the same function of what it reads"))
        return _of_steps(begun, facts, data)
    reason: Stop | None = None
    if begun is not None:
        try:
            return _of_steps(begun, facts, data)
        except OtherStart:
            pass
        except Stop as stop:
            reason = stop
    try:
        return _of_steps(loop, facts, data)
    except Stop as stop:
        raise reason or stop from None


def _of_steps(loop: Loop, facts: Facts, data: set[fx.Node]) -> LinearSite:
    outside = loop.read_elsewhere(facts)
    if outside is not None:
        raise Stop(Declined("a value inside a loop is read after it", outside.name, apart=True))
    if of_channels(loop, facts):
        raise Stop(Declined("each channel has weights of its own, which are no products of queries and keys"))
    shared = loop.shared()  # and what that is made of: it stays
    stays = shared.union(*(nx.ancestors(facts.flow, n) for n in shared))
    reason: Stop | None = None
    for reading in readings(loop):
        try:
            roll = replace(reading(loop, facts, data), apart=loop.apart)
            inside = inside_of(loop.gather, roll.visited | loop.body, facts) | loop.body
            given = {loop.final, *(row.node for row in roll.apart)}
            return _rolled_site(loop.gather, roll, inside - stays - given, facts)
        except Stop as stop:
            reason = stop if reason is None or isinstance(stop, Near) else reason
    assert reason is not None
    raise reason


def _rolled_site(root: fx.Node, roll: Rolled, interior: frozenset[fx.Node], facts: Facts) -> LinearSite:
    """The site of what is an attention over all positions. Raises Stop with what it lacks."""
    pair = roll.query, roll.key
    read = Read(roll.free, roll.dims, roll.product, roll.visited, roll.local)
    # The state of a loop may be a vector: sums of keys, say, that a normaliser reads.
    roles = sort(read.product, read.free, *pair, of_numbers=True)
    if roles is None:
        if sort(replace(read.product, exponents=()), read.free, *pair) is not None:
            raise Stop(Declined("a decay for each value channel"))
        raise Stop(Declined("the results are no products of queries with a state"))
    weight = roll.weight or _weight(read.product, pair, facts)
    if weight.gate is not None and roll.named is not None:
        weight = replace(weight, gate=roll.named.put_back(weight.gate))
    if roll.late and weight.gate is not None:
        # The gates of a step are those of the one before; what a loop starts from has not decayed in the first.
        gate = s.substitute(weight.gate, {roll.key: s.maximum(roll.key, Const(1))})
        weight = replace(weight, gate=s.where(s.le(Const(1), roll.key), gate, Const(0.0, gate.dtype)))
    candidate = LinearCandidate(root, frozenset(), interior)
    return close(candidate, facts, read, roles, weight, roll)


def _pair_of(read: Read) -> Pair | None:
    """The query and key axis: those that come apart as such, the longest where several do (a chain of three matrices
    can be read from both ends)."""

    def length(axis: Axis) -> int:
        return int(axis.size.value) if isinstance(axis.size, Const) else 1 << 40

    return max(_pairs_of(read), key=lambda pair: length(pair[0]) * length(pair[1]), default=None)


def _pairs_of(read: Read) -> list[Pair]:
    """What may be the query and key axis."""
    return [(i, j) for j in read.product.summed for i in read.free if sort(read.product, read.free, i, j) is not None]
