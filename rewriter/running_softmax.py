"""Softmax over keys in chunks, with running maxima: the chunks of both sums are paired, and stand one after the other.

What `refocus.quotient` finds with several products is read here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.candidates import Candidate
from refocus.facts import Facts, taint_of
from refocus.finite_rows import Open, Proofs, shifted_by_numbers
from refocus.ir import Axis, Call, Const, Expr, Load, Reduce
from refocus.joint import moved
from refocus.lift import Index, Lifter, arguments, dtype_of, op_name
from refocus.lift_joins import JOINS
from refocus.lift_pointwise import LARGER, POINTWISE
from refocus.lift_reductions import CONTRACTIONS, REDUCTIONS
from refocus.lift_views import VIEWS
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.factors import Factored, additive, but_for_base, factored
from refocus.patterns.fills import KEPT, LOST, UNCLEAR
from refocus.patterns.guards import unguarded
from refocus.patterns.log_sums import LOG_SUM, LogSum, alone
from refocus.patterns.softmax import Softmax, is_lost, only_infinite
from refocus.piecewise import along, renamed, seamless
from refocus.products import reads_of
from refocus.quotient import GUARDS, Quotient, below_views, divisor_of, past_guard, weights_of
from refocus.row_sums import Addend, Row, Walk, aligned, carried, opened, summed_dims
from refocus.sizes import shape_of


@dataclass(frozen=True)
class Chunked:
    """A numerator of several products, in index notation. `seamless`: the chunks are parts of one tensor, all of it.
    `rows`: reads what is made of its normaliser."""

    key: Axis
    softmax: Softmax
    values: Expr
    seamless: bool
    rows: RunningRows


@dataclass
class _Running(Lifter):
    """Reads rows that scores decide (factors of exponentials of maxima) as far down as the maxima themselves."""

    known: Facts
    rows: frozenset[fx.Node] = frozenset()

    def _at(self, node: fx.Node, index: Index) -> Expr:
        if self.joining and op_name(node) in _SCALES and not self.within(node, index) and node not in self.rows:
            # Chunks that were scaled one by one are parts of one tensor still.
            scaled = POINTWISE[op_name(node)](self, node, index)
            if scaled is not None and sum(1 for x in scaled.walk() if isinstance(x, Load)) == 1:
                return scaled
        if node not in self.rows or self.within(node, index):
            return super()._at(node, index)
        name = op_name(node)
        handler = {**VIEWS, **JOINS}.get(name) or (_ROWS.get(name) if name in _FOLLOWED else None)
        value = handler(self, node, index) if handler is not None else None
        if value is None:
            return self.leaf(node, index)
        return value if any(n == LOG_SUM for n in value.walk()) else unguarded(value) or value


_SCALES = frozenset(("mul", "multiply", "div", "true_divide", "divide", "neg", "negative"))
_GUARDS = ("where", "masked_fill", "eq", "ne", "le", "lt", "ge", "gt", "isinf", "logical_not", "bitwise_not")
_FOLLOWED = frozenset(
    ("exp", "exp2", "sub", "add", "neg", "mul", "div", "reciprocal", "log", "log2", "rsub", "logsumexp", *_GUARDS)
)
_ROWS = {**POINTWISE, "logsumexp": REDUCTIONS["logsumexp"]}


@dataclass
class _Chunk:
    """A sum over keys of exp(net) where the conditions hold: net has exponents with their multiplicities."""

    key: Axis
    net: Counter[Expr]
    conditions: Counter[Expr]
    values: Expr | None = None

    def renamed(self, key: Axis) -> _Chunk:
        return _Chunk(key, _at(self.net, {self.key: key}), _at(self.conditions, {self.key: key}))


def lift_chunked(quotient: Quotient, facts: Facts, index: Index, far: bool, together: bool) -> tuple[Chunked, Lifter]:
    """Read a quotient of several products; with `together`, chunks of one tensor in that tensor. Raises Stop with the
    reason."""
    root, products = quotient.root, {c.root: c for c in quotient.parts}
    scores = frozenset().union(*(taint_of(weights_of(c), facts) for c in quotient.parts))
    between = set(nx.ancestors(facts.flow, root)) & set().union(*(nx.descendants(facts.flow, n) for n in scores))
    rows = frozenset(n for n in between if op_name(n) not in CONTRACTIONS)
    lifter = _Running(facts, far=far or together, joining=together, rows=rows)
    lifter.visited |= between | scores | {root}
    lifter.tainted = lambda node: node in scores or node in between
    divisor = divisor_of(root, carried(list(products), facts) | set(products), facts)
    if divisor is None:
        raise Stop(Declined("several attentions are added, but not by the shares of their log-sum-exps", root.name))
    numerator = next(a for a in arguments(root)[:2] if a is not divisor)
    above = list(Walk(lifter, facts, set(products)).addends(numerator, aligned(numerator, index)))
    total, at, is_guarded = _denominator(lifter, divisor, aligned(divisor, index))
    below = list(Walk(lifter, facts, _key_sums(total, between)).addends(total, at))
    numerators = [_valued(lifter, products[a.node], a) for a in above if a.value is None]
    if len(numerators) != len(above):
        raise Stop(Declined("something is added to the values' sum before it is divided", root.name))
    _tell_queries(lifter, numerators)
    chunks = [_chunk(lifter, reading) for reading in numerators]
    normaliser = _normaliser(lifter, below, dtype_of(root))
    shift = _paired(root, chunks, normaliser, lifter.rows)
    if normaliser.lost and not _is_maximum(lifter, shift, chunks):
        raise Stop(Declined("something other than an exponential is added to the normaliser", root.name))
    key, soft, value, whole = _joined(root, chunks, normaliser.extras)
    soft = replace(soft, fills=_fills(lifter, shift, chunks), cleaned=is_guarded and not soft.extra)
    if soft.cleaned and not only_infinite(soft.logits):
        reason = "probabilities that are no numbers are replaced, where it is not plain which these are"
        raise Stop(Declined(reason, op_name(divisor)))
    query = next(iter(lifter.query_axes), Axis("row", Const(1)))
    products_of, rows_of = (frozenset(n.name for n in nodes) for nodes in (scores, between))
    factors = dict.fromkeys(row for a in (*above, *below) for row in a.rows)
    weights = [(r.key, r.weights) for r in (*numerators, *normaliser.readings)]
    proved = [
        shifted_by_numbers(Open(facts), weights, factors, Proofs(query, products_of, rows_of, assumed))
        for assumed in dict.fromkeys((whole, False))
    ]
    if not proved[0]:
        raise Stop(Declined("a row may have no keys in the first chunks, and is no number then", root.name))
    sums = frozenset(a.node for a in below if a.value is None)
    further = frozenset().union(*(nx.descendants(facts.flow, n) for n in scores)) - {root}
    reader = RunningRows(
        facts,
        tainted=lifter.tainted,
        key_axes=set(lifter.key_axes),
        query_axes=set(lifter.query_axes),
        far=lifter.far,
        joining=together,
        rows=rows | {n for n in further if op_name(n) not in CONTRACTIONS},
        sums=sums,
        chunks=tuple(chunks),
        extras=tuple(normaliser.extras),
        fills=soft.fills,
        guarded=proved[-1],
    )
    return Chunked(key, soft, value, whole, reader), lifter


def _denominator(lifter: Lifter, divisor: fx.Node, index: Index) -> tuple[fx.Node, Index, bool]:
    """What is divided by, where the division is a multiplication with its reciprocal; and whether a sum of nothing is
    replaced by a number."""
    is_guarded = False
    while (name := op_name(below_views(divisor))) in ("reciprocal", *GUARDS):
        below = moved(lifter, divisor, index) if op_name(divisor) != name else None
        if op_name(divisor) == name == "reciprocal":
            below = arguments(divisor)[0], index
        elif op_name(divisor) == name:
            below, is_guarded = past_guard(lifter, divisor, index), True
        if below is None:
            raise Stop(Declined("the normaliser is changed after the sum", op_name(divisor)))
        divisor, index = below
    return divisor, index, is_guarded


def _key_sums(divisor: fx.Node, between: set[fx.Node]) -> set[fx.Node]:
    """The sums over keys that a denominator is made of: those with no other sum before them."""
    flow: nx.DiGraph = nx.DiGraph()
    for node in between:
        flow.add_node(node)
        flow.add_edges_from((a, node) for a in node.all_input_nodes if a in between)
    if divisor not in flow:
        return set()
    found = {n for n in {divisor, *nx.ancestors(flow, divisor)} if op_name(n) == "sum"}
    return {n for n in found if not found & nx.ancestors(flow, n)}


@dataclass(frozen=True)
class _Reading:
    """Weights at a position along a key axis, the values there, and the row's factors."""

    key: Axis
    weights: tuple[fx.Node, Index]
    values: Expr | None
    rows: tuple[Row, ...]


