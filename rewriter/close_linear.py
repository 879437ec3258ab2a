"""The site of a linear attention, once its factors are sorted: which operand each goes to, what is computed outside.

normaliser  sums of the weights, inside the weights or beside the root, become a second result
states      what a loop starts from is an operand, what it ends with a result
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
from refocus.decay_tables import written_out
from refocus.expand import Expander, in_range
from refocus.facts import Facts
from refocus.held_values import HeldValues
from refocus.hoist import Hoisted
from refocus.ir import ONE, Axis, Const, Expr, Load, Operand, Reduce
from refocus.lift import dtype_of, is_tensor, op_name
from refocus.lift_tables import MOVES
from refocus.linear_candidates import LinearCandidate
from refocus.linear_ir import LinearRegion, notation
from refocus.loop_steps import Ends, Rolled
from refocus.normal_form import BATCH_NAMES
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.directions import Turned
from refocus.patterns.linear import (
    Product,
    Roles,
    Weight,
    as_number,
    holds_sum,
)
from refocus.patterns.linear_sums import Shared, of_one_row, shared_by, sums_in
from refocus.quotient import divisors
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


def sources_of(site: LinearSite, facts: Facts) -> list[fx.Node]:
    """The nodes that stand in for a site is computed from."""
    exprs = [*(b.value for b in site.bindings), *(o.value for o in site.outputs)]
    return list(dict.fromkeys(facts.nodes[x.tensor] for e in exprs for x in _loads(e) if x.tensor in facts.nodes))


@dataclass(frozen=True)
class Read:
    """A candidate's root at its free axes, taken apart. `local` is added to the sum over the keys before it is
    divided. `turned`: where positions of queries and keys are counted from the end."""

    free: tuple[Axis, ...]
    dims: tuple[Axis | None, ...]
    product: Product
    visited: Set[fx.Node]
    local: tuple[Expr, ...] = ()
    turned: Turned | None = None


# What is float32, whatever the dtype of the tensors.
_WIDE = ("gate", "erase", "initial", "lookup")


@dataclass(frozen=True)
class _Erased:
    """What is taken from the state, and what is looked up for that where it is not the keys."""

    erase: Expr | None
    lookup: Expr | None

    @staticmethod
    def of(roll: Rolled | None) -> _Erased:
        if roll is None:
            return _Erased(None, None)
        return _Erased(roll.erase, None if roll.lookup is None else roll.lookup.key)

    @property
    def axes(self) -> frozenset[Axis]:
        return frozenset().union(*(x.axes for x in (self.erase, self.lookup) if x is not None))


@dataclass(frozen=True)
class _Parts:
    """The factors of each operand, and what whole rows are multiplied with afterwards."""

    queries: tuple[Expr, ...]
    keys: tuple[Expr, ...]
    values: tuple[Expr, ...]
    rows: tuple[Expr, ...]


def close(
    candidate: LinearCandidate, facts: Facts, read: Read, roles: Roles, weight: Weight, roll: Rolled | None = None,
    values: HeldValues | None = None,
) -> LinearSite:  # fmt: skip
    """`roll`: the loop that this was. `values`: of what the model keeps."""
    root = candidate.root
    found = [t for d in (*read.product.divisors, *roles.rows) for t in sums_in(d, roles.query)]
    inner = [t for t in found if not of_one_row(t)]
    given = () if roll is None else (*(row.node for row in roll.apart), *((roll.ends.final,) if roll.ends else ()))
    beside = _sums_beside(candidate, facts, read, roles, given, values)
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
    lookup = None if roll is None else roll.lookup
    if lookup is not None and (read_sums or {*lookup.over} != {*roles.dot}):
        raise Stop(Declined("what a loop looks up in its state is not what its queries read"))
    if roll is not None and erase is not None and lookup is None:
        parts = _looked_up(parts, roll.keys, read_sums)
    dtype = _widest(
        [dtype_of(root), *(x.dtype for f in (*parts.queries, *parts.keys, *parts.values) for x in _loads(f))]
    )
    if dtype == "float16" and read_sums:
        dtype = "float32"  # before it is normalised, a sum over all keys may be larger than half precision holds
    ends = None if roll is None else roll.ends
    if ends is not None:
        parts = _stateful(ends, parts, read_sums)
    names, region, bindings = _region(read, roles, weight, parts, dtype, bool(read_sums), _Erased.of(roll), ends)
    back: dict[Axis, Expr] = {new: old for old, new in names.items()}
    place = roll.place if roll is not None else read.turned.place if read.turned is not None else None
    if place is not None:
        back[region.query] = place
    out: Expr = Load("out", tuple(back[a] for a in region.out_axes), dtype)
    sums = Load("sums", tuple(back[a] for a in region.sums_axes), "float32")
    known: dict[Expr, Expr] = {t: _times(rest, sums) for t, rest in besides.items()}
    # In chunks, a position is not an axis of the results but made of two of them.
    placed: dict[Expr, Expr] = {} if place is None else {roles.query: place}
    for row in parts.rows:
        out = s.call("mul", out, s.substitute(s.substitute(row, known), placed), dtype=dtype)
    for term in read.local:
        out = s.call("add", out, s.substitute(term, placed), dtype=dtype)
    for divisor in read.product.divisors:
        out = s.call("div", out, s.substitute(s.substitute(divisor, known), placed), dtype=dtype)
    outputs = [Output(root, read.dims, out)]
    outputs += [Output(row.node, *row.of(read.dims, out)) for row in (() if roll is None else roll.apart)]
    outputs += [Output(node, dims, known[total]) for node, dims, total in beside]
    if ends is not None and ends.final is not None:
        last: Expr = Load("final", tuple(back[a] for a in region.state_axes), "float32")
        if ends.last is not None:
            kept, added = ends.last
            last = s.call("add", s.call("mul", kept, last, dtype="float32"), added, dtype="float32")
        outputs.append(Output(ends.final, ends.dims, last))
    if any(isinstance(n, Reduce) and not of_one_row(n) for o in outputs for n in o.value.walk()):
        raise Stop(Declined("what the weights are normalised by is no function of their sums"))
    outputs = [replace(o, value=in_range(o.value, facts)) for o in outputs]
    bindings = tuple(replace(b, value=in_range(b.value, facts)) for b in bindings)
    outputs.sort(key=lambda o: facts.order[o.node])
    interior = frozenset(candidate.interior - {o.node for o in outputs})
    if roll is None:
        _reads_no_scores(facts, interior, outputs)
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
    candidate: LinearCandidate, facts: Facts, read: Read, roles: Roles, given: Sequence[fx.Node | None],
    values: HeldValues | None,
) -> list[tuple[fx.Node, tuple[Axis | None, ...], Reduce]]:  # fmt: skip
    """Sums of the weights over the keys that the model takes besides the root. Raises Stop where it reads a weight in
    any other way. `given`: what a loop gives out besides, which may be read."""
    found = []
    for node in candidate.interior - {candidate.root}:
        for user in node.users:
            if user in candidate.interior or user in given or op_name(user) in ("sym_size", "sym_numel", "sym_stride"):
                continue
            total = _total_at(candidate, facts, user, read, roles, values) if op_name(user) == "sum" else None
            changed = _normalising(user, candidate.root, facts) if total is None else None
            if changed is not None:
                reason = f"the normaliser is not linear in the scores (`{op_name(changed)}` of them)"
                raise Stop(Declined(reason, changed.name))
            if total is None:
                raise Stop(Declined(f"a score is read elsewhere (by `{op_name(user)}`)", node.name))
            found.append((user, *total))
    return found


def _normalising(user: fx.Node, root: fx.Node, facts: Facts) -> fx.Node | None:
    """The operation on the weights that makes of them what the results are divided by; None where nothing does."""
    while op_name(user) in MOVES and len(user.users) == 1:
        user = next(iter(user.users))
    results = nx.descendants(facts.flow, root) | {root}
    below = (nx.descendants(facts.flow, user) | {user}) - results
    found = any(d in below and results.intersection(n.all_input_nodes) for n in results for d in divisors(n))
    return user if found and op_name(user) != "sum" else None


def _total_at(
    candidate: LinearCandidate, facts: Facts, node: fx.Node, read: Read, roles: Roles, values: HeldValues | None
) -> tuple[tuple[Axis | None, ...], Reduce] | None:
    """A sum beside the root, at the positions of the root's own axes. Which axis each of its dimensions is, sizes alone
    do not tell (heads before or after positions): it is the order in which it is a sum of the weights."""
    if not is_tensor(node):
        return None
    rows = [a for a in read.dims if a is not None and a not in roles.value]
    first: tuple[tuple[Axis | None, ...], Reduce] | None = None
    for dims in _orders(shape_of(node), rows):
        query = roles.query if read.turned is None else read.turned.old
        lifter = Expander(facts, interior=candidate.interior | {node}, query_axes={query}, key_axes={roles.key})
        value = lifter.at(node, [Const(0) if a is None else a for a in dims])
        value = value if values is None else written_out(value, values)
        value = value if read.turned is None else read.turned.sums(value)
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
    read: Read,
    roles: Roles,
    weight: Weight,
    parts: _Parts,
    dtype: str,
    sums: bool,
    erased: _Erased,
    ends: Ends | None,
) -> tuple[dict[Axis, Axis], LinearRegion, tuple[Hoisted, ...]]:
    """The axes' names, the region, and its operands."""
    q, k, v = (_product(f, read, dtype) for f in (parts.queries, parts.keys, parts.values))
    rows = [a for a in read.free if a != roles.query and a not in roles.value]
    gate_axes = frozenset() if weight.gate is None else weight.gate.axes
    erase, erase_axes = erased.erase, erased.axes
    if (gate_axes | erase_axes) & set(roles.value):
        raise Stop(Declined("a decay for each value channel"))
    if erase_axes & set(roles.dot) and erased.lookup is None:
        raise Stop(Declined("the delta rule with a share for each channel"))
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
        values["erase"] = (erase, (*batch, roles.key, *(roles.dot if erased.lookup is not None else ())))
    if ends is not None and {*ends.dims} - {None} != {*batch, *roles.dot, *roles.value}:
        raise Stop(Declined("a loop's state has other axes than its keys and values"))
    if ends is not None and ends.initial is not None:
        values["initial"] = (ends.initial, (*batch, *roles.dot, *roles.value))
    if erased.lookup is not None:
        values["lookup"] = (erased.lookup, (*batch, roles.key, *roles.dot))
    wide = "float64" if dtype == "float64" else "float32"
    operands = tuple(
        Operand(name, wide if name in _WIDE else dtype, tuple(a.size for a in axes))
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


def _product(factors: tuple[Expr, ...], read: Read, dtype: str) -> Expr:
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


def _reads_no_scores(facts: Facts, interior: frozenset[fx.Node], outputs: list[Output]) -> None:
    """Raises Stop where results are divided by, or multiplied with, what is computed of all weights: a norm of them."""
    for name in (x.tensor for o in outputs for x in _loads(o.value)):
        if name in facts.nodes and facts.nodes[name] in interior:
            reason = f"the normaliser is not linear in the scores (`{op_name(facts.nodes[name])}` of them)"
            raise Stop(Declined(reason, name))


def _no_writes(
    facts: Facts, outputs: list[Output], bindings: tuple[Hoisted, ...], readers: frozenset[fx.Node] | set[fx.Node]
) -> None:
    """Everything is read where the first output stands: it must be there, and nothing may be written to it since."""
    first = facts.order[outputs[0].node]
    loaded = [x.tensor for e in (*(b.value for b in bindings), *(o.value for o in outputs)) for x in _loads(e)]
    late = {facts.nodes[name] for name in loaded if name in facts.nodes and facts.order[facts.nodes[name]] >= first}
    if late:
        # What has nothing to do with the results can be computed before them.
        late = {n for n in late.union(*(nx.ancestors(facts.flow, n) for n in late)) if facts.order[n] >= first}
        enabled = facts.grad_enabled[outputs[0].node]
        if any(o.node in late for o in outputs) or any(facts.grad_enabled[n] != enabled for n in late):
            raise Stop(Declined("what it is multiplied with comes after its first result"))
    read: dict[int, list[int]] = {}
    for reader in (*readers, *late):
        for source in reader.all_input_nodes:
            storage = facts.storage.get(source, -1)
            if facts.storage[reader] != storage:
                read.setdefault(storage, []).append(facts.order[reader])
    for position, storage in facts.writes:
        for at in read.get(storage, ()):
            if at < position < first or first < position < at:
                raise Stop(Declined("a tensor it reads is written in place before it is used"))


def _loads(e: Expr) -> tuple[Load, ...]:
    return (e,) if isinstance(e, Load) and not e.loads else e.loads
