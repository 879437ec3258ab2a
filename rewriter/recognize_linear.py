"""Find linear attention: expand a candidate, sort its factors by the axes they hold, name the axes, build the region.

candidate   a contraction that ends in two products of data                      (refocus.linear_candidates)
expand      root[free] = sum over d, j of factors, first without, then with the knowledge of what i and j are
sort        queries, keys, values, mask, decay                                    (refocus.patterns.linear)
normaliser  sums of the weights, inside the weights or beside the root, become a second result
close       operands are computed outside, from what the factors load
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import permutations

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.expand import Expander, step_of, viewed
from refocus.facts import Facts
from refocus.hoist import Hoisted
from refocus.ir import ONE, Axis, Const, Expr, Load, Operand, Reduce
from refocus.lift import Unliftable, dtype_of, is_tensor, op_name
from refocus.linear_candidates import LinearCandidate, data_of, linear_candidates, upstream
from refocus.linear_ir import LinearRegion, notation
from refocus.loop_steps import Ends, Rolled
from refocus.loops import Loop, depends, loop_at
from refocus.normal_form import BATCH_NAMES
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.linear import (
    Pair,
    Product,
    Roles,
    Weight,
    as_number,
    holds_sum,
    obstacle,
    product_of,
    settled,
    sort,
    weight_of,
)
from refocus.patterns.linear_sums import Shared, shared_by, sums_in
from refocus.recognize import Left, Site
from refocus.recognize_chunked import chunked_at, inside_of
from refocus.recognize_loops import rolled
from refocus.sizes import shape_of


@dataclass(frozen=True)
class Output:
    """A node that is replaced: `value` over `dims` (its dimensions), from loads of "out", "sums" and other nodes."""

    node: fx.Node
    dims: tuple[Axis | None, ...]
    value: Expr


@dataclass(frozen=True)
class LinearSite:
    """A recognised linear attention. `bindings` are what the operands of `region` are computed from, over the site's
    own axes in the order of their dimensions. `spelled`: "pairs" where the model makes an N x N tensor, "states" where
    it makes a state for each position, "steps" where it loops over them, "chunks" where it makes pairs and states of
    chunks of `rows` positions, "linear" where it does none of these."""

    root: fx.Node
    region: LinearRegion
    bindings: tuple[Hoisted, ...]
    outputs: tuple[Output, ...]
    spelled: str
    interior: frozenset[fx.Node]
    rows: Expr = ONE
    family: str = "linear"

    def __str__(self) -> str:
        return f"{self.root}:\n{notation(self.region)}"


def recognize_linear(facts: Facts, found: Sequence[Site | Left]) -> list[Site | Left | LinearSite]:
    """The sites of a graph with its linear attentions among them, in graph order."""
    sites = [x for x in found if isinstance(x, Site)]
    kept = {x.root: x for x in found if isinstance(x, Left)}
    data = data_of(facts)
    # A softmax over features that parameters name, not over positions, may be a feature map.
    closed = {n for site in sites if not _keys_are_kept(site, data) for n in (site.root, *site.interior)}
    linear: list[LinearSite] = []
    lefts: dict[fx.Node, Left] = {}
    for gather, loop in _loops(facts):
        try:
            site = _of_loop(loop, facts, data)
        except Stop as stop:
            lefts[gather] = Left(gather, gather, stop.declined)
            closed |= depends(loop, facts)
            continue
        linear.append(site)
        closed.update((gather, *site.interior))
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
        outcome = _first(root, facts, data, closed)
        if isinstance(outcome, LinearSite):
            linear.append(outcome)
            closed.update((*(o.node for o in outcome.outputs), *outcome.interior))
        elif outcome is not None and root not in kept:
            lefts[root] = outcome
    inside = {n for site in linear for n in (site.root, *site.interior)}
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
    """The unrolled loops that hand a matrix for each batch from step to step; others are no attention. Two steps that
    start from data are any two values of which one is made of the other: f(x) beside f(-x)."""
    found = [(node, loop) for node in facts.order if (loop := loop_at(node, facts)) is not None]
    return [
        (node, loop)
        for node, loop in found
        if any(x[0].meta["val"].dim() > 2 for x in loop.states)
        and (loop.steps > 2 or all(x[0] in facts.closed for x in loop.states))
    ]


def sources_of(site: LinearSite, facts: Facts) -> list[fx.Node]:
    """The nodes that stand in for a site is computed from."""
    exprs = [*(b.value for b in site.bindings), *(o.value for o in site.outputs)]
    return list(dict.fromkeys(facts.nodes[x.tensor] for e in exprs for x in _loads(e) if x.tensor in facts.nodes))


def _keys_are_kept(site: Site, data: set[fx.Node]) -> bool:
    for part in site.parts:
        bound = {o.name: b for o, b in zip(part.region.operands, part.bindings)}
        for dot in part.region.dots:
            for load in dot.key.loads:
                if load.tensor in bound and (not isinstance(n := bound[load.tensor], fx.Node) or n in data):
                    return False
    return True


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


@dataclass(frozen=True)
class _Read:
    """A candidate's root at its free axes, taken apart."""

    free: tuple[Axis, ...]
    dims: tuple[Axis | None, ...]
    product: Product
    visited: Set[fx.Node]