def _valued(lifter: Lifter, candidate: Candidate, addend: Addend) -> _Reading:
    reads = reads_of(lifter, addend.node, addend.index)
    if reads is None or len(reads[0]) != 1 or len(reads[1]) != 2:
        raise Stop(Declined("the values are not summed over one key axis", addend.node.name))
    (key,), operands = reads
    lifter.key_axes.add(key)
    return _Reading(key, operands[candidate.weights], lifter.at(*operands[1 - candidate.weights]), addend.rows)


def _summed(lifter: Lifter, addend: Addend) -> _Reading:
    dims, _ = summed_dims(addend.node)
    source = arguments(addend.node)[0]
    if len(dims) != 1:
        raise Stop(Declined("the weights are not summed over one key axis", addend.node.name))
    key = lifter.bound(addend.node, dims[0], shape_of(source)[dims[0]])
    lifter.key_axes.add(key)
    return _Reading(key, (source, opened(addend.node, addend.index, {dims[0]: key})), None, addend.rows)


def _tell_queries(lifter: Lifter, readings: list[_Reading]) -> None:
    """As for any attention: an axis that the weights have, but no values, counts as the query."""
    weighted = frozenset().union(*(e.axes for r in readings for e in r.weights[1]))
    valued = frozenset().union(*(r.values.axes for r in readings if r.values is not None))
    found = sorted(weighted - valued - {r.key for r in readings}, key=lambda a: a.name)
    lifter.query_axes = set(found[-1:])


