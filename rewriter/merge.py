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
from refocus.facts import Candidate, Facts
from refocus.ir import Axis, Call, Const, Dot, Expr, Load, Reduce
from refocus.joint import moved
from refocus.lift import Index, Lifter, arguments, is_tensor, op_name
from refocus.lift_reductions import operands_at
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.factors import additive
from refocus.patterns.softmax import Softmax, match
from refocus.piecewise import along


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
    """Sums of two weighted results of different normalisers, in graph order."""
    roots = {c.root: c for group in reversed(groups) for c in reversed(group) if c.mixes == 0 and c.weights >= 0}
    for node in facts.order:
        if node.op == "call_function" and op_name(node) == "add" and all(is_tensor(a) for a in node.args[:2]):
            found = [next(_results(a, roots), None) for a in arguments(node)[:2]]
            if found[0] and found[1] and found[0].normaliser is not found[1].normaliser:
                yield Merge(node, (found[0], found[1]))


def _results(node: fx.Node, roots: dict[fx.Node, Candidate]) -> Iterator[Candidate]:
    """The result of an attention that `node` is a multiple of."""
    for _ in range(_VIEWS):
        if op_name(node) == "mul":
            break
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return
        node = node.args[0]
    for operand in node.args[:2]:
        for _ in range(_VIEWS):
            if not isinstance(operand, fx.Node) or operand in roots:
                break
            operand = operand.args[0] if operand.args else None
        if isinstance(operand, fx.Node) and operand in roots:
            yield roots[operand]


_VIEWS = 4  # between a product, its multiple and the sum


def lift_merge(merge: Merge, lifter: Lifter, index: Index) -> Merged:
    """Read a merge. Raises Stop with the reason."""
    lifter.visited.add(merge.root)
    readings = [
        _reading(lifter, candidate, *_operand(merge.root, operand, index))
        for candidate, operand in zip(merge.parts, arguments(merge.root)[:2])
    ]
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


def _operand(root: fx.Node, operand: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    if [str(d) for d in operand.meta["val"].shape] != [str(d) for d in root.meta["val"].shape]:
        raise Stop(Declined("the two attentions that are added differ in shape", operand.name))
    return operand, index


@dataclass(frozen=True)
class _Reading:
    """Where a part is read: its share, weights and values."""

    key: Axis
    share: tuple[fx.Node, Index]
    weights: tuple[fx.Node, Index]
    values: Expr


def _reading(lifter: Lifter, candidate: Candidate, node: fx.Node, index: Index) -> _Reading:
    """share * (weights @ values), with views around the product and its multiple."""
    node, index = _through_views(lifter, node, index)
    share = reads = None
    if op_name(node) == "mul" and all(isinstance(a, fx.Node) for a in node.args[:2]):
        lifter.visited.add(node)
        for operand in node.args[:2]:
            assert isinstance(operand, fx.Node)
            shape = operand.meta["val"].shape
            at = tuple(Const(0) if d == 1 else x for d, x in zip(shape, index[len(index) - len(shape) :]))
            below, position = _through_views(lifter, operand, at, candidate.root)
            if below is candidate.root:
                lifter.visited.add(below)
                reads = operands_at(lifter, below, position)
            else:
                share = (operand, at)
    if share is None or reads is None or len(reads[0]) != 1 or len(reads[1]) != 2:
        raise Stop(Declined("the two attentions are not weighted row by row", node.name))
    (key,), operands = reads
    lifter.key_axes.add(key)
    return _Reading(key, share, operands[candidate.weights], lifter.at(*operands[1 - candidate.weights]))


def _part(lifter: Lifter, reading: _Reading) -> _Part:
    weights = lifter.at(*reading.weights)
    soft = match(weights, reading.key)
    if isinstance(soft, Declined):
        raise Stop(soft)
    if soft.extra or soft.cleaned or soft.gate != Const(1.0, soft.gate.dtype):
        raise Stop(Declined("the weights of an attention that is merged are changed after the softmax"))
    if not _finite(soft.logits):
        raise Stop(Declined("a row of an attention that is merged may have no keys, and is no number then"))
    return _Part(lifter.at(*reading.share), reading.key, soft, reading.values)


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


def _through_views(
    lifter: Lifter, node: fx.Node, index: Index, stop: fx.Node | None = None
) -> tuple[fx.Node, Index]:
    while node is not stop:
        below = moved(lifter, node, index)
        if below is None:
            break
        node, index = below
    return node, index


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