def _expand(candidate: LinearCandidate, facts: Facts, node: fx.Node, pair: Pair | None) -> _Read:
    dims = tuple(None if d == Const(1) else Axis(f"o{k}", d) for k, d in enumerate(shape_of(node)))
    lifter = Expander(facts, interior=candidate.interior | {node}, root=node)
    if pair is not None:
        lifter.query_axes.add(pair[0])
        lifter.key_axes.add(pair[1])
    value = lifter.at(node, [Const(0) if a is None else a for a in dims])
    product = product_of(value, pair)
    product = product if pair is None else settled(product, pair)
    return _Read(tuple(a for a in dims if a is not None), dims, product, lifter.visited)


def _attempt(candidate: LinearCandidate, facts: Facts) -> LinearSite | None:
    """The site of a candidate; None where it has nothing of an attention. Raises Stop with what it lacks."""
    first = _expand(candidate, facts, candidate.root, None)
    pair = _pair_of(first)
    if pair is None:
        reason = obstacle(first.product, first.free)
        if reason is not None:
            raise Stop(reason)
        return None
    read = _expand(candidate, facts, candidate.root, pair)
    roles = sort(read.product, read.free, *pair)
    if roles is None:
        return None
    weight = _weight(read.product, pair, facts)
    if weight.causal and roles.query.size != roles.key.size:
        raise Stop(Declined("the mask is causal, and there are not as many keys as queries"))
    if any(holds_sum(side) for side in (*roles.queries, *roles.keys, *roles.values)):
        return None  # a chain of more than three products (an inverse by iteration): none of them is an attention
    return _close(candidate, facts, read, roles, weight)


def _weight(product: Product, pair: Pair, facts: Facts) -> Weight:
    exponents = tuple((sign, viewed(e, facts)) for sign, e in product.exponents)
    return weight_of(replace(product, exponents=exponents), pair, lambda value, axis: step_of(value, axis, facts))


def _of_loop(loop: Loop, facts: Facts, data: set[fx.Node]) -> LinearSite:
    """The site that a loop spells step by step. Raises Stop with what it lacks."""
    outside = loop.read_elsewhere()
    if outside is not None:
        raise Stop(Declined("a value inside a loop is read after it", outside.name))
    roll = rolled(loop, facts, data)
    inside = inside_of(loop.gather, roll.visited | loop.body, facts)
    return _rolled_site(loop.gather, roll, (inside | loop.body) - {loop.final}, facts)


def _rolled_site(root: fx.Node, roll: Rolled, interior: frozenset[fx.Node], facts: Facts) -> LinearSite:
    """The site of what is an attention over all positions. Raises Stop with what it lacks."""
    pair = roll.query, roll.key
    read = _Read(roll.free, roll.dims, roll.product, roll.visited)
    roles = sort(read.product, read.free, *pair)
    if roles is None:
        raise Stop(Declined("the results are no products of queries with a state"))
    weight = roll.weight or _weight(read.product, pair, facts)
    candidate = LinearCandidate(root, frozenset(), interior)
    return _close(candidate, facts, read, roles, weight, roll)


def _pair_of(read: _Read) -> Pair | None:
    """The query and key axis: those that come apart as such, the longest where several do (a chain of three matrices
    can be read from both ends)."""

    def length(axis: Axis) -> int:
        return int(axis.size.value) if isinstance(axis.size, Const) else 1 << 40

    pairs = [(i, j) for j in read.product.summed for i in read.free if sort(read.product, read.free, i, j) is not None]
    return max(pairs, key=lambda pair: length(pair[0]) * length(pair[1]), default=None)


# ---------------------------------------------------------------------------------------------------- closing a site


@dataclass(frozen=True)
class _Parts:
    """The factors of each operand, and what whole rows are multiplied with afterwards."""

    queries: tuple[Expr, ...]
    keys: tuple[Expr, ...]
    values: tuple[Expr, ...]
    rows: tuple[Expr, ...]