def _chunk(lifter: Lifter, reading: _Reading) -> _Chunk:
    parts = factored(lifter.at(*reading.weights))
    return _Chunk(reading.key, _net(parts, lifter, reading.rows), Counter(parts.conditions), reading.values)


def _positive_terms(value: Expr) -> list[Expr]:
    terms = additive(value, 1)
    return [value] if any(sign < 0 for sign, _ in terms) else [term for _, term in terms]


def _total_of(value: Expr, lifter: Lifter, rows: tuple[Row, ...]) -> _Chunk | None:
    """exp(logsumexp x - m) as the sum of exp(x - m) over keys, which it is; None for any other value."""
    parts = factored(value)
    sums = [f for f in parts.factors if isinstance(f, Reduce) and f.op == "sum"]
    if len(sums) != 1:
        return None
    (total,) = sums
    parts.factors.remove(total)
    parts = factored(total.body).times(parts)
    return _Chunk(total.axis, _net(parts, lifter, rows), Counter(parts.conditions))


def _net(parts: Factored, lifter: Lifter, rows: tuple[Row, ...]) -> Counter[Expr]:
    """The exponents of a product, those of its rows among them. Raises Stop where there is more than exponents."""
    factors = Counter(map(renamed, parts.factors))
    factors.subtract(Counter(map(renamed, parts.divisors)))
    net: Counter[Expr] = Counter()
    for sign, term in parts.exponents:
        for way, part in _spread(lifter, sign, term):
            net[part] += way
    for row in rows:
        more = factored(row.at(lifter))
        if more.conditions:
            raise Stop(Declined("a sum over keys is masked before it is divided"))
        for sign, term in more.exponents:
            for way, part in _spread(lifter, sign * row.sign, term):
                net[part] += way
        factors.update({e: row.sign * n for e, n in Counter(map(renamed, more.factors)).items()})
        factors.subtract({e: row.sign * n for e, n in Counter(map(renamed, more.divisors)).items()})
    if any(factors.values()):
        raise Stop(Declined("a chunk of keys is weighted by more than exponentials"))
    return Counter({term: n for term, n in net.items() if n})


def _spread(lifter: Lifter, sign: int, term: Expr) -> Iterator[tuple[int, Expr]]:
    """c * (x - m) as c * x and c * m, where m is a maximum: they cancel one by one."""
    names = {n.name for n in lifter.rows} if isinstance(lifter, _Running) else set()
    inner, factor = term, 1.0
    while isinstance(inner, Call) and inner.op == "mul" and any(isinstance(a, Const) for a in inner.args):
        at = next(k for k, a in enumerate(inner.args) if isinstance(a, Const))
        inner, factor = inner.args[1 - at], factor * float(inner.args[at].value)  # type: ignore[attr-defined]
    parts = additive(inner, sign) if _reads(term, names) else []
    if len(parts) < 2:
        yield sign, term
    for way, part in parts if len(parts) > 1 else ():
        whole = math.isclose(factor, 1.0, rel_tol=1e-12)  # base 2, and back
        yield way, part if whole else s.call("mul", part, Const(factor, term.dtype), dtype=term.dtype)


@dataclass(frozen=True)
class _Normaliser:
    """A sum over all keys, of chunks and of `extras`. `lost`: and of a number that may be too small to make a
    difference."""

    readings: tuple[_Reading, ...]
    chunks: tuple[_Chunk, ...]
    extras: tuple[Counter[Expr], ...]
    lost: bool


