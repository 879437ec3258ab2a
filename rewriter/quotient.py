"""Attention as a quotient of two sums over keys: the values' and the weights'; and a share of one.

    e = exp(q k - m); (e @ v) / e.sum(-1)                              ->      softmax(q k) @ v

    for each chunk t of the keys, with the maxima m so far:
        e = exp(q k_t - m); c = exp(m_before - m)
        acc = acc * c + e @ v_t; l = l * c + e.sum(-1)
    acc / l                                                            ->      softmax(q k) @ v

Numerator and denominator are read as sums of chunks, each times what multiplies it from there to the division (Milakov
and Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe and Staats 2021, "Self-attention does not need
O(n^2) memory"). The exponents of a chunk add up, and what one maximum takes away another gives back: what is left is
the same for every chunk, and cancels. Chunks whose exponents differ, or that one of the two sums lacks, are declined.

    (softmax(s) @ v) * sigmoid(lse(s) - sink)                          ->      softmax(s, with the sink as a logit) @ v

is read alike: what multiplies a row after the product is one of its factors, and made of the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.candidates import Candidate
from refocus.facts import Facts, contraction_operands, taint_of
from refocus.ir import Const, Expr
from refocus.lift import Index, Lifter, arguments, is_tensor, op_name
from refocus.lift_views import VIEWS
from refocus.patterns.declined import Declined, Stop
from refocus.row_sums import PRODUCTS, Row, Walk, aligned, carried, divides


@dataclass(frozen=True)
class Quotient:
    """A division whose numerator holds products of weights and values."""

    root: fx.Node
    parts: tuple[Candidate, ...]


@dataclass(frozen=True)
class Rescaled:
    """A numerator of one product: where it is, and the rows it is multiplied with or divided by on its way."""

    node: fx.Node
    index: Index
    rows: tuple[Row, ...]

    def times_rows(self, lifter: Lifter, weights: Expr) -> Expr:
        for row in self.rows:
            weights = s.call("mul" if row.sign > 0 else "div", weights, row.at(lifter), dtype=weights.dtype)
        return weights


def quotients(groups: list[list[Candidate]], facts: Facts) -> list[Quotient]:
    """Divisions that products of exponentials and values flow into, those further down first: a running mean divides
    at every step."""
    found: dict[fx.Node, dict[fx.Node, Candidate]] = {}
    logarithms = [n for n in facts.order if op_name(n) in _LOGARITHMS and taint_of(n, facts)]
    for candidate in (c for group in groups for c in group):
        if candidate.mixes == 0 and candidate.weights >= 0:
            for root in (*_shares(candidate, logarithms, facts), *_divisions(candidate, facts)):
                found.setdefault(root, {}).setdefault(candidate.root, candidate)
    order = sorted(found, key=lambda n: -facts.order[n])
    return [Quotient(root, _first(list(found[root].values()), facts)) for root in order]


def _first(parts: list[Candidate], facts: Facts) -> tuple[Candidate, ...]:
    """Of products one of which flows into another (a sum of stacked chunks, each times a factor), those above."""
    later = {n for c in parts for n in carried([c.root], facts)}
    return tuple(sorted((c for c in parts if c.root not in later), key=lambda c: facts.order[c.root]))


EXPONENTIALS = ("exp", "exp2")


def _divisions(candidate: Candidate, facts: Facts) -> Iterator[fx.Node]:
    """Divisions downstream of a product, by what its exponentials decide, too; of a softmax, by what its log-sum-exp
    decides."""
    below = carried([candidate.root], facts)
    for node in below:
        divisor = divisor_of(node, below | {candidate.root}, facts)
        if divisor is not None and (op_name(candidate.normaliser) in EXPONENTIALS or _of_logarithms(divisor, facts)):
            yield node


def _of_logarithms(node: fx.Node, facts: Facts) -> bool:
    above = nx.ancestors(facts.flow, node)
    return any(op_name(n) in _LOGARITHMS and taint_of(n, facts) for n in above)


def _shares(candidate: Candidate, logarithms: list[fx.Node], facts: Facts) -> Iterator[fx.Node]:
    """Multiples of a product by what the log-sum-exp of the same scores decides."""
    above = nx.ancestors(facts.flow, candidate.root) if logarithms else set()
    mine = {n for n in logarithms if taint_of(n, facts) & above}
    below = carried([candidate.root], facts) if mine else set()
    for node in below:
        if op_name(node) in PRODUCTS:
            others = {a for a in arguments(node)[:2] if is_tensor(a)} - below - {candidate.root}
            made_of = {n for a in others for n in (a, *nx.ancestors(facts.flow, a))}
            if mine & made_of:
                yield node


_LOGARITHMS = ("logsumexp", "log", "log2", "logaddexp")


def divisor_of(node: fx.Node, sums: set[fx.Node], facts: Facts) -> fx.Node | None:
    """What one of `sums` is divided by, if it comes from scores."""
    for divisor in divisors(node):
        others = [a for a in arguments(node)[:2] if a is not divisor]
        if len(others) == 1 and others[0] in sums and divisor not in sums and _of_scores(divisor, facts):
            return divisor
    return None


def _of_scores(node: fx.Node, facts: Facts) -> bool:
    """Whether a row is a sum of exponentials, or made of such."""
    above = nx.ancestors(facts.flow, node)
    return any(op_name(n) in EXPONENTIALS and taint_of(n, facts) for n in above)


def weights_of(candidate: Candidate) -> fx.Node:
    return contraction_operands(candidate.root)[candidate.weights]


def divisors(node: fx.Node) -> list[fx.Node]:
    """What a value is divided by: the divisor, or the reciprocal that it is multiplied with."""
    operands = [a for a in arguments(node)[:2] if is_tensor(a)]
    if divides(node) and len(operands) == 2:
        return operands[1:]
    return [a for a in operands if op_name(below_views(a)) == "reciprocal"] if op_name(node) in PRODUCTS else []


def below_views(node: fx.Node) -> fx.Node:
    while op_name(node) in VIEWS and arguments(node) and is_tensor(arguments(node)[0]):
        node = arguments(node)[0]
    return node


def past_guard(lifter: Lifter, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """l and its position, of where(l == 0, 1, l) at a position; None where there is no such guard."""
    name, given = op_name(node), arguments(node)
    if name not in GUARDS or len(given) < 3:
        return None
    condition, fill, kept = given[:3] if name == "where" else (given[1], given[2], given[0])
    if not is_tensor(condition) or len(arguments(condition)) < 2:
        return None
    if op_name(condition) in ("ne", "not_equal", "gt", "greater"):
        fill, kept = kept, fill
    elif op_name(condition) not in ("eq", "le", "less_equal"):
        return None
    value, least = arguments(condition)[:2]
    if not is_tensor(kept) or lifter.known.same.get(value, value) is not lifter.known.same.get(kept, kept):
        return None
    numbers = [lifter.broadcast(x, index) for x in (fill, least)]
    if not all(isinstance(n, Const) and math.isfinite(n.value) for n in numbers):
        return None
    one, zero = (n.value for n in numbers if isinstance(n, Const))
    return (kept, aligned(kept, index)) if one != 0 and zero == 0 else None


GUARDS = ("where", "masked_fill")


def lift_rescaled(quotient: Quotient, facts: Facts, lifter: Lifter, index: Index) -> Rescaled | None:
    """The one product of a quotient and its row's factors, the denominator among them; None where there are several.
    Raises Stop with the reason."""
    if len(quotient.parts) > 1:
        return None
    walk = Walk(lifter, facts, {quotient.parts[0].root})
    found = list(walk.addends(quotient.root, index))
    if len(found) != 1 or found[0].value is not None:
        raise Stop(Declined("something is added to the values' sum before it is divided", quotient.root.name))
    return Rescaled(found[0].node, found[0].index, found[0].rows)