def _close(
    candidate: LinearCandidate, facts: Facts, read: _Read, roles: Roles, weight: Weight, roll: Rolled | None = None
) -> LinearSite:
    """`roll`: the loop that this was."""
    root = candidate.root
    inner = [*(t for d in (*read.product.divisors, *roles.rows) for t in sums_in(d, roles.query))]
    ended = None if roll is None or roll.ends is None else roll.ends.final
    beside = _sums_beside(candidate, facts, read, roles, ended)
    read_sums = [*inner, *(total for _, _, total in beside)]
    shared: Shared | None = None
    besides: dict[Reduce, tuple[Expr, ...]] = {}
    for total in read_sums:
        common, rest = shared_by(total, roles, read.product)
        if shared is not None and (Counter(common.factors), set(common.conditions)) != (
            Counter(shared.factors), set(shared.conditions),
        ):  # fmt: skip
            raise Stop(Declined("the weights are summed in two ways"))
        shared, besides[total] = common, rest
    parts = _parts(read.product, roles, shared)
    erase = None if roll is None else roll.erase
    if roll is not None and erase is not None:
        parts = _looked_up(parts, roll.keys, read_sums)
    dtype = _widest(
        [dtype_of(root), *(x.dtype for f in (*parts.queries, *parts.keys, *parts.values) for x in _loads(f))]
    )
    if dtype == "float16" and read_sums:
        dtype = "float32"  # before it is normalised, a sum over all keys may be larger than half precision holds
    ends = None if roll is None else roll.ends
    if ends is not None:
        parts = _stateful(ends, parts, read_sums)
    names, region, bindings = _region(read, roles, weight, parts, dtype, bool(read_sums), erase, ends)
    back: dict[Axis, Expr] = {new: old for old, new in names.items()}
    if roll is not None:
        back[region.query] = roll.place
    out: Expr = Load("out", tuple(back[a] for a in region.out_axes), dtype)
    sums = Load("sums", tuple(back[a] for a in region.sums_axes), "float32")
    known: dict[Expr, Expr] = {t: _times(rest, sums) for t, rest in besides.items()}
    for row in parts.rows:
        out = s.call("mul", out, s.substitute(row, known), dtype=dtype)
    for divisor in read.product.divisors:
        out = s.call("div", out, s.substitute(divisor, known), dtype=dtype)
    outputs = [Output(root, read.dims, out)]
    outputs += [Output(node, dims, known[total]) for node, dims, total in beside]
    if ends is not None and ends.final is not None:
        last = Load("final", tuple(back[a] for a in region.state_axes), "float32")
        outputs.append(Output(ends.final, tuple(x if isinstance(x, Axis) else None for x in ends.index), last))
    if any(holds_sum(o.value) for o in outputs):
        raise Stop(Declined("what the weights are normalised by is no function of their sums"))
    outputs.sort(key=lambda o: facts.order[o.node])
    interior = frozenset(candidate.interior - {o.node for o in outputs})
    _no_writes(facts, outputs, bindings, interior | read.visited)
    if roll is None:
        return LinearSite(root, region, bindings, tuple(outputs), _spelled(candidate, roles), interior)
    spelled = "steps" if roll.rows == Const(1) else "chunks"
    return LinearSite(root, region, bindings, tuple(outputs), spelled, interior, roll.rows)


def _stateful(ends: Ends, parts: _Parts, sums: list[Reduce]) -> _Parts:
    """The parts, so that the region's state, which adds up keys times values, is that of the loop. Raises Stop."""
    if sums:
        raise Stop(Declined("a loop with a normaliser starts from a state, or its last state is read"))
    if ends.written is None:
        return parts
    written, mine, queries = (Counter(x) for x in (ends.written, (*parts.keys, *parts.values), parts.queries))
    moved = written - mine  # factors of whole heads, which are anyone's
    if mine - written or moved - queries:
        raise Stop(Declined("a loop's state is no sum of its keys times values"))
    return replace(
        parts, queries=tuple((queries - moved).elements()), values=(*parts.values, *moved.elements())
    )  # fmt: skip


def _looked_up(parts: _Parts, keys: tuple[Expr, ...], sums: list[Reduce]) -> _Parts:
    """The delta rule's keys are what it looks up; whatever else a key has goes to the values."""
    others = Counter(parts.keys)
    others.subtract(Counter(keys))
    if sums or any(count < 0 for count in others.values()):
        raise Stop(Declined("the delta rule does not look up the keys that it writes"))
    return replace(parts, keys=keys, values=(*parts.values, *others.elements()))