def _normaliser(lifter: Lifter, addends: list[Addend], dtype: str) -> _Normaliser:
    readings = tuple(_summed(lifter, a) for a in addends if a.value is None)
    chunks = [_chunk(lifter, reading) for reading in readings]
    extras: list[Counter[Expr]] = []
    lost = False
    for term, addend in ((x, a) for a in addends if a.value is not None for x in _positive_terms(a.value)):
        if is_lost(term, dtype) and not addend.rows:
            lost = True
            continue
        summed = _total_of(term, lifter, addend.rows)
        if summed is not None:
            chunks.append(summed)
        else:
            extras.append(_net(factored(term), lifter, addend.rows))
    return _Normaliser(readings, tuple(chunks), tuple(extras), lost)


def _paired(root: fx.Node, chunks: list[_Chunk], below: _Normaliser, rows: frozenset[fx.Node]) -> Counter[Expr]:
    """What all exponents of both sums are shifted by, which is taken away from them."""
    totals = list(below.chunks)
    for chunk in chunks:
        same = [t for t in totals if t.key.size == chunk.key.size and _equal(t.renamed(chunk.key), chunk)]
        if not same:
            raise Stop(Declined("the exponents of the weights and of the normaliser differ", root.name))
        totals.remove(same[0])
    if totals:
        raise Stop(Declined("the normaliser sums over keys that no values belong to", root.name))
    shift = _unshifted(chunks[0], [*(c.net for c in chunks), *below.extras], rows)
    if shift is None:
        raise Stop(Declined("the maxima that chunks of keys are shifted by do not cancel", root.name))
    return shift


def _unshifted(chunk: _Chunk, nets: list[Counter[Expr]], rows: frozenset[fx.Node]) -> Counter[Expr] | None:
    """What a chunk is shifted by, taken away from all exponents; None where some of them are shifted otherwise."""
    names = {n.name for n in rows}
    shift = Counter({e: n for e, n in chunk.net.items() if chunk.key not in e.axes and _reads(e, names)})
    for net in nets:
        net.subtract(shift)
    return None if any(n and _reads(e, names) for net in nets for e, n in net.items()) else shift


def _joined(root: fx.Node, chunks: list[_Chunk], extras: Sequence[Counter[Expr]]) -> tuple[Axis, Softmax, Expr, bool]:
    """The chunks one after the other: their key, weights and values, and whether they are parts of one tensor."""
    chunks.sort(key=lambda c: _begin(c.values, c.key))  # as they lie in memory, where that can be told
    key = Axis(f"{root.name}.keys", s.add(*(c.key.size for c in chunks)))
    logits = []
    for chunk in chunks:
        value = _total(chunk.net)
        held = list(chunk.conditions)
        logits.append((chunk.key, s.where(s.and_(*held), value, Const(float("-inf"), value.dtype)) if held else value))
    values = [(c.key, c.values) for c in chunks if c.values is not None]
    whole = seamless(key, logits) is not None and seamless(key, values) is not None
    soft = Softmax(along(key, logits), tuple(_total(net) for net in extras), Const(1.0, "float32"))
    return key, soft, along(key, values), whole


def _fills(lifter: _Running, shift: Counter[Expr], chunks: list[_Chunk]) -> str:
    """What becomes of a row that holds nothing but finite fills (see `refocus.patterns.fills`)."""
    if not +shift and not -shift:
        return LOST
    numbers = [n.value for c in chunks for e in c.net for n in e.walk() if isinstance(n, Const) and n.is_float]
    return KEPT if _is_maximum(lifter, shift, chunks, min(numbers, default=0.0)) else UNCLEAR


