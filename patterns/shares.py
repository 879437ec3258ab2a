"""A softmax whose result is multiplied with its own share of a larger sum.

    softmax(x) * sigmoid(logsumexp(x) - t)    ->    softmax(x) with t as an extra logit

For sigmoid(log Z - t) is Z / (Z + exp(t)), and exp(x) / Z times that is exp(x) / (Z + exp(t)).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from refocus import simplify as s
from refocus.ir import TRUE, Axis, Call, Expr, Reduce
from refocus.patterns.declined import Declined
from refocus.patterns.factors import additive, factored, holds_scores, multiplied, summed
from refocus.patterns.fills import KEPT
from refocus.patterns.softmax import Softmax, by_key, match


def match_with_share(core: Expr, key: Axis, by_hand: bool = False, in_part: bool = False) -> Softmax | Declined:
    """`match`, of weights that may be multiplied with such a share."""
    parts = factored(core)
    shares = [f for f in parts.factors if _share_of(f) is not None]
    if not shares:
        return match(core, key, by_hand=by_hand, in_part=in_part)
    rest = replace(parts, factors=[f for f in parts.factors if f not in shares])
    found = match(multiplied(rest, core.dtype), key, by_hand=by_hand, in_part=in_part)
    if isinstance(found, Declined):
        return found
    plain = (found.extra, found.cleaned, found.selected, found.fills) == ((), False, TRUE, KEPT)
    along = key if found.part is None else found.part.whole
    shared = _shared(found, shares[0], along) if plain and len(shares) == 1 else None
    reason = "the result is multiplied with a share that is not that of its own log-sum-exp"
    return shared or Declined(reason, "sigmoid")


def _share_of(factor: Expr) -> tuple[Reduce, list[tuple[int, Expr]]] | None:
    """Z and the terms of t, of a factor sigmoid(log Z - t) with a sum Z over scores."""
    if not (isinstance(factor, Call) and factor.op == "sigmoid"):
        return None
    terms = additive(factor.args[0], 1)
    for k, (sign, term) in enumerate(terms):
        total = term.args[0] if sign > 0 and isinstance(term, Call) and term.op == "log" else None
        if isinstance(total, Reduce) and total.op == "sum" and holds_scores(total):
            return total, [(-way, e) for n, (way, e) in enumerate(terms) if n != k]
    return None


def _shared(found: Softmax, share: Expr, key: Axis) -> Softmax | None:
    """A softmax with the share as an extra logit, if the share is of its own sum."""
    total, sink = _share_of(share) or (None, [])
    if total is None or total.axis.size != key.size:
        return None
    body = factored(s.substitute(total.body, {total.axis: key}))
    mine, rows = by_key(body.exponents, key)
    if body.factors or body.divisors or body.conditions or Counter(mine) != Counter(additive(found.logits, 1)):
        return None
    if any(key in e.axes or holds_scores(e) for _, e in (*sink, *rows)):
        return None
    extra = summed([*sink, *((-way, e) for way, e in rows)], share.dtype)
    return replace(found, extra=(extra,), strict=True)