def _widest(dtypes: list[str]) -> str:
    """The dtype that holds all of these: what eager code multiplies in float32 must not be rounded first."""
    floats = dict.fromkeys(d for d in dtypes if d.startswith(("float", "bfloat")))
    if len(floats) == 1:
        return next(iter(floats))
    return "float64" if "float64" in floats else "float32"


def _times(factors: tuple[Expr, ...], value: Expr) -> Expr:
    for factor in factors:
        value = s.call("mul", value, factor, dtype="float32")
    return value


def _sums_beside(
    candidate: LinearCandidate, facts: Facts, read: _Read, roles: Roles, ended: fx.Node | None
) -> list[tuple[fx.Node, tuple[Axis | None, ...], Reduce]]:
    """Sums of the weights over the keys that the model takes besides the root. Raises Stop where it reads a weight in
    any other way. `ended`: a loop's last state, which may be read."""
    found = []
    for node in candidate.interior - {candidate.root}:
        for user in node.users:
            if user in candidate.interior or user is ended or op_name(user) in ("sym_size", "sym_numel", "sym_stride"):
                continue
            total = _total_at(candidate, facts, user, read, roles) if op_name(user) == "sum" else None
            if total is None:
                raise Stop(Declined(f"a score is read elsewhere (by `{op_name(user)}`)", node.name))
            found.append((user, *total))
    return found


def _total_at(
    candidate: LinearCandidate, facts: Facts, node: fx.Node, read: _Read, roles: Roles
) -> tuple[tuple[Axis | None, ...], Reduce] | None:
    """A sum beside the root, at the positions of the root's own axes. Which axis each of its dimensions is, sizes alone
    do not tell (heads before or after positions): it is the order in which it is a sum of the weights."""
    if not is_tensor(node):
        return None
    rows = [a for a in read.dims if a is not None and a not in roles.value]
    first: tuple[tuple[Axis | None, ...], Reduce] | None = None
    for dims in _orders(shape_of(node), rows):
        lifter = Expander(facts, interior=candidate.interior | {node}, query_axes={roles.query}, key_axes={roles.key})
        value = lifter.at(node, [Const(0) if a is None else a for a in dims])
        if not isinstance(value, Reduce) or roles.query not in value.axes:
            continue
        first = first or (dims, value)
        with suppress(Stop):
            shared_by(value, roles, read.product)
            return dims, value
    return first  # it has the reason


def _orders(shape: Sequence[Expr], rows: Sequence[Axis]) -> list[tuple[Axis | None, ...]]:
    """The ways in which dimensions can be axes of their sizes, the axes' own order first."""
    places = [k for k, size in enumerate(shape) if size != Const(1)]
    found: list[tuple[Axis | None, ...]] = []
    for chosen in permutations(rows, len(places)):
        if all(axis.size == shape[k] for axis, k in zip(chosen, places)):
            dims: list[Axis | None] = [None] * len(shape)
            for axis, k in zip(chosen, places):
                dims[k] = axis
            found.append(tuple(dims))
    return found


def _parts(product: Product, roles: Roles, shared: Shared | None) -> _Parts:
    """Which operand each factor goes to. What the sums of the weights do not have is no part of the weights."""
    common = Counter((*shared.factors, *map(as_number, shared.conditions))) if shared is not None else None
    keys: list[Expr] = []
    values = list(roles.values)
    for factor in roles.keys:
        inside = common is None or common[factor] > 0
        (keys if inside or factor.axes & set(roles.dot) else values).append(factor)
    queries: list[Expr] = list(roles.queries)
    rows: list[Expr] = []
    for factor in roles.rows:
        scale = not holds_sum(factor) and roles.query not in factor.axes
        inside = scale if common is None else common[factor] > 0
        (queries if inside else rows).append(factor)
    return _Parts(tuple(queries), tuple(keys), tuple(values), tuple(rows))