def _is_maximum(lifter: _Running, shift: Counter[Expr], chunks: list[_Chunk], least: float = -math.inf) -> bool:
    """Whether a shift is the greatest of some of a row's logits: then the exponentials add up to one at least. It may
    be no less than `least`."""
    facts = lifter.known
    logits = [(c.key, c.net) for c in chunks if not c.conditions]
    stack: list[tuple[Expr, float]] = [(e, 1.0) for e in shift]
    budget = 256
    if list(shift.values()) != [-1]:
        return False
    while stack:
        (value, factor), budget = stack.pop(), budget - 1
        value = unguarded(value) or value
        if budget < 0:
            return False
        if isinstance(value, Const):
            if not value.value * factor <= least:
                return False
        elif isinstance(value, Call) and value.op in ("max", "where", "detach"):
            stack.extend((a, factor) for a in value.args if a.is_float)
        elif isinstance(value, Call) and value.op == "mul" and any(isinstance(a, Const) for a in value.args):
            numbers = [float(a.value) for a in value.args if isinstance(a, Const)]
            stack.extend((a, factor * math.prod(numbers)) for a in value.args if not isinstance(a, Const))
        elif isinstance(value, Reduce) and value.op == "max":
            terms: Counter[Expr] = Counter()
            for sign, term in additive(value.body, 1):
                scaled = s.call("mul", term, Const(factor, term.dtype), dtype=term.dtype)
                terms[term if factor == 1 else but_for_base(scaled)] += sign
            if not any(_at(terms, {value.axis: key}) == net for key, net in logits):
                stack.append((value.body, factor))
        elif isinstance(value, Load) and value.tensor in facts.nodes:
            node = facts.nodes[value.tensor]
            handler = {**VIEWS, **JOINS, **_MOST}.get(op_name(node))
            below = None if handler is None else handler(lifter, node, value.index)
            if below is None or below == value:
                return False
            stack.append((below, factor))
        else:
            return False
    return True


@dataclass
class RunningRows(_Running):
    """Reads values of rows as functions of the log-sum-exp L of all chunks: a sum of these is exp(L + shift).

    `sums`: those over keys that a normaliser is made of, which is that of `chunks` and `extras` without their shift;
    `fills`, `guarded` are as in `LogSum`."""

    sums: frozenset[fx.Node] = frozenset()
    chunks: tuple[_Chunk, ...] = ()
    extras: tuple[Counter[Expr], ...] = ()
    fills: str = KEPT
    guarded: bool = False

    def log_sum(self, node: fx.Node, index: Index) -> LogSum | None:
        """A value at a position as a function of the log-sum-exp there; None where it is none."""
        value = self.at(node, index)
        found = alone(value) if self.fills != UNCLEAR and any(n == LOG_SUM for n in value.walk()) else None
        return None if found is None else LogSum(found, self.fills, self.guarded)

    def _at(self, node: fx.Node, index: Index) -> Expr:
        walk = Walk(self, self.known, set(self.sums))
        shift = self._shift_of(walk, node, index) if node in walk.carriers | self.sums else None
        if shift is None:
            return super()._at(node, index)
        dtype = dtype_of(node)
        return s.call("exp", s.call("add", LOG_SUM, _total(shift), dtype=dtype), dtype=dtype)

    def _shift_of(self, walk: Walk, node: fx.Node, index: Index) -> Counter[Expr] | None:
        """What all exponents of a sum over all keys are shifted by; None for any other value."""
        try:
            below = _normaliser(self, list(walk.addends(node, index)), dtype_of(node))
        except Stop:
            return None
        if len(below.chunks) != len(self.chunks) or len(below.extras) != len(self.extras):
            return None
        shift = _unshifted(below.chunks[0], [*(c.net for c in below.chunks), *below.extras], self.rows)
        if shift is None or (below.lost and not _is_maximum(self, shift, list(self.chunks))):
            return None
        rest = list(below.chunks)
        for chunk in self.chunks:
            same = [t for t in rest if t.key.size == chunk.key.size and _equal(t.renamed(chunk.key), chunk)]
            if not same:
                return None
            rest.remove(same[0])
        extras = list(below.extras)
        for extra in self.extras:
            if extra not in extras:
                return None
            extras.remove(extra)
        return shift


_MOST = {"amax": REDUCTIONS["amax"], "maximum": LARGER, "max": LARGER}


def _at(terms: Counter[Expr], names: dict[Expr, Expr]) -> Counter[Expr]:
    return Counter({s.substitute(e, names): n for e, n in terms.items()})


def _equal(a: _Chunk, b: _Chunk) -> bool:
    return a.net == b.net and a.conditions == b.conditions


def _reads(value: Expr, names: set[str]) -> bool:
    """Whether a value is made from what some nodes hold."""
    loads = (value,) if isinstance(value, Load) else value.loads
    return any(x.tensor in names for x in loads)


def _begin(values: Expr | None, key: Axis) -> int:
    for load in () if values is None else (values,) if isinstance(values, Load) else values.loads:
        for entry in load.index:
            offset = s.sub(entry, key)
            if isinstance(offset, Const):
                return int(offset.value)
    return 0


def _total(net: Counter[Expr]) -> Expr:
    out: Expr | None = None
    for term, count in net.items():
        for _ in range(abs(count)):
            signed = term if count > 0 else s.call("neg", term, dtype=term.dtype)
            out = signed if out is None else s.call("add", out, signed, dtype=out.dtype)
    return Const(0.0, "float32") if out is None else out
