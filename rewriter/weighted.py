"""Weights at a position of a product with values, read as softmaxes over the key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from refocus import simplify as s
from refocus.candidates import Candidate
from refocus.choices import is_choice, without_choice
from refocus.facts import Facts, taint_of
from refocus.ir import Axis, Const, Dot, Expr, Load, Reduce
from refocus.joint import NOTHING
from refocus.lift import Lifter, op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.lifted import Lifted
from refocus.patterns.declined import Declined
from refocus.patterns.factors import holds_scores
from refocus.patterns.fills import ROUNDED, UNCLEAR, by_rounded_sum
from refocus.patterns.pairwise import match_pairwise
from refocus.patterns.shares import match_with_share
from refocus.patterns.softmax import Softmax, Term, steadied, terms_of, with_steady_softmaxes
from refocus.pieces import holds_pieces, whole, without_choice_of_products
from refocus.quotient import EXPONENTIALS, Rescaled
from refocus.roles import Axes, cut_axes
from refocus.sizes import shape_of


def tainted_like(weights: list[fx.Node], facts: Facts) -> Callable[[fx.Node], bool]:
    """Whether a value may hold scores that these weights hold, too."""
    taint = frozenset().union(*(taint_of(n, facts) for n in weights))
    reach: dict[fx.Node, bool] = {}

    def tainted(node: fx.Node) -> bool:
        if node not in reach:
            reach[node] = bool(taint_of(node, facts) & taint)
        return reach[node]

    return tainted


def loads_of(value: Expr) -> tuple[Load, ...]:
    return (value,) if isinstance(value, Load) else value.loads


@dataclass(frozen=True)
class Weighted:
    """Weights at a position, and the values that they are multiplied with, along `key`."""

    key: Axis
    node: fx.Node
    index: tuple[Expr, ...]
    values: Expr
    rescaled: Rescaled | None = None


def weighted(candidate: Candidate, facts: Facts, axes: Axes, lifter: Lifter, found: Weighted) -> Lifted | Declined:
    """Read the weights as softmaxes over the key."""
    lifter.query_axes = cut_axes([a for a in axes.flat() if a not in found.values.axes], found.index, found.key)
    rows = [row.node for row in found.rescaled.rows] if found.rescaled is not None else []
    # Past a mixture of heads, or a split, the weights' own source is that.
    sources = [found.node, candidate.normaliser, *(n for n in rows if isinstance(n, fx.Node))]
    lifter.tainted = tainted_like(sources, facts)
    weights = _lifted(candidate, facts, lifter, found)
    if isinstance(weights, Declined):
        return weights
    if not candidate.normalised:
        pairs = match_pairwise(weights, found.key)
        if isinstance(pairs, Declined):
            return pairs
        return Lifted(found.key, found.values, [((), *pairs)], NOTHING, lifter, False)
    outcome = _as_softmaxes(candidate, facts, lifter, found, weights)
    if isinstance(outcome, Declined):
        # Weights of some keys may be read past what was put together for all of them: is that read, they compare.
        sums = (n for n in weights.walk() if isinstance(n, Reduce))
        again = lifter.keeping(facts.nodes[x.tensor] for total in sums for x in total.loads if x.is_float)
        reread = _lifted(candidate, facts, again, found)
        if not isinstance(reread, Declined) and reread != weights:
            second = _as_softmaxes(candidate, facts, again, found, reread)
            if isinstance(second, Lifted) and any(soft.part is not None for _, _, soft in second.terms):
                return second
    return outcome


def _lifted(candidate: Candidate, facts: Facts, lifter: Lifter, found: Weighted) -> Expr | Declined:
    """The weights in index notation."""
    weights = without_choice(lifter.at(found.node, found.index), found.key, lifter.query_axes)
    lifter.chooses = is_choice(weights, found.key)
    if found.key not in weights.axes and found.key.size != Const(1):
        return Declined("the weights do not depend on the key", op_name(candidate.root))
    if isinstance(weights, Load):
        blame = lifter.blame or facts.nodes[weights.tensor]
        return Declined(f"`{op_name(blame)}` is not understood", blame.name)
    if found.rescaled is not None:
        weights = found.rescaled.times_rows(lifter, weights)
    if any(isinstance(n, Dot) for n in weights.walk()):
        return weights
    for node in (facts.nodes[load.tensor] for load in weights.loads):
        if node in facts.opaque and taint_of(node, facts):
            writer = facts.writers[facts.storage[node]][-1]
            return Declined(f"scores are written in place (by `{op_name(writer)}`), too far to follow", writer.name)
    reason = "the weights hold no product of queries and keys"
    if lifter.blame is not None and op_name(lifter.blame) not in CONTRACTIONS:
        reason += f" (`{op_name(lifter.blame)}` is not understood)"
    return Declined(reason, (lifter.blame or candidate.normaliser).name)


def _as_softmaxes(
    candidate: Candidate, facts: Facts, lifter: Lifter, found: Weighted, weights: Expr
) -> Lifted | Declined:
    key, values = found.key, found.values
    parts, rest = terms_of(weights, key)
    if key not in weights.axes:  # of one key
        parts, rest = [Term((), Const(1.0, weights.dtype), weights)], NOTHING

    def sizes(name: str) -> tuple[Expr, ...]:
        return shape_of(facts.nodes[name])

    cores: list[tuple[tuple[Axis, ...], Expr, Softmax]] = []
    added = NOTHING
    for part in parts:
        if not holds_scores(part.core) and not part.mixed:  # weights that no product decides are applied outside
            weight = s.call("mul", *steadied(part.factor, part.core, key), dtype="float32")
            apart = Dot((key,), weight, values, "float32")
            added = apart if added == NOTHING else s.call("add", added, apart, dtype="float32")
            continue
        by_hand = op_name(candidate.normaliser) in EXPONENTIALS
        read = match_with_share(part.core, key, by_hand=by_hand, in_part=True)
        if isinstance(read, Declined):
            if lifter.blame is not None:
                return Declined(f"{read.reason} (`{op_name(lifter.blame)}` is not understood)", lifter.blame.name)
            return read
        if read.fills == UNCLEAR and by_rounded_sum(part.core, key, _takes_maxima_away(lifter)):
            read = replace(read, fills=ROUNDED)
        along = key if read.part is None else read.part.whole
        read = replace(read, logits=without_choice_of_products(with_steady_softmaxes(read.logits), along, sizes))
        if holds_pieces(read.logits):
            read = replace(read, logits=whole(read.logits, along, sizes))
        cores.append((part.mixed, part.factor, read))
    if not cores:
        return Declined("the weights are not normalised over the keys")
    used = cores[0][2].part
    if any(soft.part != used for _, _, soft in cores):
        return Declined("softmaxes over different keys are added up", op_name(candidate.root))
    if used is not None:
        key, values = used.whole, used.only(values)
        lifter.key_axes.add(key)
    safe = any(op_name(n) == "_safe_softmax" for n in lifter.visited)
    return Lifted(key, values, cores, rest, lifter, safe, added)


def _takes_maxima_away(lifter: Lifter) -> bool:
    """Whether what is read as log(sum(exp(x))) is `logsumexp`, for the only exponential is that of the weights."""
    return sum(op_name(n) in EXPONENTIALS for n in lifter.visited) == 1