def _region(
    read: _Read,
    roles: Roles,
    weight: Weight,
    parts: _Parts,
    dtype: str,
    sums: bool,
    erase: Expr | None,
    ends: Ends | None,
) -> tuple[dict[Axis, Axis], LinearRegion, tuple[Hoisted, ...]]:
    """The axes' names, the region, and its operands."""
    q, k, v = (_product(f, read, dtype) for f in (parts.queries, parts.keys, parts.values))
    rows = [a for a in read.free if a != roles.query and a not in roles.value]
    gate_axes = frozenset() if weight.gate is None else weight.gate.axes
    erase_axes = frozenset() if erase is None else erase.axes
    if (gate_axes | erase_axes) & set(roles.value):
        raise Stop(Declined("a decay for each value channel"))
    if erase_axes & set(roles.dot) or (erase is not None and gate_axes & set(roles.dot)):
        raise Stop(Declined("the delta rule with a decay for each channel"))
    batch = [a for a in rows if a in k.axes | v.axes | gate_axes | erase_axes]
    share = [a for a in rows if a not in batch]
    channel = bool(gate_axes & set(roles.dot))
    names = {
        a: Axis(BATCH_NAMES[n] if n < len(BATCH_NAMES) else f"b{n}", a.size) for n, a in enumerate((*batch, *share))
    }
    names |= {roles.query: Axis("i", roles.query.size), roles.key: Axis("j", roles.key.size)}
    for letter, axes in (("d", roles.dot), ("e", roles.value)):
        names |= {a: Axis(letter + (str(n) if n else ""), a.size) for n, a in enumerate(axes)}
    values: dict[str, tuple[Expr, tuple[Axis, ...]]] = {
        "q": (q, (*batch, *share, roles.query, *roles.dot)),
        "k": (k, (*batch, roles.key, *roles.dot)),
        "v": (v, (*batch, roles.key, *roles.value)),
    }
    if weight.gate is not None:
        values["gate"] = (weight.gate, (*batch, roles.key, *(roles.dot if channel else ())))
    if erase is not None:
        values["erase"] = (erase, (*batch, roles.key))
    if ends is not None and {x for x in ends.index if isinstance(x, Axis)} != {*batch, *roles.dot, *roles.value}:
        raise Stop(Declined("a loop's state has other axes than its keys and values"))
    if ends is not None and ends.initial is not None:
        values["initial"] = (ends.initial, (*batch, *roles.dot, *roles.value))
    wide = "float64" if dtype == "float64" else "float32"
    operands = tuple(
        Operand(name, wide if name in ("gate", "erase", "initial") else dtype, tuple(a.size for a in axes))
        for name, (_, axes) in values.items()
    )
    region = LinearRegion(
        batch=tuple(names[a] for a in batch),
        share=tuple(names[a] for a in share),
        query=names[roles.query],
        key=names[roles.key],
        dot=tuple(names[a] for a in roles.dot),
        value=tuple(names[a] for a in roles.value),
        operands=operands,
        out_dtype=dtype,
        causal=weight.causal,
        strict=weight.strict,
        gate="none" if weight.gate is None else "channel" if channel else "head",
        sums=sums,
        erase=erase is not None,
        final=ends is not None and ends.final is not None,
    )
    return names, region, tuple(Hoisted(value, axes) for value, axes in values.values())


def _product(factors: tuple[Expr, ...], read: _Read, dtype: str) -> Expr:
    out: Expr = Const(1.0, dtype)
    for factor in factors:
        out = s.call("mul", out, factor, dtype=dtype)
    return out


def _spelled(candidate: LinearCandidate, roles: Roles) -> str:
    """What the model makes: a tensor of all pairs, a state for each position, or neither."""
    inside = [n for n in candidate.interior - {candidate.root} if is_tensor(n)]
    if any(op_name(n) == "cumsum" for n in inside):
        return "states"
    wanted = Counter((roles.query.size, roles.key.size))
    pairs = candidate.root in candidate.cores or any(not wanted - Counter(shape_of(n)) for n in inside)
    return "pairs" if pairs else "linear"


def _no_writes(
    facts: Facts, outputs: list[Output], bindings: tuple[Hoisted, ...], readers: frozenset[fx.Node] | set[fx.Node]
) -> None:
    """Everything is read where the first output stands: it must be there, and nothing may be written to it since."""
    first, last = facts.order[outputs[0].node], facts.order[outputs[-1].node]
    loaded = [x.tensor for e in (*(b.value for b in bindings), *(o.value for o in outputs)) for x in _loads(e)]
    for name in loaded:
        if name in facts.nodes and facts.order[facts.nodes[name]] >= first:
            raise Stop(Declined("what it is multiplied with comes after its first result"))
    read: dict[int, int] = {}
    for reader in readers:
        for source in reader.all_input_nodes:
            storage = facts.storage.get(source, -1)
            if facts.storage[reader] != storage:
                read[storage] = min(read.get(storage, facts.order[reader]), facts.order[reader])
    for position, storage in facts.writes:
        if read.get(storage, last) < position < last:
            raise Stop(Declined("a tensor it reads is written in place before it is used"))


def _loads(e: Expr) -> tuple[Load, ...]:
    return (e,) if isinstance(e, Load) and not e.loads else e.loads
