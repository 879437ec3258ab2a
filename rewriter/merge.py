"""Two attentions of the same queries, merged by their log-sum-exps: one attention over the keys of both.

    share = sigmoid(lse(s) - lse(t)); share * softmax(s) @ v + (1 - share) * softmax(t) @ w
        ->      softmax(cat(s, t)) @ cat(v, w)

For sigmoid(log Y - log Z) is Y / (Y + Z), and exp(s) / Y times that is exp(s) / (Y + Z). What is added to one of the
log-sum-exps (a sample counts for more than one key) is added to that part's scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from refocus import simplify as s
from refocus.candidates import Candidate
from refocus.facts import Facts
from refocus.ir import Axis, Call, Const, Dot, Expr, Load, Reduce
from refocus.lift import Index, Lifter, op_name
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.factors import additive
from refocus.patterns.softmax import Softmax, match
from refocus.piecewise import along
from refocus.products import reads_of
from refocus.row_sums import Addend, Row, Walk, carried


@dataclass(frozen=True)
class Merge:
    """A sum of two products with values, each times a share of the row."""

    root: fx.Node
    parts: tuple[Candidate, Candidate]


@dataclass(frozen=True)
class Merged:
    """A merge in index notation."""

    key: Axis
    softmax: Softmax
    values: Expr


@dataclass(frozen=True)
class _Part:
    """One of the two: its share, its weights and values along its own keys."""

    share: Expr
    key: Axis
    softmax: Softmax
    values: Expr


def merges(groups: list[list[Candidate]], facts: Facts) -> Iterator[Merge]:
    """Sums of multiples of two weighted results, of different normalisers, in graph order."""
    roots = {c.root: c for group in reversed(groups) for c in reversed(group) if c.mixes == 0 and c.weights >= 0}
    reaching: dict[fx.Node, list[Candidate]] = {}
    for root in sorted(roots, key=facts.order.__getitem__):
        for node in carried([root], facts):
            reaching.setdefault(node, []).append(roots[root])
    for node in sorted(reaching, key=facts.order.__getitem__):
        found = reaching[node]
        if op_name(node) in _BLENDS and len(found) == 2 and found[0].normaliser is not found[1].normaliser:
            yield Merge(node, (found[0], found[1]))


_BLENDS = ("add", "sub", "lerp")


def lift_merge(merge: Merge, facts: Facts, lifter: Lifter, index: Index) -> Merged:
    """Read a merge. Raises Stop with the reason."""
    addends = list(Walk(lifter, facts, {c.root for c in merge.parts}).addends(merge.root, index))
    if any(a.value is not None for a in addends):
        raise Stop(Declined("something is added to the two attentions", merge.root.name))
    readings = [_reading(lifter, c, [a for a in addends if a.node is c.root]) for c in merge.parts]
    # As for any attention: axes that the weights have, but no values, count as the query.
    weighted = frozenset().union(*(e.axes for r in readings for e in r.weights[1]))
    valued = frozenset().union(*(r.values.axes for r in readings))
    rows = sorted(weighted - valued - {r.key for r in readings}, key=lambda a: a.name)
    lifter.query_axes = set(rows[-1:])
    parts = [_part(lifter, reading) for reading in readings]
    shifts = _shifts(parts[0], parts[1])
    if shifts is None:
        raise Stop(Declined("the shares of the two attentions are not those of their log-sum-exps", merge.root.name))
    key = Axis(f"{merge.root.name}.keys", s.add(*(part.key.size for part in parts)))
    logits = []
    for part, shift in zip(parts, shifts):
        here = part.softmax.logits
        logits.append((part.key, here if shift is None else s.call("add", here, shift, dtype=here.dtype)))
    soft = Softmax(along(key, logits), (), Const(1.0, "float32"))
    return Merged(key, soft, along(key, [(part.key, part.values) for part in parts]))


@dataclass(frozen=True)
class _Reading:
    """Where a part is read: its weights and values, and the rows of each multiple of it."""

    key: Axis
    multiples: tuple[tuple[Row, ...], ...]
    weights: tuple[fx.Node, Index]
    values: Expr


def _reading(lifter: Lifter, candidate: Candidate, addends: list[Addend]) -> _Reading:
    """share * (weights @ values), where the share may be a sum."""
    reads = reads_of(lifter, candidate.root, addends[0].index) if addends else None
    if reads is None or len(reads[0]) != 1 or len(reads[1]) != 2 or len({a.index for a in addends}) != 1:
        raise Stop(Declined("the two attentions are not weighted row by row", candidate.root.name))
    lifter.visited.add(candidate.root)
    (key,), operands = reads
    lifter.key_axes.add(key)
    values = lifter.at(*operands[1 - candidate.weights])
    return _Reading(key, tuple(a.rows for a in addends), operands[candidate.weights], values)


def _share(lifter: Lifter, multiples: tuple[tuple[Row, ...], ...]) -> Expr:
    """The sum of all multiples of a part; those that are taken away stand last."""
    total: Expr | None = None
    signs = [math.prod(-1 for row in rows if row.node == -1.0) for rows in multiples]
    for sign, rows in sorted(zip(signs, multiples), key=lambda x: -x[0]):
        value: Expr = Const(1.0, "float32")
        for row in rows:
            if row.node != -1.0:
                value = s.call("mul" if row.sign > 0 else "div", value, row.at(lifter), dtype="float32")
        if total is None:
            total = value if sign > 0 else s.call("neg", value, dtype="float32")
        else:
            total = s.call("add" if sign > 0 else "sub", total, value, dtype="float32")
    assert total is not None
    return total


def _part(lifter: Lifter, reading: _Reading) -> _Part:
    weights = lifter.at(*reading.weights)
    soft = match(weights, reading.key)
    if isinstance(soft, Declined):
        raise Stop(soft)
    if soft.extra or soft.cleaned or soft.gate != Const(1.0, soft.gate.dtype):
        raise Stop(Declined("the weights of an attention that is merged are changed after the softmax"))
    if not _finite(soft.logits):
        raise Stop(Declined("a row of an attention that is merged may have no keys, and is no number then"))
    return _Part(_share(lifter, reading.multiples), reading.key, soft, reading.values)


def _finite(logits: Expr) -> bool:
    """Whether no logit is infinite by itself: a fill of -inf, or what a tensor that is added may hold."""
    stack = [logits]
    while stack:
        e = stack.pop()
        if isinstance(e, Dot):
            continue
        if isinstance(e, Load) or (isinstance(e, Const) and e.is_float and math.isinf(e.value)):
            return False
        stack.extend(a for a in e.children if a.is_float)
    return True


def _shifts(a: _Part, b: _Part) -> tuple[Expr | None, Expr | None] | None:
    """What is added to the scores of each part; None where the shares are not those of the two log-sum-exps."""
    odds = _log_odds(a.share)
    other = _log_odds(b.share)
    if odds is None or other is None or sorted(map(repr, odds)) != sorted(repr((-w, e)) for w, e in other):
        return None
    rest = []
    seen: list[int] = []
    for way, term in odds:
        if way > 0 and _is_lse(term, a) and 0 not in seen:
            seen.append(0)
        elif way < 0 and _is_lse(term, b) and 1 not in seen:
            seen.append(1)
        else:
            rest.append((way, term))
    if sorted(seen) != [0, 1] or any(x.axes & {a.key, b.key} for _, x in rest):
        return None
    if any(isinstance(n, Reduce) for _, x in rest for n in x.walk()):
        return None
    shift: Expr | None = None
    for way, term in rest:
        signed = term if way > 0 else s.call("neg", term, dtype=term.dtype)
        shift = signed if shift is None else s.call("add", shift, signed, dtype=signed.dtype)
    return shift, None


def _log_odds(share: Expr) -> list[tuple[int, Expr]] | None:
    """a - b, as signed terms, of a share exp(a) / (exp(a) + exp(b)) however it is spelled, or of one minus such."""
    if not isinstance(share, Call):
        return None
    if share.op == "sigmoid":
        return additive(share.args[0], 1)
    if share.op == "sub" and _is_one(share.args[0]):
        rest = _log_odds(share.args[1])
        return None if rest is None else [(-way, term) for way, term in rest]
    if share.op == "exp":  # exp(a - logaddexp(a, b))
        terms = additive(share.args[0], 1)
        joint = [t for way, t in terms if way < 0 and isinstance(t, Call) and t.op == "logaddexp"]
        for mine in joint[0].args if len(joint) == 1 else ():
            if Counter([*additive(mine, 1), (-1, joint[0])]) == Counter(terms):
                return _difference(mine, joint[0].args)
        return None
    if share.op == "reciprocal":
        return _over_sum(Const(0.0, share.dtype), share.args[0])
    if share.op == "div":
        above = share.args[0]
        if isinstance(above, Call) and above.op == "exp":
            return _over_sum(above.args[0], share.args[1])
        return _over_sum(Const(0.0, share.dtype), share.args[1]) if _is_one(above) else None
    return None


def _over_sum(exponent: Expr, total: Expr) -> list[tuple[int, Expr]] | None:
    """a - b of exp(a) / (exp(a) + exp(b)), where 1 is exp(0)."""
    if not (isinstance(total, Call) and total.op == "add" and len(total.args) == 2):
        return None
    exponents: list[Expr] = []
    for part in total.args:
        if isinstance(part, Call) and part.op == "exp":
            exponents.append(part.args[0])
        elif _is_one(part):
            exponents.append(Const(0.0, total.dtype))
    return _difference(exponent, tuple(exponents)) if len(exponents) == 2 and exponent in exponents else None


def _difference(mine: Expr, both: tuple[Expr, ...]) -> list[tuple[int, Expr]]:
    other = both[1] if both[0] == mine else both[0]
    terms = [*additive(mine, 1), *additive(other, -1)]
    return [t for t in terms if not (isinstance(t[1], Const) and t[1].value == 0)]


def _is_one(value: Expr) -> bool:
    return isinstance(value, Const) and value.value == 1


def _is_lse(term: Expr, part: _Part) -> bool:
    """Whether a term is the log-sum-exp of a part's own logits."""
    if not (isinstance(term, Call) and term.op == "log" and isinstance(term.args[0], Reduce)):
        return False
    total = term.args[0]
    if total.op != "sum" or total.axis.size != part.key.size:
        return False
    body = s.substitute(total.body, {total.axis: part.key})
    return isinstance(body, Call) and body.op == "exp" and body.args[0] == part.softmax.logits
